package hostile

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
	"barevif/xenbus/xenstore"
)

// offloadKeys is what a peer publishes that takes long frames and partial checksums.
func offloadKeys() xenstore.Values {
	return xenstore.Values{
		"feature-no-csum-offload": "0", "feature-ipv6-csum-offload": "1",
		"feature-gso-tcpv4": "1", "feature-gso-tcpv6": "1",
	}
}

// An arrival is a received frame with its metadata.
type arrival struct {
	b    []byte
	gso  pvnet.GSO
	csum pvnet.Checksum
}

func (a arrival) differs(want arrival) error {
	if a.gso != want.gso || a.csum != want.csum {
		return fmt.Errorf("%+v, checksum %d, want %+v, %d", a.gso, a.csum, want.gso, want.csum)
	}
	if !bytes.Equal(a.b, want.b) {
		return fmt.Errorf("%d bytes, want %d others", len(a.b), len(want.b))
	}
	return nil
}

func arrivalOf(f *pvnet.Frame) arrival {
	b := make([]byte, f.Len())
	f.CopyTo(b)
	return arrival{b, f.GSO(), f.Checksum()}
}

// listenMetadata is listen that also keeps the metadata of the frames.
func listenMetadata(d *pvnet.Device) (*sink, chan arrival) {
	s := &sink{dev: d, frames: make(chan []byte, 4096), ended: make(chan error, 1)}
	all := make(chan arrival, 4096)
	go func() {
		s.ended <- d.Listen(context.Background(), func(f pvnet.Frame) {
			s.seen.Add(1)
			a := arrivalOf(&f)
			if binary.BigEndian.Uint16(a.b[12:]) == 0x88b5 { // a frame of works
				s.frames <- a.b
			} else {
				all <- a
			}
		})
	}()
	return s, all
}

// attackBackendWith is attack by a frontend that publishes more keys.
func (l *lab) attackBackendWith(keys xenstore.Values) (*guest, chan arrival) {
	l.t.Helper()
	g := l.newGuest()
	all := g.Keys()
	maps.Copy(all, keys)
	l.write(l.guestStore, g.v.FrontDir(), all, "4")
	g.awaitBackend("4")
	waitLinkUp(l.t, g.dev)
	var got chan arrival
	g.sink, got = listenMetadata(g.dev)
	return g, got
}

// connectFrontendWith is connectFrontend to a backend that publishes more keys.
func (l *lab) connectFrontendWith(cfg pvnet.Config, keys xenstore.Values) *driver {
	l.t.Helper()
	return l.connectFrontendBy(cfg, func(drv *driver) {
		offer := raw.BackKeys()
		maps.Copy(offer, keys)
		l.write(l.tools, drv.v.BackDir(), offer, "") // some values are longer than a domain may write
		drv.offerWith(nil)
	})
}

// A gsoCase is a frame with extras, and what becomes of it at an end that takes long frames.
type gsoCase struct {
	name    string
	frame   []byte
	flags   uint16 // flags of the tx ring
	extras  []raw.Extra
	sizes   []int // sizes of the slots; the rest is in as few as possible
	outcome outcome
	want    arrival // the arrival if it passes
	fixup   bool    // its checksum was not partial
}

type outcome int

const (
	delivered outcome = iota
	dropped           // DropBadGSO
	violation         // no correct peer sends it
)

const partial = raw.TxBlank | raw.TxValidated

// ipOf is the offset of the IP header in a frame without tags; l4Of that of the TCP
// header after an IP header without options.
const ipOf = 14

func l4Of(v6 bool) int {
	if v6 {
		return ipOf + 40
	}
	return ipOf + 20
}

func gsoTypeOf(v6 bool) pvnet.GSOType {
	if v6 {
		return pvnet.GSOTCPv6
	}
	return pvnet.GSOTCPv4
}

// withBytes returns b with v at offset i.
func withBytes(b []byte, i int, v ...byte) []byte {
	b = bytes.Clone(b)
	copy(b[i:], v)
	return b
}

func bigEndian16(v int) []byte { return binary.BigEndian.AppendUint16(nil, uint16(v)) }

// chainExtras returns extras with the more flag on all but the last.
func chainExtras(extras ...raw.Extra) []raw.Extra {
	for i := range extras[:len(extras)-1] {
		extras[i].Flags = 1
	}
	return extras
}

// gsoCases are long frames of every kind, correct and malformed (xenvif_get_extras,
// xenvif_set_skb_gso, checksum_setup; xennet_get_extras, xennet_set_skb_gso).
func gsoCases() (all []gsoCase) {
	add := func(name string, frame []byte, size int, kind uint8, f outcome, keeps bool) *gsoCase {
		a := gsoCase{name: name, frame: frame, flags: partial, extras: []raw.Extra{raw.GSO(uint16(size), kind)}, outcome: f}
		a.want = arrival{b: frame, csum: pvnet.ChecksumPartial}
		if keeps {
			a.want.gso = pvnet.GSO{Type: pvnet.GSOType(kind), Size: uint16(size)}
		}
		all = append(all, a)
		return &all[len(all)-1]
	}
	hash := raw.Extra{Type: 4, Body: [6]byte{1, 1, 2, 3, 4, 5}}
	for _, v6 := range []bool{false, true} {
		kind, other := uint8(gsoTypeOf(v6)), uint8(gsoTypeOf(!v6))
		name := func(s string) string { return fmt.Sprint(s, ", IPv6 ", v6) }
		l4 := l4Of(v6)
		head := l4 + 20
		blank, whole := packet(0, v6, false, 3000, 5)

		for tags := range 3 {
			for _, n := range []int{2897, 5000, 64000} {
				b, _ := packet(tags, v6, false, n, tags)
				add(name(fmt.Sprint(tags, " tags, payload of ", n)), b, 1448, kind, delivered, true)
			}
		}
		three, _ := packet(3, v6, false, 3000, 1)
		add(name("three tags"), three, 1448, kind, dropped, false)
		for _, c := range []struct {
			payload, size int
			keeps         bool
		}{
			{0, 1, false}, {1, 1, false}, {2, 1, true}, {128, 1, true}, {1447, 1448, false}, {1448, 1448, false},
			{1449, 1448, true}, {64000, 65535, false}, {64000, 64000, false}, {64000, 63999, true}, {64000, 500, true},
		} {
			b, _ := packet(0, v6, false, c.payload, 2)
			add(name(fmt.Sprintf("%d bytes in pieces of %d", c.payload, c.size)), b, c.size, kind, delivered, c.keeps)
		}
		// At most packet.MostCuts segments.
		for _, c := range [][2]int{{129, 1}, {64001, 500}, {64000, 499}, {64000, 8}, {8192 * 7, 7}} {
			b, _ := packet(0, v6, false, c[0], 2)
			add(name(fmt.Sprintf("%d bytes in pieces of %d", c[0], c[1])), b, c[1], kind, delivered, true)
		}
		for _, c := range [][2]int{{64000, 1}, {64000, 2}, {8192*7 + 1, 7}} {
			b, _ := packet(0, v6, false, c[0], 2)
			add(name(fmt.Sprintf("%d bytes in pieces of %d", c[0], c[1])), b, c[1], kind, dropped, false)
		}

		// A checksum that is not partial is made partial (rx_gso_checksum_fixup).
		for _, flags := range []uint16{0, raw.TxValidated} {
			a := add(name(fmt.Sprint("flags ", flags)), whole, 1448, kind, delivered, true)
			a.flags, a.want.b, a.fixup = flags, blank, true
		}
		add(name("blank only"), blank, 1448, kind, delivered, true).flags = raw.TxBlank
		// A checksum marked partial is not verified.
		add(name("partial garbage"), withBytes(blank, l4+16, 0xde, 0xad), 1448, kind, delivered, true)

		// The packet differs from its GSO type.
		proto := 23
		if v6 {
			proto = 20
		}
		for _, p := range []byte{0, 1, 17, 41, 43, 44, 58, 60, 132, 255} {
			add(name(fmt.Sprint("protocol ", p)), withBytes(blank, proto, p), 1448, kind, dropped, false)
		}
		for _, e := range []int{0x0806, 0x0800 ^ 0x86dd ^ map[bool]int{true: 0x86dd, false: 0x0800}[v6], 0x8863, 0, 0xffff} {
			add(name(fmt.Sprintf("Ethernet type %#x", e)), withBytes(blank, 12, bigEndian16(e)...), 1448, kind, dropped, false)
		}
		add(name("of the other type"), blank, 1448, other, dropped, false)
		add(name("of another version"), withBytes(blank, ipOf, 0x55), 1448, kind, dropped, false)
		add(name("garbage"), withBytes(pattern(3000, 4), 12, blank[12:14]...), 1448, kind, dropped, false)
		lengthAt, own := 16, 0 // own: bytes before the segment that the length includes
		if v6 {
			lengthAt = 18
		} else {
			own = 20
			for _, frag := range []int{0x2000, 1, 0x1fff, 0x3fff} {
				add(fmt.Sprintf("a fragment, %#x", frag), withBytes(blank, 20, bigEndian16(frag)...), 1448, kind, dropped, false)
			}
			add("not to be fragmented", withBytes(blank, 20, 0x40), 1448, kind, delivered, true)
			for ihl := range 16 {
				b := withBytes(blank, ipOf, 0x40|byte(ihl))
				if ihl < 5 {
					add(fmt.Sprint("IP header of words ", ihl), b, 1448, kind, dropped, false)
				}
			}
		}
		for _, c := range []struct {
			length int // of the segment, by the IP header
			f      outcome
			keeps  bool
		}{
			{3021, dropped, false}, {4000, dropped, false}, {65535 - own, dropped, false}, {0, dropped, false}, {19, dropped, false},
			{20, delivered, false}, {1468, delivered, false}, {1469, delivered, true}, {3019, delivered, true},
		} {
			add(name(fmt.Sprint("of length ", c.length)), withBytes(blank, lengthAt, bigEndian16(own+c.length)...), 1448, kind, c.f, c.keeps)
		}
		for words := range 16 {
			f := delivered
			if words < 5 {
				f = dropped
			}
			add(name(fmt.Sprint("TCP header of words ", words)), withBytes(blank, l4+12, byte(words<<4)), 1448, kind, f, f == delivered)
			few, _ := packet(0, v6, false, 4*3, 1)
			if few = withBytes(few, l4+12, byte(words<<4)); words < 5 || words > 8 {
				add(name(fmt.Sprint("TCP header of words, of which there are 8: ", words)), few, 1, kind, dropped, false)
			} else {
				add(name(fmt.Sprint("TCP header of words, of which there are 8: ", words)), few, 1, kind, delivered, words < 8)
			}
			if words > 8 { // nor does the packet have that many behind the header
				add(name(fmt.Sprint("TCP header of words, and what is behind: ", words)), append(few, make([]byte, 40)...), 1, kind, dropped, false)
			}
		}
		for n := 14; n <= head; n++ {
			add(name(fmt.Sprint("cut short at ", n)), blank[:n], 1448, kind, dropped, false)
		}

		// Several extras: of each type the last one counts.
		good := raw.GSO(1448, kind)
		say := func(s string, f outcome, extras ...raw.Extra) {
			add(name(s), blank, 1448, kind, f, f == delivered).extras = chainExtras(extras...)
		}
		say("another before", delivered, raw.GSO(9, other), good)
		say("another behind", dropped, good, raw.GSO(9, other))
		add(name("a small one behind"), blank, 1, kind, delivered, true).extras = chainExtras(good, raw.GSO(1, kind))
		say("and a hash", delivered, good, hash)
		say("a hash and", delivered, hash, good)
		say("and what only Linux knows", delivered, raw.Extra{Type: 5}, good, hash)
		say("eight of them", delivered, good, good, good, hash, hash, hash, good, good)
		say("size 0", violation, raw.GSO(0, kind))
		say("size 0 and a good one", violation, raw.GSO(0, kind), good)
		say("a good one and size 0", violation, good, raw.GSO(0, kind))
		say("a good one and nothing", violation, good, raw.Extra{})
		for _, k := range []uint8{0, 3, 4, 255} {
			say(fmt.Sprint("type ", k), violation, raw.GSO(1448, k))
		}
	}
	return all
}

// T10: a frontend attacks a backend that takes long frames, and one that does not.
func TestT10LongFramesToTheBackend(t *testing.T) {
	for _, offload := range []bool{true, false} {
		l := newLab(t, emu.Config{})
		l.serve(pvnet.ServeConfig{Config: pvnet.Config{Offload: offload}})
		g, got := l.attackBackendWith(nil)
		var gso, fixed, total uint64
		check := func() {
			t.Helper()
			st := g.sink.stats(t).RX
			if n, f, c := st.Get(telemetry.GSOPackets), st.Get(telemetry.GSOCsumFixup), st.Get(telemetry.CsumPartial); n != gso || f != fixed || c != total {
				t.Errorf("counted %d, %d fixed, %d partial; want %d, %d, %d", n, f, c, gso, fixed, total)
			}
			gso, fixed, total = 0, 0, 0
		}
		for _, a := range gsoCases() {
			reqs := g.split(a.frame, a.flags|raw.TxExtra, a.sizes...)
			switch {
			case a.outcome == violation:
				check()
				g.send(reqs, a.extras, fatal, 0, nil)
				g, got = l.attackBackendWith(nil)
			case !offload:
				g.send(reqs, a.extras, refuse, telemetry.DropBadGSO, nil)
			case a.outcome == dropped:
				before := rxLost(g.dev, telemetry.DropBadGSO)
				g.send(reqs, a.extras, pass, 0, nil) // answered OKAY, as by Linux
				eventually(t, a.name, func() bool { return rxLost(g.dev, telemetry.DropBadGSO) == before+1 })
			default:
				g.send(reqs, a.extras, pass, 0, nil)
				if err := wait(t, got).differs(a.want); err != nil {
					t.Fatalf("%s: %v", a.name, err)
				}
				total++
				if a.fixup {
					fixed++
				}
				if a.want.gso.Size != 0 {
					gso++
				}
			}
			if t.Failed() {
				t.Fatal(a.name)
			}
		}
		g.requireTraffic()
		check()
		if len(got) != 0 {
			t.Errorf("%d frames more", len(got))
		}
		g.disconnect()
		l.stopServing()
	}
}

// rxCount returns a counter of the receiving half, lostTo the frames it lost for a reason.
func rxCount(d *pvnet.Device, c telemetry.Counter) uint64 { st := d.Stats(); return st.RX.Get(c) }
func rxLost(d *pvnet.Device, r telemetry.Reason) uint64 {
	st := d.Stats()
	return st.RX.Lost(r)
}

// T08 for frames that keep their headers: where the slots end is not where they are.
func TestT08LongFramesSplitAtEveryByte(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Offload: true}})
	g, got := l.attackBackendWith(nil)
	n := uint64(0)
	for _, v6 := range []bool{false, true} {
		for _, tags := range []int{0, 2} {
			blank, _ := packet(tags, v6, false, 3000, 3)
			blank[4*tags+l4Of(v6)+12] = 15 << 4
			want := arrival{blank, pvnet.GSO{Type: gsoTypeOf(v6), Size: 1000}, pvnet.ChecksumPartial}
			extra := []raw.Extra{raw.GSO(1000, uint8(want.gso.Type))}
			for k := 14; k <= 4*tags+l4Of(v6)+62; k++ {
				for _, sizes := range [][]int{{k}, {k, 1}, {k, 0, 2}, {k, k}} {
					g.send(g.split(blank, partial|raw.TxExtra, sizes...), extra, pass, 0, nil)
					if err := wait(t, got).differs(want); err != nil {
						t.Fatalf("%v: %v", sizes, err)
					}
					n++
				}
			}
			sizes := []int{14}
			for len(sizes) < 18 {
				sizes = append(sizes, 1)
			}
			g.send(g.split(blank, partial|raw.TxExtra, sizes...), extra, pass, 0, nil)
			if err := wait(t, got).differs(want); err != nil {
				t.Fatal(err)
			}
			n++
			// One slot too many; the extra does not count.
			sizes = append(sizes, 1)
			g.send(g.split(blank, partial|raw.TxExtra, sizes...), extra, refuse, telemetry.DropBadChain, nil)
		}
	}
	if got := g.sink.stats(t).RX.Get(telemetry.GSOPackets); got != n || n < 1500 {
		t.Errorf("%d of %d frames", got, n)
	}
	g.requireTraffic()
	g.disconnect()
}

// rxFlags returns the flags of the rx ring for those of the tx ring.
func rxFlags(flags uint16) uint16 { return flags&^3 | flags&1<<1 | flags&2>>1 }

// frameSlots returns a frame with extras as slots of the rx ring.
func (drv *driver) frameSlots(frame []byte, flags uint16, extras []raw.Extra, sizes ...int) (slots [][2]uint32) {
	drv.l.t.Helper()
	for i := 0; len(frame) > 0 || i < len(sizes); i++ {
		n := min(len(frame), 4096)
		if i < len(sizes) {
			n = min(n, sizes[i])
		}
		f := uint16(raw.RxMore)
		if i == 0 {
			f |= rxFlags(flags)
		}
		if n == len(frame) && i+1 >= len(sizes) {
			f &^= raw.RxMore
		}
		slots = append(slots, drv.fillSlot(uint16(min(7*i, 4096-n)), f, frame[:n]))
		frame = frame[n:]
		if i == 0 {
			for _, x := range extras {
				slots = append(slots, drv.extraSlot(x))
			}
		}
	}
	return slots
}

// T06 and T10: a backend attacks a frontend. An error in a frame costs only that frame.
func TestT10LongFramesToTheFrontend(t *testing.T) {
	for _, cfg := range []pvnet.Config{{Offload: true}, {Offload: true, LendRx: true}, {}, {LendRx: true}} {
		l := newLab(t, emu.Config{})
		drv := l.connectFrontendWith(cfg, nil)
		var got chan arrival
		drv.sink, got = listenMetadata(drv.dev)
		for _, a := range gsoCases() {
			before := drv.dev.Stats()
			drv.deliverSlots(drv.frameSlots(a.frame, a.flags|raw.TxExtra, a.extras, a.sizes...)...)
			if a.outcome == delivered && cfg.Offload {
				if err := wait(t, got).differs(a.want); err != nil {
					t.Fatalf("%s: %v", a.name, err)
				}
				continue
			}
			reasons := []telemetry.Reason{telemetry.DropBadGSO}
			if a.outcome == violation && !cfg.Offload { // whichever it meets first
				reasons = append(reasons, telemetry.DropBadExtra)
			} else if a.outcome == violation {
				reasons[0] = telemetry.DropBadExtra
			}
			eventually(t, a.name, func() bool {
				st, n := drv.dev.Stats(), uint64(0)
				for _, r := range reasons {
					n += st.RX.Lost(r) - before.RX.Lost(r)
				}
				return n == 1 && st.RX.Dropped()+st.RX.Errors() == before.RX.Dropped()+before.RX.Errors()+1
			})
		}
		if n := drv.sink.stats(t).RX.Get(telemetry.LentPackets); n != 0 {
			t.Errorf("%d frames with offloads were lent", n)
		}
		drv.requireTraffic()
		if len(got) != 0 {
			t.Errorf("%d frames more", len(got))
		}
		eventually(t, "256 pages posted", func() bool { return drv.Rx.Load(raw.ReqProd)-drv.RxProd == 256 })
		drv.disconnect()
	}
}

// T20: the peer can still write a lent page, so a frame whose headers we read is copied
// instead of lent.
func TestT20LongFramesAreNotLent(t *testing.T) {
	l := newLab(t, emu.Config{})
	drv := l.connectFrontendWith(pvnet.Config{Offload: true, LendRx: true}, nil)
	own, err := drv.dev.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	own.SetDeadline(deadline())
	blank, whole := packet(0, false, false, 3000, 1)
	for _, c := range []struct {
		frame  []byte
		flags  uint16
		extras []raw.Extra
		lent   bool
	}{
		{blank, partial | raw.TxExtra, []raw.Extra{raw.GSO(1448, 1)}, false},
		{whole, raw.TxExtra, []raw.Extra{raw.GSO(1448, 1)}, false},
		{blank, partial, nil, false},
		{whole, raw.TxValidated, nil, true},
	} {
		drv.awaitPosted(2)
		ref, before := drv.posted[0], rxCount(drv.dev, telemetry.LentPackets)
		drv.deliverSlots(drv.frameSlots(c.frame, c.flags, c.extras)...)
		var f [1]pvnet.Frame
		if n, err := own.Receive(f[:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		was := arrivalOf(&f[0])
		if err := drv.Fill(ref, 0, bytes.Repeat([]byte{0xff}, 4000)); err != nil {
			t.Fatal(err)
		}
		if same := arrivalOf(&f[0]).differs(was) == nil; same == c.lent {
			t.Errorf("flags %#x: written afterwards, and the same %v", c.flags, same)
		}
		if n := rxCount(drv.dev, telemetry.LentPackets) - before; (n == 1) != c.lent {
			t.Errorf("flags %#x: %d lent", c.flags, n)
		}
		if err := own.Release(f[:]); err != nil {
			t.Fatal(err)
		}
	}
	drv.disconnect()
}

// T30: a failed copy costs a long frame, as any other; the response of its extra does not
// change.
func TestT30CopiesOfALongFrameThatFail(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Offload: true}})
	g, got := l.attackBackendWith(nil)
	blank, _ := packet(0, false, false, 3000, 1)
	want := arrival{blank, pvnet.GSO{Type: pvnet.GSOTCPv4, Size: 1448}, pvnet.ChecksumPartial}
	extras := chainExtras(raw.Extra{Type: 4}, raw.GSO(1448, 1))
	for k := 1; k <= 3; k++ {
		reqs := g.split(blank, partial|raw.TxExtra, 100, 200)
		lift := l.drv.Fail(emu.Fault{Op: emu.OpCopyGrant, K: k, Status: hypercall.BadGntref})
		g.send(reqs, extras, refuse, telemetry.DropBadGref, nil)
		lift()
		g.send(reqs, extras, pass, 0, nil)
		if err := wait(t, got).differs(want); err != nil {
			t.Fatal(err)
		}
	}
	g.requireTraffic()
	g.disconnect()
}
