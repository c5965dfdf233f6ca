package hostile

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
	"barevif/xenbus/xenstore"
)

// checksum is the sum of the internet checksum, byte by byte.
func checksum(parts ...[]byte) uint16 {
	n := uint32(0)
	for _, p := range parts {
		for i, b := range p {
			if i%2 == 0 {
				n += uint32(b) << 8
			} else {
				n += uint32(b)
			}
		}
	}
	for n > 0xffff {
		n = n&0xffff + n>>16
	}
	return uint16(n)
}

// packet returns an Ethernet frame with tags VLAN tags, IPv4 or IPv6, and TCP or UDP with
// size bytes of payload. The checksum field of blank holds the pseudo-header's sum, that
// of whole the checksum.
func packet(tags int, v6, udp bool, size, seed int) (blank, whole []byte) {
	b := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	for range tags {
		b = append(b, 0x81, 0, 0, byte(seed))
	}
	head, proto, field := 20, byte(6), 16
	if udp {
		head, proto, field = 8, 17, 6
	}
	length := head + size
	var pseudo []byte
	if v6 {
		b = append(b, 0x86, 0xdd)
		ip := make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(length))
		copy(ip[8:], pattern(32, seed))
		b = append(b, ip...)
		pseudo = append(pseudo, ip[8:40]...)
	} else {
		b = append(b, 8, 0)
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(ip[2:], uint16(20+length))
		copy(ip[12:], pattern(8, seed))
		binary.BigEndian.PutUint16(ip[10:], ^checksum(ip))
		b = append(b, ip...)
		pseudo = append(pseudo, ip[12:20]...)
	}
	pseudo = append(pseudo, 0, proto, byte(length>>8), byte(length))
	at := len(b)
	l4 := pattern(length, seed+1)
	if !udp {
		l4[12] = 5 << 4
	} else {
		binary.BigEndian.PutUint16(l4[4:], uint16(length))
	}
	l4[field], l4[field+1] = 0, 0
	blank = append(b, l4...)
	whole = append([]byte(nil), blank...)
	c := ^checksum(pseudo, l4)
	if c == 0 && udp {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(whole[at+field:], c)
	binary.BigEndian.PutUint16(blank[at+field:], checksum(pseudo))
	return blank, whole
}

// split returns a packet of the guest that has frame in pieces of the given sizes, and the
// rest in the last piece.
func (g *guest) split(frame []byte, flags uint16, sizes ...int) []raw.TxReq {
	var reqs []raw.TxReq
	rest := frame
	for i := 0; len(rest) > 0 || i < len(sizes); i++ {
		n := len(rest)
		if i < len(sizes) {
			n = min(n, sizes[i])
		}
		n = min(n, 4096)
		off := min(3*i, 4096-n)
		copy(g.Pages.Page(i)[off:], rest[:n])
		r := g.Req(i, uint16(off), uint16(n), raw.TxMore)
		if i == 0 {
			r.Size, r.Flags = uint16(len(frame)), raw.TxMore|flags
		}
		reqs = append(reqs, r)
		rest = rest[n:]
	}
	reqs[len(reqs)-1].Flags &^= raw.TxMore
	return reqs
}

// XSA-423: netback copied only the part of the headers in the first slots.
func TestT08HeadersSplitAtEveryByte(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	for _, tags := range []int{0, 2} {
		blank, whole := packet(tags, true, false, 150, 3)
		for k := 1; k <= 128; k++ {
			for _, sizes := range [][]int{{k}, {k, 1}, {k, 0, 2}, {k, k}} {
				reqs := g.split(blank, raw.TxBlank|raw.TxValidated, sizes...)
				if k < 14 {
					g.send(reqs, nil, refuse, telemetry.DropTooShort, nil)
					continue
				}
				g.send(reqs, nil, pass, 0, whole)
			}
		}
		// Pieces of one byte, as many as there may be slots.
		sizes := []int{14}
		for len(sizes) < 18 {
			sizes = append(sizes, 1)
		}
		g.send(g.split(blank, raw.TxBlank, sizes...), nil, pass, 0, whole)
	}
	g.requireTraffic()
	g.disconnect()
}

func TestT09OffsetsAndSizes(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	offsets := []uint16{0, 1, 14, 2048, 4081, 4082, 4083, 4095, 4096, 4097, 32768, 65522, 65535}
	sizes := []uint16{0, 1, 13, 14, 15, 2048, 4095, 4096, 4097, 32767, 32768, 65535}
	seen := map[verdict]int{}
	try := func(reqs []raw.TxReq, want []byte) {
		v := netbackVerdict(reqs)
		seen[v]++
		reason := telemetry.DropTooShort
		if len(reqs) > 1 && reqs[1].Size > reqs[0].Size {
			reason = telemetry.DropBadChain
		}
		if v != pass {
			want = nil
		}
		g.send(reqs, nil, v, reason, want)
		if t.Failed() {
			t.Fatalf("%+v", reqs)
		}
		if v == fatal {
			g = l.attackBackend()
		}
	}
	for i := range 2 {
		copy(g.Pages.Page(i), pattern(4096, i))
	}
	part := func(i int, off, n uint16) []byte {
		if p := pattern(4096, i); int(off)+int(n) <= 4096 {
			copy(g.Pages.Page(i), p)
			return p[off : off+n]
		}
		return nil
	}
	for _, off := range offsets {
		for _, n := range sizes {
			try([]raw.TxReq{g.Req(0, off, n, 0)}, part(0, off, n))
			// As the second of two slots: in a packet of 60 bytes more, and in one
			// shorter than the slot.
			first := g.Req(0, 0, n+60, raw.TxMore)
			if n <= 0xffff-60 {
				want := append(append([]byte(nil), part(0, 0, 60)...), part(1, off, n)...)
				try([]raw.TxReq{first, g.Req(1, off, n, 0)}, want)
			}
			if n > 0 {
				first.Size = n - 1
				try([]raw.TxReq{first, g.Req(1, off, n, 0)}, nil)
			}
			// The first slot's own part, after subtracting the rest, crosses its page.
			if n >= 14 && n <= 4096 {
				first = g.Req(0, off, n+20, raw.TxMore)
				want := append(append([]byte(nil), part(0, off, n)...), part(1, 5, 20)...)
				try([]raw.TxReq{first, g.Req(1, 5, 20, 0)}, want)
			}
		}
	}
	g.requireTraffic()
	g.disconnect()
	if seen[pass] < 50 || seen[refuse] < 50 || seen[fatal] < 50 {
		t.Errorf("verdicts are not balanced: %v", seen)
	}
}

// Extras of a packet: xenvif_get_extras and xenvif_set_skb_gso. A malformed GSO extra is
// fatal; one that was not offered costs the packet.
func TestT10Extras(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	many := func(n int) []raw.Extra {
		var x []raw.Extra
		for range n {
			x = append(x, raw.Extra{Type: 4, Flags: 1})
		}
		return x
	}
	last := func(x []raw.Extra) []raw.Extra { x[len(x)-1].Flags = 0; return x }
	mcast := func(kind uint8) raw.Extra { return raw.Extra{Type: kind, Body: [6]byte{1, 0, 0x5e, 0, 0, 1}} }
	for _, c := range []struct {
		name   string
		extras []raw.Extra
		want   verdict
		reason telemetry.Reason
	}{
		{"type 0", []raw.Extra{{}}, fatal, 0},
		{"type MAX", []raw.Extra{{Type: 6}}, fatal, 0},
		{"type 255", []raw.Extra{{Type: 255, Flags: 255}}, fatal, 0},
		{"a good one, then a bad one", []raw.Extra{{Type: 4, Flags: 1}, {Type: 7}}, fatal, 0},
		{"missing", nil, fatal, 0},
		{"one of two missing", many(1), fatal, 0},
		{"endless MORE", many(255), fatal, 0},
		{"GSO of size 0", []raw.Extra{raw.GSO(0, 1)}, fatal, 0},
		{"GSO of no type", []raw.Extra{raw.GSO(1448, 0)}, fatal, 0},
		{"GSO of unknown type", []raw.Extra{raw.GSO(1448, 3)}, fatal, 0},
		{"GSO of type 255", []raw.Extra{raw.GSO(1448, 255)}, fatal, 0},
		{"GSO of size 1", []raw.Extra{raw.GSO(1, 1)}, refuse, telemetry.DropBadGSO},
		{"GSO of size 65535", []raw.Extra{raw.GSO(65535, 2)}, refuse, telemetry.DropBadGSO},
		{"GSO twice", []raw.Extra{{Type: 1, Flags: 1, Body: [6]byte{1, 0, 1}}, raw.GSO(9, 2)}, refuse, telemetry.DropBadGSO},
		{"hash", []raw.Extra{{Type: 4, Body: [6]byte{255, 255, 1, 2, 3, 4}}}, pass, 0},
		{"hash four times", last(many(4)), pass, 0},
		{"XDP, which only Linux knows", []raw.Extra{{Type: 5}}, pass, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.t = t
			reqs, want := g.chain(raw.TxExtra, 60, 40)
			if c.want == pass {
				g.send(reqs, c.extras, pass, 0, want)
				return
			}
			if c.want == fatal && (c.extras == nil || c.extras[len(c.extras)-1].Flags == 1) {
				reqs = reqs[:1] // nothing follows
			}
			g.send(reqs, c.extras, c.want, c.reason, nil)
			if c.want == fatal {
				why := map[string]string{
					"missing": "extra info is missing", "one of two missing": "extra info is missing",
					"endless MORE": "endless extra info",
				}[c.name]
				_, err := g.dev.Write(pattern(60, 0))
				if pe, ok := errors.AsType[*pvnet.PeerError](err); !ok || pe.Reason != cmp.Or(why, "malformed extra info") {
					t.Errorf("ended with %v", err)
				}
				g = l.attackBackend()
			}
		})
	}
	l.t = t
	// A dummy request that joins or leaves a group carries no packet, whatever its flags
	// are: the next slot begins a new packet. The list has 64 places, and an address that is
	// added twice takes two, as in Linux (xenvif_mcast_add); one that is not there may leave.
	for i, flags := range []uint16{raw.TxExtra, raw.TxExtra | raw.TxMore, raw.TxExtra | raw.TxBlank} {
		dummy := func(want verdict, extras ...raw.Extra) {
			t.Helper()
			g.send([]raw.TxReq{g.Req(0, 0, 0, flags)}, extras, want, noReason, nil)
		}
		dummy(pass, mcast(3))
		for range 64 {
			dummy(pass, mcast(2))
		}
		dummy(refuse, mcast(2))
		add, del := mcast(2), mcast(3)
		add.Flags = 1
		dummy(refuse, add, del) // the one that adds counts, as in Linux
		for range 65 + i {
			dummy(pass, mcast(3))
		}
		g.requireTraffic()
	}
	g.disconnect()
}

// A frontend gets the multicast that it has listed, and all other frames, as long as it asks
// for that; it may change its mind at any time, and say nonsense. A new connection begins
// with an empty list.
func TestMulticastIsFilteredForWhoAsks(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	ask := func(value string) {
		l.write(l.guestStore, g.v.FrontDir(), xenstore.Values{"request-multicast-control": value}, "")
	}
	frame := func(first, last byte) []byte {
		b := pattern(100, 0)
		copy(b, []byte{first, 0, 0x5e, 0, 0, last})
		return b
	}
	// passes reports whether the backend sends a frame to the guest.
	passes := func(b []byte) bool {
		t.Helper()
		g.Post(1)
		before := g.dev.Stats().TX
		if _, err := g.dev.Write(b); err != nil {
			t.Fatal(err)
		}
		after := g.dev.Stats().TX
		sent, filtered := after.Packets()-before.Packets(), after.Get(telemetry.Filtered)-before.Get(telemetry.Filtered)
		if sent+filtered != 1 {
			t.Fatalf("%d sent, %d filtered", sent, filtered)
		}
		return sent == 1
	}
	joined, other, unicast, broadcast := frame(1, 1), frame(1, 2), frame(2, 1), pattern(60, 0)
	copy(broadcast, []byte{255, 255, 255, 255, 255, 255})
	join := func(kind uint8) {
		g.send([]raw.TxReq{g.Req(0, 0, 0, raw.TxExtra)}, []raw.Extra{{Type: kind, Body: [6]byte(joined[:6])}}, pass, noReason, nil)
	}
	for _, value := range []string{"0", "x", "-1", "1", "0", "4294967296", "2"} {
		ask(value)
		on := value == "1" || value == "2"
		eventually(t, "the filter as asked with "+value, func() bool { return passes(other) != on })
		if passes(joined) == on || !passes(unicast) || !passes(broadcast) {
			t.Errorf("%s: without a list, joined %v, unicast %v, broadcast %v", value, passes(joined), passes(unicast), passes(broadcast))
		}
		join(2)
		if !passes(joined) || passes(other) == on || !passes(unicast) {
			t.Errorf("%s: with a list, joined %v, other %v, unicast %v", value, passes(joined), passes(other), passes(unicast))
		}
		join(3)
		if passes(joined) == on {
			t.Errorf("%s: a group that was left", value)
		}
	}
	g.disconnect()
}

func TestT10ChecksumLeftBlank(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	for tags := range 3 {
		for _, v6 := range []bool{false, true} {
			for _, udp := range []bool{false, true} {
				for _, size := range []int{0, 1, 2, 7, 64, 1401, 4000, 9001} {
					for seed, sizes := range [][]int{nil, {14}, {31, 17}, {61, 1, 1}} {
						blank, whole := packet(tags, v6, udp, size, seed)
						g.send(g.split(blank, raw.TxBlank|raw.TxValidated, sizes...), nil, pass, 0, whole)
						// A checksum that is not partial is left alone.
						g.send(g.split(blank, 0, sizes...), nil, pass, 0, blank)
					}
				}
			}
		}
	}
	// A partial checksum that cannot be completed: the packet is answered OKAY and
	// dropped, as by Linux (checksum_setup). The headers give every possible wrong
	// length.
	blank, _ := packet(1, false, false, 100, 1)
	six, _ := packet(0, true, true, 100, 1)
	garbage := [][]byte{pattern(14, 0), pattern(60, 1), blank[:18], blank[:19], blank[:37], blank[:38], six[:14], six[:53], six[:54], six[:61]}
	for i := 12; i < 60; i++ {
		for _, v := range []byte{0, 1, 0x40, 0x4f, 0x7f, 0xff} {
			for _, p := range [][]byte{blank, six} {
				b := append([]byte(nil), p...)
				b[i] = v
				garbage = append(garbage, b)
			}
		}
	}
	for _, b := range garbage {
		before := g.dev.Stats()
		reqs := g.split(b, raw.TxBlank, 20)
		g.send(reqs, nil, pass, 0, nil)
		eventually(t, "the frame", func() bool { // it arrives with the same length, or is counted as lost
			st := g.dev.Stats()
			if len(g.sink.frames) > 0 {
				if got := <-g.sink.frames; len(got) != len(b) {
					t.Fatalf("%d bytes of %d", len(got), len(b))
				}
				return true
			}
			return st.RX.Lost(telemetry.DropBadCsum) == before.RX.Lost(telemetry.DropBadCsum)+1
		})
	}
	if st := g.dev.Stats(); st.RX.Lost(telemetry.DropBadCsum) < 50 {
		t.Errorf("%d of %d were dropped", st.RX.Lost(telemetry.DropBadCsum), len(garbage))
	}
	g.requireTraffic()
	g.disconnect()
}

// A frontend that posts no pages, or never reads the ring, gets no more frames and costs
// no more.
func TestT12RingNeverConsumed(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	tx, err := g.dev.OwnTX(0)
	if err != nil {
		t.Fatal(err)
	}
	send := func(n int) (sent int, err error) {
		var f [1]pvnet.Frame
		for sent < n {
			if _, err = tx.AllocWait(f[:], 100); err != nil {
				return sent, err
			}
			if _, err = tx.Send(f[:]); err != nil {
				f[0].Release()
				return sent, err
			}
			sent++
		}
		return sent, nil
	}
	pages := l.Ledger()
	if n, err := send(1); n != 0 || err != pvnet.ErrFull {
		t.Error(n, err)
	}
	g.Post(256)
	if n, err := send(1000); n != 256 || err != pvnet.ErrFull {
		t.Error(n, err)
	}
	tx.SetDeadline(time.Now().Add(30 * time.Millisecond))
	var f [1]pvnet.Frame
	tx.AllocSize(f[:], 60)
	if n, err := tx.SendWait(f[:]); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(n, err)
	}
	f[0].Release()
	if now := l.Ledger(); now != pages {
		t.Errorf("%+v, before: %+v", now, pages)
	}
	tx.SetDeadline(time.Time{})
	if _, err := g.Received(256, deadline()); err != nil {
		t.Error(err)
	}
	g.Post(256)
	if n, err := send(256); n != 256 || err != nil {
		t.Error(n, err)
	}
	g.disconnect()
}

// stalls reports whether d has recorded one event of kind k, for a sender short of so
// many slots.
func stalls(d *pvnet.Device, k telemetry.EventKind, short uint64) bool {
	n := 0
	for _, e := range d.Counters().Events() {
		if e.Kind == k && e.Queue == 0 && e.A == short {
			n++
		}
	}
	return n == 1
}

// XSA-392: a guest took nothing for a minute while gigabytes piled up for it. Here the
// sender gets an error, and no unsent frame is kept: the first frame after a stall was
// made after the stall.
func TestT16FrontendStopsTakingInAFlood(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	tx, err := g.dev.OwnTX(0)
	if err != nil {
		t.Fatal(err)
	}
	g.Post(3)
	pages, budget := l.Ledger(), g.dev.Budget()
	var made atomic.Uint64
	taken := make(chan uint64, 16) // made before each accepted frame
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		var f [1]pvnet.Frame
		for {
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
			if n := tx.AllocSize(f[:], 100); n != 1 {
				ended <- errors.New("frames that were refused keep their pages")
				return
			}
			n := made.Add(1)
			copy(f[0].Bytes(), pattern(100, 0))
			binary.BigEndian.PutUint64(f[0].Bytes()[14:], n)
			switch _, err := tx.Send(f[:]); err {
			case nil:
				taken <- n
			case pvnet.ErrFull: // as a bridge does
				f[0].Release()
				runtime.Gosched()
			default:
				ended <- err
				return
			}
		}
	}()
	for range 3 {
		wait(t, taken)
	}
	eventually(t, "a stall", func() bool { return stalls(g.dev, telemetry.EventStall, 1) })
	eventually(t, "its count", func() bool { return count(g.dev, telemetry.Stalls) == 1 })
	if now, b := l.Ledger(), g.dev.Budget(); now != pages || b != budget {
		t.Errorf("%+v and %v, before: %+v and %v", now, b, pages, budget)
	}
	if n := g.Rx.Load(raw.RspProd); n != 3 {
		t.Errorf("%d frames in 3 pages", n)
	}
	before := made.Load()
	g.Post(1)
	if n := wait(t, taken); n < before {
		t.Errorf("frame %d was sent after frame %d was made", n, before)
	}
	eventually(t, "its end", func() bool { return count(g.dev, telemetry.Stalls) == 1 && eventKinds(g.dev)[telemetry.EventStallOver] })
	close(stop)
	if err := wait(t, ended); err != nil {
		t.Error(err)
	}
	st := g.dev.Stats()
	if n, lost := st.TX.Get(telemetry.Packets), st.TX.Dropped()+st.TX.Errors(); n != 4 || lost != 0 {
		t.Errorf("sent %d, lost %d", n, lost)
	}
	g.disconnect()
}

// XSA-392: one slot was free, the packet needed two, and no stall was reported.
func TestT17OneSlotForAFrameThatNeedsTwo(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	tx, _ := g.dev.OwnTX(0)
	g.Post(1)
	var f [1]pvnet.Frame
	want := pattern(5000, 1)
	tx.AllocSize(f[:], 5000)
	f[0].CopyFrom(want)
	if n, err := tx.Send(f[:]); n != 0 || err != pvnet.ErrFull {
		t.Fatal(n, err)
	}
	sent := make(chan error, 1)
	go func() { _, err := tx.SendWait(f[:]); sent <- err }()
	eventually(t, "a stall", func() bool { return stalls(g.dev, telemetry.EventStall, 1) })
	if p := g.Rx.Load(raw.RspProd); p != 0 {
		t.Errorf("%d responses to half a frame", p)
	}
	g.Post(1)
	if err := wait(t, sent); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its end", func() bool { return stalls(g.dev, telemetry.EventStallOver, 0) })
	if n := count(g.dev, telemetry.Stalls); n != 1 {
		t.Errorf("%d stalls counted", n)
	}
	rsp, err := g.Received(2, deadline())
	if err != nil || rsp[0] != (raw.RxRsp{ID: 0, Flags: raw.RxMore, Status: 3968}) || rsp[1] != (raw.RxRsp{ID: 1, Status: 1032}) {
		t.Fatal(rsp, err)
	}
	if got := append(append([]byte(nil), g.Posted.Page(0)[:3968]...), g.Posted.Page(1)[:1032]...); !bytes.Equal(got, want) {
		t.Error("other bytes")
	}
	g.disconnect()
}

// XSA-332, XSA-391: events without work cost their sender, not the neighbours.
func TestT14EventStorm(t *testing.T) {
	l := newServingLab(t)
	honest, g := l.attackBackend(), l.attackBackend()
	parks := func() uint64 { st := g.dev.Stats(); return st.RX.Get(telemetry.Parks) }
	before := parks()
	stop := make(chan struct{})
	ended := make(chan struct{})
	var events atomic.Int64
	start := time.Now()
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
				g.TxPort.Notify()
				g.RxPort.Notify()
				events.Add(1)
				runtime.Gosched() // there may be one thread
			}
		}
	}()
	// Long enough for the delays to grow, however many events that takes.
	for frames := 0; frames < 100 || events.Load() < 10000 || time.Since(start) < 1200*time.Millisecond; frames++ {
		honest.requireTraffic()
	}
	close(stop)
	wait(t, ended)
	// 1, 2, 4 ... 512 ms: the tenth comes after more than a second. Then one comes per
	// second.
	spent := time.Since(start)
	if n := parks() - before; n > 16+uint64(spent/time.Second) {
		t.Errorf("%d wake-ups in %v", n, spent)
	}
	g.requireTraffic()
	g.disconnect()
	honest.disconnect()
}

func TestT15EventsOnClosedPorts(t *testing.T) {
	l := newServingLab(t)
	for range 5 {
		g := l.attackBackend()
		tx, rx := g.TxPort, g.RxPort
		g.setState("6") // at once, as some guests do
		g.awaitBackend("6")
		for range 100 {
			tx.Notify()
			rx.Notify()
		}
		g.removeVif()
		next := l.attackBackend() // the port numbers are used again
		for range 100 {
			tx.Notify()
			rx.Notify()
		}
		next.requireTraffic()
		next.disconnect()
	}
	if n := l.log.count(8); n != 0 {
		t.Error(l.log)
	}
}
