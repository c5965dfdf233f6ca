package hostile

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
)

// A heapStore is a Store on the heap, where the race detector watches it.
type heapStore struct {
	t       testing.TB
	mu      sync.Mutex
	mirrors []*heapMirror // guarded by mu
}

type heapMirror struct {
	t      testing.TB
	words  [2][telemetry.BlockWords]uint64
	closed atomic.Bool
}

func (s *heapStore) Open(info telemetry.Info) (telemetry.Mirror, error) {
	m := &heapMirror{t: s.t}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mirrors = append(s.mirrors, m)
	return m, nil
}

func (m *heapMirror) Words(_ int, d telemetry.Dir) (words, base []uint64) { return m.words[d][:], nil }
func (m *heapMirror) Kind() string                                        { return "heap" }
func (m *heapMirror) Reason() string                                      { return "a test's" }
func (m *heapMirror) Update(telemetry.Status, telemetry.Reset)            { m.checkOpen() }
func (m *heapMirror) Record(telemetry.Event)                              { m.checkOpen() }

func (m *heapMirror) checkOpen() {
	if m.closed.Load() {
		m.t.Error("a mirror is used after its Close")
	}
}

// Close overwrites the words: no device may write or read them afterwards.
func (m *heapMirror) Close() error {
	m.checkOpen()
	m.closed.Store(true)
	for d := range m.words {
		for i := range m.words[d] {
			m.words[d][i] = ^uint64(0)
		}
	}
	return nil
}

// requireAllClosed requires that all mirrors are closed, and unchanged since.
func (s *heapStore) requireAllClosed() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, m := range s.mirrors {
		if !m.closed.Load() {
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

// startStatsReaders starts goroutines that call every method of d that reads statistics, as fast
// as they can, until stop. All frames have 200 bytes.
func startStatsReaders(t testing.TB, d *pvnet.Device) (stop func() (reads uint64)) {
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
				runtime.Gosched() // there may be one thread
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
	s := &heapStore{t: t}
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Buffers: 64, Counters: s}})
	rounds := 24
	if testing.Short() {
		rounds = 8
	}
	reads := uint64(0)
	start := time.Now()
	for i := range rounds {
		g := l.newGuest()
		stop := startStatsReaders(t, g.dev)
		switch i % 4 {
		case 0:
			g.connect()
			g.requireTraffic()
			g.disconnect()
		case 1:
			keys := g.Keys()
			keys["tx-ring-ref"] = "4000000"
			g.requireRefused(keys)
			g.retryAfterRefusal()
		case 2:
			g.connect()
			g.requireTraffic()
			g.Tx.Store(raw.ReqProd, g.TxProd+1000)
			g.TxPort.Notify()
			g.requirePeerError("tx", "impossible")
		case 3:
			g.connect()
			g.requireTraffic()
			g.setState("6")
			g.removeVif()
		}
		for range 100 { // and the statistics of an ended device
			g.dev.Stats()
		}
		reads += stop()
	}
	t.Logf("%.0f reads a second", float64(reads)/time.Since(start).Seconds())
	s.requireAllClosed()
}

func TestT36StatisticsOfAFrontendAreReadThroughoutALife(t *testing.T) {
	l := newLab(t, emu.Config{})
	s := &heapStore{t: t}
	for i := range 6 {
		drv := l.attackFrontend(pvnet.Config{Buffers: 64, Counters: s})
		stop := startStatsReaders(t, drv.dev)
		drv.requireTraffic()
		if i%2 == 0 {
			if err := drv.Close(); err != nil {
				t.Fatal(err)
			}
			drv.setState("5")
			drv.awaitFrontend("6")
			drv.setState("6")
			drv.awaitFrontend("1")
			drv.reconnect()
			drv.requireTraffic()
		}
		if i%3 == 0 {
			drv.Rx.Store(raw.RspProd, drv.RxProd+1000)
			drv.RxPort.Notify()
			drv.requirePeerError("rx", "impossible")
		} else {
			drv.disconnect()
		}
		stop()
	}
	s.requireAllClosed()
}
