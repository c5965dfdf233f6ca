package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/packet"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The solicited-node groups of a site's uplink: of 2001:db8::2, and of addresses that follow from its MAC.
var (
	staticGroup = netip.MustParseAddr("ff02::1:ff00:2")
	cardGroup   = netip.MustParseAddr("ff02::1:ff00:100")
	uplinkLocal = netip.MustParseAddr("fe80::216:3eff:fe00:100")
	uplinkMAC   = [6]byte{0, 0x16, 0x3e, 0, 1, 0}
)

// A wire is the world's end of the uplink without TCP/IP: a switch, say.
type wire struct {
	*site
	dev    *pvnet.Device
	frames chan []byte // of IPv6 that the router sends
}

func newWire(t *testing.T, text string) *wire {
	t.Helper()
	s := newWorldless(t, text)
	w := &wire{site: s, dev: s.uplinkDevice(), frames: make(chan []byte, 1024)}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- w.dev.Listen(ctx, func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			if h, ok := packet.Parse(b, len(b)); ok && h.Version == 6 {
				select {
				case w.frames <- b:
				default:
				}
			}
		})
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return w
}

// next returns the next message of the router about listeners or neighbours: its source, its type, and what it is about.
func (w *wire) next() string {
	w.Helper()
	for {
		select {
		case b := <-w.frames:
			h, _ := packet.Parse(b, len(b))
			if h.Proto != protoICMPv6 || h.L4 == 0 {
				continue
			}
			m := b[h.L4:h.End]
			from := netip.AddrFrom16([16]byte(b[22:]))
			if [6]byte(b[6:12]) != uplinkMAC {
				w.Errorf("from %x", b[6:12])
			}
			switch m[0] {
			case 135:
				return fmt.Sprintf("%v asks for %v", from, netip.AddrFrom16([16]byte(m[8:])))
			case 131, 132:
				return fmt.Sprintf("%v: %s %v", from, map[byte]string{131: "old report", 132: "done"}[m[0]], netip.AddrFrom16([16]byte(m[8:])))
			case 143:
				var list []string
				for r := m[8:]; len(r) >= 20; r = r[20:] {
					list = append(list, fmt.Sprintf("%s %v", map[byte]string{2: "is", 3: "leave", 4: "join"}[r[0]], netip.AddrFrom16([16]byte(r[4:]))))
				}
				slices.Sort(list)
				return fmt.Sprintf("%v: %s", from, strings.Join(list, ", "))
			}
		case <-w.ctx.Done():
			w.Fatal("the router says nothing more")
		}
	}
}

// says requires that the router says these next, in this order.
func (w *wire) says(list ...string) {
	w.Helper()
	for _, want := range list {
		if got := w.next(); got != want {
			w.Fatalf("%q, want %q", got, want)
		}
	}
}

// hears sends the router an ICMPv6 message of a station of the link.
func (w *wire) hears(from, to netip.Addr, limit byte, options, message []byte) {
	w.Helper()
	dst := to.As16()
	b := append([]byte{0x33, 0x33}, dst[12:]...)
	b = append(b, 2, 0, 0, 0, 0, 9, 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(options)+len(message)), 58, limit)
	if len(options) > 0 {
		b[20] = 0
	}
	b = append(append(append(b, from.AsSlice()...), dst[:]...), options...)
	sum := packet.Add(58+uint64(len(message)), b[22:54])
	message = bytes.Clone(message)
	binary.BigEndian.PutUint16(message[2:], ^packet.Fold(packet.Add(sum, message)))
	if _, err := w.dev.Write(append(b, message...)); err != nil {
		w.Fatal(err)
	}
}

// announces sends the router an advertisement of /64s, with gVisor's own encoding of its parts.
func (w *wire) announces(prefixes ...string) {
	w.Helper()
	var opts header.NDPOptionsSerializer
	for _, p := range prefixes {
		opts = append(opts, prefixInformation(p))
	}
	ra := make([]byte, header.NDPRAMinimumSize+opts.Length())
	ra[0] = 64
	binary.BigEndian.PutUint16(ra[2:], 1800)
	header.NDPRouterAdvert(ra).Options().Serialize(opts)
	w.hears(worldLink, allNodes, 255, nil, append([]byte{134, 0, 0, 0}, ra...))
}

var routerAlert = []byte{58, 0, 5, 2, 0, 0, 1, 0}

// asks sends a query of version 2, about all groups if it is of none, that is to be answered at once.
func (w *wire) asks(group netip.Addr) {
	w.Helper()
	w.hears(worldLink, allNodes, 1, routerAlert, append(append([]byte{130, 0, 0, 0, 0, 0, 0, 0}, group.AsSlice()...), 2, 125, 0, 0))
}

func all(from netip.Addr, how string, groups ...netip.Addr) string {
	var list []string
	for _, g := range groups {
		list = append(list, how+" "+g.String())
	}
	slices.Sort(list)
	return from.String() + ": " + strings.Join(list, ", ")
}

// The groups of an address of the file are reported when the link comes up, when somebody asks, and
// when the address comes and goes with a reload.
func TestTheUplinkSaysWhereItListens(t *testing.T) {
	w := newWire(t, standard)
	join, both := all(uplinkLocal, "join", staticGroup, cardGroup), []netip.Addr{staticGroup, cardGroup}
	w.says(join, join)
	w.asks(netip.IPv6Unspecified())
	w.says(all(uplinkLocal, "is", both...))
	w.asks(cardGroup)
	w.says(all(uplinkLocal, "is", cardGroup))
	now := w.d.state().(*state).Uplink
	if l := now.Listening; l == nil || !slices.Equal(l.Groups, both) || l.Version != 2 || l.Queries != 2 || l.Reports != 4 {
		t.Errorf("%+v", l)
	}
	var b bytes.Buffer
	if err := w.d.writeMetrics(&b); err != nil || !strings.Contains(b.String(), "\nvifrouter_uplink_listener_queries_total 2\n") || !strings.Contains(b.String(), "\nvifrouter_uplink_listener_reports_total 4\n") {
		t.Errorf("%v\n%s", err, &b)
	}
	var text strings.Builder
	(&shown{state: *w.d.state().(*state)}).write(&text, time.Now())
	if !strings.Contains(text.String(), "listens to ff02::1:ff00:2, ff02::1:ff00:100 by MLDv2; heard 2 queries, sent 4 reports\n") {
		t.Errorf("%s", &text)
	}
	if n := w.d.plane.n.control.Load(); n != 0 {
		t.Errorf("%d frames of its own found no room", n)
	}
	// Another address, none, and one again.
	if err := w.d.reload(parse(t, strings.Replace(standard, "2001:db8::2/64", "2001:db8::3/64", 1))); err != nil {
		t.Fatal(err)
	}
	other := netip.MustParseAddr("ff02::1:ff00:3")
	change := "fe80::216:3eff:fe00:100: join ff02::1:ff00:3, leave ff02::1:ff00:2"
	w.says(change, change)
	if err := w.d.reload(parse(t, strings.Replace(standard, "uplink ipv6 2001:db8::2/64 via 2001:db8::1\n", "", 1))); err != nil {
		t.Fatal(err)
	}
	over := all(netip.IPv6Unspecified(), "leave", other, cardGroup)
	w.says(over, over)
	if l := w.d.state().(*state).Uplink.Listening; l != nil {
		t.Errorf("%+v", l)
	}
	if err := w.d.reload(parse(t, standard)); err != nil {
		t.Fatal(err)
	}
	w.says(join, join)
	// The same to a querier of version 1.
	w.hears(worldLink, allNodes, 1, routerAlert, append([]byte{130, 0, 0, 0, 0, 0, 0, 0}, staticGroup.AsSlice()...))
	w.says("fe80::216:3eff:fe00:100: old report ff02::1:ff00:2")
	if l := w.d.state().(*state).Uplink.Listening; l == nil || l.Version != 1 {
		t.Errorf("%+v", l)
	}
	if err := w.d.reload(parse(t, strings.Replace(standard, "2001:db8::2/64", "2001:db8::3/64", 1))); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a message for each
		if m := w.next(); m != "fe80::216:3eff:fe00:100: done ff02::1:ff00:2" && m != "fe80::216:3eff:fe00:100: old report ff02::1:ff00:3" {
			t.Error(m)
		}
	}
}

// What is no query of the link is not answered, nor is a report of another station a reason to say nothing.
func TestTheUplinkIgnoresWhatIsNoQuery(t *testing.T) {
	w := newWire(t, standard)
	join := all(uplinkLocal, "join", staticGroup, cardGroup)
	w.says(join, join)
	query := append(append([]byte{130, 0, 0, 0, 0, 0, 0, 0}, cardGroup.AsSlice()...), 2, 125, 0, 0)
	for name, send := range map[string]func(){
		"a hop limit of 64":       func() { w.hears(worldLink, allNodes, 64, routerAlert, query) },
		"from a global address":   func() { w.hears(worldAddr6, allNodes, 1, routerAlert, query) },
		"from no address":         func() { w.hears(netip.IPv6Unspecified(), allNodes, 1, routerAlert, query) },
		"as if from the router":   func() { w.hears(uplinkLocal, allNodes, 1, routerAlert, query) },
		"without an alert":        func() { w.hears(worldLink, allNodes, 1, []byte{58, 0, 1, 4, 0, 0, 0, 0}, query) },
		"without options":         func() { w.hears(worldLink, allNodes, 1, nil, query) },
		"cut short":               func() { w.hears(worldLink, allNodes, 1, routerAlert, query[:26]) },
		"more sources than bytes": func() { w.hears(worldLink, allNodes, 1, routerAlert, append(bytes.Clone(query[:26]), 0, 1)) },
		"for another group":       func() { w.asks(netip.MustParseAddr("ff02::1:ff00:7")) },
		"a report":                func() { w.hears(worldLink, cardGroup, 1, routerAlert, append([]byte{131}, query[1:24]...)) },
	} {
		send()
		// Answers have no delay here: one would come before that to the next query.
		w.asks(staticGroup)
		if got, want := w.next(), all(uplinkLocal, "is", staticGroup); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	p, _ := w.d.core.PortStats(uplinkPort)
	if p.Dropped == [len(p.Dropped)]uint64{} {
		t.Error("nothing is counted as dropped")
	}
}

// The group of an address that the link is to be asked for is said before it is asked, from :: since the link-local address is
// asked for as well, and again once that is the router's (RFC 4862, section 5.4.2, and RFC 3590).
func TestTheUplinkListensBeforeItAsks(t *testing.T) {
	w := newWire(t, announced)
	w.comes("the uplink is up", func() bool { return strings.Contains(w.said.String(), "uplink vif 0: connected") })
	asked, own := netip.MustParseAddr("2001:db8::216:3eff:fe00:100"), false
	w.announces("2001:db8::")
	w.says(all(netip.IPv6Unspecified(), "join", cardGroup))
	var seen []string
	for !own {
		m := w.next()
		seen = append(seen, m)
		own = m == all(uplinkLocal, "join", cardGroup)
	}
	first := slices.Index(seen, fmt.Sprintf(":: asks for %v", asked))
	link := slices.Index(seen, fmt.Sprintf(":: asks for %v", uplinkLocal))
	if first < 0 || link < 0 {
		t.Fatalf("%q", seen)
	}
	w.says(all(uplinkLocal, "join", cardGroup))
	w.comes("the address is the router's", func() bool { return w.has(asked) })
	w.asks(netip.IPv6Unspecified())
	w.says(all(uplinkLocal, "is", cardGroup))
}

// The link is asked for no address of a prefix that is a network of guests, which the log says once. A reload
// that makes it one of nobody has it asked for, without another announcement, and one that makes it the guests'
// again ends the address before it returns.
func TestTheUplinkAsksForNoAddressOfGuests(t *testing.T) {
	w := newWire(t, announced)
	w.comes("the uplink is up", func() bool { return strings.Contains(w.said.String(), "uplink vif 0: connected") })
	theirs, free := netip.MustParseAddr("fd00:137:0:7:216:3eff:fe00:100"), netip.MustParseAddr("2001:db8::216:3eff:fe00:100")
	w.announces("fd00:137:0:7::", "2001:db8::")
	asks := func(a netip.Addr) string { return fmt.Sprintf(":: asks for %v", a) }
	// That the router has another address is said a second after it asked for all of them.
	var seen []string
	for m := ""; m != all(uplinkLocal, "join", cardGroup); seen = append(seen, m) {
		m = w.next()
	}
	if slices.Contains(seen, asks(theirs)) || !slices.Contains(seen, asks(free)) {
		t.Errorf("%q", seen)
	}
	w.comes("the other address is the router's", func() bool { return w.has(free) })
	w.announces("fd00:137:0:7::", "2001:db8::")
	refused := func() int {
		return strings.Count(w.said.String(), `since it is a network of guests: the uplink asks for no address of it" prefix=fd00:137:0:7::/64 network=office`)
	}
	if n := refused(); n != 1 {
		t.Errorf("%d lines about it", n)
	}
	if err := w.d.reload(parse(t, strings.Replace(announced, "fd00:137::/56", "fd00:138::/56", 1))); err != nil {
		t.Fatal(err)
	}
	for w.next() != asks(theirs) {
	}
	w.comes("an address of what was the guests'", func() bool { return w.has(theirs) && w.has(free) })
	if err := w.d.reload(parse(t, announced)); err != nil {
		t.Fatal(err)
	}
	if w.has(theirs) || !w.has(free) {
		t.Error("after the reload the router has an address in a network of guests, or no other")
	}
	w.comes("it says so again", func() bool { return refused() == 2 && len(w.auto().Addrs) == 1 })
	if !strings.Contains(w.said.String(), "uplink: address "+theirs.String()+"/64 is over") {
		t.Error("it does not say that the address is over")
	}
}

// A flood of queries costs bounded answers, and holds nobody up.
func TestAStationThatAsksAndAsks(t *testing.T) {
	w := newWire(t, standard)
	join := all(uplinkLocal, "join", staticGroup, cardGroup)
	w.says(join, join)
	began := time.Now()
	const n = 3000
	for i := range n {
		w.asks([]netip.Addr{netip.IPv6Unspecified(), staticGroup, cardGroup}[i%3])
	}
	w.comes("it has heard of them", func() bool { return w.d.listens.now().Queries >= n/10 })
	s := w.d.listens.now()
	if took := time.Since(began); s.Reports > 3+uint64(took/(100*time.Millisecond)) {
		t.Errorf("%+v in %v", s, took)
	}
}
