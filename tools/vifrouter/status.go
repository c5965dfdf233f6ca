package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"barevif/pvnet/inspect"
	"barevif/tools/cli"
	"barevif/tools/internal/looking"
	"barevif/tools/internal/stat"
	"barevif/tools/table"

	"github.com/spf13/cobra"
)

// serviceDir is where the router of the systemd unit has its socket.
const serviceDir = "/run/vifrouter"

const aboutStatus = `status shows what a running router is, has and does, as it says itself:

  router     its version, its process and domain, and since when it runs
  config     the file, when it was read, and what became of the last reload
  uplink     its link, addresses and how long they last, gateways, name servers asked; its
             MTU, which is the one that routers announce, if that is less than the vif's;
             addresses that it would have, but another station of its link has; the groups
             that it tells switches of the link it listens to (Multicast Listener Discovery)
  flows      in the table, and its size; how many one guest may have
  networks   their prefixes, and how many guests are in each
  guests     each vif: guest and network, domain, MAC, addresses, link, what it sent and
             got, how much of it was dropped, its flows
  drops      of the uplink and each guest, by reason

What a vif "received" is what the router got from it: a guest's, what the guest has sent. The
reasons rx_… and tx_… are the vif's own, explained in COUNTERS.md; "undelivered" are frames
that found no room at the vif they should leave by; the others are the router's, as in
vifrouter_dropped_packets. A vif that is refused is there too, with the reason.

The router is asked at a unix socket, which answers its own user and root alone: that of
the service in ` + serviceDir + `, that of this user or root, or in the directory of --inspect.
--json prints a list with an object for each router; "format" in it changes when a field
goes, or means something else.

It exits with 1 if there is no router, or one that does not answer.`

func statusCommand(p *cli.Program) *cobra.Command {
	s := statusRequest{Program: p, service: serviceDir}
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what a running router has and does",
		Long:  aboutStatus,
		Example: `  vifrouter status
  vifrouter status --json | jq '.[].guests[] | select(.link != "up")'
  vifrouter status --json | jq -e '.[0].config.error == null'`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	s.Register(cmd, "routers", "of the router")
	cmd.Flags().BoolVar(&s.json, "json", false, "print JSON")
	return cmd
}

// A statusRequest is one run of "vifrouter status", with its flags.
type statusRequest struct {
	*cli.Program
	looking.Finder
	service string // the directory of the service's socket
	json    bool
}

// A shown is a router that has answered.
type shown struct {
	PID int `json:"pid"`
	UID int `json:"uid"`
	state
}

func (s *statusRequest) run(ctx context.Context) error {
	uids, err := s.UIDs()
	if err != nil {
		return err
	}
	all, err := s.find(ctx, uids)
	if len(all) == 0 && err != nil {
		return &cli.Advice{Err: fmt.Errorf("no router answers: %s", oneLine(err)), Next: `if it runs, look at its log, and end it if it is stuck; "vifrouter run FILE" starts one`}
	}
	if len(all) == 0 {
		return &cli.Advice{
			Err: errors.New("no router of this user or root runs here that can be asked"),
			Next: `"vifrouter run FILE" starts one, or "systemctl start vifrouter"; one of another user is found by root, with --user; ` +
				`one that runs with --inspect DIR with the same flag here, with "--inspect off" not at all`,
		}
	}
	if err == nil {
		return s.write(all)
	}
	return errors.Join(s.write(all), errors.New(oneLine(err)))
}

// mostLine is how many characters a line of text about another process has at most.
const mostLine = 600

// oneLine makes the text of errors a line that a terminal can show.
func oneLine(err error) string {
	return stat.CleanTo(strings.ReplaceAll(err.Error(), "\n", "; "), mostLine)
}

// find asks the routers of users. With an error it also returns those that have answered.
func (s *statusRequest) find(ctx context.Context, uids []int) ([]shown, error) {
	found, err := inspect.States(ctx, s.Dir, stateName, uids...)
	if s.Dir == "" {
		// Root finds the service, whichever user it runs as. Nobody but root made its directory.
		if uid, ok := looking.OwnerOf(s.service); ok {
			more, e := inspect.States(ctx, s.service, stateName, uid)
			found, err = append(found, more...), errors.Join(err, e)
		}
	}
	var all []shown
	for _, one := range found {
		if s.PID != 0 && one.PID != s.PID {
			continue
		}
		r := shown{PID: one.PID, UID: one.UID}
		if e := json.Unmarshal(one.JSON, &r.state); e != nil {
			err = errors.Join(err, fmt.Errorf("process %d does not say what a router says: %w", one.PID, e))
			continue
		}
		if r.Format != stateFormat {
			err = errors.Join(err, fmt.Errorf("the router of process %d is of version %s, whose state this program cannot read: ask it with a vifrouter of that version", one.PID, r.Version))
			continue
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b shown) int { return cmp.Compare(a.PID, b.PID) })
	return all, err
}

func (s *statusRequest) write(all []shown) error {
	now := time.Now()
	return looking.Print(s.Stdout, s.json, all, func(b *strings.Builder, r *shown) { r.write(b, now) })
}

// write writes a state as text. Another process has sent what is in it, so each line is cleaned and
// bounded before it goes to a terminal.
func (r *shown) write(b *strings.Builder, now time.Time) {
	line := func(head, format string, args ...any) {
		fmt.Fprintf(b, "%-9s %s\n", head, stat.CleanTo(fmt.Sprintf(format, args...), mostLine))
	}
	commit := ""
	if r.Commit != "" {
		commit = ", commit " + r.Commit
	}
	line("router", "version %s%s", r.Version, commit)
	line("", "process %d, domain %d, for %s", r.PID, r.Domain, span(now.Sub(r.Since)))
	c := &r.Config
	file := c.File
	if file == "" {
		file = "the lines of --line"
	}
	line("config", "%s, read %s", file, clock(c.Read))
	switch {
	case c.Tried.IsZero():
		line("", "not reloaded")
	case c.Error == "":
		line("", "reloaded %s; %d taken, %d refused", clock(c.Tried), c.Taken, c.Refused)
	default:
		line("", "the reload of %s was refused, and the old one is in use; %d taken, %d refused", clock(c.Tried), c.Taken, c.Refused)
		for one := range strings.Lines(c.Error) {
			line("", "  %s", strings.TrimSpace(one))
		}
	}
	r.Uplink.write(line)
	line("flows", "%s of %s; a guest may have %s; %s lost their place", number(r.Flows.Used), number(r.Flows.Limit), number(r.Uplink.FlowsLimit), cli.Grouped(r.Flows.Evicted))
	r.writeNetworks(b)
	r.writeGuests(b)
	r.writeDrops(b)
}

func (u *uplinkState) write(line func(head, format string, args ...any)) {
	backend := ""
	if u.Backend != nil {
		backend = fmt.Sprintf(", backend in domain %d", *u.Backend)
	}
	line("uplink", "vif %s, %s%s", u.Vif, linkOf(&u.portState), backend)
	if u.MAC != "" {
		line("", "MAC %s, MTU %d", u.MAC, u.MTU)
	}
	if len(u.Addresses) == 0 {
		line("", "no address")
	}
	for _, a := range u.Addresses {
		until := ""
		if !a.Until.IsZero() {
			until = " until " + clock(a.Until)
		}
		line("", "address %v, %s%s", a.Address, map[string]string{"file": "of the file", "dhcp": "by DHCP", "router": "by a router's advertisement"}[a.From], until)
	}
	for _, a := range u.Taken {
		line("", "address %v is not used: station %s of the link has it", a.Address, a.Station)
	}
	if len(u.Gateways) > 0 {
		line("", "gateway %s", list(u.Gateways))
	}
	if len(u.DNS) > 0 {
		line("", "names asked of %s", strings.Join(u.DNS, ", "))
	}
	if l := u.Listening; l != nil {
		line("", "listens to %s by MLDv%d; heard %s queries, sent %s reports", list(l.Groups), l.Version, cli.Grouped(l.Queries), cli.Grouped(l.Reports))
	}
	line("", "received %s packets, %s; sent %s packets, %s; dropped %s",
		cli.Grouped(u.Received.Packets), cli.BinarySize(u.Received.Bytes), cli.Grouped(u.Sent.Packets), cli.BinarySize(u.Sent.Bytes), cli.Grouped(u.dropped()))
}

func linkOf(p *portState) string {
	if p.Why == "" {
		return p.Link
	}
	return p.Link + ": " + p.Why
}

func (p *portState) dropped() (n uint64) {
	for _, one := range p.Drops {
		n += one
	}
	return n
}

// writeTable writes a blank line and a table, if it has rows.
func writeTable(b *strings.Builder, t *table.Table) {
	if len(t.Rows) > 0 {
		b.WriteString("\n" + t.String())
	}
}

func (r *shown) writeNetworks(b *strings.Builder) {
	t := &table.Table{Head: []string{"network", "IPv4", "router", "pool", "IPv6", "guests"}, Left: func(c int) bool { return c < 5 }}
	for _, n := range r.Networks {
		pool := ""
		if n.First.IsValid() {
			pool = fmt.Sprintf("%v-%v", n.First, n.Last)
		}
		t.Rows = append(t.Rows, []string{cell(n.Name), valid(n.IPv4), valid(n.Router), cell(pool), valid(n.IPv6), strconv.Itoa(n.Guests)})
	}
	writeTable(b, t)
}

func (r *shown) writeGuests(b *strings.Builder) {
	t := &table.Table{
		Head: []string{"vif", "guest", "network", "dom", "MAC", "address", "IPv6", "link", "received", "", "sent", "", "dropped", "flows"},
		Left: func(c int) bool { return c < 8 },
	}
	for i := range r.Guests {
		g := &r.Guests[i]
		addr := valid(g.Addr)
		if g.Addr.IsValid() && !g.Leased.IsZero() {
			addr += ", leased"
		}
		t.Rows = append(t.Rows, []string{
			cell(g.Vif), cell(g.Name), cell(g.Network), strconv.Itoa(int(g.Domain)), cell(g.MAC), addr, valid(g.Prefix), cell(g.Link),
			cli.Grouped(g.Received.Packets), cli.BinarySize(g.Received.Bytes), cli.Grouped(g.Sent.Packets), cli.BinarySize(g.Sent.Bytes),
			cli.Grouped(g.dropped()), number(g.Flows),
		})
		if g.Why != "" {
			t.Rows = append(t.Rows, []string{"  " + cell(g.Vif) + ": " + stat.CleanTo(g.Why, mostLine)})
		}
	}
	if len(t.Rows) == 0 {
		b.WriteString("\nno guest has a vif here\n")
	}
	writeTable(b, t)
}

func (r *shown) writeDrops(b *strings.Builder) {
	t := &table.Table{Head: []string{"dropped at", "reason", "packets"}, Left: func(c int) bool { return c < 2 }}
	add := func(name string, p *portState) {
		for _, reason := range slices.Sorted(maps.Keys(p.Drops)) {
			t.Rows = append(t.Rows, []string{cell(name), cell(reason), cli.Grouped(p.Drops[reason])})
		}
	}
	add("uplink", &r.Uplink.portState)
	for i := range r.Guests {
		add("vif "+r.Guests[i].Vif, &r.Guests[i].portState)
	}
	writeTable(b, t)
}

// cell makes a word that another process sent safe to print, and not empty, for a table.
func cell(s string) string {
	if s == "" {
		return "-"
	}
	return stat.Clean(s)
}

// valid writes an address or a prefix, or "-" for the zero one.
func valid[T interface {
	netip.Addr | netip.Prefix
	IsValid() bool
	String() string
}](a T) string {
	if !a.IsValid() {
		return "-"
	}
	return stat.Clean(a.String())
}

func list(addrs []netip.Addr) string {
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}

func number(n int) string { return cli.Grouped(uint64(max(n, 0))) }

// clock writes a time in the time zone of this process.
func clock(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.Local().Format(time.DateTime)
}

// span writes how long something lasts, in days or to the second.
func span(d time.Duration) string {
	d = max(d, 0)
	if d >= 48*time.Hour {
		return fmt.Sprintf("%d days", int(d/(24*time.Hour)))
	}
	return d.Round(time.Second).String()
}
