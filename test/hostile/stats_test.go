package hostile

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
)

// A shelf is a Store on the heap, where the race detector watches it.
type shelf struct {
	t   testing.TB
	mu  sync.Mutex
	all []*shelved // guarded by mu
}

type shelved struct {
	t     testing.TB
	words [2][telemetry.BlockWords]uint64
	gone  atomic.Bool
}

func (s *shelf) Open(info telemetry.Info) (telemetry.Mirror, error) {
	m := &shelved{t: s.t}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, m)
	return m, nil
}

func (m *shelved) Words(_ int, d telemetry.Dir) (words, base []uint64) { return m.words[d][:], nil }
func (m *shelved) Kind() string                                        { return "heap" }
func (m *shelved) Reason() string                                      { return "a test's" }
func (m *shelved) Update(telemetry.Status, telemetry.Reset)            { m.used() }
func (m *shelved) Record(telemetry.Event)                              { m.used() }

func (m *shelved) used() {
	if m.gone.Load() {
		m.t.Error("a mirror is used after its Close")
	}
}

// Close overwrites the words: no device may write or read them afterwards.
func (m *shelved) Close() error {
	m.used()
	m.gone.Store(true)
	for d := range m.words {
		for i := range m.words[d] {
			m.words[d][i] = ^uint64(0)
		}
	}
	return nil
}

// check requires that all mirrors are closed, and unchanged since.
func (s *shelf) check() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, m := range s.all {
		if !m.gone.Load() {
			s.t.Errorf("mirror %d is still open", i)
		}
		for d := range m.words {
			for w, v := range m.words[d] {
				if v != ^uint64(0) {
					s.t.Errorf("mirror %d, block %d: word %d is written after Close", i, d, w)
				}
			}
		}
	}
}

// watchers call every method of d that reads statistics, as fast as they can, until stop.
// All frames have 200 bytes.
func watchers(t testing.TB, d *pvnet.Device) (stop func() (reads uint64)) {
	end := make(chan struct{})
	var n atomic.Uint64
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			var last telemetry.Stats
			for {
				select {
				case <-end:
					return
				default:
				}
				st := d.Stats()
				for _, v := range []struct {
					what      string
					now, then *telemetry.Values
				}{{"rx", &st.RX, &last.RX}, {"tx", &st.TX, &last.TX}} {
					p := v.now.Get(telemetry.Packets)
					if b := v.now.Get(telemetry.Bytes); b != 200*p {
						t.Errorf("%s: %d frames have %d bytes", v.what, p, b)
					}
					if then := v.then.Get(telemetry.Packets); p < then {
						t.Errorf("%s: %d frames, %d before", v.what, p, then)
					}
				}
				last = st
				d.Counters().Totals()
				d.Counters().Events()
				d.Counters().Backend()
				d.Budget()
				d.Active()
				d.Peer()
				d.MAC()
				n.Add(1)
			}
		})
	}
	return func() uint64 { close(end); wg.Wait(); return n.Load() }
}

// T36, XSA-526, XSA-528: a reader of the statistics gets a past or the present value
// while the device connects, fails to connect, reconnects, is attacked, or ends.
func TestT36StatisticsAreReadThroughoutALife(t *testing.T) {
	l := newLab(t, emu.Config{})
	s := &shelf{t: t}
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Buffers: 64, Counters: s}})
	rounds := 24
	if testing.Short() {
		rounds = 8
	}
	reads := uint64(0)
	start := time.Now()
	for i := range rounds {
		g := l.knock()
		stop := watchers(t, g.dev)
		switch i % 4 {
		case 0:
			g.connect()
			g.works()
			g.leave()
		case 1:
			keys := g.Keys()
			keys["tx-ring-ref"] = "4000000"
			g.refused(keys)
			g.retry()
		case 2:
			g.connect()
			g.works()
			g.Tx.Store(raw.ReqProd, g.TxProd+1000)
			g.TxPort.Notify()
			g.fatal("tx", "impossible")
		case 3:
			g.connect()
			g.works()
			g.state("6")
			g.gone()
		}
		for range 100 { // and the statistics of an ended device
			g.dev.Stats()
		}
		reads += stop()
	}
	t.Logf("%.0f reads a second", float64(reads)/time.Since(start).Seconds())
	s.check()
}

func TestT36StatisticsOfAFrontendAreReadThroughoutALife(t *testing.T) {
	l := newLab(t, emu.Config{})
	s := &shelf{t: t}
	for i := range 6 {
		h := l.lure(pvnet.Config{Buffers: 64, Counters: s})
		stop := watchers(t, h.dev)
		h.works()
		if i%2 == 0 {
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			h.state("5")
			l.await(h.v.FrontDir()+"/state", "6")
			h.state("6")
			l.await(h.v.FrontDir()+"/state", "1")
			h.refs = nil
			h.offer()
			eventually(t, "the link", func() bool { return h.dev.Budget() != (pvnet.Budget{}) })
			h.works()
		}
		if i%3 == 0 {
			h.Rx.Store(raw.RspProd, h.RxProd+1000)
			h.RxPort.Notify()
			h.fatal("rx", "impossible")
		} else {
			h.leave()
		}
		stop()
	}
	s.check()
}
