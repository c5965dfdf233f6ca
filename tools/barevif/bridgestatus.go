package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"barevif/pvnet/bridge"
	"barevif/pvnet/forward"
	"barevif/pvnet/inspect"
	"barevif/tools/cli"
	"barevif/tools/internal/looking"
	"barevif/tools/internal/release"
	"barevif/tools/internal/stat"
	"barevif/tools/table"

	"github.com/spf13/cobra"
)

// bridgeState is the name of the state that a bridge shows of itself.
const bridgeState = "bridge"

const aboutBridgeStatus = `status shows the ports of bridges that run, and the stations behind them. The process of
each bridge is asked, as "barevif ring" does it.

NAME is a bridge's --name, or a pattern. Without one it shows all bridges of this user and
root.

  port      a vif as DOM.ID, or an uplink
  received  frames from the guest behind the port, or from the uplink
  dropped   of these: with another's address, to an isolated port, with no port to go
            to… --json has each of the reasons
  sent      frames to the guest behind the port, from all others
  lost      of those for it: not taken in time, while its link was down… --json as well
  waiting   frames that wait for it now
  idle      since the station sent; in steps of an eighth of the bridge's --age

A station that is "guarded" has its address from the vif's mac: it is known before it sends,
and never forgotten.`

func bridgeStatusCommand(p *cli.Program) *cobra.Command {
	s := bridgeStatus{inspected: inspected{Program: p}}
	cmd := &cobra.Command{
		Use:   "status [NAME...]",
		Short: "Show the ports and the stations of bridges that run",
		Long:  aboutBridgeStatus,
		Example: `  barevif bridge status
  barevif bridge status --json xenbr0 | jq '.[].ports[] | {port, dropped}'`,
		ValidArgsFunction: s.completeBridges,
		RunE:              func(cmd *cobra.Command, args []string) error { return s.run(cmd.Context(), args) },
	}
	s.register(cmd)
	cmd.Flags().BoolVar(&s.json, "json", false, "print JSON")
	return cmd
}

type bridgeStatus struct {
	inspected
	json bool
}

// A bridgePage is what a bridge says of itself: the JSON of status.
type bridgePage struct {
	Bridge      string        `json:"bridge"`
	PID         int           `json:"pid"` // set by who asks
	UID         int           `json:"uid"` // the same
	Domain      uint16        `json:"domain"`
	Version     string        `json:"version"`
	UpSeconds   int64         `json:"up_seconds"`
	AgeSeconds  int64         `json:"age_seconds"` // --age
	MaxStations int           `json:"max_stations"`
	MaxPorts    int           `json:"max_ports"`
	Ports       []portPage    `json:"ports"`
	Known       int           `json:"known"`    // how many stations there are
	Stations    []stationPage `json:"stations"` // those, at most mostShown
}

// A portPage is a port of a bridge.
type portPage struct {
	Port     string   `json:"port"`
	Up       bool     `json:"up"`
	MTU      int      `json:"mtu"`
	Guard    []string `json:"guard"` // the addresses that it may send from; empty: any
	Isolated bool     `json:"isolated"`

	Received  uint64    `json:"received"`
	Unicast   uint64    `json:"unicast"`
	Flooded   uint64    `json:"flooded"`
	Dropped   portDrops `json:"dropped"`
	Moved     uint64    `json:"moved"`
	Unlearned uint64    `json:"unlearned"`

	Sent    uint64   `json:"sent"`
	Lost    portLost `json:"lost"`
	Waiting int      `json:"waiting"`
}

// portDrops are the frames from a port that were not passed on.
type portDrops struct {
	Local    uint64 `json:"local"`
	Isolated uint64 `json:"isolated"`
	Spoofed  uint64 `json:"spoofed"`
	Invalid  uint64 `json:"invalid"`
	Reserved uint64 `json:"reserved"`
	Alone    uint64 `json:"alone"`
}

func (d *portDrops) sum() uint64 {
	return d.Local + d.Isolated + d.Spoofed + d.Invalid + d.Reserved + d.Alone
}

// portLost are the frames for a port that it did not get.
type portLost struct {
	Full     uint64 `json:"full"`
	Down     uint64 `json:"down"`
	Oversize uint64 `json:"oversize"`
	Refused  uint64 `json:"refused"`
	Ended    uint64 `json:"ended"`
}

func (l *portLost) sum() uint64 { return l.Full + l.Down + l.Oversize + l.Refused + l.Ended }

// A stationPage is a station behind a port.
type stationPage struct {
	MAC         string `json:"mac"`
	Port        string `json:"port"`
	IdleSeconds int64  `json:"idle_seconds"`
	Guarded     bool   `json:"guarded"`
}

// mostShown is how many stations a page has at most.
const mostShown = 1 << 15

// page makes the page of the bridge.
func (b *bridged) page() *bridgePage {
	stations := b.sw.Stations()
	b.mu.Lock()
	infos := make(map[*bridge.Port]portInfo, len(b.ports))
	for p, info := range b.ports {
		infos[p] = info
	}
	b.mu.Unlock()
	page := &bridgePage{
		Bridge: b.bridge, Domain: uint16(b.own.ID()), Version: release.Version, UpSeconds: int64(time.Since(b.began).Seconds()),
		AgeSeconds: int64(b.age.Seconds()), MaxStations: b.stations, MaxPorts: b.most,
		Ports: []portPage{}, Known: len(stations), Stations: []stationPage{},
	}
	for p, info := range infos {
		page.Ports = append(page.Ports, pageOf(p, info))
	}
	slices.SortFunc(page.Ports, func(x, y portPage) int { return comparePorts(x.Port, y.Port) })
	for _, s := range stations[:min(len(stations), mostShown)] {
		if info, ok := infos[s.Port]; ok { // else it comes, or goes
			page.Stations = append(page.Stations, stationPage{MAC: s.MAC.String(), Port: info.name, IdleSeconds: int64(s.Idle.Seconds()), Guarded: s.Guarded})
		}
	}
	return page
}

// comparePorts puts vifs first, in the order of their numbers.
func comparePorts(x, y string) int {
	var a, b [2]int
	_, errA := fmt.Sscanf(x, "%d.%d", &a[0], &a[1])
	_, errB := fmt.Sscanf(y, "%d.%d", &b[0], &b[1])
	switch {
	case errA == nil && errB == nil:
		return slices.Compare(a[:], b[:])
	case errA == nil:
		return -1
	case errB == nil:
		return 1
	}
	return strings.Compare(x, y)
}

func pageOf(p *bridge.Port, info portInfo) portPage {
	s, dev := p.Stats(), p.Device()
	page := portPage{
		Port: info.name, Up: dev.Counters().Status().Up, MTU: dev.MTU(), Guard: []string{}, Isolated: info.isolated,
		Received: s.Received, Unicast: s.Unicast, Flooded: s.Flooded, Dropped: dropsOf(s), Moved: s.Moved, Unlearned: s.Unlearned,
		Sent: s.Out.Sent, Lost: lostOf(s.Out), Waiting: s.Out.Waiting,
	}
	for _, mac := range info.guard {
		page.Guard = append(page.Guard, mac.String())
	}
	return page
}

func dropsOf(s bridge.PortStats) portDrops {
	return portDrops{Local: s.Local, Isolated: s.Isolated, Spoofed: s.Spoofed, Invalid: s.Invalid, Reserved: s.Reserved, Alone: s.Alone}
}

func lostOf(s forward.Stats) portLost {
	return portLost{Full: s.Full, Down: s.Down, Oversize: s.Oversize, Refused: s.Refused, Ended: s.Ended}
}

func (s *bridgeStatus) run(ctx context.Context, names []string) error {
	all, err := s.findBridges(ctx, names)
	if err != nil {
		return err
	}
	return looking.Print(s.Stdout, s.json, all, writeBridge)
}

// findBridges returns the bridges that names mean, all if there are no names.
func (s *bridgeStatus) findBridges(ctx context.Context, names []string) ([]bridgePage, error) {
	for _, n := range names {
		if _, err := path.Match(n, ""); err != nil {
			return nil, &cli.Advice{Err: fmt.Errorf("%q: %w", n, err), Next: `the name of a bridge, as "barevif bridge status" shows it, or a pattern such as 'dmz*'`, Usage: true}
		}
	}
	uids, err := s.UIDs()
	if err != nil {
		return nil, err
	}
	all, err := s.listBridges(ctx, uids)
	if err != nil {
		s.Note("%s", stat.Clean(strings.ReplaceAll(err.Error(), "\n", "; ")))
	}
	var found []bridgePage
	for _, p := range all {
		if len(names) == 0 || slices.ContainsFunc(names, func(n string) bool { ok, _ := path.Match(n, p.Bridge); return ok }) {
			found = append(found, p)
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	next := `"barevif bridge" of this user or root shows its own, unless it runs with --inspect off; --user and --inspect look elsewhere`
	if len(all) > 0 {
		next = "the bridges that run here are " + strings.Join(cli.Quoted(bridgeNames(all)), ", ")
	}
	what := "bridge of this user or root"
	if len(names) > 0 {
		what = "bridge " + strings.Join(cli.Quoted(names), ", ")
	}
	return nil, &cli.Advice{Err: fmt.Errorf("no %s runs", what), Next: next}
}

// listBridges returns the bridges that run, by name. With an error, which says what could not be
// asked, it also returns those that it found.
func (s *bridgeStatus) listBridges(ctx context.Context, uids []int) (all []bridgePage, err error) {
	states, err := inspect.States(ctx, s.Dir, bridgeState, uids...)
	for _, st := range states {
		if s.PID != 0 && st.PID != s.PID {
			continue
		}
		var p bridgePage
		if e := json.Unmarshal(st.JSON, &p); e != nil {
			err = errors.Join(err, fmt.Errorf("process %d: %w", st.PID, e))
			continue
		}
		p.PID, p.UID = st.PID, st.UID
		all = append(all, p)
	}
	slices.SortFunc(all, func(x, y bridgePage) int {
		return cmp.Or(strings.Compare(x.Bridge, y.Bridge), cmp.Compare(x.PID, y.PID))
	})
	return all, err
}

func bridgeNames(all []bridgePage) (names []string) {
	for _, p := range all {
		names = append(names, stat.Clean(p.Bridge))
	}
	return names
}

// completeBridges offers the bridges that run.
func (s *bridgeStatus) completeBridges(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completePatience)
	defer cancel()
	uids, err := s.UIDs()
	if err != nil {
		return offered(nil)
	}
	all, _ := s.listBridges(ctx, uids)
	return offered(bridgeNames(all), args...)
}

// writeBridge writes a page as text. Another process has made it.
func writeBridge(b *strings.Builder, p *bridgePage) {
	fmt.Fprintf(b, "bridge %s in domain %d, process %d, up for %v: %d ports of %d, %d stations of %d\n",
		stat.Clean(p.Bridge), p.Domain, p.PID, time.Duration(p.UpSeconds)*time.Second, len(p.Ports), p.MaxPorts, p.Known, p.MaxStations)
	first := func(column int) bool { return column == 0 }
	ports := table.Table{Head: []string{"port", "link", "guard", "isolated", "received", "dropped", "sent", "lost", "waiting"}, Left: first}
	for i := range p.Ports {
		port := &p.Ports[i]
		link, isolated := "down", "-"
		if port.Up {
			link = "up"
		}
		if port.Isolated {
			isolated = "yes"
		}
		ports.Rows = append(ports.Rows, []string{stat.Clean(port.Port), link, orNone(stat.Clean(strings.Join(port.Guard, " "))), isolated,
			cli.Grouped(port.Received), cli.Grouped(port.Dropped.sum()), cli.Grouped(port.Sent), cli.Grouped(port.Lost.sum()), fmt.Sprint(port.Waiting)})
	}
	stations := table.Table{Head: []string{"station", "port", "idle"}, Left: first}
	for _, s := range p.Stations {
		idle := (time.Duration(s.IdleSeconds) * time.Second).String()
		if s.Guarded {
			idle = "guarded"
		}
		stations.Rows = append(stations.Rows, []string{stat.Clean(s.MAC), stat.Clean(s.Port), idle})
	}
	for _, t := range []*table.Table{&ports, &stations} {
		if len(t.Rows) > 0 {
			b.WriteString("\n" + t.String())
		}
	}
	if more := p.Known - len(p.Stations); more > 0 {
		fmt.Fprintf(b, "and %d more\n", more)
	}
}
