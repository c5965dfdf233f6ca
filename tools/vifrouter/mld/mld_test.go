package mld

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"barevif/pvnet/packet"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

var (
	mac    = [6]byte{0x00, 0x16, 0x3e, 1, 2, 3}
	own    = netip.MustParseAddr("fe80::216:3eff:fe01:203")
	static = netip.MustParseAddr("2001:db8::2")
	group1 = netip.MustParseAddr("ff02::1:ff01:203") // of own
	group2 = netip.MustParseAddr("ff02::1:ff00:2")   // of static
	none   = netip.IPv6Unspecified()
	now    = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
)

// old makes a query of version 1, written down from RFC 2710, section 3; code is in milliseconds.
func old(group netip.Addr, code uint16) []byte {
	b := []byte{130, 0, 0, 0, byte(code >> 8), byte(code), 0, 0}
	return append(b, group.AsSlice()...)
}

// query makes one of version 2, from RFC 3810, section 5.1.
func query(group netip.Addr, code uint16, qrv, qqic byte, sources ...netip.Addr) []byte {
	b := append(old(group, code), qrv, qqic, 0, byte(len(sources)))
	for _, s := range sources {
		b = append(b, s.AsSlice()...)
	}
	return b
}

var alert = []byte{5, 2, 0, 0, 1, 0}

// ip makes a packet of a message, with hop-by-hop options.
func ip(options, message []byte) []byte {
	b := []byte{0x60, 0, 0, 0, 0, byte(2 + len(options) + len(message)), 0, 1}
	b = append(append(b, netip.MustParseAddr("fe80::1").AsSlice()...), netip.MustParseAddr("ff02::1").AsSlice()...)
	b = append(append(b, 58, byte((2+len(options))/8-1)), options...)
	return append(b, message...)
}

func TestWhatIsAQuery(t *testing.T) {
	edit := func(b []byte, at int, to byte) []byte { b = bytes.Clone(b); b[at] = to; return b }
	for name, c := range map[string]struct {
		packet []byte
		want   Query
		ok     bool
	}{
		"version 1":                          {ip(alert, old(none, 2500)), Query{none, true, 2500 * time.Millisecond, 0, 0}, true},
		"version 1, a group":                 {ip(alert, old(group1, 1)), Query{group1, true, time.Millisecond, 0, 0}, true},
		"version 1, its longest delay":       {ip(alert, old(none, 65535)), Query{none, true, 65535 * time.Millisecond, 0, 0}, true},
		"version 2":                          {ip(alert, query(none, 1000, 2, 125)), Query{none, false, time.Second, 2, 125 * time.Second}, true},
		"version 2, at once":                 {ip(alert, query(none, 0, 0, 0)), Query{none, false, 0, 0, 0}, true},
		"version 2, a group":                 {ip(alert, query(group2, 10000, 7, 0x80)), Query{group2, false, 10 * time.Second, 7, 128 * time.Second}, true},
		"version 2, sources":                 {ip(alert, query(group2, 5, 8, 1, static, own)), Query{group2, false, 5 * time.Millisecond, 0, time.Second}, true},
		"version 2, its longest times":       {ip(alert, query(none, 0xffff, 2, 0xff)), Query{none, false, 0x1fff << 10 * time.Millisecond, 2, 31 << 10 * time.Second}, true},
		"more than the sources":              {ip(alert, append(query(none, 5, 2, 1, own), 0)), Query{none, false, 5 * time.Millisecond, 2, time.Second}, true},
		"another code":                       {ip(alert, edit(old(none, 5), 1, 9)), Query{none, true, 5 * time.Millisecond, 0, 0}, true},
		"more padding":                       {ip([]byte{0, 0, 1, 4, 9, 9, 9, 9, 5, 2, 0, 0, 1, 0}, old(none, 5)), Query{none, true, 5 * time.Millisecond, 0, 0}, true},
		"an option that may be left unknown": {ip([]byte{5, 2, 0, 0, 0x1e, 6, 0, 0, 0, 0, 0, 0, 0, 0}, old(none, 5)), Query{none, true, 5 * time.Millisecond, 0, 0}, true},

		"nothing":                        {},
		"half a header":                  {packet: ip(alert, nil)[:39]},
		"no message":                     {packet: ip(alert, nil)},
		"a byte short":                   {packet: ip(alert, old(none, 5)[:23])},
		"25 bytes":                       {packet: ip(alert, append(old(none, 5), 0))},
		"26 bytes":                       {packet: ip(alert, append(old(none, 5), 0, 0))},
		"27 bytes":                       {packet: ip(alert, query(none, 5, 2, 1)[:27])},
		"a source short":                 {packet: ip(alert, query(none, 5, 2, 1, own)[:43])},
		"65535 sources":                  {packet: ip(alert, edit(edit(query(none, 5, 2, 1), 26, 255), 27, 255))},
		"a report":                       {packet: ip(alert, edit(old(none, 5), 0, 131))},
		"another protocol":               {packet: edit(ip(alert, old(none, 5)), 40, 17)},
		"a host's address as group":      {packet: ip(alert, old(static, 5))},
		"without options":                {packet: edit(append(ip(alert, nil)[:40:40], old(none, 5)...), 6, 58)},
		"behind destination options":     {packet: edit(ip(alert, old(none, 5)), 6, 60)},
		"destination options behind":     {packet: edit(ip(alert, append([]byte{58, 0, 1, 4, 0, 0, 0, 0}, old(none, 5)...)), 40, 60)},
		"no alert":                       {packet: ip([]byte{1, 4, 0, 0, 0, 0}, old(none, 5))},
		"an alert of something else":     {packet: ip([]byte{5, 2, 0, 1, 1, 0}, old(none, 5))},
		"an alert of something else, 2":  {packet: ip([]byte{5, 2, 1, 0, 1, 0}, old(none, 5))},
		"an alert of another length":     {packet: ip([]byte{5, 3, 0, 0, 0, 0}, old(none, 5))},
		"an alert of no length":          {packet: ip([]byte{1, 2, 0, 0, 5, 0}, old(none, 5))},
		"half an alert":                  {packet: ip([]byte{1, 2, 0, 0, 0, 5}, old(none, 5))},
		"an alert that is cut":           {packet: ip([]byte{1, 1, 0, 5, 2, 0}, old(none, 5))},
		"two alerts":                     {packet: ip([]byte{5, 2, 0, 0, 5, 2, 0, 0, 1, 4, 0, 0, 0, 0}, old(none, 5))},
		"an option not to be ignored":    {packet: ip([]byte{5, 2, 0, 0, 0x9e, 6, 0, 0, 0, 0, 0, 0, 0, 0}, old(none, 5))},
		"options longer than the packet": {packet: edit(ip(alert, old(none, 5)), 41, 4)},
	} {
		if q, ok := Parse(c.packet); ok != c.ok || ok && q != c.want {
			t.Errorf("%s: %+v, %v, want %+v, %v", name, q, ok, c.want, c.ok)
		}
	}
}

// A said is what a message says of a group.
type said struct {
	typ   byte // of the message
	kind  byte // of the record, if it is a report of version 2
	group netip.Addr
	from  netip.Addr
}

// hears reads the frames that a listener sends, with nothing of this package.
func hears(t *testing.T, frames [][]byte) (list []said) {
	t.Helper()
	for _, b := range frames {
		h, ok := packet.Parse(b, len(b))
		if !ok || h.Version != 6 || h.Proto != 58 || h.End != len(b) || h.L4 != 62 || h.Extensions != packet.HasOptions {
			t.Fatalf("%+v, % x", h, b)
		}
		if b[h.L3+7] != 1 || !bytes.Equal(b[54:62], []byte{58, 0, 5, 2, 0, 0, 1, 0}) || [6]byte(b[6:12]) != mac || [6]byte(b) != [6]byte{0x33, 0x33, b[50], b[51], b[52], b[53]} {
			t.Fatalf("% x", b)
		}
		if packet.Fold(packet.Add(uint64(h.Pseudo(b, len(b)-h.L4)), b[h.L4:])) != 0xffff {
			t.Fatalf("the checksum is wrong: % x", b)
		}
		from, to := netip.AddrFrom16([16]byte(b[22:])), netip.AddrFrom16([16]byte(b[38:]))
		m := b[h.L4:]
		switch m[0] {
		case 131, 132: // RFC 2710, sections 3 and 5
			g := netip.AddrFrom16([16]byte(m[8:]))
			if want := map[byte]netip.Addr{131: g, 132: netip.MustParseAddr("ff02::2")}[m[0]]; to != want || len(m) != 24 || !bytes.Equal(m[4:8], make([]byte, 4)) {
				t.Fatalf("% x", b)
			}
			list = append(list, said{m[0], 0, g, from})
		case 143: // RFC 3810, section 5.2
			if to != netip.MustParseAddr("ff02::16") || len(m) != 8+20*int(binary.BigEndian.Uint16(m[6:])) || !bytes.Equal(m[4:6], make([]byte, 2)) || len(b) > 14+1280 {
				t.Fatalf("% x", b)
			}
			for r := m[8:]; len(r) > 0; r = r[20:] {
				if !bytes.Equal(r[1:4], make([]byte, 3)) {
					t.Fatalf("% x", r)
				}
				list = append(list, said{143, r[0], netip.AddrFrom16([16]byte(r[4:])), from})
			}
		default:
			t.Fatalf("% x", b)
		}
	}
	return list
}

func of2(kind byte, from netip.Addr, groups ...netip.Addr) (list []said) {
	for _, g := range groups {
		list = append(list, said{143, kind, g, from})
	}
	return list
}

func of1(typ byte, from netip.Addr, groups ...netip.Addr) (list []said) {
	for _, g := range groups {
		list = append(list, said{typ, 0, g, from})
	}
	return list
}

// A clock drives a listener from one time that it names to the next.
type clock struct {
	*testing.T
	Listener
	at time.Time
}

// next lets the time come for which the listener waits, if it is not after end, and returns what it says then.
func (c *clock) next(end time.Time) (list []said) {
	c.Helper()
	for {
		next := c.Next()
		if next.IsZero() || next.After(end) {
			c.at = end
			return nil
		}
		if next.After(c.at) {
			if early := c.Reports(next.Add(-1)); len(early) != 0 {
				c.Fatalf("%+v before it is time", hears(c.T, early))
			}
			c.at = next
		}
		if list = hears(c.T, c.Reports(c.at)); len(list) > 0 {
			return list
		}
		if again := c.Next(); !again.IsZero() && !again.After(c.at) {
			c.Fatal("it waits for what does not come")
		}
	}
}

// says requires that the listener says this next, within a time.
func (c *clock) says(within time.Duration, want []said) {
	c.Helper()
	if got := c.next(c.at.Add(within)); !slices.Equal(got, want) {
		c.Fatalf("%+v\nwant %+v", got, want)
	}
}

// silent requires that it says nothing for a time.
func (c *clock) silent(d time.Duration) {
	c.Helper()
	if got := c.next(c.at.Add(d)); len(got) > 0 {
		c.Fatalf("%+v", got)
	}
}

func (c *clock) hear(message []byte) {
	c.Helper()
	q, ok := Parse(ip(alert, message))
	if !ok {
		c.Fatalf("% x", message)
	}
	before := c.Next()
	if another := c.Hear(c.at, q); another == c.Next().Equal(before) {
		c.Fatalf("%v, but it was %v and is %v", another, before, c.Next())
	}
}

// listening returns one that has reported both groups.
func listening(t *testing.T) *clock {
	c := &clock{T: t, at: now}
	c.Listen(c.at, own, []netip.Addr{static, own})
	c.Up(c.at, mac)
	c.says(mostDelay, of2(4, own, group2, group1))
	c.says(mostRepeat, of2(4, own, group2, group1))
	c.silent(time.Hour)
	return c
}

const ever = 30 * 24 * time.Hour

func TestGroupsAreReportedOnceTheLinkIsUp(t *testing.T) {
	c := &clock{T: t, at: now}
	c.Listen(c.at, own, []netip.Addr{static, own, netip.MustParseAddr("2001:db8:7::216:3eff:fe01:203")}) // the last two have one group
	c.hear(query(none, 0, 2, 125))
	c.silent(ever)
	c.Up(c.at, mac)
	if c.Next().Before(c.at) {
		t.Error(c.Next())
	}
	c.says(mostDelay, of2(4, own, group2, group1))
	first := c.at
	c.says(mostRepeat, of2(4, own, group2, group1))
	c.silent(ever)
	if s := c.State(c.at); !slices.Equal(s.Groups, []netip.Addr{group2, group1}) || s.MLDv1 || s.Queries != 0 || s.Reports != 2 {
		t.Errorf("%+v", s)
	}
	// Not again for nothing, and again when the link comes again.
	c.Listen(c.at, own, []netip.Addr{own, static})
	c.silent(ever)
	c.Listen(c.at, own, []netip.Addr{own}) // the other is to be left
	c.Down()
	c.silent(ever)
	c.Up(c.at, mac)
	c.says(mostDelay, of2(4, own, group1))
	c.says(mostRepeat, of2(4, own, group1))
	c.silent(ever)
	// A delay is at random.
	delays := map[time.Duration]bool{first.Sub(now): true}
	for range 20 {
		c.Up(c.at, mac)
		began := c.at
		c.says(mostDelay, of2(4, own, group1))
		delays[c.at.Sub(began)] = true
		c.says(mostRepeat, of2(4, own, group1))
	}
	if len(delays) < 10 {
		t.Errorf("%v", delays)
	}
}

func TestAGroupComesAndGoes(t *testing.T) {
	c := listening(t)
	c.Listen(c.at, own, []netip.Addr{own})
	c.says(0, of2(3, own, group2))
	c.says(mostRepeat, of2(3, own, group2))
	c.silent(ever)
	if len(c.groups) != 1 {
		t.Errorf("%+v", c.groups)
	}
	c.Listen(c.at, own, []netip.Addr{own, static})
	c.says(0, of2(4, own, group2))
	// It goes again before the second report, which is then not sent, and so on.
	c.Listen(c.at, own, []netip.Addr{own})
	c.says(0, of2(3, own, group2))
	c.Listen(c.at, own, []netip.Addr{own, static})
	c.says(0, of2(4, own, group2))
	c.says(mostRepeat, of2(4, own, group2))
	c.silent(ever)
	c.Listen(c.at, none, nil)
	c.says(0, of2(3, none, group1, group2))
	c.says(mostRepeat, of2(3, none, group1, group2))
	c.silent(ever)
	if len(c.groups) != 0 {
		t.Errorf("%+v", c.groups)
	}
	c.hear(query(none, 0, 2, 125))
	c.silent(ever)
}

// Before the link-local address is one, reports come from ::, which switches take and routers do not: then all is said again.
func TestReportsComeFromTheLinkLocalAddress(t *testing.T) {
	c := &clock{T: t, at: now}
	c.Up(c.at, mac)
	c.silent(ever)
	c.Listen(c.at, none, []netip.Addr{own})
	c.says(0, of2(4, none, group1))
	c.Listen(c.at, own, []netip.Addr{own, static})
	c.says(0, of2(4, own, group1, group2))
	c.says(mostRepeat, of2(4, own, group1, group2))
	c.silent(ever)
	c.Listen(c.at, none, []netip.Addr{own, static})
	c.silent(ever)
	c.Listen(c.at, static, []netip.Addr{own, static}) // no link-local address
	c.silent(ever)
	c.hear(query(none, 0, 2, 125))
	c.says(1, of2(2, none, group1, group2))
	// On a link that came up just now it waits for its time all the same.
	c.Up(c.at, mac)
	at := c.Next()
	c.Listen(c.at, own, []netip.Addr{own, static})
	if !c.Next().Equal(at) {
		t.Errorf("%v, want %v", c.Next(), at)
	}
}

// An address is about to be asked for: its group is said first, also on a link that came up just now.
func TestHurry(t *testing.T) {
	c := &clock{T: t, at: now}
	c.Listen(c.at, own, []netip.Addr{own})
	for range 20 { // at random, it may be now
		if c.Up(c.at, mac); c.Next().After(c.at) {
			break
		}
	}
	if !c.Next().After(c.at) {
		t.Fatal("there is no delay")
	}
	c.Hurry(c.at)
	c.says(0, of2(4, own, group1))
	again := c.Next()
	c.Hurry(c.at)
	if !c.Next().Equal(again) {
		t.Error("what was said is repeated sooner")
	}
	c.says(mostRepeat, of2(4, own, group1))
	c.silent(ever)
}

func TestQueriesAreAnswered(t *testing.T) {
	c := listening(t)
	delays := map[time.Duration]bool{}
	for range 20 {
		began := c.at
		c.hear(query(none, 10000, 2, 125))
		c.says(10*time.Second, of2(2, own, group2, group1))
		delays[c.at.Sub(began)] = true
		c.silent(time.Minute)
	}
	if len(delays) < 10 {
		t.Errorf("%v", delays)
	}
	c.hear(query(group1, 1000, 2, 125))
	c.says(time.Second, of2(2, own, group1))
	c.silent(ever)
	c.hear(query(group2, 1000, 2, 125, static)) // of all sources, and so of this one
	c.says(time.Second, of2(2, own, group2))
	c.silent(ever)
	c.hear(query(netip.MustParseAddr("ff02::1:ff00:3"), 1000, 2, 125))
	c.silent(ever)
	c.hear(query(none, 0, 2, 125))
	c.says(1, of2(2, own, group2, group1))
	c.silent(ever)
	if s := c.State(c.at); s.Queries != 24 || s.Reports != 25 {
		t.Errorf("%+v", s)
	}
}

// Of several queries there is one answer, at the earliest of their times (RFC 3810, section 6.2).
func TestAnswersAreMerged(t *testing.T) {
	c := listening(t)
	c.hear(query(none, 0xffff, 2, 125))
	c.hear(query(none, 1000, 2, 125))
	c.hear(query(none, 0xffff, 2, 125))
	c.says(time.Second, of2(2, own, group2, group1))
	c.silent(ever)
	c.hear(query(group1, 0xffff, 2, 125))
	c.hear(query(group1, 1000, 2, 125))
	c.hear(query(group1, 0xffff, 2, 125, static))
	c.says(time.Second, of2(2, own, group1))
	c.silent(ever)
	// An answer about a group does not wait for that about all.
	c.hear(query(none, 0xffff, 2, 125))
	c.hear(query(group1, 0, 2, 125))
	c.says(1, of2(2, own, group1))
	c.says(ever, of2(2, own, group2, group1))
	c.silent(ever)
	// That about all is one about each, whichever was asked for first.
	c.hear(query(group1, 0xffff, 2, 125))
	c.hear(query(none, 0, 2, 125))
	c.hear(query(group2, 0xffff, 2, 125))
	c.says(1, of2(2, own, group2, group1))
	c.silent(ever)
	// One that is left has no answer any more.
	c.hear(query(group2, 0xffff, 2, 125))
	c.Listen(c.at, own, []netip.Addr{own})
	c.says(0, of2(3, own, group2))
	c.hear(query(group2, 0, 2, 125))
	c.says(mostRepeat, of2(3, own, group2))
	c.silent(ever)
	// Nor has a link that is down.
	c.hear(query(none, 0xffff, 2, 125))
	c.hear(query(group1, 0, 2, 125))
	c.Down()
	c.Up(c.at, mac)
	c.says(mostDelay, of2(4, own, group1))
	c.says(mostRepeat, of2(4, own, group1))
	c.silent(ever)
}

// While a querier speaks version 1 so does the listener; its queries are answered for each group, and others'
// reports change nothing.
func TestVersion1(t *testing.T) {
	c := listening(t)
	c.hear(query(none, 0xffff, 2, 125)) // answers of version 2 are over
	c.hear(query(group1, 0xffff, 2, 125))
	began := c.at
	c.hear(old(none, 10000))
	if s := c.State(c.at); !s.MLDv1 {
		t.Errorf("%+v", s)
	}
	answers := append(c.next(c.at.Add(10*time.Second)), c.next(began.Add(10*time.Second+leastAnswer))...)
	if len(answers) != 2 || !slices.Contains(answers, of1(131, own, group1)[0]) || !slices.Contains(answers, of1(131, own, group2)[0]) {
		t.Errorf("%+v", answers)
	}
	c.silent(time.Minute)
	c.hear(old(group1, 1000))
	c.says(time.Second, of1(131, own, group1))
	c.hear(query(group2, 1000, 2, 125)) // of version 2, meanwhile
	c.says(time.Second+leastAnswer, of1(131, own, group2))
	c.Listen(c.at, own, []netip.Addr{own})
	c.says(0, of1(132, own, group2))
	c.silent(time.Minute)
	c.Listen(c.at, own, []netip.Addr{own, static})
	c.says(0, of1(131, own, group2))
	c.says(mostRepeat, of1(131, own, group2))
	c.silent(time.Minute)
	// It ends with the time of the last query: twice the interval, and its delay.
	c.hear(old(none, 5000))
	last := c.at
	c.next(c.at.Add(5 * time.Second))
	c.next(c.at.Add(5*time.Second + leastAnswer))
	c.at = last.Add(2*125*time.Second + 5*time.Second - 1)
	c.hear(query(group1, 0, 2, 125))
	c.says(1, of1(131, own, group1))
	c.silent(time.Minute)
	if c.State(c.at).MLDv1 {
		t.Error("it does not end")
	}
	c.hear(query(none, 0, 2, 125))
	c.says(1, of2(2, own, group1, group2))
	c.silent(ever)
	// And with the link.
	c.hear(old(none, 5000))
	c.Up(c.at, mac)
	c.says(mostDelay, of2(4, own, group1, group2))
}

// What was not said at all is said also if the version changes; repetitions are not (RFC 3810, section 8.2.1).
func TestAChangeOfVersionLosesNoChange(t *testing.T) {
	c := listening(t)
	c.Up(c.at, mac)
	c.Listen(c.at, own, []netip.Addr{own}) // the other may be known here
	elsewhere := netip.MustParseAddr("ff02::1:ff00:3")
	c.hear(old(elsewhere, 0))
	c.says(0, of1(132, own, group2))
	c.says(mostDelay, of1(131, own, group1))
	c.says(mostRepeat, of1(131, own, group1))
	c.silent(time.Hour)
	c.hear(old(elsewhere, 0))
	c.Listen(c.at, own, []netip.Addr{own, static})
	c.says(0, of1(131, own, group2))
	c.at = c.at.Add(time.Hour) // version 2 again
	c.silent(ever)
	c.Listen(c.at, own, []netip.Addr{static})
	c.says(0, of2(3, own, group1))
	c.hear(old(elsewhere, 0)) // 1, and the group is left: that was said
	c.silent(ever)
	if len(c.groups) != 1 {
		t.Errorf("%+v", c.groups)
	}
}

// A querier's own values count, within bounds.
func TestWhatAQuerierGoesBy(t *testing.T) {
	c := listening(t)
	for qrv, want := range map[byte]int{0: 2, 1: 2, 2: 2, 3: 3, 7: 7} {
		c.hear(query(none, 0, qrv, 125))
		c.says(1, of2(2, own, group2, group1))
		c.Listen(c.at, own, []netip.Addr{own})
		c.says(0, of2(3, own, group2))
		for range want - 1 {
			c.says(mostRepeat, of2(3, own, group2))
		}
		c.silent(time.Hour)
		c.Listen(c.at, own, []netip.Addr{static, own})
		c.says(0, of2(4, own, group2))
		for range want - 1 {
			c.says(mostRepeat, of2(4, own, group2))
		}
		c.silent(time.Hour)
		slices.Reverse(c.groups)
	}
	for qqic, want := range map[byte]time.Duration{0: 2 * 125 * time.Second, 60: 2 * time.Minute, 255: 2 * mostInterval} {
		c.hear(query(group1, 0, 2, qqic))
		c.says(1, of2(2, own, group1))
		c.hear(old(group1, 0))
		c.says(leastAnswer, of1(131, own, group1))
		heard := c.at.Add(-leastAnswer)
		c.at = heard.Add(want - 1)
		if !c.State(c.at).MLDv1 || c.State(heard.Add(want+leastAnswer)).MLDv1 {
			t.Errorf("interval %d: not %v", qqic, want)
		}
		c.at = c.at.Add(time.Hour)
	}
}

// However many ask, and for whatever, a query allocates nothing, and answers go out ten times a second at most.
func TestAFloodOfQueries(t *testing.T) {
	c := listening(t)
	kinds := [][]byte{query(none, 0, 7, 255), query(group1, 0, 0, 0), query(group2, 1, 2, 1, static), query(none, 0xffff, 1, 1), query(netip.MustParseAddr("ff05::2"), 0, 2, 1)}
	for _, v1 := range []bool{false, true} {
		if v1 {
			kinds = append(kinds, old(none, 0), old(group1, 0), old(group2, 3))
		}
		var packets [][]byte
		for _, m := range kinds {
			packets = append(packets, ip(alert, m))
		}
		i := 0
		hear := func() {
			q, ok := Parse(packets[i%len(packets)])
			if !ok {
				t.Fatal(i)
			}
			i++
			c.Hear(c.at, q)
		}
		if n := testing.AllocsPerRun(1000, hear); n != 0 {
			t.Errorf("%v allocations for a query", n)
		}
		end, times, frames := c.at.Add(10*time.Second), 0, 0
		for ; c.at.Before(end); c.at = c.at.Add(time.Millisecond) {
			for range 20 {
				hear()
			}
			if list := c.Reports(c.at); len(list) > 0 {
				times++
				frames += len(list)
			}
			if len(c.groups) != 2 {
				t.Fatal(len(c.groups))
			}
		}
		if times > 101 || frames > 2*101 || times < 50 {
			t.Errorf("%d answers, %d frames", times, frames)
		}
	}
}

// Many addresses take several reports, and what is left does not pile up.
func TestManyGroups(t *testing.T) {
	c := &clock{T: t, at: now}
	c.Up(c.at, mac)
	var many []netip.Addr
	var groups []netip.Addr
	for i := range 100 {
		b := static.As16()
		b[13] = byte(i)
		many = append(many, netip.AddrFrom16(b))
		groups = append(groups, Group(many[i]))
	}
	c.Listen(c.at, own, many)
	if n := len(c.Reports(c.at)); n != 2 {
		t.Errorf("%d reports", n)
	}
	c.says(mostRepeat, of2(4, own, groups...))
	c.Listen(c.at, own, nil)
	if n := len(c.groups); n != mostLeaving {
		t.Errorf("%d groups that nobody listens to", n)
	}
	c.says(0, of2(3, own, groups[100-mostLeaving:]...))
}

func TestGroupOfAnAddress(t *testing.T) {
	if g := Group(netip.MustParseAddr("4037::01:800:200e:8c6c")); g != netip.MustParseAddr("ff02::1:ff0e:8c6c") { // RFC 4291, section 2.7.1
		t.Error(g)
	}
}

// Another reader of messages, gVisor's, sees in reports what was meant.
func TestGVisorReadsReports(t *testing.T) {
	c := &clock{T: t, at: now}
	c.Listen(c.at, own, []netip.Addr{static, own})
	c.Up(c.at, mac)
	c.Hurry(c.at)
	frames := c.Reports(c.at)
	if len(frames) != 1 {
		t.Fatal(len(frames))
	}
	it := header.MLDv2Report(frames[0][66:]).MulticastAddressRecords()
	for _, want := range []netip.Addr{group2, group1} {
		r, ok := it.Next()
		if ok != header.MLDv2ReportMulticastAddressRecordIteratorNextOk || r.RecordType() != header.MLDv2ReportRecordChangeToExcludeMode || addrOf(r.MulticastAddress()) != want || r.AuxDataLen() != 0 {
			t.Fatal(ok, r)
		}
		if s, ok := r.Sources(); !ok || !s.Done() {
			t.Error("it has sources")
		}
	}
	if _, ok := it.Next(); ok != header.MLDv2ReportMulticastAddressRecordIteratorNextDone {
		t.Error(ok)
	}
}

// FuzzQuery reads any packet, and has a listener hear it. Whatever it says, an answer is about the groups that
// are listened to, and comes within the time that a query can give.
func FuzzQuery(f *testing.F) {
	f.Add(ip(alert, old(none, 5)))
	f.Add(ip(alert, query(group1, 0xffff, 7, 255, static, own)))
	f.Add(ip([]byte{0, 0, 1, 4, 9, 9, 9, 9, 5, 2, 0, 0, 1, 0}, query(none, 0, 0, 0)))
	f.Fuzz(func(t *testing.T, b []byte) {
		guard := append(bytes.Clone(b), 0xa5)
		q, ok := Parse(guard[:len(b):len(b)])
		if !bytes.Equal(guard[:len(b)], b) {
			t.Fatal("the packet changed")
		}
		if !ok {
			return
		}
		if q.Group != none && !q.Group.IsMulticast() || q.MaxResponseDelay < 0 || q.MaxResponseDelay > 0x1fff<<10*time.Millisecond || q.Robustness > 7 || q.QueryInterval < 0 || q.QueryInterval > 31<<10*time.Second {
			t.Fatalf("%+v", q)
		}
		c := listening(t)
		c.Hear(c.at, q)
		asked := q.Group == none || q.Group == group1 || q.Group == group2
		end := c.at.Add(q.MaxResponseDelay + leastAnswer + 1)
		answered := false
		for {
			list := c.next(end)
			if len(list) == 0 {
				break
			}
			answered = true
			for _, s := range list {
				if s.group != group1 && s.group != group2 || (s.typ == 131) != q.MLDv1 || s.typ != 131 && s.kind != 2 || q.Group != none && s.group != q.Group {
					t.Fatalf("%+v to %+v", s, q)
				}
			}
		}
		if answered != asked {
			t.Fatalf("answered %v: %+v", answered, q)
		}
		c.silent(ever)
	})
}
