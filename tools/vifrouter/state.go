package main

import (
	"cmp"
	"net/netip"
	"runtime/debug"
	"slices"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/router"
	"barevif/telemetry"
	"barevif/tools/internal/release"
)

// stateName is the name under which a router shows its state; see pvnet/inspect.
const stateName = "vifrouter"

// stateFormat is the version of the JSON of a state. It changes when a field is removed or
// means something else.
const stateFormat = 1

// A state is what a running router says of itself: "vifrouter status" asks for it. Times are
// absent where there is none; sizes are in bytes.
type state struct {
	Format   int            `json:"format"`
	Version  string         `json:"version"`
	Commit   string         `json:"commit,omitempty"`
	Domain   uint16         `json:"domain"`
	Since    time.Time      `json:"since"`
	Config   configState    `json:"config"`
	Uplink   uplinkState    `json:"uplink"`
	Networks []networkState `json:"networks"`
	Guests   []guestState   `json:"guests"`
	Flows    flowState      `json:"flows"`
}

type configState struct {
	File    string    `json:"file,omitempty"`  // or "xenstore:" and a key; "": its lines are arguments
	Read    time.Time `json:"read"`            // when the configuration that is in use was read
	Tried   time.Time `json:"tried,omitzero"`  // when a reload was tried last
	Error   string    `json:"error,omitempty"` // of that reload; "": it was taken
	Taken   uint64    `json:"taken"`
	Refused uint64    `json:"refused"`
}

// A portState is what a vif has moved, seen from the router.
type portState struct {
	Link       string            `json:"link"` // "up", "down", "refused"
	Why        string            `json:"why,omitempty"`
	MAC        string            `json:"mac,omitempty"`
	MTU        int               `json:"mtu,omitempty"`
	Received   moved             `json:"received"`
	Sent       moved             `json:"sent"`
	Drops      map[string]uint64 `json:"drops,omitempty"` // by reason, of those that there are
	Flows      int               `json:"flows"`
	FlowsLimit int               `json:"flows_limit"`
}

type moved struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

type uplinkState struct {
	Vif string `json:"vif"`
	portState
	Backend   *uint16        `json:"backend,omitempty"` // its domain
	Addresses []addressState `json:"addresses"`
	Taken     []takenState   `json:"taken,omitempty"` // addresses that it would have, and another station has
	Gateways  []netip.Addr   `json:"gateways"`
	DNS       []string       `json:"dns"` // that are asked
	Listening *listenState   `json:"listening,omitempty"`
}

// A listenState says which groups the link was told of, since the router runs. It is there with the first group.
type listenState struct {
	Groups  []netip.Addr `json:"groups"`  // solicited-node groups that the router listens to
	Version int          `json:"version"` // of Multicast Listener Discovery: 1 while a querier speaks it, else 2
	Queries uint64       `json:"queries"` // heard
	Reports uint64       `json:"reports"` // sent
}

type takenState struct {
	Address netip.Addr `json:"address"`
	Station string     `json:"station"` // its MAC
}

type addressState struct {
	Address netip.Prefix `json:"address"`
	From    string       `json:"from"` // "file", "dhcp", "router": its prefix is one that a router announces
	Until   time.Time    `json:"until,omitzero"`
}

type networkState struct {
	Name   string       `json:"name"`
	IPv4   netip.Prefix `json:"ipv4,omitzero"`
	Router netip.Addr   `json:"router,omitzero"`
	First  netip.Addr   `json:"pool_first,omitzero"`
	Last   netip.Addr   `json:"pool_last,omitzero"`
	IPv6   netip.Prefix `json:"ipv6,omitzero"`
	Guests int          `json:"guests"` // vifs that are in it
}

type guestState struct {
	Vif     string `json:"vif"` // DOMAIN.ID
	Domain  uint16 `json:"domain"`
	Name    string `json:"name,omitempty"`
	Network string `json:"network,omitempty"`
	portState
	Addr   netip.Addr   `json:"ipv4,omitzero"`
	Leased time.Time    `json:"leased_until,omitzero"`
	Prefix netip.Prefix `json:"ipv6,omitzero"`
}

type flowState struct {
	Used    int    `json:"used"`
	Limit   int    `json:"limit"`
	Evicted uint64 `json:"evicted"`
}

// state returns what the router is now. It is called for who asks, one at a time.
func (d *daemon) state() any {
	d.mu.Lock()
	defer d.mu.Unlock()
	flows := d.core.Stats()
	s := &state{
		Format: stateFormat, Domain: uint16(d.domain.ID()), Since: d.began,
		Config:   configState{File: d.file, Read: d.read, Tried: d.tried, Error: d.wrong, Taken: d.reloads, Refused: d.refused},
		Networks: []networkState{}, Guests: []guestState{},
		Flows: flowState{Used: flows.Flows, Limit: flows.FlowLimit, Evicted: flows.Evicted},
	}
	info, _ := debug.ReadBuildInfo()
	s.Version, s.Commit = release.Of(info)
	s.Uplink = d.uplinkStateLocked()
	members := map[string]int{}
	list := d.sortedLocked()
	slices.SortFunc(list, func(a, b *guest) int { // their ports are numbered as they came
		x, y := a.dev.ID(), b.dev.ID() // decimal
		return cmp.Or(cmp.Compare(a.dev.Peer(), b.dev.Peer()), cmp.Compare(len(x), len(y)), cmp.Compare(x, y))
	})
	for _, g := range list {
		if g.admitted {
			members[g.network]++
		}
		s.Guests = append(s.Guests, g.stateLocked())
	}
	for i := range d.cfg.Networks {
		n := &d.cfg.Networks[i]
		s.Networks = append(s.Networks, networkState{n.Name, n.IPv4, n.Router, n.First, n.Last, n.IPv6, members[n.Name]})
	}
	return s
}

func (d *daemon) uplinkStateLocked() uplinkState {
	u := &d.cfg.Uplink
	s := uplinkState{Vif: u.Vif, Addresses: []addressState{}, Gateways: []netip.Addr{}, DNS: []string{}}
	s.Link, s.Why = "down", d.upDown
	if d.up != nil {
		s.portState = d.portStateLocked(uplinkPort, d.up.dev, d.upDown)
		for i := range d.applied.Ports {
			if p := &d.applied.Ports[i]; p.ID == uplinkPort {
				s.MTU = p.MTU // routers may have announced less than the device's
			}
		}
		mac := d.up.dev.MAC()
		s.MAC = mac.String()
		peer := uint16(d.up.dev.Peer())
		s.Backend = &peer
	}
	add := func(p netip.Prefix, from string, until time.Time) {
		if p.IsValid() {
			s.Addresses = append(s.Addresses, addressState{p, from, until})
		}
	}
	gateway := func(a netip.Addr) {
		if a.IsValid() {
			s.Gateways = append(s.Gateways, a)
		}
	}
	add(u.IPv4, "file", time.Time{})
	add(d.lease.addr, "dhcp", d.lease.until)
	add(u.IPv6, "file", time.Time{})
	for _, a := range d.auto.Addrs {
		add(a.Prefix, "router", a.Until)
	}
	for _, a := range d.auto.Taken {
		s.Taken = append(s.Taken, takenState{a.Addr, pvnet.MAC(a.By).String()})
	}
	gateway(u.Via4)
	for _, r := range d.lease.routes {
		if r.To.Bits() == 0 {
			gateway(r.Via)
		}
	}
	gateway(u.Via6)
	gateway(d.auto.Router)
	for _, a := range d.serversLocked() {
		s.DNS = append(s.DNS, a.String())
	}
	if l := d.listens.now(); len(l.Groups) > 0 {
		s.Listening = &listenState{l.Groups, 2, l.Queries, l.Reports}
		if l.MLDv1 {
			s.Listening.Version = 1
		}
	}
	return s
}

func (g *guest) stateLocked() guestState {
	s := guestState{
		Vif: g.vif, Domain: uint16(g.dev.Peer()), Name: g.name, Network: g.network,
		portState: g.d.portStateLocked(g.id, g.dev, g.down), Addr: g.addr, Prefix: g.prefix,
	}
	if g.mac != (pvnet.MAC{}) {
		s.MAC = g.mac.String()
	}
	if !g.admitted {
		s.Link, s.Name, s.Network = "refused", "", ""
		if g.why != nil {
			s.Why = g.why.Error()
		}
	}
	if g.server != nil {
		if l, ok := g.server.Lease(time.Now()); ok {
			s.Leased = l.Until
		}
	}
	return s
}

// portStateLocked returns what a port and its vif have counted. why is why its link is down.
func (d *daemon) portStateLocked(id router.PortID, dev *pvnet.Device, why string) portState {
	st := dev.Stats()
	s := portState{
		Link: "down", Why: why, MTU: dev.MTU(), Drops: map[string]uint64{}, FlowsLimit: d.core.Stats().PortLimit,
		Received: moved{st.RX.Packets(), st.RX.Bytes()}, Sent: moved{st.TX.Packets(), st.TX.Bytes()},
	}
	if dev.Counters().Status().Up {
		s.Link, s.Why = "up", ""
	}
	drop := func(name string, n uint64) {
		if n > 0 {
			s.Drops[name] = n
		}
	}
	for _, f := range d.losses {
		drop(f.FullName(telemetry.RX), st.RX.Field(f))
		drop(f.FullName(telemetry.TX), st.TX.Field(f))
	}
	drop("undelivered", st.RX.Get(telemetry.Undelivered))
	if p, ok := d.core.PortStats(id); ok {
		s.Flows = p.Flows
		for r := router.Reason(1); int(r) < router.Reasons; r++ {
			drop(r.String(), p.Dropped[r])
		}
	}
	return s
}

// triedReload notes what became of a reload from source; err is nil if it was taken.
func (d *daemon) triedReload(source string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tried, d.wrong = time.Now(), ""
	if err != nil {
		d.wrong = err.Error()
		d.refused++
		return
	}
	d.reloads++
	d.read, d.file = d.tried, source
}

// losses returns the fields of counters that are reasons for which a vif lost frames.
func losses() []telemetry.Field {
	return slices.DeleteFunc(telemetry.Fields(), func(f telemetry.Field) bool { return f.SumIn == "" })
}
