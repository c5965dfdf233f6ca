package hostile

import (
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
	"barevif/xenbus/xenstore"
)

// notOffered are the counters that cannot change, because we offer their feature to no
// peer.
var notOffered = []string{"gso_packets", "gso_checksum_fixup"}

// A forgedStore keeps words that a test can write.
type forgedStore struct {
	mu    sync.Mutex
	words map[string]*[2][telemetry.BlockWords]uint64 // guarded by mu: by the device's name
}

func (m *forgedStore) Open(i telemetry.Info) (telemetry.Mirror, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.words == nil {
		m.words = make(map[string]*[2][telemetry.BlockWords]uint64)
	}
	w := new([2][telemetry.BlockWords]uint64)
	m.words[i.Name()] = w
	return &forgedMirror{w}, nil
}

// forge changes one word of every mirror.
func (m *forgedStore) forge() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, w := range m.words {
		atomic.StoreUint64(&w[telemetry.RX][telemetry.Packets], 1<<60)
	}
}

type forgedMirror struct {
	words *[2][telemetry.BlockWords]uint64
}

func (p *forgedMirror) Words(_ int, d telemetry.Dir) (words, base []uint64) {
	return p.words[d][:], nil
}
func (p *forgedMirror) Kind() string                             { return "test" }
func (p *forgedMirror) Reason() string                           { return "" }
func (p *forgedMirror) Update(telemetry.Status, telemetry.Reset) {}
func (p *forgedMirror) Record(telemetry.Event)                   {}
func (p *forgedMirror) Close() error                             { return nil }

// count returns the present value of a counter of d.
func count(d *pvnet.Device, c telemetry.Counter) uint64 {
	st := d.Stats()
	return st.RX.Get(c) + st.TX.Get(c)
}

// Every counter of the table changes and every event is recorded, because one that never
// changes tells nothing.
func TestEveryFieldOfTheTableMoves(t *testing.T) {
	moved := map[string]bool{}
	look := func(d *pvnet.Device) {
		st := d.Counters().Totals()
		for _, v := range []*telemetry.Values{&st.RX, &st.TX} {
			for _, f := range telemetry.Fields() {
				if f.Kind == telemetry.KindHistogram {
					buckets, _ := v.Histogram(f)
					moved[f.Name] = moved[f.Name] || slices.ContainsFunc(buckets, func(n uint64) bool { return n > 0 })
				} else if v.Field(f) != 0 {
					moved[f.Name] = true
				}
			}
		}
	}
	l := newLab(t, emu.Config{})
	store := new(forgedStore)
	cfg := pvnet.Config{Counters: store}
	l.serve(pvnet.ServeConfig{Config: cfg, StallTimeout: time.Second})
	var devices []*pvnet.Device

	// Frames from a frontend, correct and wrong.
	g := l.attackBackend()
	devices = append(devices, g.dev)
	g.requireTraffic()
	group, everybody := pattern(100, 1), pattern(100, 2)
	group[0] |= 1
	copy(everybody, []byte{255, 255, 255, 255, 255, 255})
	for _, b := range [][]byte{group, everybody} {
		g.send(g.split(b, raw.TxValidated), nil, pass, noReason, b)
	}
	blank, whole := packet(0, false, true, 100, 1)
	g.send(g.split(blank, raw.TxBlank, 50), nil, pass, noReason, whole)
	reqs, want := g.chain(raw.TxExtra, 100, 200)
	g.send(reqs, []raw.Extra{{Type: 4}}, pass, noReason, want)
	g.send(reqs, []raw.Extra{raw.GSO(1448, 1)}, refuse, telemetry.DropBadGSO, nil)
	g.send(g.split(pattern(60, 0), raw.TxBlank), nil, pass, noReason, nil) // no checksum to complete
	eventually(t, "no checksum to complete", func() bool {
		st := g.dev.Stats()
		return st.RX.Lost(telemetry.DropBadCsum) == 1
	})
	reqs, _ = g.chain(0, 10)
	g.send(reqs, nil, refuse, telemetry.DropTooShort, nil)
	reqs, _ = g.chain(0, slices.Repeat([]int{60}, 20)...)
	g.send(reqs, nil, refuse, telemetry.DropBadChain, nil)
	bad := g.Req(0, 0, 60, 0)
	bad.Ref = 1 << 30
	g.send([]raw.TxReq{bad}, nil, refuse, telemetry.DropBadGref, nil)

	// A limit that makes frames wait.
	l.write(l.tools, g.v.BackDir(), xenstore.Values{"rate": "1000,20000"}, "")
	limited := func() uint64 { return g.dev.Stats().RX.Gauge(telemetry.RateLimit) }
	eventually(t, "a limit", func() bool { return limited() == 50000 })
	for range 5 {
		g.send(g.split(pattern(500, 1), 0), nil, pass, noReason, pattern(500, 1))
	}
	l.write(l.tools, g.v.BackDir(), xenstore.Values{"rate": "1000000,1000"}, "")
	eventually(t, "a limit that holds nothing up", func() bool { return limited() == 1000000000 })

	// Frames to it: more than it asked to be notified of, then more than it takes.
	g.Post(2)
	for range 2 {
		if _, err := g.dev.Write(pattern(60, 0)); err != nil {
			t.Fatal(err)
		}
	}
	sent := make(chan error, 1)
	go func() { _, err := g.dev.Write(pattern(60, 0)); sent <- err }()
	eventually(t, "a stall", func() bool { return count(g.dev, telemetry.Stalls) == 1 && g.dev.Stalled() })
	g.Post(1)
	if err := wait(t, sent); err != nil {
		t.Fatal(err)
	}
	g.awaitReceived(3)
	store.forge()
	g.TxPort.Notify() // an event without work
	eventually(t, "the tick and what it wants", func() bool {
		return count(g.dev, telemetry.MirrorHealed) > 0 && count(g.dev, telemetry.EventsSpurious) > 0
	})
	g.requireTraffic()
	g.dev.ResetStats()
	lift := l.guest.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
	eventually(t, "events of every kind a backend records", func() bool {
		kinds := eventKinds(g.dev)
		if !kinds[telemetry.EventRescued] { // again if it was awake and has looked by itself
			g.Put(g.Req(0, 0, 60, 0).Words())
			g.Push()
			g.awaitAnswers(1)
		}
		return kinds[telemetry.EventTamper] && kinds[telemetry.EventStallOver] && kinds[telemetry.EventRescued] && kinds[telemetry.EventCarrierOn]
	})
	lift()
	// A frame to a group that the frontend has not joined.
	l.write(l.guestStore, g.v.FrontDir(), xenstore.Values{"request-multicast-control": "1"}, "")
	g.Post(100)
	eventually(t, "a frame that is filtered", func() bool {
		if _, err := g.dev.Write(group); err != nil {
			t.Fatal(err)
		}
		return count(g.dev, telemetry.Filtered) > 0
	})
	g.Tx.Store(raw.ReqProd, g.TxProd-1)
	g.TxPort.Notify()
	g.requirePeerError("tx", "impossible")

	// Frames to a frontend that takes none, and does not notify.
	g, _ = l.attackBackendWith(xenstore.Values{"feature-rx-notify": "0"})
	devices = append(devices, g.dev)
	if _, err := g.dev.Write(pattern(60, 0)); err != nil {
		t.Fatal(err)
	}
	g.disconnect()
	l.stopServing()

	// Frames from a backend, and its faults.
	drv := l.connectFrontend(pvnet.Config{Counters: store, LendRx: true})
	devices = append(devices, drv.dev)
	rx, err := drv.dev.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	tx, err := drv.dev.OwnTX(0)
	if err != nil {
		t.Fatal(err)
	}
	var f [1]pvnet.Frame
	drv.deliverSlots(drv.fillSlot(0, 0, pattern(60, 0)), drv.fillSlot(0, 0, pattern(60, 0)))
	if n, err := rx.Receive(f[:]); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	rx.Release(f[:])
	if err := rx.CountUndelivered(1); err != nil {
		t.Fatal(err)
	}
	var long [][2]uint32
	for range 17 {
		long = append(long, drv.fillSlot(0, raw.RxMore, pattern(4096, 0)))
	}
	drv.deliverSlots(append(long, drv.fillSlot(0, 0, pattern(60, 0)))...)
	drv.deliverSlots(drv.unfilledSlot(raw.RxRsp{Offset: 4096, Status: 1}), drv.unfilledSlot(raw.RxRsp{Status: -1}))
	drv.deliverSlots(drv.fillSlot(0, raw.RxExtra, pattern(60, 0)), drv.extraSlot(raw.Extra{}))
	drv.deliverSlots(drv.fillSlot(0, raw.RxExtra, pattern(60, 0)), drv.extraSlot(raw.Extra{Type: 4, Body: [6]byte{0, 1}}))
	rx.SetDeadline(time.Now().Add(10 * time.Millisecond))
	for err = nil; err == nil; {
		var n int
		if n, err = rx.Receive(f[:]); n > 0 {
			rx.Release(f[:])
		}
	}
	if !os.IsTimeout(err) {
		t.Fatal(err)
	}
	// The caller holds all pages, then the backend does; and a backend that keeps the
	// rings, with sent frames in them.
	held := make([]pvnet.Frame, 257)
	n := tx.AllocSize(held, 60)
	if tx.AllocSize(f[:], 60) != 0 {
		t.Fatal("a page too many")
	}
	if k, err := tx.Send(held[:n]); k != n || err != nil {
		t.Fatal(k, err)
	}
	look(drv.dev) // no slot is in use any more once the link is down
	kept := drv.Back
	drv.setState("5")
	drv.awaitFrontend("6")
	drv.setState("6")
	drv.awaitFrontend("1")
	drv.offer()
	waitLinkUp(t, drv.dev)
	if err := kept.Close(); err != nil {
		t.Error(err)
	}
	// Then a backend that answers a request that was not made, with three frames in
	// flight.
	n = tx.AllocSize(held[:3], 60)
	if k, err := tx.Send(held[:n]); k != 3 || err != nil {
		t.Fatal(k, err)
	}
	drv.Answer(raw.TxRsp{ID: 256})
	for err = nil; err == nil; {
		if n = tx.AllocSize(f[:], 60); n == 0 { // the poll
			_, err = tx.Send(nil)
			continue
		}
		_, err = tx.Send(f[:])
	}
	drv.awaitFrontend("5")
	drv.finishClose()

	recorded := map[telemetry.EventKind]bool{}
	for _, d := range devices {
		look(d)
		maps.Copy(recorded, eventKinds(d))
	}
	for _, f := range telemetry.Fields() {
		if moved[f.Name] == slices.Contains(notOffered, f.Name) {
			t.Errorf("%s moved: %v", f.Name, moved[f.Name])
		}
	}
	for k := telemetry.EventState; int(k) < len(telemetry.EventNames); k++ {
		if !recorded[k] {
			t.Errorf("no event %s was recorded", k)
		}
	}
}

// eventKinds returns the kinds of the events that d has recorded.
func eventKinds(d *pvnet.Device) map[telemetry.EventKind]bool {
	kinds := map[telemetry.EventKind]bool{}
	for _, e := range d.Counters().Events() {
		kinds[e.Kind] = true
	}
	return kinds
}
