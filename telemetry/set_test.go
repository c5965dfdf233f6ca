package telemetry

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func TestResetLosesNothing(t *testing.T) {
	s, m := attached(t, 2)
	var stop atomic.Bool
	var wg sync.WaitGroup
	var truth [2]uint64
	for q := range truth {
		wg.Go(func() {
			b := s.RX(q)
			for !stop.Load() {
				b.Add(Packets, 1)
				truth[q]++
				b.Publish()
			}
			b.Flush()
		})
	}
	var before, last uint64
	for range 1000 {
		st := s.Snapshot()
		if st.RX.Get(Packets) > 1<<62 {
			t.Fatal("Snapshot went below its baseline")
		}
		s.Reset()
		total := s.Totals()
		if n := total.RX.Get(Packets); n < last {
			t.Fatal("Totals went backwards")
		} else {
			last = n
		}
	}
	stop.Store(true)
	wg.Wait()
	for i := range s.base {
		before += s.base[i][Packets]
	}
	st := s.Snapshot()
	if got := before + st.RX.Get(Packets); got != truth[0]+truth[1] {
		t.Fatalf("before the last reset %d + after it %d, counted %d", before, st.RX.Get(Packets), truth[0]+truth[1])
	}
	if m.reset.Count != 1000 || m.reset.RxPackets != before {
		t.Errorf("the mirror was told of %+v, want 1000 resets at %d packets", m.reset, before)
	}
	if w := m.block(0, RX); w[Packets] != truth[0] {
		t.Errorf("a reset moved the mirror: %d, want %d", w[Packets], truth[0])
	}
}

func TestResetKeepsGauges(t *testing.T) {
	s := NewSet(1)
	s.TX(0).Set(RingUsed, 12)
	s.TX(0).Observe(BatchSize, 4)
	s.TX(0).Flush()
	s.Reset()
	st := s.Snapshot()
	if st.TX.Gauge(RingUsed) != 12 {
		t.Error("a gauge was reset")
	}
	if b, sum := st.TX.Histogram(fieldNamed(t, "batch_size")); b[2] != 0 || sum != 0 {
		t.Errorf("a histogram was not reset: %v, %d", b, sum)
	}
}

func TestCountersWrap(t *testing.T) {
	s := NewSet(1)
	b := s.RX(0)
	b.Add(Bytes, ^uint64(0)-9)
	b.Flush()
	s.Reset()
	b.Add(Bytes, 15)
	b.Flush()
	if st := s.Snapshot(); st.RX.Get(Bytes) != 15 {
		t.Errorf("%d bytes across the wrap, want 15", st.RX.Get(Bytes))
	}
	if st := s.Totals(); st.RX.Get(Bytes) != 5 {
		t.Errorf("total %d, want 5", st.RX.Get(Bytes))
	}
}

func TestMirrorContinuesEarlierTotals(t *testing.T) {
	s := NewSet(1)
	s.RX(0).Add(Packets, 7)
	s.RX(0).Set(RingUsed, 3)
	s.RX(0).Flush()
	m := newHeapMirror(1)
	base := make([]uint64, BlockWords)
	for i := range base {
		base[i] = 1000
	}
	m.base[RX] = base
	if err := s.Attach(m); err != nil {
		t.Fatal(err)
	}
	w := m.block(0, RX)
	if w[Packets] != 1007 || w[Bytes] != 1000 || w[RingUsed] != 3 || w[wordDone] != w[wordStart] || w[wordDone] > 2 {
		t.Fatalf("mirror: packets %d bytes %d ring_used %d generation %d", w[Packets], w[Bytes], w[RingUsed], w[wordDone])
	}
	s.RX(0).Add(Packets, 1)
	s.RX(0).Publish()
	if n := s.RX(0).Refresh(); n != 0 || w[Packets] != 1008 {
		t.Errorf("healed %d, packets %d", n, w[Packets])
	}
	if st := s.Totals(); st.RX.Get(Packets) != 8 {
		t.Errorf("Totals count what an earlier process did: %d", st.RX.Get(Packets))
	}
}

func TestClosedMirrorIsNotWritten(t *testing.T) {
	for range 50 {
		s, m := attached(t, 1)
		var stop atomic.Bool
		var wg sync.WaitGroup
		wg.Go(func() {
			for b := s.TX(0); !stop.Load(); b.Publish() {
				b.Add(Packets, 1)
			}
		})
		if err := s.Close(); err != nil || m.closed != 1 {
			t.Fatal(err, m.closed)
		}
		// From here on the words may be unmapped: the race detector would report a write
		// by the owner.
		clear(m.words)
		if err := s.Close(); err != nil || m.closed != 1 {
			t.Fatal("the second Close did something", err, m.closed)
		}
		stop.Store(true)
		wg.Wait()
	}
}

func TestMirrorIsToldOfTheDevice(t *testing.T) {
	s := NewSet(1)
	s.Record(EventState, NoQueue, 1, 2)
	s.SetStatus(Status{State: 2})
	m := newHeapMirror(1)
	s.Open(storeFunc(func(i Info) (Mirror, error) {
		if i.Queues != 1 || i.Name() != "back-1-2-3" {
			t.Errorf("opened as %+v", i)
		}
		return m, nil
	}), Info{Role: Backend, Own: 1, Peer: 2, Handle: 3})
	if k, r := s.Backend(); k != "test" || r != "because" {
		t.Errorf("backend %q, %q", k, r)
	}
	if m.status.State != 2 || len(m.events) != 1 {
		t.Error("the mirror was not told what happened before it was there")
	}
	s.SetStatus(Status{State: 4, Up: true})
	s.Record(EventStall, 0, 5, 6)
	if !m.status.Up || len(m.events) != 2 || m.events[1].Seq != 2 {
		t.Errorf("status %+v, events %+v", m.status, m.events)
	}
	if err := s.Attach(newHeapMirror(1)); err != ErrAttached {
		t.Errorf("a second mirror: %v", err)
	}
}

func TestFailingStoreLeavesTheHeap(t *testing.T) {
	s := NewSet(1)
	s.Open(nil, Info{})
	if k, r := s.Backend(); k != "heap" || r != "" {
		t.Errorf("no store: %q, %q", k, r)
	}
	s.Open(storeFunc(func(Info) (Mirror, error) { return nil, errRefused }), Info{})
	if k, r := s.Backend(); k != "heap" || r != "refused" {
		t.Errorf("refusing store: %q, %q", k, r)
	}
	m := newHeapMirror(1)
	m.short = true
	s.Open(storeFunc(func(Info) (Mirror, error) { return m, nil }), Info{})
	if k, r := s.Backend(); k != "heap" || !strings.Contains(r, "127") || m.closed != 1 {
		t.Errorf("mirror of the wrong size: %q, %q, closed %d times", k, r, m.closed)
	}
	s.RX(0).Add(Packets, 1)
	s.RX(0).Flush()
	if st := s.Snapshot(); st.RX.Get(Packets) != 1 {
		t.Error("the counters do not count")
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
}

func TestRecorderKeepsTheLatest(t *testing.T) {
	s := NewSet(1)
	for i := range uint64(eventsKept + 44) {
		s.Record(EventViolation, 0, i, 0)
	}
	ev := s.Events()
	if len(ev) != eventsKept || ev[0].Seq != 45 || ev[eventsKept-1].A != eventsKept+43 {
		t.Fatalf("%d events from %d to %d", len(ev), ev[0].Seq, ev[len(ev)-1].Seq)
	}
	for i := 1; i < len(ev); i++ {
		if ev[i].Seq != ev[i-1].Seq+1 {
			t.Fatal("a gap in the numbers")
		}
	}
}

func TestNamesCoverTheConstants(t *testing.T) {
	if State(4).String() != "Connected" || State(4).Symbol() != "XenbusStateConnected" || State(200).Symbol() != "unknown" {
		t.Error("states")
	}
	if EventReconnect.String() != "reconnect" || EventKind(99).String() != "unknown" {
		t.Error("events")
	}
	if FeatureHash != 1<<(len(FeatureNames)-1) {
		t.Error("features")
	}
}
