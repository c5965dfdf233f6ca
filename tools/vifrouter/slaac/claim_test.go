package slaac

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"barevif/pvnet/packet"
)

var (
	other  = [6]byte{0x00, 0x16, 0x3e, 9, 9, 9}
	global = netip.MustParseAddr("2001:db8:1::216:3eff:fe01:203")
	local  = netip.MustParseAddr("fe80::216:3eff:fe01:203")
	nobody = netip.IPv6Unspecified()
	nodes  = netip.MustParseAddr("ff02::1")
	// Both addresses end in the same three bytes.
	solicitedNode = netip.MustParseAddr("ff02::1:ff01:203")
)

// neighbour makes a solicitation or advertisement, written down from RFC 4861, sections 4.3 and 4.4.
func neighbour(typ, flags byte, target netip.Addr, options ...byte) []byte {
	b := []byte{typ, 0, 0, 0, flags, 0, 0, 0}
	return append(append(b, target.AsSlice()...), options...)
}

// wants makes a client that is to ask for an address, and says so in its settings.
func wants(t *testing.T) *Client {
	t.Helper()
	c := newClient()
	a, err := Parse(first, message(0, 1800, prefixOption("2001:db8:1::/64", onLink|own, 7200, 3600)))
	if err != nil {
		t.Fatal(err)
	}
	c.Hear(now, a)
	s := c.Settings(now)
	if len(s.Addrs) != 0 || !slices.Equal(s.Tentative, []netip.Addr{global, local}) || len(s.Taken)+len(s.Listening) != 0 || s.Next.After(now.Add(mostDelay)) ||
		len(s.OnLink) != 1 || s.OnLink[0] != netip.MustParsePrefix("2001:db8:1::/64") || s.Router != first {
		t.Fatalf("%+v", s)
	}
	return c
}

func TestAnAddressIsUsedOnceNobodyAnswers(t *testing.T) {
	c := wants(t)
	if n := len(c.Probes(now.Add(-1))); n != 0 {
		t.Errorf("%d frames before it is time", n)
	}
	asked := now.Add(mostDelay)
	frames := c.Probes(asked)
	if len(frames) != 2 || len(c.Probes(asked)) != 0 {
		t.Fatalf("%d frames", len(frames))
	}
	for i, b := range frames {
		h, ok := packet.Parse(b, len(b))
		if !ok || h.Version != 6 || h.Proto != 58 || h.End != len(b) || b[h.L3+7] != 255 || len(b)-h.L4 != 32 {
			t.Fatalf("%+v, % x", h, b)
		}
		if packet.Fold(packet.Add(uint64(h.Pseudo(b, len(b)-h.L4)), b[h.L4:])) != 0xffff {
			t.Error("the checksum is wrong")
		}
		src, dst := netip.AddrFrom16([16]byte(b[h.L3+8:])), netip.AddrFrom16([16]byte(b[h.L3+24:]))
		if [6]byte(b[:6]) != [6]byte{0x33, 0x33, 0xff, 1, 2, 3} || [6]byte(b[6:12]) != mac || src != nobody || dst != solicitedNode {
			t.Errorf("% x", b)
		}
		want := neighbour(135, 0, []netip.Addr{global, local}[i], append([]byte{14, 1}, c.claims[i].nonce[:]...)...)
		if got := b[h.L4:]; !slices.Equal(got[4:], want[4:]) || got[0] != 135 || got[1] != 0 {
			t.Errorf("% x, want % x", got, want)
		}
	}
	if c.claims[0].nonce == c.claims[1].nonce {
		t.Error("one nonce for two")
	}
	over := asked.Add(answerWait)
	both := []netip.Addr{global, local} // whoever has them answers to their groups
	if s := c.Settings(over.Add(-1)); len(s.Addrs) != 0 || len(s.Tentative) != 2 || !slices.Equal(s.Listening, both) || s.Next != over {
		t.Errorf("%+v", s)
	}
	s := c.Settings(over)
	if !slices.Equal(s.Listening, both) {
		t.Errorf("%+v", s)
	}
	if len(s.Addrs) != 1 || s.Addrs[0].Prefix != netip.PrefixFrom(global, 64) || len(s.Tentative)+len(s.Taken)+len(s.OnLink) != 0 || s.Next != now.Add(1800*time.Second) {
		t.Errorf("%+v", s)
	}
	// It stays, whatever stations say then, and also when the link comes again.
	if _, ok := c.Claimed(over, other, global, nodes, neighbour(136, 0x20, global)); ok {
		t.Error("an address in use is taken away")
	}
	c.Again(over)
	if s := c.Settings(over); len(s.Addrs) != 1 || len(s.Tentative) != 0 {
		t.Errorf("%+v", s)
	}
	// A prefix that comes later needs the address alone.
	late, _ := Parse(first, message(0, 1800, prefixOption("2001:db8:2::/64", own, 7200, 3600)))
	c.Hear(over, late)
	if s := c.Settings(over); len(s.Addrs) != 1 || len(s.Tentative) != 1 {
		t.Errorf("%+v", s)
	}
}

func TestAnAddressThatAnotherHasIsNotUsed(t *testing.T) {
	nonce := []byte{14, 1, 1, 2, 3, 4, 5, 6}
	for name, m := range map[string]struct {
		src, dst netip.Addr
		message  []byte
		claims   bool
	}{
		"it has it":                            {global, nodes, neighbour(136, 0x20, global, 2, 1, 0, 0x16, 0x3e, 9, 9, 9), true},
		"it has it and is a router":            {local, nodes, neighbour(136, 0xa0, global), true},
		"it says so to the router":             {global, global, neighbour(136, 0x60, global), true},
		"it asks, too":                         {nobody, solicitedNode, neighbour(135, 0, global), true},
		"it asks, too, with a nonce":           {nobody, solicitedNode, neighbour(135, 0, global, nonce...), true},
		"it answers a group as if asked":       {global, nodes, neighbour(136, 0x60, global), false},
		"it looks for a neighbour":             {first, solicitedNode, neighbour(135, 0, global), false},
		"it asks and names its MAC":            {nobody, solicitedNode, neighbour(135, 0, global, 1, 1, 0, 0x16, 0x3e, 9, 9, 9), false},
		"it asks a station":                    {nobody, global, neighbour(135, 0, global), false},
		"it asks another group":                {nobody, nodes, neighbour(135, 0, global), false},
		"another address":                      {nobody, solicitedNode, neighbour(135, 0, netip.MustParseAddr("2001:db8:9::216:3eff:fe01:203")), false},
		"another code":                         {global, nodes, append([]byte{136, 1}, neighbour(136, 0x20, global)[2:]...), false},
		"another type":                         {global, nodes, neighbour(137, 0x20, global), false},
		"cut short":                            {global, nodes, neighbour(136, 0x20, global)[:23], false},
		"nothing":                              {global, nodes, nil, false},
		"half an option":                       {global, nodes, neighbour(136, 0x20, global, 2, 1, 0), false},
		"an option without a length":           {global, nodes, neighbour(136, 0x20, global, make([]byte, 8)...), false},
		"an option that is longer than it all": {global, nodes, neighbour(136, 0x20, global, 2, 2, 0, 0, 0, 0, 0, 0), false},
	} {
		for _, probed := range []bool{false, true} {
			c := wants(t)
			at := now.Add(mostDelay)
			if probed {
				c.Probes(at)
			}
			if a, ok := c.Claimed(at, other, m.src, m.dst, m.message); ok != m.claims || ok && a != global {
				t.Errorf("%s, asked before %v: %v, %v", name, probed, a, ok)
			}
			if !probed {
				c.Probes(at)
			}
			s := c.Settings(at.Add(answerWait))
			if m.claims {
				if len(s.Addrs) != 0 || !slices.Equal(s.Taken, []Taken{{global, other}}) || len(s.OnLink) != 1 {
					t.Errorf("%s, asked before %v: %+v", name, probed, s)
				}
			} else if len(s.Addrs) != 1 || len(s.Taken) != 0 {
				t.Errorf("%s, asked before %v: %+v", name, probed, s)
			}
		}
	}
}

// What the link brings back of its own says nothing; that of somebody else does, though the frame
// has the same MAC: MACs that are the same are why addresses are.
func TestItsOwnSolicitationIsNoClaim(t *testing.T) {
	c := wants(t)
	at := now.Add(mostDelay)
	own := c.Probes(at)[0]
	if _, ok := c.Claimed(at, mac, nobody, solicitedNode, own[54:]); ok {
		t.Error("its own")
	}
	longer := append(slices.Clone(own[54:]), make([]byte, 8)...) // a nonce that begins like its own
	longer[25] = 2
	if _, ok := c.Claimed(at, mac, nobody, solicitedNode, longer); !ok {
		t.Error("a nonce of another length")
	}
	c = wants(t)
	own = c.Probes(at)[0]
	own[len(own)-1]++
	if _, ok := c.Claimed(at, mac, nobody, solicitedNode, own[54:]); !ok {
		t.Error("not its own")
	}
}

// What is taken is asked for again later, and at once when the link comes again; it is used when
// nobody has it any more.
func TestATakenAddressIsAskedForAgain(t *testing.T) {
	for _, again := range []bool{false, true} {
		c := wants(t)
		at := now.Add(mostDelay)
		c.Probes(at)
		if _, ok := c.Claimed(at, other, global, nodes, neighbour(136, 0x20, global)); !ok {
			t.Fatal("no claim")
		}
		if _, ok := c.Claimed(at, other, global, nodes, neighbour(136, 0x20, global)); ok {
			t.Error("taken twice")
		}
		if s := c.Settings(at.Add(answerWait)); s.Next != at.Add(askAgain) || len(s.Taken) != 1 || len(s.Tentative) != 0 {
			t.Errorf("%+v", s)
		}
		if f := c.Probes(at.Add(answerWait)); len(f) != 0 {
			t.Error("it is asked for at once")
		}
		later := at.Add(askAgain)
		if again {
			later = at.Add(2 * answerWait)
			c.Again(later)
			later = later.Add(mostDelay)
		}
		if s := c.Settings(later); len(s.Tentative) != 1 || len(s.Taken) != 0 {
			t.Errorf("%+v", s)
		}
		if f := c.Probes(later); len(f) != 1 {
			t.Errorf("%d frames", len(f))
		}
		if s := c.Settings(later.Add(answerWait)); len(s.Addrs) != 1 || len(s.Taken) != 0 {
			t.Errorf("%+v", s)
		}
	}
}

// Whoever has the link-local address of the same MAC would be confused with this host for any.
func TestNoAddressWithoutTheLinkLocalOne(t *testing.T) {
	c := wants(t)
	at := now.Add(mostDelay)
	c.Probes(at)
	if a, ok := c.Claimed(at, other, local, nodes, neighbour(136, 0x20, local)); !ok || a != local {
		t.Fatal(a, ok)
	}
	if s := c.Settings(at.Add(answerWait)); len(s.Addrs) != 0 || len(s.Taken) != 1 || s.Taken[0].Addr != local || !slices.Equal(s.Listening, []netip.Addr{global}) {
		t.Errorf("%+v", s)
	}
}

// The link is asked for no address of an excluded network, nor for the link-local one on its account. Such
// a prefix is used once it is not excluded any more, and is over as soon as it is again.
func TestAnExcludedNetworkGivesNoAddress(t *testing.T) {
	guests, linked, free := netip.MustParsePrefix("2001:db8:1::/56"), netip.MustParsePrefix("2001:db8::/44"), netip.MustParsePrefix("2001:db8:100::/64")
	c := newClient()
	c.Exclude([]netip.Prefix{netip.MustParsePrefix("fd00:1::/64"), guests})
	c.Reset(mac) // and another card changes nothing of it
	hear := func(at time.Time, options ...[]byte) {
		t.Helper()
		a, err := Parse(first, message(0, 1800, options...))
		if err != nil {
			t.Fatal(err)
		}
		c.Hear(at, a)
	}
	hear(now, prefixOption("2001:db8:1::/64", own, 7200, 3600), prefixOption(linked.String(), onLink, 7200, 3600))
	s := c.Settings(now)
	if !slices.Equal(s.Excluded, []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/64"), linked}) || len(s.Addrs)+len(s.OnLink)+len(s.Tentative)+len(s.Listening) != 0 || s.Router != first {
		t.Errorf("%+v", s)
	}
	if n := len(c.Probes(now.Add(mostDelay))); n != 0 {
		t.Errorf("%d frames ask for an address of it", n)
	}
	// Beside it another prefix is used as ever.
	settle := func(at time.Time, asked int) Settings {
		t.Helper()
		c.Settings(at)
		if n := len(c.Probes(at.Add(mostDelay))); n != asked {
			t.Errorf("%d frames, want %d", n, asked)
		}
		return c.Settings(at.Add(mostDelay + answerWait))
	}
	hear(now, prefixOption(free.String(), onLink|own, 7200, 3600))
	s = settle(now, 2)
	if len(s.Addrs) != 1 || s.Addrs[0].Prefix.Masked() != free || len(s.Excluded) != 2 {
		t.Errorf("%+v", s)
	}
	// Not excluded any more: the link is asked for it, and without another announcement.
	at := now.Add(time.Minute)
	c.Exclude(nil)
	s = settle(at, 1)
	if len(s.Addrs) != 2 || s.Addrs[1].Prefix.Addr() != global || len(s.OnLink) != 1 || len(s.Excluded) != 0 {
		t.Errorf("%+v", s)
	}
	// Excluded again, it is over at once; and it is asked for anew when that ends.
	at = at.Add(time.Minute)
	c.Exclude([]netip.Prefix{guests})
	if s = c.Settings(at); len(s.Addrs) != 1 || s.Addrs[0].Prefix.Masked() != free || len(s.OnLink) != 0 || len(s.Excluded) != 2 || slices.Contains(s.Listening, global) {
		t.Errorf("%+v", s)
	}
	c.Exclude(nil)
	if s = c.Settings(at); len(s.Addrs) != 1 || !slices.Equal(s.Tentative, []netip.Addr{global}) {
		t.Errorf("%+v", s)
	}
	if s = settle(at, 1); len(s.Addrs) != 2 {
		t.Errorf("%+v", s)
	}
}

// A station that announces prefixes and claims each address keeps nothing but a bounded number of
// them busy; a claim ends with its prefix.
func TestAStationThatClaimsEverything(t *testing.T) {
	c := newClient()
	at := now
	for i := range 300 {
		p := prefixOption(fmt.Sprintf("2001:db8:%x::/64", i), onLink|own, 60, 60)
		a, err := Parse(first, message(0, 1800, p))
		if err != nil {
			t.Fatal(err)
		}
		c.Hear(at, a)
		at = at.Add(time.Second)
		s := c.Settings(at)
		for _, one := range append(s.Tentative, global, local) {
			c.Claimed(at, other, one, nodes, neighbour(136, 0x20, one))
		}
		if n := len(c.Probes(at)); len(c.claims) > MaxPrefixes+1 || n > MaxPrefixes+1 || len(s.Addrs) != 0 || len(s.Taken)+len(s.Tentative) != len(c.claims) {
			t.Fatalf("after %d: %d claims, %d frames, %+v", i, len(c.claims), n, s)
		}
	}
	if s := c.Settings(at.Add(time.Hour)); len(c.claims) != 0 || len(s.Taken)+len(s.Tentative) != 0 || !s.Next.IsZero() {
		t.Errorf("%+v, %+v", c.claims, s)
	}
}

func FuzzClaim(f *testing.F) {
	f.Add(neighbour(136, 0x20, global, 2, 1, 0, 0x16, 0x3e, 9, 9, 9), true)
	f.Add(neighbour(135, 0, local, 14, 1, 1, 2, 3, 4, 5, 6), false)
	f.Add(neighbour(135, 0, global, 1, 1, 0, 0, 0, 0, 0, 0), true)
	f.Fuzz(func(t *testing.T, m []byte, multicast bool) {
		c := wants(t)
		at := now.Add(mostDelay)
		c.Probes(at)
		dst := global
		if multicast {
			dst = solicitedNode
		}
		a, ok := c.Claimed(at, other, nobody, dst, m)
		if s := c.Settings(at.Add(answerWait)); ok != (len(s.Taken) == 1) || ok && (a != global && a != local || binary.BigEndian.Uint64(m[16:]) != 0x02163efffe010203) || ok == (len(s.Addrs) == 1) {
			t.Errorf("%v, %v: %+v", a, ok, s)
		}
	})
}

// However many excluded prefixes are announced, in one message or in many, they hide no other; and their own
// number has a bound.
func TestExcludedPrefixesTakeNoRoomFromOthers(t *testing.T) {
	guests, free := netip.MustParsePrefix("2001:db8:1::/48"), netip.MustParsePrefix("2001:db8:100::/64")
	var many [][]byte
	for i := range 5 * MaxPrefixes {
		many = append(many, prefixOption(fmt.Sprintf("2001:db8:1:%x::/64", i), onLink|own, 7200, 3600))
	}
	used := func(s Settings) (list []netip.Prefix) {
		for _, a := range s.Addrs {
			list = append(list, a.Prefix.Masked())
		}
		return list
	}
	for _, messages := range [][][][]byte{
		{append(slices.Clone(many), prefixOption(free.String(), onLink|own, 7200, 3600))},
		{many, {prefixOption(free.String(), onLink|own, 7200, 3600)}},
	} {
		c := newClient()
		c.Exclude([]netip.Prefix{guests})
		var s Settings
		for _, options := range messages {
			s = heard(t, c, now, first, message(0, 1800, options...))
		}
		if !slices.Equal(used(s), []netip.Prefix{free}) || len(s.Excluded) != MaxPrefixes || len(c.prefixes) != MaxPrefixes+1 {
			t.Errorf("%+v", s)
		}
		// Not excluded any more they take the room that is left. The address in use stays and comes first.
		c.Exclude(nil)
		s = heard(t, c, now, first, message(0, 1800))
		if n := len(s.Addrs); n != MaxPrefixes || used(s)[0] != free || len(s.Excluded) != 0 || len(c.prefixes) != MaxPrefixes {
			t.Errorf("%+v", s)
		}
		// Excluded again they leave it to others.
		c.Exclude([]netip.Prefix{guests})
		late := netip.MustParsePrefix("2001:db8:101::/64")
		s = heard(t, c, now, first, message(0, 1800, prefixOption(late.String(), onLink|own, 7200, 3600)))
		if !slices.Equal(used(s), []netip.Prefix{free, late}) || len(s.Excluded) != MaxPrefixes-1 {
			t.Errorf("%+v", s)
		}
	}
}
