package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/forward"
	"barevif/pvnet/packet"
	"barevif/pvnet/pvnettest"
	"barevif/pvnet/router"
	"barevif/xenbus/toolstack"
)

// A rig is a plane between two guests whose goroutines are the test: nothing receives but what the
// test moves.
type rig struct {
	testing.TB
	*plane
	now   time.Duration
	looks int // at the clock
	ports [2]*port
	rx    [2]*pvnet.RX // of the ports' devices
	txs   [2]*pvnet.TX // of the guests
	rxs   [2]*pvnet.RX
	cfg   router.Config
	w     worker
	in    [forward.Batch]pvnet.Frame
	out   [forward.Batch]pvnet.Frame
}

// rigMTU is the MTU of the vifs of a rig.
const rigMTU = 600

func rigMAC(i int) [6]byte { return [6]byte{2, 0, 0, 0, 9, byte(i)} }

func rigAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i + 1), 0, 5}) }

func newRig(t testing.TB) *rig {
	h := pvnettest.NewHub(t, 2, toolstack.Vif{MTU: rigMTU}, func(int) pvnet.Config { return pvnet.Config{} }, pvnet.ServeConfig{})
	core, err := router.New(router.Limits{Replies: 1e6})
	if err != nil {
		t.Fatal(err)
	}
	cfg := router.Config{Default: router.Accept, LocalDefault: router.Accept}
	r := &rig{TB: t, now: time.Hour}
	defer func() { r.cfg = cfg }()
	for i := range r.ports {
		a := netip.AddrFrom4([4]byte{10, byte(i + 1), 0, 1})
		cfg.Ports = append(cfg.Ports, router.Port{ID: router.PortID(i + 1), Name: fmt.Sprint("guest ", i), MAC: guestMAC, MTU: rigMTU, Addrs: []netip.Prefix{netip.PrefixFrom(a, 24)}})
	}
	if err := core.Configure(cfg); err != nil {
		t.Fatal(err)
	}
	local, err := newLocalStack()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(local.close)
	r.plane = newPlane(core, local)
	r.clock = func() time.Duration { r.looks++; return r.now }
	for i := range r.ports {
		if r.ports[i], err = r.newPort(router.PortID(i+1), h.Backs[i]); err != nil {
			t.Fatal(err)
		}
		r.add(r.ports[i])
		if r.rx[i], err = h.Backs[i].OwnRX(0); err != nil {
			t.Fatal(err)
		}
		if r.txs[i], err = h.Fronts[i].OwnTX(0); err != nil {
			t.Fatal(err)
		}
		if r.rxs[i], err = h.Fronts[i].OwnRX(0); err != nil {
			t.Fatal(err)
		}
		if err := core.Learn(r.now, router.PortID(i+1), rigAddr(i), rigMAC(i)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, p := range r.ports {
			r.remove(p)
		}
	})
	return r
}

// datagram makes what guest 0 sends to an address.
func (r *rig) datagram(to netip.Addr, n int) []byte {
	return udpFrame(rigMAC(0), guestMAC, netip.AddrPortFrom(rigAddr(0), 1000), netip.AddrPortFrom(to, 9), make([]byte, n))
}

// ttl makes the TTL of a packet of IPv4 another.
func ttl(frame []byte, n byte) []byte {
	frame[22], frame[24], frame[25] = n, 0, 0
	binary.BigEndian.PutUint16(frame[24:], packet.Checksum(frame[14:34]))
	return frame
}

// request is an ARP request of guest 0 for the router's address.
func (r *rig) request() []byte {
	b := make([]byte, 42)
	mac, own := rigMAC(0), rigAddr(0).As4()
	copy(b, []byte{255, 255, 255, 255, 255, 255})
	copy(b[6:], mac[:])
	copy(b[12:], []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 1})
	copy(b[22:], mac[:])
	copy(b[28:], own[:])
	copy(b[38:], []byte{10, 1, 0, 1})
	return b
}

// move has the router move frames of guest 0.
func (r *rig) move(frames ...[]byte) {
	n := 0
	for _, b := range frames {
		if r.txs[0].AllocSize(r.in[n:n+1], len(b)) != 1 {
			r.Fatal("no page")
		}
		r.in[n].CopyFrom(b)
		n++
	}
	if k, err := r.txs[0].SendWait(r.in[:n]); k != n || err != nil {
		r.Fatal(k, err)
	}
	for n > 0 {
		k, err := r.rx[0].Receive(r.in[:])
		if err != nil {
			r.Fatal(err)
		}
		if lost := r.plane.move(r.ports[0], &r.w, r.in[:k]); lost != 0 {
			r.Fatal(lost, "frames lost")
		}
		n -= k
	}
}

// gets waits until a guest has got so many frames.
func (r *rig) gets(guest, n int) {
	var end time.Time
	for n > 0 {
		k, err := r.rxs[guest].Poll(r.out[:])
		if err != nil {
			r.Fatal(err)
		}
		r.rxs[guest].Release(r.out[:k])
		if n -= k; k > 0 {
			continue
		}
		runtime.Gosched()
		switch now := time.Now(); {
		case end.IsZero():
			end = now.Add(limit)
		case now.After(end):
			r.Fatal(n, "frames never come")
		}
	}
	if n < 0 {
		r.Fatal(-n, "frames too many")
	}
}

// What the plane does with a frame allocates nothing, whatever the verdict. A batch that is
// forwarded costs one look at the clock.
func TestThePlaneAllocatesNothing(t *testing.T) {
	r := newRig(t)
	batch := func(b []byte, n int) [][]byte { return slices.Repeat([][]byte{b}, n) }
	long := r.datagram(rigAddr(1), 1400)
	own := udpFrame([6]byte{}, [6]byte{}, netip.MustParseAddrPort("10.2.0.1:53"), netip.AddrPortFrom(rigAddr(1), 1000), make([]byte, 100))
	ownLong := udpFrame([6]byte{}, [6]byte{}, netip.MustParseAddrPort("10.2.0.1:53"), netip.AddrPortFrom(rigAddr(1), 1000), make([]byte, 1300))
	room := make([]byte, len(ownLong))
	mixed := append(append(batch(r.datagram(rigAddr(1), 22), 10), batch(r.request(), 2)...), batch(r.datagram(rigAddr(1), 500), 10)...)
	lonely := batch(r.datagram(netip.MustParseAddr("10.2.0.77"), 22), 4)
	for i := range lonely {
		lonely[i] = slices.Clone(lonely[i])
	}
	forwarded, expired, requests, cut := batch(r.datagram(rigAddr(1), 22), 32), batch(ttl(r.datagram(rigAddr(1), 22), 1), 16), batch(r.request(), 16), batch(long, 4)
	var ask []hopKey
	for _, c := range []struct {
		name  string
		looks int // at the clock; 0: more than those of batches
		cycle func()
	}{
		{"forwarded", 1, func() { r.move(forwarded...); r.gets(1, 32) }},
		{"ICMP errors", 1, func() { r.move(expired...); r.gets(0, 16) }},
		{"ARP replies", 1, func() { r.move(requests...); r.gets(0, 16) }},
		{"fragments", 1, func() { r.move(cut...); r.gets(1, 4*3) }},
		{"mixed", 1, func() { r.move(mixed...); r.gets(1, 20); r.gets(0, 2) }},
		{"of its own", 1, func() { copy(room, own); r.sendOwn(&r.w, room[:len(own)]); r.gets(1, 1) }},
		{"fragments of its own", 1, func() { copy(room, ownLong); r.sendOwn(&r.w, room); r.gets(1, 3) }},
		{"no neighbour", 0, func() {
			r.move(lonely...)
			r.gets(1, 1) // a solicitation
			for range solicits - 1 {
				r.now += solicitEvery
				ask, r.w.waited = r.wait.due(r.now, ask[:0], r.w.waited[:0])
				for _, key := range ask {
					r.solicit(&r.w, key.out, key.next)
				}
				r.gets(1, 1)
			}
			r.now += solicitEvery
			ask, r.w.waited = r.wait.due(r.now, ask[:0], r.w.waited[:0])
			r.again(&r.w, true)
			r.gets(0, 4) // host unreachable
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.TB = t
			for i := range r.ports {
				if err := r.core.Learn(r.now, router.PortID(i+1), rigAddr(i), rigMAC(i)); err != nil {
					t.Fatal(err)
				}
			}
			for range 3 {
				c.cycle()
			}
			least := 1e9
			for range 5 { // what runs beside the test allocates now and then
				least = min(least, testing.AllocsPerRun(10, c.cycle))
			}
			if least >= 1 {
				t.Errorf("%v allocations", least)
			}
			r.looks = 0
			if c.cycle(); c.looks != 0 && r.looks != c.looks {
				t.Errorf("%d looks at the clock, want %d", r.looks, c.looks)
			}
		})
	}
	if n := r.n.control.Load() + r.n.failed.Load() + r.n.undelivered.Load(); n != 0 {
		t.Errorf("%d frames lost", n)
	}
}

// What is cut is cut to the MTU that the core has for a port, which may be less than the device's; what
// must not be cut is told that.
func TestFragmentsKeepToTheMTUOfTheCore(t *testing.T) {
	const least = 576
	r := newRig(t)
	r.cfg.Ports[1].MTU = least
	if err := r.core.Configure(r.cfg); err != nil {
		t.Fatal(err)
	}
	sizes := func(guest int) (list []int) {
		n, err := r.rxs[guest].Receive(r.out[:])
		if err != nil {
			t.Fatal(err)
		}
		for i := range r.out[:n] {
			list = append(list, r.out[i].Len())
		}
		r.rxs[guest].Release(r.out[:n])
		return list
	}
	r.move(r.datagram(rigAddr(1), 1400))
	var got []int
	for len(got) < 3 {
		got = append(got, sizes(1)...)
	}
	if want := []int{14 + 20 + 552, 14 + 20 + 552, 14 + 20 + 304}; !slices.Equal(got, want) {
		t.Errorf("fragments of %v bytes, want %v", got, want)
	}
	whole := r.datagram(rigAddr(1), 1400)
	whole[20] |= 0x40 // not to be cut
	r.move(ttl(whole, 64))
	n, err := r.rxs[0].Receive(r.out[:])
	if err != nil || n != 1 {
		t.Fatal(n, err)
	}
	b := make([]byte, r.out[0].Len())
	r.out[0].CopyTo(b)
	r.rxs[0].Release(r.out[:n])
	if len(b) < 42 || b[34] != 3 || b[35] != 4 || binary.BigEndian.Uint32(b[38:]) != least {
		t.Errorf("% x", b[:min(len(b), 42)])
	}
}

// Frames that waited, of guests and of the router's own, go when the neighbour answers; what may
// wait, and what is kept for it, is bounded.
func TestWhatWaitsForNeighboursIsBounded(t *testing.T) {
	r := newRig(t)
	here := netip.MustParseAddr("10.2.0.7")
	r.move(r.datagram(here, 40), r.datagram(here, 41))
	own := udpFrame([6]byte{}, [6]byte{}, netip.MustParseAddrPort("10.2.0.1:53"), netip.AddrPortFrom(here, 1000), make([]byte, 100))
	sent := slices.Clone(own)
	r.sendOwn(&r.w, sent)
	clear(sent) // the caller's again
	r.gets(1, 1)
	if err := r.core.Learn(r.now, 2, here, rigMAC(1)); err != nil {
		t.Fatal(err)
	}
	r.retry(r.ports[1], &r.w, here)
	var sizes []int
	for len(sizes) < 3 {
		n, err := r.rxs[1].Receive(r.out[:])
		if err != nil {
			t.Fatal(err)
		}
		for i := range r.out[:n] {
			sizes = append(sizes, r.out[i].Len())
			if h, ok := r.out[i].Headers(); !ok || h.L5 == 0 {
				t.Errorf("frame %d is none", i)
			}
		}
		r.rxs[1].Release(r.out[:n])
	}
	slices.Sort(sizes)
	if !slices.Equal(sizes, []int{82, 83, len(own)}) {
		t.Errorf("frames of %v bytes", sizes)
	}
	for i := range 250 {
		next := netip.AddrFrom4([4]byte{10, 2, 0, byte(i)})
		if next == rigAddr(1) || next == here || i < 2 {
			continue
		}
		r.move(r.datagram(next, 40))
		binary.BigEndian.PutUint32(own[30:], 10<<24|2<<16|uint32(i))
		own[24], own[25] = 0, 0
		binary.BigEndian.PutUint16(own[24:], packet.Checksum(own[14:34]))
		r.sendOwn(&r.w, slices.Clone(own))
		n, err := r.rxs[1].Poll(r.out[:]) // solicitations
		if err != nil {
			t.Fatal(err)
		}
		r.rxs[1].Release(r.out[:n])
	}
	if n := r.ports[0].held.Load(); n != waitPerPort || r.wait.own[2] != waitOwn || len(r.wait.hops) > waitPerPort+waitOwn || r.wait.lost == 0 {
		t.Errorf("%d and %d frames wait for %d neighbours, %d were lost", n, r.wait.own[2], len(r.wait.hops), r.wait.lost)
	}
	// A guest who has the router wait for many neighbours takes no room from another's frames.
	lost := r.wait.lost
	r.sendOwn(&r.w, udpFrame([6]byte{}, [6]byte{}, netip.MustParseAddrPort("10.1.0.1:53"), netip.MustParseAddrPort("10.1.0.9:1000"), nil))
	if r.wait.lost != lost || r.wait.own[1] != 1 {
		t.Errorf("%d frames for the other guest wait, %d were lost", r.wait.own[1], r.wait.lost-lost)
	}
	r.w.waited = r.wait.take(1, r.wait.take(2, r.w.waited[:0]))
	r.again(&r.w, true)
	if n := r.ports[0].held.Load(); n != 0 || r.wait.own != [router.MaxPorts]uint8{} || len(r.wait.hops) != 0 || len(r.wait.spare) > spareHops || len(r.wait.rooms) > spareRooms {
		t.Errorf("%d and %d frames wait for %d neighbours; %d and %d spare", n, r.wait.own[2], len(r.wait.hops), len(r.wait.spare), len(r.wait.rooms))
	}
}

// A guest makes connections to the router itself at a bounded rate, however many it begins, and another
// guest begins its own meanwhile.
func TestConnectionsToTheRouterAreBounded(t *testing.T) {
	r := newRig(t)
	if err := r.local.setAddrs([]netip.Addr{netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.2.0.1")}); err != nil {
		t.Fatal(err)
	}
	l, err := r.local.listenTCP(netip.MustParseAddrPort("10.1.0.1:53"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	began := func() uint64 { return r.local.stack.Stats().TCP.ValidSegmentsReceived.Value() }
	knock := func(n int) uint64 {
		t.Helper()
		before := began()
		for i := range n {
			r.toLocal(r.ports[0], synFrame(rigMAC(0), guestMAC, netip.AddrPortFrom(rigAddr(0), uint16(1024+i)), netip.MustParseAddrPort("10.1.0.1:53")))
		}
		return began() - before
	}
	if n := knock(3 * knockBurst); n != knockBurst || r.n.knocks.Load() != 2*knockBurst {
		t.Errorf("%d connections begin at once, %d do not", n, r.n.knocks.Load())
	}
	r.now += time.Second
	if n := knock(3 * knockBurst); n != knockRate {
		t.Errorf("%d connections begin a second later", n)
	}
	if !r.ports[1].knocks.allow(r.now) {
		t.Error("another guest begins none")
	}
}

// synFrame returns the Ethernet frame of a SYN over IPv4, with complete checksums.
func synFrame(from, to [6]byte, src, dst netip.AddrPort) []byte {
	b := udpFrame(from, to, src, dst, make([]byte, 12)) // as long as a TCP header
	ip := b[ethernet:]
	ip[9] = packet.TCP
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], packet.Checksum(ip[:ipHeader4]))
	seg := ip[ipHeader4:]
	clear(seg[4:])
	seg[12], seg[13], seg[14] = 5<<4, flagSYN, 0xff
	binary.BigEndian.PutUint16(seg[16:], ^packet.Fold(packet.Add(packet.Add(packet.TCP+20, ip[12:20]), seg)))
	return b
}

// A guest that says where it is, again and again, has nothing processed that waits for others: those
// are given up in time.
func TestAnnouncementsDoNotKeepFramesWaiting(t *testing.T) {
	r := newRig(t)
	absent := netip.MustParseAddr("10.2.0.77")
	r.move(r.datagram(absent, 40))
	own := udpFrame([6]byte{}, [6]byte{}, netip.MustParseAddrPort("10.1.0.1:53"), netip.MustParseAddrPort("10.1.0.77:1000"), nil)
	r.sendOwn(&r.w, own) // for a neighbour at the port of the guest that announces itself
	r.gets(0, 1)
	r.gets(1, 1)
	waited := r.wait.total
	for range 10 {
		r.move(r.request())
		r.gets(0, 1) // the answer, and no solicitation
	}
	if r.wait.total != waited || len(r.wait.hops) != 2 {
		t.Errorf("%d frames have waited, %d before it; for %d neighbours", r.wait.total, waited, len(r.wait.hops))
	}
	if h := r.wait.hops[hopKey{1, netip.MustParseAddr("10.1.0.77")}]; h == nil || h.asked != 1 {
		t.Errorf("%+v", h)
	}
}
