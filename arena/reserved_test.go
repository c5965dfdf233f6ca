package arena

import (
	"fmt"
	"slices"
	"testing"

	"barevif/arena/shm"
)

// A reserve records the pages that the arena's populate calls put in memory.
type reserve struct {
	t     *testing.T
	there []bool
	calls int
}

func reserved(t *testing.T, pages, size int) (*Arena, *reserve) {
	r := &reserve{t: t, there: make([]bool, pages)}
	return NewReserved(shm.Heap(pages), size, r.populate), r
}

func (r *reserve) populate(first, pages int) {
	r.calls++
	for i := range r.there[first : first+pages] {
		if r.there[first+i] {
			r.t.Errorf("page %d was there already", first+i)
		}
		r.there[first+i] = true
	}
}

func (r *reserve) requirePopulated(when string, pages, calls int) {
	r.t.Helper()
	n := 0
	for _, there := range r.there {
		if there {
			n++
		}
	}
	if n != pages || slices.Contains(r.there[:n], false) || r.calls != calls {
		r.t.Errorf("%s: %d pages are there after %d calls, want the first %d after %d", when, n, r.calls, pages, calls)
	}
}

func TestReservedPagesAreTouchedAsDeepAsTheyAreUsed(t *testing.T) {
	for _, size := range []int{4096, 1024} {
		t.Run(fmt.Sprint("size=", size), func(t *testing.T) {
			const pages = 3*Step + 5
			per := shm.PageSize / size
			a, r := reserved(t, pages, size)
			r.requirePopulated("idle", Step, 1)
			bufs := make([]uint32, a.Len())
			for range 1000 { // at most a step of buffers in use
				if n := a.Get(bufs[:Step*per]); n != Step*per {
					t.Fatal(n)
				}
				a.Put(bufs[:Step*per]...)
			}
			r.requirePopulated("never more than a step at once", Step, 1)
			if a.Free() != a.Len() || a.Touched() != Step*per {
				t.Errorf("%d of %d are free, %d touched", a.Free(), a.Len(), a.Touched())
			}
			a.Get(bufs[:Step*per])
			a.Get(bufs[Step*per : Step*per+1])
			r.requirePopulated("one more", 2*Step, 2)
			if n := a.Get(bufs[Step*per+1:]); n != a.Len()-Step*per-1 {
				t.Fatal(n)
			}
			r.requirePopulated("all", pages, 3)
			if n := a.Get(make([]uint32, 1)); n != 0 || a.Free() != 0 {
				t.Errorf("%d more, %d free", n, a.Free())
			}
			slices.Sort(bufs)
			for i, b := range bufs {
				if int(b) != i {
					t.Fatalf("buffer %d is not there, or twice", i)
				}
			}
			a.Put(bufs...)
			r.requirePopulated("all home", pages, 3)
			if a.Touched() != a.Len() {
				t.Errorf("%d of %d touched", a.Touched(), a.Len())
			}
		})
	}
}

// Get hands out buffers that other goroutines released before it touches a page, and warm
// buffers before those in newly touched pages.
func TestWarmBuffersComeFirst(t *testing.T) {
	a, r := reserved(t, 2*Step, 4096)
	bufs := make([]uint32, Step)
	a.Get(bufs)
	for _, i := range bufs {
		if err := a.Buffer(i).Release(); err != nil {
			t.Fatal(err)
		}
	}
	if n := a.Get(bufs); n != Step {
		t.Fatal(n)
	}
	r.requirePopulated("given back by others", Step, 1)
	a.Put(bufs[:3]...)
	four := make([]uint32, 4)
	if n := a.Get(four); n != 4 {
		t.Fatal(n)
	}
	r.requirePopulated("one more than there were", 2*Step, 2)
	fresh := 0
	for _, i := range four {
		if i >= Step {
			fresh++
		}
	}
	if fresh != 1 {
		t.Errorf("%v: %d of them were touched just now", four, fresh)
	}
}

func TestAnArenaThatWasNotUsedUpRetires(t *testing.T) {
	a, _ := reserved(t, 4*Step, 4096)
	held := getOne(t, a)
	done := false
	a.Retire(func() { done = true })
	if done {
		t.Error("retired under a holder")
	}
	held.Release()
	if !done {
		t.Error("not retired")
	}
}

func TestTouchingCostsNothingOnceItIsDone(t *testing.T) {
	a, r := reserved(t, 4*Step, 4096)
	var bufs [64]uint32
	a.Get(bufs[:])
	a.Put(bufs[:]...)
	calls := r.calls
	if n := testing.AllocsPerRun(100, func() { a.Put(bufs[:a.Get(bufs[:])]...) }); n != 0 || r.calls != calls {
		t.Errorf("%v allocations, %d calls", n, r.calls-calls)
	}
}
