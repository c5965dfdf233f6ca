package telemetry

import (
	"math/bits"
	"math/rand/v2"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func TestReasonsAddUpToDroppedAndErrors(t *testing.T) {
	s := NewSet(2)
	var dropped, errs uint64
	for range 1000 {
		r := DropDisconnected + Reason(rand.N(int(endReasons-DropDisconnected)))
		n := rand.Uint64N(1 << 40)
		b := s.RX(rand.N(2))
		b.Drop(r, n)
		if r < DropTooLong {
			dropped += n
		} else {
			errs += n
		}
		if rand.N(3) == 0 {
			b.Publish()
		}
	}
	s.RX(0).Flush()
	s.RX(1).Flush()
	st := s.Snapshot()
	var sum uint64
	for r := DropDisconnected; r < endReasons; r++ {
		sum += st.RX.Lost(r)
	}
	if st.RX.Dropped() != dropped || st.RX.Errors() != errs || sum != dropped+errs {
		t.Fatalf("dropped %d errors %d sum %d, want %d and %d", st.RX.Dropped(), st.RX.Errors(), sum, dropped, errs)
	}
}

func TestObservedValueLandsUnderItsBound(t *testing.T) {
	fields := map[string]Field{}
	for _, f := range Fields() {
		fields[f.Name] = f
	}
	for h := range endHists {
		f := fields[histTexts[h].name]
		values := []uint64{0, 1, 2, 1 << 63, ^uint64(0)}
		for _, b := range f.Bounds {
			values = append(values, b-1, b, b+1)
		}
		for range 1000 {
			values = append(values, rand.Uint64()>>rand.N(64))
		}
		for _, v := range values {
			s := NewSet(1)
			s.TX(0).Observe(h, v)
			s.TX(0).Flush()
			st := s.Snapshot()
			got, sum := st.TX.Histogram(f)
			want := make([]uint64, len(f.Bounds)+1)
			i := 0
			for i < len(f.Bounds) && v > f.Bounds[i] {
				i++
			}
			want[i] = 1
			for j := range want {
				if got[j] != want[j] {
					t.Fatalf("%s: %d counted in %v, want bucket %d (%s)", f.Name, v, got, i, f.Bucket(i))
				}
			}
			if sum != v {
				t.Fatalf("%s: sum %d after observing %d", f.Name, sum, v)
			}
		}
	}
}

func TestUnpublishedIsNotSeen(t *testing.T) {
	s := NewSet(1)
	s.RX(0).Add(Packets, 5)
	if st := s.Snapshot(); st.RX.Get(Packets) != 0 {
		t.Fatal("a private word is visible")
	}
	s.RX(0).Publish()
	if st := s.Snapshot(); st.RX.Get(Packets) != 5 {
		t.Fatal("a published word is not visible")
	}
}

func TestPublishDoesNotWaitForAReader(t *testing.T) {
	s := NewSet(1)
	b := s.TX(0)
	b.Add(Packets, 1)
	b.mu.Lock() // stands for a reader that was preempted during its copy
	b.Publish() // would hang the test if it waited
	b.mu.Unlock()
	if st := s.Snapshot(); st.TX.Get(Packets) != 0 {
		t.Fatal("published under a reader's lock")
	}
	b.Add(Bytes, 60)
	b.Publish()
	if st := s.Snapshot(); st.TX.Get(Packets) != 1 || st.TX.Get(Bytes) != 60 {
		t.Fatal("what one Publish skipped, the next did not show")
	}
}

func TestFlushWaitsForAReader(t *testing.T) {
	s := NewSet(1)
	b := s.TX(0)
	b.Add(Packets, 1)
	b.mu.Lock()
	done := make(chan struct{})
	go func() { b.Flush(); close(done) }()
	b.mu.Unlock()
	<-done
	if st := s.Snapshot(); st.TX.Get(Packets) != 1 {
		t.Fatal("lost")
	}
}

func TestMaxOnlyRises(t *testing.T) {
	s := NewSet(2)
	for _, v := range []uint64{3, 9, 4} {
		s.RX(0).Max(RingUsedMax, v)
		s.RX(0).Set(RingUsed, v)
	}
	s.RX(1).Max(RingUsedMax, 7)
	s.RX(1).Set(RingUsed, 2)
	s.RX(0).Flush()
	s.RX(1).Flush()
	st := s.Snapshot()
	if st.Queues[0].RX.Gauge(RingUsedMax) != 9 || st.RX.Gauge(RingUsedMax) != 9 {
		t.Error("ring_used_max of the device is not that of its fullest queue")
	}
	if st.RX.Gauge(RingUsed) != 6 {
		t.Errorf("ring_used of the device is %d, want 4+2", st.RX.Gauge(RingUsed))
	}
}

func TestCountingDoesNotAllocate(t *testing.T) {
	s := NewSet(1)
	if err := s.Attach(newHeapMirror(1)); err != nil {
		t.Fatal(err)
	}
	b := s.RX(0)
	n := testing.AllocsPerRun(1000, func() {
		b.Add(Packets, 32)
		b.Drop(DropDisconnected, 1)
		b.Set(RingUsed, 7)
		b.Max(RingUsedMax, 7)
		b.Observe(FrameSize, 1514)
		b.Publish()
		b.Add(Polls, 1)
		b.Flush()
		b.Refresh()
	})
	if n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

func TestCountingIsInlined(t *testing.T) {
	out, err := exec.Command("go", "build", "-gcflags=-m", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, m := range []string{"Add", "Drop", "Set", "Max", "ObserveN"} {
		if !regexp.MustCompile(`can inline \(\*Block\)\.` + m + `\b`).Match(out) {
			t.Errorf("the compiler no longer inlines Block.%s", m)
		}
	}
	if strings.Contains(string(out), "moved to heap: words") {
		t.Error("a block's words escape")
	}
}

// Snapshots and outside readers run against a writer that publishes continuously: each
// must see the words of one instant.
func TestReadersSeeOneInstant(t *testing.T) {
	const perFrame = 1500
	s, m := attached(t, 1)
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		b := s.RX(0)
		for n := 1; !stop.Load(); n++ {
			if n%64 == 0 {
				runtime.Gosched() // there may be one thread
			}
			for range 3 {
				b.Add(Packets, 1)
				b.Add(Bytes, perFrame)
				b.Drop(DropDisconnected, 2)
				b.Observe(FrameSize, perFrame)
			}
			b.Publish()
		}
		b.Flush()
	})
	field := fieldNamed(t, "frame_size")
	var snaps, whole int
	for range 20000 {
		st := s.Snapshot()
		if snaps++; snaps%64 == 0 {
			runtime.Gosched()
		}
		p := st.RX.Get(Packets)
		_, sum := st.RX.Histogram(field)
		if st.RX.Get(Bytes) != p*perFrame || st.RX.Dropped() != 2*p || sum != p*perFrame {
			t.Fatalf("snapshot mixes instants: %d packets, %d bytes", p, st.RX.Get(Bytes))
		}
		w, ok := m.read(0, RX)
		if !ok {
			continue
		}
		whole++
		if p := w[Packets]; w[Bytes] != p*perFrame || w[DropDisconnected] != 2*p {
			t.Fatalf("equal markers, mixed instants: %d packets, %d bytes", p, w[Bytes])
		}
	}
	stop.Store(true)
	wg.Wait()
	w, ok := m.read(0, RX)
	st := s.Snapshot()
	if !ok || w[Packets] != st.RX.Get(Packets) || w[Packets] == 0 {
		t.Errorf("at rest the mirror holds %d packets, the snapshot %d", w[Packets], st.RX.Get(Packets))
	}
	if whole == 0 {
		t.Errorf("none of %d reads of the mirror was whole", snaps)
	}
}

func TestRefreshHealsTheMirror(t *testing.T) {
	s, m := attached(t, 1)
	b := s.TX(0)
	b.Add(Packets, 10)
	b.Flush()
	if n := b.Refresh(); n != 0 {
		t.Fatalf("healed %d words nobody touched", n)
	}
	w := m.block(0, TX)
	w[Packets], w[RingSize], w[wordDone] = 999, 1, 0
	if st := s.Snapshot(); st.TX.Get(Packets) != 10 {
		t.Fatal("Stats follow a tampered mirror")
	}
	if n := b.Refresh(); n != 3 {
		t.Fatalf("healed %d words, 3 were changed", n)
	}
	if w[Packets] != 10 || w[RingSize] != 0 || w[wordDone] != w[wordStart] {
		t.Fatal("the mirror is not healed")
	}
	s.Tick()
	s.Tick()
	ev := s.Events()
	if len(ev) != 1 || ev[0].Kind != EventTamper || ev[0].A != 3 {
		t.Fatalf("events %+v, want one tamper of 3 words", ev)
	}
}

func TestMirrorFollowsEveryWord(t *testing.T) {
	s, m := attached(t, 1)
	b := s.RX(0)
	for range 5000 {
		for range rand.N(4) {
			switch rand.N(4) {
			case 0:
				b.Add(1+Counter(rand.N(int(endCounters-1))), rand.Uint64())
			case 1:
				b.Drop(DropDisconnected+Reason(rand.N(int(endReasons-DropDisconnected))), rand.Uint64())
			case 2:
				b.Set(RingSize+Gauge(rand.N(int(endGauges-RingSize))), rand.Uint64())
			case 3:
				b.Observe(Hist(rand.N(int(endHists))), rand.Uint64()>>rand.N(64))
			}
		}
		b.Publish()
		want := b.words
		got, whole := m.read(0, RX)
		got[wordDone], got[wordStart] = 0, 0
		if !whole || got != want || b.public != want {
			t.Fatal("the mirror differs from the private words after Publish")
		}
	}
}

func TestEveryWordOfTheTableIsUsedOnce(t *testing.T) {
	var used [BlockWords]string
	names := map[string]bool{}
	for _, f := range Fields() {
		if f.Name == "" || f.Unit == "" || f.Help == "" {
			t.Fatalf("word %d is not described: %+v", f.Word, f)
		}
		if names[f.Name] {
			t.Errorf("two fields are named %s", f.Name)
		}
		names[f.Name] = true
		if !regexp.MustCompile(`^[a-z][a-z0-9_]{1,31}$`).MatchString(f.Name) {
			t.Errorf("%q is no name for a field", f.Name)
		}
		if len(f.Help) > 100 || strings.ContainsAny(f.Help, "\\\"\n") || strings.HasSuffix(f.Help, ".") {
			t.Errorf("%s: help does not fit one line of OpenMetrics: %q", f.Name, f.Help)
		}
		for w := f.Word; w < f.Word+f.Words(); w++ {
			if w <= wordDone || w >= wordStart || used[w] != "" {
				t.Fatalf("%s: word %d is taken by %q", f.Name, w, used[w])
			}
			used[w] = f.Name
		}
		for i, b := range f.Bounds {
			if bits.OnesCount64(b) != 1 || (i > 0 && b != 2*f.Bounds[i-1]) {
				t.Errorf("%s: bounds %v do not double", f.Name, f.Bounds)
			}
		}
	}
}

// A reader in another process relies on the layout hash: when this test fails, raise
// LayoutVersion and add the new hash.
func TestLayoutIsGuarded(t *testing.T) {
	hashes := map[int]uint64{1: 0x9c5e4ff2408e42dc, 2: 0xdab3ece7552adb7b, 3: 0x7cf0445946b43ed3, 4: 0x27f070c925d75cd0, 5: 0xc26b114c34edc91a}
	if got := Layout(); got != hashes[LayoutVersion] {
		t.Errorf("version %d has hash %#x, was %#x", LayoutVersion, got, hashes[LayoutVersion])
	}
}

func fieldNamed(t *testing.T, name string) Field {
	t.Helper()
	for _, f := range Fields() {
		if f.Name == name {
			return f
		}
	}
	t.Fatalf("no field %s", name)
	return Field{}
}
