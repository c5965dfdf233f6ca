package arena

import (
	"errors"
	"sync"
	"testing"

	"barevif/arena/shm"
)

func TestBuffersAreDistinctAndInsideTheirPage(t *testing.T) {
	for _, size := range []int{64, 2048, 4096} {
		a := New(shm.Heap(3), size)
		if a.Len() != 3*4096/size {
			t.Fatalf("size %d: %d buffers", size, a.Len())
		}
		seen := map[uint32]bool{}
		bufs := make([]uint32, a.Len())
		if n := a.Get(bufs); n != a.Len() {
			t.Fatal(n)
		}
		for _, i := range bufs {
			page, off := a.Page(i)
			if seen[i] || int(off)+size > shm.PageSize || int(page) > 2 || len(a.Bytes(i)) != size {
				t.Fatalf("size %d: buffer %d at page %d byte %d", size, i, page, off)
			}
			seen[i] = true
			a.Bytes(i)[0] = byte(i)
			a.Bytes(i)[size-1] = byte(i)
		}
		for _, i := range bufs {
			if a.Bytes(i)[0] != byte(i) || a.Bytes(i)[size-1] != byte(i) {
				t.Fatalf("size %d: buffer %d overlaps another", size, i)
			}
		}
	}
}

func TestSizesThatCrossPagesPanic(t *testing.T) {
	for _, size := range []int{-64, 0, 32, 63, 96, 2049, 8192} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("buffers of %d bytes", size)
				}
			}()
			New(shm.Heap(2), size)
		}()
	}
}

func TestExhaustionIsAShortCount(t *testing.T) {
	a := New(shm.Heap(4), 4096)
	bufs := make([]uint32, 6)
	if n := a.Get(bufs); n != 4 {
		t.Fatal(n)
	}
	if n := a.Get(bufs[4:]); n != 0 {
		t.Fatal(n)
	}
	a.Put(bufs[:3]...)
	if n := a.Get(bufs); n != 3 {
		t.Fatal(n)
	}
}

func getOne(t *testing.T, a *Arena) Buffer {
	t.Helper()
	var i [1]uint32
	if a.Get(i[:]) != 1 {
		t.Fatal("no buffer")
	}
	return a.Buffer(i[0])
}

func TestUseAfterReleaseIsRefused(t *testing.T) {
	a := New(shm.Heap(1), 4096)
	old := getOne(t, a)
	if err := old.Release(); err != nil {
		t.Fatal(err)
	}
	again := getOne(t, a) // the same memory with another holder
	if old == again || old.Valid() || !again.Valid() {
		t.Fatal("the stale handle passes for the new one")
	}
	if err := old.Release(); !errors.Is(err, ErrStale) {
		t.Error(err)
	}
	if err := old.Retain(); !errors.Is(err, ErrStale) {
		t.Error(err)
	}
	if _, err := a.Take(old); !errors.Is(err, ErrStale) {
		t.Error(err)
	}
	if err := a.Release(old); !errors.Is(err, ErrStale) {
		t.Error(err)
	}
	for name, use := range map[string]func(){
		"Bytes": func() { old.Bytes() },
		"Next":  func() { old.Next() },
	} {
		func() {
			defer func() {
				if got := recover(); got != ErrStale {
					t.Errorf("%s of a stale buffer: panic with %v, want %v", name, got, ErrStale)
				}
			}()
			use()
		}()
	}
}

func TestTheZeroBufferIsRefused(t *testing.T) {
	a := New(shm.Heap(1), 4096)
	var b Buffer
	if _, err := a.Take(b); !errors.Is(err, ErrStale) {
		t.Error(err)
	}
	if b.Valid() || !errors.Is(b.Release(), ErrStale) || !errors.Is(b.Retain(), ErrStale) {
		t.Error("the zero Buffer is held")
	}
	if b.Size() != 0 || getOne(t, a).Size() != 4096 {
		t.Error("size of the zero Buffer, or of one of 4096 bytes")
	}
}

func TestTakeMakesTheHandleStale(t *testing.T) {
	a, other := New(shm.Heap(1), 4096), New(shm.Heap(1), 4096)
	b := getOne(t, a)
	if _, err := other.Take(b); !errors.Is(err, ErrForeign) {
		t.Error(err)
	}
	b.Retain()
	if _, err := a.Take(b); !errors.Is(err, ErrShared) {
		t.Error(err)
	}
	b.Release()
	if _, err := a.Take(b); err != nil {
		t.Error(err)
	}
	if b.Valid() {
		t.Error("still valid after Take")
	}
}

func TestTheLastHolderReleases(t *testing.T) {
	a := New(shm.Heap(1), 4096)
	b := getOne(t, a)
	for range 3 {
		if err := b.Retain(); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if err := b.Release(); err != nil || !b.Valid() || a.Free() != 0 {
			t.Fatal(err, b.Valid(), a.Free())
		}
	}
	if err := a.Release(b); err != nil || b.Valid() || a.Free() != 1 {
		t.Fatal(err, b.Valid(), a.Free())
	}
}

func TestAChainIsReleasedAsOne(t *testing.T) {
	for _, owner := range []bool{true, false} {
		a := New(shm.Heap(5), 4096)
		var i [3]uint32
		a.Get(i[:])
		a.Link(i[0], i[1], 10, 100)
		a.Link(i[1], i[2], 20, 200)
		b := a.Buffer(i[0])
		p, ok := b.Next()
		if !ok || p.Off != 10 || p.Len != 100 {
			t.Fatal(p, ok)
		}
		if p, ok = b.After(p); !ok || p.Off != 20 || p.Len != 200 {
			t.Fatal(p, ok)
		}
		if _, ok = b.After(p); ok {
			t.Fatal("a fourth piece")
		}
		if owner {
			a.Release(b)
		} else {
			b.Release()
		}
		if a.Free() != 5 {
			t.Fatalf("owner %v: %d free", owner, a.Free())
		}
		a.Get(i[:])
		if _, ok := a.Buffer(i[0]).Next(); ok {
			t.Fatal("an old link survived")
		}
	}
}

func TestUnlinkCutsAChainUntilItEnds(t *testing.T) {
	a := New(shm.Heap(2), 4096)
	var i [2]uint32
	a.Get(i[:])
	a.Link(i[0], i[1], 10, 100)
	if next, off, n, ok := a.Unlink(i[0]); !ok || next != i[1] || off != 10 || n != 100 {
		t.Error(next, off, n, ok)
	}
	for _, end := range i {
		if next, _, _, ok := a.Unlink(end); ok {
			t.Errorf("buffer %d is followed by %d", end, next)
		}
	}
	a.Put(i[:]...)
	if a.Free() != 2 {
		t.Error(a.Free())
	}
}

// An owner may release a buffer of another arena, which then goes to that arena's return
// list.
func TestTheOwnerReleasesAnothersBuffer(t *testing.T) {
	a, other := New(shm.Heap(1), 4096), New(shm.Heap(1), 4096)
	b := getOne(t, other)
	if err := a.Release(b); err != nil || b.Valid() || a.Free() != 1 || other.Free() != 1 {
		t.Error(err, b.Valid(), a.Free(), other.Free())
	}
	if err := a.Release(b); !errors.Is(err, ErrStale) {
		t.Error(err)
	}
	if err := a.Release(Buffer{}); !errors.Is(err, ErrStale) {
		t.Error(err)
	}
}

func TestTheOwnerIsNotTheLastHolder(t *testing.T) {
	a := New(shm.Heap(1), 4096)
	b := getOne(t, a)
	b.Retain()
	if err := a.Release(b); err != nil || !b.Valid() || a.Free() != 0 {
		t.Error(err, b.Valid(), a.Free())
	}
	b.Release()
	if a.Free() != 1 {
		t.Error(a.Free())
	}
}

func TestOneHolderIsExclusive(t *testing.T) {
	a := New(shm.Heap(1), 4096)
	b := getOne(t, a)
	check := func(when string, want bool) {
		t.Helper()
		if b.Exclusive() != want {
			t.Errorf("%s: exclusive %v", when, !want)
		}
	}
	check("held once", true)
	b.Retain()
	check("held twice", false)
	b.Release()
	check("held once again", true)
	b.Release()
	check("released", false)
	if (Buffer{}).Exclusive() {
		t.Error("the zero Buffer is held")
	}
}

// All holders of a chain read where its pieces are, so only a single holder may change
// that.
func TestOnlyAnOnlyHolderResizes(t *testing.T) {
	a := New(shm.Heap(2), 4096)
	var i [2]uint32
	a.Get(i[:])
	a.Link(i[0], i[1], 10, 100)
	b := a.Buffer(i[0])
	p, _ := b.Next()
	refused := func(want error) {
		t.Helper()
		defer func() {
			t.Helper()
			if got := recover(); got != want {
				t.Errorf("resized, or panicked with %v; want a panic with %v", got, want)
			}
			if at := &a.desc[i[1]]; at.off != 10 || at.len != 100 {
				t.Errorf("%d bytes at %d after a refused resize", at.len, at.off)
			}
		}()
		b.Resize(p, 20, 200)
	}
	b.Retain()
	refused(ErrShared)
	b.Release()
	b.Resize(p, 20, 200)
	if p, ok := b.Next(); !ok || p.Off != 20 || p.Len != 200 {
		t.Error(p, ok)
	}
	b.Resize(p, 10, 100)
	b.Release()
	refused(ErrStale)
}

// One owner hands out buffers and many goroutines release them: each buffer comes back
// exactly once.
func TestReleaseFromAnyGoroutine(t *testing.T) {
	const rounds = 3000
	a := New(shm.Heap(16), 4096)
	out := make(chan Buffer)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for b := range out {
				b.Bytes()[0]++
				if err := b.Release(); err != nil {
					t.Error(err)
				}
				if err := b.Release(); !errors.Is(err, ErrStale) {
					t.Errorf("second release: %v", err)
				}
			}
		})
	}
	var bufs [8]uint32
	for sent := 0; sent < rounds; {
		for _, i := range bufs[:a.Get(bufs[:])] {
			out <- a.Buffer(i)
			sent++
		}
	}
	close(out)
	wg.Wait()
	if a.Free() != 16 {
		t.Fatalf("%d of 16 came home", a.Free())
	}
}

func TestOnlyOneOfTwoReleasersWins(t *testing.T) {
	a := New(shm.Heap(1), 4096)
	for range 500 {
		b := getOne(t, a)
		var errs [2]error
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() { errs[i] = b.Release() })
		}
		wg.Wait()
		if (errs[0] == nil) == (errs[1] == nil) {
			t.Fatal(errs)
		}
		if a.Free() != 1 {
			t.Fatal(a.Free())
		}
	}
}

func TestRetireWaitsForTheLastRelease(t *testing.T) {
	for range 200 {
		a := New(shm.Heap(4), 4096)
		x, y := getOne(t, a), getOne(t, a)
		done := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() { x.Release() })
		a.Retire(func() { close(done) })
		wg.Wait()
		select {
		case <-done:
			t.Fatal("retired with a buffer out")
		default:
		}
		if len(y.Bytes()) != 4096 {
			t.Fatal("a held buffer must stay readable")
		}
		y.Release()
		<-done
	}
	a := New(shm.Heap(1), 4096)
	ran := false
	a.Retire(func() { ran = true })
	if !ran {
		t.Fatal("a whole arena retires at once")
	}
}

func TestOwnerPathDoesNotAllocate(t *testing.T) {
	a := New(shm.Heap(64), 4096)
	var bufs [32]uint32
	if n := testing.AllocsPerRun(100, func() { cycle(a, bufs[:]) }); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

func cycle(a *Arena, bufs []uint32) {
	for _, i := range bufs[:a.Get(bufs)] {
		b := a.Buffer(i)
		j, _ := a.Take(b)
		a.Put(j)
	}
}

func BenchmarkArena(b *testing.B) {
	a := New(shm.Heap(64), 4096)
	var bufs [32]uint32
	b.Run("get,take,put/batch=32", func(b *testing.B) {
		for b.Loop() {
			cycle(a, bufs[:])
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*32), "ns/buffer")
	})
	b.Run("get,release/batch=32", func(b *testing.B) {
		for b.Loop() {
			for _, i := range bufs[:a.Get(bufs[:])] {
				a.Buffer(i).Release()
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*32), "ns/buffer")
	})
}

func TestTheOwnerTakesOnlyItsOwn(t *testing.T) {
	a, b := New(shm.Heap(1), 4096), New(shm.Heap(1), 4096)
	of, other := getOne(t, a), getOne(t, b) // differ only in the arena
	if _, ok := a.TakeOne(other); ok || !of.Valid() || !other.Valid() {
		t.Error("took another's")
	}
	if i, ok := a.TakeOne(of); !ok || i != 0 || of.Valid() {
		t.Error("did not take its own")
	}
}

func TestReadOnlyBuffersAreNobodysToWrite(t *testing.T) {
	a := NewReadOnly(shm.Heap(2), shm.PageSize, nil)
	if a.Free() != 0 {
		t.Fatalf("%d buffers free: the owner holds all", a.Free())
	}
	b := a.Buffer(1)
	if !b.Valid() || b.Exclusive() || !b.ReadOnly() {
		t.Fatalf("valid %v, exclusive %v, read-only %v", b.Valid(), b.Exclusive(), b.ReadOnly())
	}
	if err := b.Release(); err != nil {
		t.Fatal(err)
	}
	if err := b.Release(); err != ErrStale {
		t.Fatalf("second release: %v", err)
	}
	var got [2]uint32
	if n := a.Get(got[:]); n != 1 || got[0] != 1 {
		t.Fatalf("%d buffers back: %v", n, got)
	}
	done := false
	a.Put(0)
	a.Retire(func() { done = true })
	if done {
		t.Fatal("retired without buffer 1")
	}
	if w := New(shm.Heap(1), shm.PageSize).Buffer(0); w.ReadOnly() || (Buffer{}).ReadOnly() {
		t.Fatal("another arena's buffer is read-only")
	}
}

func TestAReturnedBufferWakesItsOwnerOnce(t *testing.T) {
	woken := 0
	a := NewReadOnly(shm.Heap(4), shm.PageSize, func() { t.Error("the first wake was called") })
	a.SetWake(func() { woken++ })
	give := func(i uint32) { a.Buffer(i).Release() }
	give(0)
	if woken != 0 {
		t.Fatal("woken without WakeOnReturn")
	}
	a.WakeOnReturn()
	if err := a.Release(a.Buffer(1)); err != nil || woken != 0 {
		t.Fatalf("the owner's own release woke it: %d, %v", woken, err)
	}
	give(2)
	give(3)
	if woken != 1 {
		t.Fatalf("woken %d times", woken)
	}
	done := false
	a.WakeOnReturn()
	var got [4]uint32
	a.Get(got[:])
	b := a.Buffer(got[0])
	a.Put(got[1:]...)
	a.Retire(func() { done = true })
	b.Release()
	if !done || woken != 2 {
		t.Fatalf("retired %v, woken %d", done, woken)
	}
}
