package hostile

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
	"barevif/xenbus/xenstore"
)

// A sender sends frames with metadata: checksum and GSO.
type sender struct {
	t testing.TB
	*pvnet.TX
}

func newSender(t testing.TB, d *pvnet.Device) sender {
	t.Helper()
	tx, err := d.OwnTX(0)
	if err != nil {
		t.Fatal(err)
	}
	tx.SetDeadline(deadline())
	return sender{t, tx}
}

// newFrame returns a frame in the sender's own pages. size 0 means that the frame is not to
// be segmented.
func (p sender) newFrame(b []byte, csum pvnet.Checksum, kind pvnet.GSOType, size int) (f [1]pvnet.Frame) {
	p.t.Helper()
	if n, err := p.AllocWait(f[:], len(b)); n != 1 || err != nil {
		p.t.Fatal(n, err)
	}
	f[0].CopyFrom(b)
	p.setMetadata(&f[0], csum, kind, size)
	return f
}

func (p sender) setMetadata(f *pvnet.Frame, csum pvnet.Checksum, kind pvnet.GSOType, size int) {
	p.t.Helper()
	f.SetChecksum(csum)
	if size > 0 {
		if err := f.SetGSO(pvnet.GSO{Type: kind, Size: uint16(size)}); err != nil {
			p.t.Fatal(err)
		}
	}
}

func (p sender) send(f [1]pvnet.Frame) {
	p.t.Helper()
	if n, err := p.SendWait(f[:]); n != 1 || err != nil {
		p.t.Fatal(n, err)
	}
}

// readFrame joins the bytes that the requests of one frame point at.
func (drv *driver) readFrame(reqs []raw.TxReq) (b []byte) {
	drv.l.t.Helper()
	first := int(reqs[0].Size)
	for _, r := range reqs[1:] {
		first -= int(r.Size)
	}
	for i, r := range reqs {
		n := int(r.Size)
		if i == 0 {
			n = first
		}
		part := make([]byte, n)
		if err := drv.Read(hypercall.GrantRef(r.Ref), r.Offset, part); err != nil {
			drv.l.t.Fatal(err)
		}
		b = append(b, part...)
	}
	return b
}

// The worked example of the tx ring: three data slots, the first with the total size, and
// an extra in the second slot, padded with zeros whatever the slot held before.
func TestWireOfALongFrameFromTheFrontend(t *testing.T) {
	l := newLab(t, emu.Config{})
	drv := l.connectFrontendWith(pvnet.Config{}, offloadKeys())
	p := newSender(t, drv.dev)
	for range 300 { // every slot has held a request
		p.send(p.newFrame(pattern(60, 0), pvnet.ChecksumUnknown, 0, 0))
		reqs := drv.awaitRequests(1)
		drv.Answer(raw.TxRsp{ID: reqs[0].ID})
	}
	for _, v6 := range []bool{false, true} {
		kind := gsoTypeOf(v6)
		blank, _ := packet(0, v6, false, 5000-l4Of(v6)-20, 6)
		at := drv.TxCons % raw.Size
		f := p.newFrame(make([]byte, 5000+3768), pvnet.ChecksumUnknown, 0, 0)
		if !f[0].TrimFront(3768) || f[0].CopyFrom(blank) != 5000 { // 200 + 4096 + 704
			t.Fatal(f[0].Len())
		}
		p.setMetadata(&f[0], pvnet.ChecksumPartial, kind, 0x0123)
		p.send(f)
		slots := drv.awaitRequests(4)
		extra := drv.Tx.Bytes()[raw.Slots+12*int(at+1)%(12*raw.Size):][:12]
		if want := []byte{1, 0, 0x23, 1, byte(kind), 0, 0, 0, 0, 0, 0, 0}; !bytes.Equal(extra, want) {
			t.Errorf("the extra is % x, want % x", extra, want)
		}
		data := []raw.TxReq{slots[0], slots[2], slots[3]}
		for i, want := range []raw.TxReq{{Flags: 0x0f, Size: 5000}, {Flags: 0x04, Size: 4096}, {Flags: 0, Size: 704}} {
			if r := data[i]; r.Flags != want.Flags || r.Size != want.Size {
				t.Errorf("request %d is %+v, want flags %#x and size %d", i, r, want.Flags, want.Size)
			}
		}
		if !bytes.Equal(drv.readFrame(data), blank) {
			t.Error("other bytes")
		}
		drv.Answer(raw.TxRsp{ID: slots[0].ID}, raw.TxRsp{ID: 0x0001, Status: raw.Null}, raw.TxRsp{ID: slots[3].ID}, raw.TxRsp{ID: slots[2].ID})
		p.send(p.newFrame(pattern(60, 1), pvnet.ChecksumUnknown, 0, 0))
		reqs := drv.awaitRequests(1)
		drv.Answer(raw.TxRsp{ID: reqs[0].ID})
	}
	// A frame with only a partial checksum has no extra.
	blank, _ := packet(0, false, true, 900, 2)
	p.send(p.newFrame(blank, pvnet.ChecksumPartial, 0, 0))
	reqs, err := drv.Requests(1, deadline())
	if err != nil || reqs[0].Flags != raw.TxBlank|raw.TxValidated || int(reqs[0].Size) != len(blank) || !bytes.Equal(drv.readFrame(reqs), blank) {
		t.Errorf("%+v, %v", reqs, err)
	}
	if n := drv.Tx.Load(raw.ReqProd); n != drv.TxCons {
		t.Errorf("%d slots more", n-drv.TxCons)
	}
	drv.disconnect()
}

// The worked example of the rx ring, without a hash: the extra takes the second slot and
// the request in it.
func TestWireOfALongFrameFromTheBackend(t *testing.T) {
	l := newServingLab(t)
	g, _ := l.attackBackendWith(offloadKeys())
	p := newSender(t, g.dev)
	page := func(slot uint32) []byte { return g.Posted.Page(int(slot % 32)) }
	for range 259 { // the indices have wrapped
		g.Post(1)
		p.send(p.newFrame(pattern(60, 0), pvnet.ChecksumUnknown, 0, 0))
		g.awaitReceived(1)
	}
	for _, v6 := range []bool{false, true} {
		kind := gsoTypeOf(v6)
		blank, _ := packet(0, v6, false, 5000-l4Of(v6)-20, 6)
		for _, fails := range []int{0, 1, 2} { // one copy for each slot
			at := g.RxCons
			for i := range uint32(4) {
				copy(page(at+i), bytes.Repeat([]byte{0xee}, 4096))
			}
			g.Post(3)
			lift := func() {}
			if fails > 0 {
				lift = l.drv.Fail(emu.Fault{Op: emu.OpCopyGrant, K: fails, Status: hypercall.BadGntref})
			}
			p.send(p.newFrame(blank, pvnet.ChecksumPartial, kind, 0x0123))
			lift()
			rsp := g.awaitReceived(3)
			slot := func(i uint32) uint16 { return uint16((at + i) % raw.Size) }
			want := []raw.RxRsp{
				{ID: slot(0), Flags: 0x0f, Status: 3968},
				raw.RxRspOf([3]uint32{0x01230001, uint32(kind)}),
				{ID: slot(2), Status: 1032},
			}
			if fails > 0 {
				want[0].Status, want[2].Status = raw.Error, raw.Error
			}
			for i := range want {
				if rsp[i] != want[i] {
					t.Errorf("copy %d fails: slot %d is %+v, want %+v", fails, i, rsp[i], want[i])
				}
			}
			extra := g.Rx.Bytes()[raw.Slots+8*int((at+1)%raw.Size):][:8]
			if want := []byte{1, 0, 0x23, 1, byte(kind), 0, 0, 0}; !bytes.Equal(extra, want) {
				t.Errorf("the extra is % x, want % x", extra, want)
			}
			if fails == 0 && !bytes.Equal(append(bytes.Clone(page(at)[:3968]), page(at + 2)[:1032]...), blank) {
				t.Error("other bytes")
			}
			untouched := slices.Concat(page(at)[3968:], page(at+1), page(at + 2)[1032:])
			if bytes.Count(untouched, []byte{0xee}) != len(untouched) {
				t.Error("bytes were written that nobody sent")
			}
		}
	}
	// Without an extra the second slot is data.
	for _, fails := range []int{1, 2} {
		at := g.RxCons
		g.Post(2)
		lift := l.drv.Fail(emu.Fault{Op: emu.OpCopyGrant, K: fails, Status: hypercall.BadGntref})
		p.send(p.newFrame(pattern(5000, 1), pvnet.ChecksumUnknown, 0, 0))
		lift()
		rsp, err := g.Received(2, deadline())
		want := []raw.RxRsp{
			{ID: uint16(at % raw.Size), Flags: raw.RxMore, Status: raw.Error},
			{ID: uint16((at + 1) % raw.Size), Status: raw.Error},
		}
		if err != nil || rsp[0] != want[0] || rsp[1] != want[1] {
			t.Errorf("copy %d fails: %+v, %v", fails, rsp, err)
		}
	}
	st := g.dev.Stats()
	if sent, lost, gso := st.TX.Get(telemetry.Packets), st.TX.Lost(telemetry.DropBadGref), st.TX.Get(telemetry.GSOPackets); sent != 267 || lost != 6 || gso != 6 {
		t.Errorf("sent %d, lost %d, long %d", sent, lost, gso)
	}
	g.disconnect()
}

// T05 and T35: the response of an extra has no id. Whatever responses a backend gives, no
// page is lost.
func TestT05ResponsesOfExtras(t *testing.T) {
	l := newLab(t, emu.Config{})
	null := raw.TxRsp{ID: 0xffff, Status: raw.Null}
	ok := func(id uint16) raw.TxRsp { return raw.TxRsp{ID: id} }
	bad := func(id uint16) raw.TxRsp { return raw.TxRsp{ID: id, Status: raw.Error} }
	const notOutstanding = "not outstanding"
	for _, c := range []struct {
		name string
		// a and b are the ids of two frames of two data slots each, with an extra in
		// between
		answer func(a, b []uint16) []raw.TxRsp
		want   string // "": legal
		lost   uint64 // frames lost, if legal
	}{
		{"as Linux does", func(a, b []uint16) []raw.TxRsp {
			return []raw.TxRsp{ok(a[0]), null, ok(a[1]), ok(b[0]), null, ok(b[1])}
		}, "", 0},
		{"first the extras", func(a, b []uint16) []raw.TxRsp {
			return []raw.TxRsp{null, null, ok(a[0]), ok(a[1]), ok(b[0]), ok(b[1])}
		}, "", 0},
		{"last the extras", func(a, b []uint16) []raw.TxRsp {
			return []raw.TxRsp{ok(b[1]), ok(b[0]), ok(a[1]), ok(a[0]), null, null}
		}, "", 0},
		{"ids that mean something", func(a, b []uint16) []raw.TxRsp {
			own := raw.TxRsp{ID: a[1], Status: raw.Null}
			return []raw.TxRsp{own, ok(a[0]), ok(a[1]), own, ok(b[1]), ok(b[0])}
		}, "", 0},
		{"an error each", func(a, b []uint16) []raw.TxRsp {
			return []raw.TxRsp{bad(a[0]), null, bad(a[1]), bad(b[0]), null, bad(b[1])}
		}, "", 2},
		{"an error of one", func(a, b []uint16) []raw.TxRsp {
			return []raw.TxRsp{ok(b[0]), null, ok(b[1]), bad(a[0]), null, bad(a[1])}
		}, "", 1},
		{"three NULLs for two extras", func(a, b []uint16) []raw.TxRsp { return []raw.TxRsp{null, null, null} }, "extra that was not sent", 0},
		{"NULL for all", func(a, b []uint16) []raw.TxRsp {
			return []raw.TxRsp{null, null, null, null, null, null}
		}, "extra that was not sent", 0},
		{"an id for the extra, twice", func(a, b []uint16) []raw.TxRsp { return []raw.TxRsp{ok(a[0]), ok(a[0])} }, notOutstanding, 0},
		{"an id for the extra, of another", func(a, b []uint16) []raw.TxRsp {
			return []raw.TxRsp{ok(a[0]), ok(b[0]), ok(a[1]), ok(b[0])}
		}, notOutstanding, 0},
		{"an id for the extra, of nobody", func(a, b []uint16) []raw.TxRsp { return []raw.TxRsp{ok(a[0]), ok(256)} }, notOutstanding, 0},
		{"an error for the extra", func(a, b []uint16) []raw.TxRsp {
			return []raw.TxRsp{bad(a[0]), {ID: 0xffff, Status: raw.Error}}
		}, notOutstanding, 0},
		{"nothing for the extras, twice of all ids", func(a, b []uint16) []raw.TxRsp {
			return []raw.TxRsp{ok(a[0]), ok(a[1]), ok(b[0]), ok(b[1]), ok(b[1])}
		}, notOutstanding, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.t = t
			drv := l.connectFrontendWith(pvnet.Config{}, offloadKeys())
			drv.sink = listen(drv.dev)
			p := newSender(t, drv.dev)
			var ids [2][]uint16
			blank, _ := packet(0, false, false, 5000, 1)
			for i := range ids {
				p.send(p.newFrame(blank, pvnet.ChecksumPartial, pvnet.GSOTCPv4, 1448))
				slots, err := drv.Requests(3, deadline())
				if err != nil || slots[0].Flags != 0x0f || slots[2].Flags != 0 {
					t.Fatal(slots, err)
				}
				ids[i] = []uint16{slots[0].ID, slots[2].ID}
			}
			rsp := c.answer(ids[0], ids[1])
			drv.Answer(rsp...)
			// The frontend reads the responses when it needs room: there are 256 slots,
			// less those without a response.
			room, n := 256-6+len(rsp), 0
			var err error
			for ; err == nil && n <= 256; n++ {
				if n == room && c.want == "" {
					p.SetDeadline(time.Now())
				}
				var f [1]pvnet.Frame
				if _, err = p.AllocWait(f[:], 60); err != nil {
					break
				}
				f[0].CopyFrom(pattern(60, 0))
				if _, err = p.SendWait(f[:]); err != nil {
					f[0].Release()
					break
				}
			}
			if c.want != "" {
				wait(t, drv.sink.ended)
				drv.sink = nil
				drv.awaitFrontend("5")
				drv.finishClose()
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("ended with %v, want %q", err, c.want)
				}
				st := drv.dev.Stats()
				sent, lost := st.TX.Get(telemetry.Packets), st.TX.Dropped()+st.TX.Errors()
				arrived := uint64(0)
				for _, r := range rsp[:len(rsp)-1] {
					if r.Status == raw.Okay && (r.ID == ids[0][0] || r.ID == ids[1][0]) {
						arrived++
					}
				}
				if sent != lost+arrived {
					t.Errorf("sent %d, lost %d, arrived %d", sent, lost, arrived)
				}
				return
			}
			if n != room {
				t.Errorf("room for %d frames, want %d: %v", n, room, err)
			}
			st := drv.dev.Stats()
			if lost := st.TX.Lost(telemetry.DropBackendError); lost != c.lost {
				t.Errorf("%d lost, want %d", lost, c.lost)
			}
			reqs := drv.awaitRequests(room)
			seen := map[uint16]bool{}
			for _, r := range reqs {
				if seen[r.ID] {
					t.Errorf("id %d is out twice", r.ID)
				}
				seen[r.ID] = true
			}
			drv.disconnect()
		})
	}
	l.t = t
}

// An extra without a response costs its slot until the connection ends, and no page.
func TestExtrasThatAreNeverAnswered(t *testing.T) {
	l := newLab(t, emu.Config{})
	drv := l.connectFrontendWith(pvnet.Config{}, offloadKeys())
	p := newSender(t, drv.dev)
	blank, _ := packet(0, true, false, 5000, 1)
	for round := range 3 {
		var all []raw.TxRsp
		frames := 0
		for {
			var f [1]pvnet.Frame
			if p.AllocSize(f[:], len(blank)) == 0 {
				break
			}
			f[0].CopyFrom(blank)
			p.setMetadata(&f[0], pvnet.ChecksumPartial, pvnet.GSOTCPv6, 1448)
			if _, err := p.Send(f[:]); err != nil {
				f[0].Release()
				break
			}
			slots := drv.awaitRequests(3)
			all = append(all, raw.TxRsp{ID: slots[0].ID}, raw.TxRsp{ID: slots[2].ID})
			frames++
		}
		if frames != 85 {
			t.Fatalf("%d frames of 3 slots", frames)
		}
		drv.Answer(all...) // responses to 170 of 255: the extras have none
		for range 171 {
			p.send(p.newFrame(pattern(60, 0), pvnet.ChecksumUnknown, 0, 0))
		}
		f := p.newFrame(pattern(60, 0), pvnet.ChecksumUnknown, 0, 0)
		if n, err := p.Send(f[:]); n != 0 || err != pvnet.ErrFull {
			t.Fatal(n, err)
		}
		f[0].Release()
		st := drv.dev.Stats()
		if sent, lost := st.TX.Get(telemetry.Packets), st.TX.Dropped(); sent != uint64((round+1)*(85+171)) || lost != uint64(round*171) {
			t.Errorf("round %d: sent %d, lost %d", round, sent, lost)
		}
		if round == 2 {
			break
		}
		drv.closeHandshake()
		offer := raw.BackKeys()
		maps.Copy(offer, offloadKeys())
		drv.offerWith(offer)
		drv.awaitPages()
		waitLinkUp(t, drv.dev)
	}
	drv.disconnect()
}

// T17: a long frame waits for all of its slots, including that of its extra. A frame that
// we segment is sent as far as there are slots, and continued when it is offered again.
func TestT17LongFramesToANearlyFullRing(t *testing.T) {
	l := newLab(t, emu.Config{})
	blank, _ := packet(0, false, false, 20000-54, 1)
	const size, pieces = 1000, 20
	for _, segmented := range []bool{false, true} {
		keys, need := offloadKeys(), 5+1
		if segmented {
			keys, need = nil, pieces
		}
		// Our backend; its frontend posts too few pages.
		l.serve(pvnet.ServeConfig{})
		g, _ := l.attackBackendWith(keys)
		p := newSender(t, g.dev)
		f := p.newFrame(blank, pvnet.ChecksumPartial, pvnet.GSOTCPv4, size)
		for n := range need {
			if n > 0 {
				g.Post(1)
			}
			if k, err := p.Send(f[:]); k != 0 || err != pvnet.ErrFull {
				t.Fatal(k, err)
			}
			want := 0
			if segmented {
				want = n
			}
			if got := g.Rx.Load(raw.RspProd); int(got) != want {
				t.Fatalf("%d responses with %d slots, want %d", got, n, want)
			}
		}
		sent := make(chan error, 1)
		p.SetDeadline(deadline())
		go func() { _, err := p.SendWait(f[:]); sent <- err }()
		eventually(t, "a stall", func() bool { return stalls(g.dev, telemetry.EventStall, 1) })
		g.Post(1)
		if err := wait(t, sent); err != nil {
			t.Fatal(err)
		}
		rsp := g.awaitReceived(need)
		var got []byte
		for i, r := range rsp {
			if segmented {
				got = append(got, g.Posted.Page(i)[54:r.Status]...)
			} else if i != 1 {
				got = append(got, g.Posted.Page(i)[:r.Status]...)
			}
		}
		want := blank
		if segmented {
			want = blank[54:]
		}
		if !bytes.Equal(got, want) {
			t.Errorf("cut %v: %d bytes, want %d", segmented, len(got), len(want))
		}
		eventually(t, "its end", func() bool { return stalls(g.dev, telemetry.EventStallOver, 0) })
		if n := count(g.dev, telemetry.Stalls); n != 1 {
			t.Errorf("%d stalls counted", n)
		}
		g.disconnect()
		l.stopServing()

		// Our frontend; its backend answers too few requests.
		drv := l.connectFrontendWith(pvnet.Config{}, keys)
		p = newSender(t, drv.dev)
		f = p.newFrame(blank, pvnet.ChecksumPartial, pvnet.GSOTCPv4, size)
		var ids []uint16
		for range 256 - need + 1 {
			p.send(p.newFrame(pattern(60, 0), pvnet.ChecksumUnknown, 0, 0))
			reqs := drv.awaitRequests(1)
			ids = append(ids, reqs[0].ID)
		}
		before := drv.Tx.Load(raw.ReqProd)
		if n, err := p.Send(f[:]); n != 0 || err != pvnet.ErrFull {
			t.Fatal(n, err)
		}
		part := 0
		if segmented {
			part = need - 1 - 5 // no further pages are free: the frame holds 5
		}
		if n := drv.Tx.Load(raw.ReqProd); int(n-before) != part {
			t.Fatalf("%d requests with %d slots, want %d", n-before, need-1, part)
		}
		p.SetDeadline(deadline())
		go func() { _, err := p.SendWait(f[:]); sent <- err }()
		for _, id := range ids {
			drv.Answer(raw.TxRsp{ID: id})
		}
		if err := wait(t, sent); err != nil {
			t.Fatal(err)
		}
		if n := drv.Tx.Load(raw.ReqProd); int(n-before) != need {
			t.Errorf("%d requests, want %d", n-before, need)
		}
		drv.disconnect()
	}
}

// requireSegments requires that pieces are the segments of whole, with size bytes of payload
// each.
func requireSegments(t testing.TB, whole []byte, v6 bool, size int, pieces [][]byte) {
	t.Helper()
	head := l4Of(v6) + 20
	left := whole[head:]
	for i, p := range pieces {
		n := min(size, len(left))
		if len(p) != head+n || n == 0 || !bytes.Equal(p[head:], left[:n]) {
			t.Fatalf("piece %d has %d bytes, want %d", i, len(p), head+n)
		}
		left = left[n:]
		pseudo := append(bytes.Clone(whole[ipOf+12:ipOf+20]), 0, 6)
		if v6 {
			pseudo = append(bytes.Clone(whole[ipOf+8:ipOf+40]), 0, 6)
		} else if checksum(p[ipOf:ipOf+20]) != 0xffff {
			t.Errorf("piece %d: wrong IP checksum", i)
		}
		if checksum(pseudo, bigEndian16(20+n), p[l4Of(v6):]) != 0xffff {
			t.Errorf("piece %d: wrong TCP checksum", i)
		}
		seq := binary.BigEndian.Uint32(whole[l4Of(v6)+4:]) + uint32(i*size)
		if got := binary.BigEndian.Uint32(p[l4Of(v6)+4:]); got != seq {
			t.Errorf("piece %d begins at %d, want %d", i, got, seq)
		}
	}
	if len(left) != 0 {
		t.Errorf("%d bytes are missing", len(left))
	}
}

// Both ends are ours, each with or without offloads: frames arrive in the form that the
// receiver takes, and all are accounted for.
func TestLongFramesBetweenOurOwnEnds(t *testing.T) {
	for _, offload := range [][2]bool{{true, true}, {true, false}, {false, true}, {false, false}} {
		l := newLab(t, emu.Config{})
		l.serve(pvnet.ServeConfig{Config: pvnet.Config{Offload: offload[1]}})
		v := l.addVif()
		front, err := pvnet.Connect(ctx(t), l.guest, fmt.Sprint(v.ID), pvnet.Config{Offload: offload[0]})
		if err != nil {
			t.Fatal(err)
		}
		back := wait(t, l.devs)
		waitLinkUp(t, front)
		waitLinkUp(t, back)
		for _, way := range []struct {
			from, to *pvnet.Device
			takes    bool
		}{{front, back, offload[1]}, {back, front, offload[0]}} {
			sink, got := listenMetadata(way.to)
			p := newSender(t, way.from)
			var gso, partials, frames, whole uint64
			var held []pvnet.Frame
			var original [][]byte
			rng := rand.New(rand.NewPCG(1, 9))
			for range 60 {
				v6, udp := rng.IntN(2) == 0, rng.IntN(4) == 0
				n, size := rng.IntN(60000), 0
				if udp {
					n %= 1400
				} else if rng.IntN(3) > 0 {
					size = max(1+rng.IntN(9000), (n+127)/128)
				}
				blank, want := packet(0, v6, udp, n, rng.IntN(100))
				if rng.IntN(5) == 0 {
					size = 0
					p.send(p.newFrame(want, pvnet.ChecksumUnknown, 0, 0))
					if err := wait(t, got).differs(arrival{b: want}); err != nil {
						t.Fatal(err)
					}
					frames++
					continue
				}
				f := p.newFrame(blank, pvnet.ChecksumPartial, gsoTypeOf(v6), size)
				if size > 0 && rng.IntN(3) == 0 { // the frame has another holder
					f[0].Retain()
					held, original = append(held, f[0]), append(original, blank)
				}
				long := f[0].GSO() != (pvnet.GSO{})
				p.send(f)
				switch {
				case way.takes:
					a := arrival{b: blank, csum: pvnet.ChecksumPartial}
					partials++
					frames++
					if long {
						a.gso = pvnet.GSO{Type: gsoTypeOf(v6), Size: uint16(size)}
						gso++
					}
					if err := wait(t, got).differs(a); err != nil {
						t.Fatal(err)
					}
				case long:
					var pieces [][]byte
					for range (n + size - 1) / size {
						a := wait(t, got)
						if a.csum != pvnet.ChecksumVerified || a.gso != (pvnet.GSO{}) {
							t.Fatalf("a piece came with %d, %+v", a.csum, a.gso)
						}
						pieces = append(pieces, a.b)
					}
					requireSegments(t, blank, v6, size, pieces)
					frames += uint64(len(pieces))
					whole += uint64(len(pieces))
				default:
					if err := wait(t, got).differs(arrival{b: want, csum: pvnet.ChecksumVerified}); err != nil {
						t.Fatal(err)
					}
					frames++
					whole++
				}
			}
			sent, received := way.from.Stats().TX, sink.stats(t).RX
			for _, c := range []struct {
				what telemetry.Counter
				want uint64
			}{{telemetry.Packets, frames}, {telemetry.GSOPackets, gso}, {telemetry.CsumPartial, partials}, {telemetry.GSOCsumFixup, 0}} {
				if s, r := sent.Get(c.what), received.Get(c.what); s != c.want || r != c.want {
					t.Errorf("%v, counter %d: sent %d, received %d, want %d", offload, c.what, s, r, c.want)
				}
			}
			for _, c := range []telemetry.Counter{telemetry.Bytes, telemetry.Slots, telemetry.ChainedPackets} {
				if s, r := sent.Get(c), received.Get(c); s != r {
					t.Errorf("%v, counter %d: sent %d, received %d", offload, c, s, r)
				}
			}
			for i, f := range held {
				if err := arrivalOf(&f).differs(arrival{original[i], f.GSO(), pvnet.ChecksumPartial}); err != nil {
					t.Errorf("the other holder's: %v", err)
				}
				f.Release()
			}
			if n := received.Get(telemetry.CsumVerified); n != whole {
				t.Errorf("%v: %d verified, want %d", offload, n, whole)
			}
			if n := sent.Dropped() + sent.Errors() + received.Dropped() + received.Errors(); n != 0 {
				t.Errorf("%v: %d lost", offload, n)
			}
		}
		front.Disconnect()
		l.removeVif(v)
		wait(t, back.Done())
		l.stopServing()
	}
}

// T21: each end publishes its offloads, and removes the keys of an earlier process.
func TestT21OffloadKeys(t *testing.T) {
	l := newLab(t, emu.Config{})
	keys := []string{"feature-no-csum-offload", "feature-ipv6-csum-offload", "feature-gso-tcpv4", "feature-gso-tcpv6"}
	for _, offload := range []bool{true, false, true} {
		v := l.addVif()
		for _, k := range keys { // left by earlier processes
			l.write(l.guestStore, v.FrontDir(), xenstore.Values{k: "1"}, "")
			l.write(l.drvStore, v.BackDir(), xenstore.Values{k: "1"}, "")
		}
		l.serve(pvnet.ServeConfig{Config: pvnet.Config{Offload: offload}})
		front, err := pvnet.Connect(ctx(t), l.guest, fmt.Sprint(v.ID), pvnet.Config{Offload: offload})
		if err != nil {
			t.Fatal(err)
		}
		back := wait(t, l.devs)
		waitLinkUp(t, front)
		for _, dir := range []string{v.FrontDir(), v.BackDir()} {
			for _, k := range keys {
				want, there := offloadKeys()[k], true
				if !offload {
					want, there = "1", k == "feature-no-csum-offload"
				} else if want == "0" {
					there = false // means the same, and takes no node
				}
				if got, err := l.store.Read(dir + "/" + k); (err == nil) != there || there && got != want {
					t.Errorf("offload %v: %s/%s is %q, %v", offload, dir, k, got, err)
				}
			}
		}
		front.Disconnect()
		l.removeVif(v)
		wait(t, back.Done())
		l.stopServing()
	}
}

// T21: only "1" offers a feature. An unknown value of a checksum key means that partial
// checksums are not accepted.
func TestT21GarbageInsteadOfOffers(t *testing.T) {
	l := newLab(t, emu.Config{})
	blank, _ := packet(0, false, false, 3000, 1)
	six, _ := packet(0, true, false, 3000, 1)
	try := func(keys xenstore.Values, long4, long6 bool) {
		t.Helper()
		drv := l.connectFrontendWith(pvnet.Config{}, keys)
		p := newSender(t, drv.dev)
		for _, v6 := range []bool{false, true} {
			b, long := blank, long4
			if v6 {
				b, long = six, long6
			}
			p.send(p.newFrame(b, pvnet.ChecksumPartial, gsoTypeOf(v6), 1448))
			if long {
				slots, err := drv.Requests(2, deadline())
				if err != nil || slots[0].Flags != 0x0b {
					t.Fatalf("%.60q: IPv6 %v: %+v, %v", keys, v6, slots, err)
				}
				continue
			}
			var pieces [][]byte
			for range 3 {
				slots, err := drv.Requests(1, deadline())
				if err != nil || slots[0].Flags != raw.TxValidated {
					t.Fatalf("%.60q: IPv6 %v: %+v, %v", keys, v6, slots, err)
				}
				pieces = append(pieces, drv.readFrame(slots))
			}
			requireSegments(t, b, v6, 1448, pieces)
		}
		if n := drv.Tx.Load(raw.ReqProd); n != drv.TxCons {
			t.Fatalf("%.60q: %d slots more", keys, n-drv.TxCons)
		}
		drv.disconnect()
	}
	with := func(key, v string) xenstore.Values {
		k := offloadKeys()
		k[key] = v
		return k
	}
	try(offloadKeys(), true, true)
	try(nil, false, false)
	try(with("feature-sg", "0"), false, false)
	for i, v := range append([]string{"0", "2", strings.Repeat("1", 4000)}, garbage...) {
		if strings.Contains(v, "\x00") || testing.Short() && i > 4 {
			continue // xenstored does not take such a value
		}
		try(with("feature-gso-tcpv4", v), false, true)
		try(with("feature-gso-tcpv6", v), true, false)
		try(with("feature-ipv6-csum-offload", v), true, false)
		try(with("feature-sg", v), false, false)
		if v != "0" {
			try(with("feature-no-csum-offload", v), v == "", true) // an empty node is a missing one
		}
	}
}

// A sender that waits when its peer goes sends to the next peer, in the form that this
// one takes.
func TestALongFrameWaitsForAnotherPeer(t *testing.T) {
	l := newLab(t, emu.Config{})
	drv := l.connectFrontendWith(pvnet.Config{}, offloadKeys())
	p := newSender(t, drv.dev)
	blank, _ := packet(0, false, false, 9000, 1)
	other, _ := packet(0, false, true, 900, 1)
	long := p.newFrame(blank, pvnet.ChecksumPartial, pvnet.GSOTCPv4, 1000)
	short := p.newFrame(other, pvnet.ChecksumPartial, 0, 0)
	few, _ := packet(0, false, false, 200, 1)
	p.send(p.newFrame(few, pvnet.ChecksumPartial, pvnet.GSOTCPv4, 100)) // more slots than pages
	for range 251 {
		p.send(p.newFrame(pattern(60, 0), pvnet.ChecksumUnknown, 0, 0))
	}
	sent := make(chan error, 1)
	go func() {
		n, err := p.SendWait([]pvnet.Frame{long[0], short[0]})
		if n != 2 && err == nil {
			err = fmt.Errorf("%d sent", n)
		}
		sent <- err
	}()
	eventually(t, "waiting", func() bool { return count(drv.dev, telemetry.RingFull) > 0 })
	drv.closeHandshake()
	for k := range offloadKeys() {
		if err := l.tools.Remove(ctx(t), drv.v.BackDir()+"/"+k); err != nil {
			t.Fatal(err)
		}
	}
	drv.offer()
	if err := wait(t, sent); err != nil {
		t.Fatal(err)
	}
	var pieces [][]byte
	for range 9 {
		reqs, err := drv.Requests(1, deadline())
		if err != nil || reqs[0].Flags != raw.TxValidated {
			t.Fatal(reqs, err)
		}
		pieces = append(pieces, drv.readFrame(reqs))
	}
	requireSegments(t, blank, false, 1000, pieces)
	// Over IPv4 any peer accepts partial checksums unless it says otherwise.
	reqs, err := drv.Requests(1, deadline())
	if err != nil || reqs[0].Flags != partial || !bytes.Equal(drv.readFrame(reqs), other) {
		t.Fatal(reqs, err)
	}
	drv.disconnect()
}
