package ring

import (
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"barevif/arena/shm"
)

type request struct{ A, B, C uint32 }
type response struct{ A uint32 }

const stride = 12

var starts = []uint32{0, 1, 255, 1<<31 - 3, ^uint32(0) - 300, ^uint32(0)}

func pair(t testing.TB, first uint32) (*Front[request, response], *Back[request, response], shm.Memory) {
	t.Helper()
	page := shm.Heap(1)
	f := newFront[request, response](page, stride, first)
	b, err := AttachBack[request, response](page, stride)
	if err != nil {
		t.Fatal(err)
	}
	return f, b, page
}

func TestEntriesOfXenRings(t *testing.T) {
	for stride, want := range map[int]int{12: 256, 8: 256, 16: 128} {
		if got := Entries(stride); got != want {
			t.Errorf("Entries(%d) = %d, want %d", stride, got, want)
		}
	}
}

func TestNewFrontWritesSharedRingInit(t *testing.T) {
	page := shm.Heap(1)
	NewFront[request, response](page, stride)
	for off, want := range map[int]uint32{reqProd: 0, reqEvent: 1, rspProd: 0, rspEvent: 1, 16: 0, 64: 0} {
		if got := page.In(off).Load(); got != want {
			t.Errorf("word at %d is %d, want %d", off, got, want)
		}
	}
}

func TestEverySlotComesBackAcrossTheWrap(t *testing.T) {
	for _, first := range starts {
		f, b, _ := pair(t, first)
		sent, answered := uint32(0), uint32(0)
		for round := range 40 {
			for n := uint32(round*37%256) + 1; n > 0 && f.Free() > 0; n-- {
				f.Put(request{sent, ^sent, sent * 3})
				sent++
			}
			f.Publish()
			n, err := b.Poll()
			if err != nil {
				t.Fatal(err)
			}
			for ; n > 0; n-- {
				r := b.Take()
				if r.B != ^r.A || r.C != r.A*3 {
					t.Fatalf("first %d: torn request %+v", first, r)
				}
				b.Put(response{r.A})
			}
			b.Publish()
			n, err = f.Poll()
			if err != nil {
				t.Fatal(err)
			}
			for ; n > 0; n-- {
				if r := f.Take(); r.A != answered {
					t.Fatalf("first %d: response %d, want %d", first, r.A, answered)
				}
				answered++
			}
		}
		if sent != answered || f.Free() != f.Size() {
			t.Fatalf("first %d: sent %d, answered %d, free %d", first, sent, answered, f.Free())
		}
	}
}

func TestFrontRefusesImpossibleResponses(t *testing.T) {
	for _, first := range starts {
		for _, jump := range []uint32{6, 256, 257, 1 << 31, ^uint32(0)} {
			f, _, page := pair(t, first)
			for range 5 {
				f.Put(request{})
			}
			f.Publish()
			page.Out(rspProd).Store(first + jump)
			if _, err := f.Poll(); !errors.Is(err, ErrCorrupt) {
				t.Errorf("first %d: jump of %d with 5 in flight: %v", first, jump, err)
			}
			if _, err := f.Arm(1); !errors.Is(err, ErrCorrupt) {
				t.Errorf("first %d: Arm after a jump of %d: %v", first, jump, err)
			}
		}
	}
}

func TestUnpublishedRequestsCannotBeAnswered(t *testing.T) {
	f, _, page := pair(t, 0)
	f.Put(request{})
	page.Out(rspProd).Store(1)
	if _, err := f.Poll(); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
}

func TestBackRefusesImpossibleRequests(t *testing.T) {
	for _, first := range starts {
		for _, jump := range []uint32{257, 300, 1 << 31, ^uint32(0)} {
			_, b, page := pair(t, first)
			page.Out(reqProd).Store(first + jump)
			if _, err := b.Poll(); !errors.Is(err, ErrCorrupt) {
				t.Errorf("first %d: jump of %d: %v", first, jump, err)
			}
		}
	}
}

func TestUnansweredSlotsAreNotFree(t *testing.T) {
	f, b, page := pair(t, 7)
	for range 256 {
		f.Put(request{})
	}
	f.Publish()
	if n, _ := b.Poll(); n != 256 {
		t.Fatal(n)
	}
	for range 10 {
		b.Take()
	}
	page.Out(reqProd).Store(7 + 257)
	if _, err := b.Reload(); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a request in an unanswered slot: %v", err)
	}
}

func TestProducerGoingBackwardsIsCorrupt(t *testing.T) {
	for _, first := range starts {
		f, b, page := pair(t, first)
		for range 10 {
			f.Put(request{})
		}
		f.Publish()
		if n, _ := b.Poll(); n != 10 {
			t.Fatal(n)
		}
		page.Out(reqProd).Store(first + 9)
		if _, err := b.Reload(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("first %d: requests went backwards: %v", first, err)
		}
		page.Out(rspProd).Store(first + 4)
		if n, _ := f.Poll(); n != 4 {
			t.Fatal(n)
		}
		page.Out(rspProd).Store(first + 3)
		if _, err := f.Arm(1); !errors.Is(err, ErrCorrupt) {
			t.Errorf("first %d: responses went backwards: %v", first, err)
		}
	}
}

func TestPublishNotifiesOnlyWhenAsked(t *testing.T) {
	for _, first := range starts {
		f, b, _ := pair(t, first)
		f.Put(request{})
		if !f.Publish() {
			t.Fatalf("first %d: the first request must notify", first)
		}
		f.Put(request{})
		if f.Publish() {
			t.Errorf("first %d: notified a back that is not waiting", first)
		}
		if f.Publish() {
			t.Errorf("first %d: notified without news", first)
		}
		b.Poll()
		b.Take()
		b.Take()
		if more, err := b.Arm(1); more || err != nil {
			t.Fatal(more, err)
		}
		f.Put(request{})
		f.Put(request{})
		if !f.Publish() {
			t.Errorf("first %d: did not notify a back that waits", first)
		}
	}
}

func TestArmSeesLateRequest(t *testing.T) {
	f, b, _ := pair(t, ^uint32(0)-1)
	f.Put(request{})
	f.Publish()
	if more, err := b.Arm(1); !more || err != nil {
		t.Fatalf("Arm = %v, %v with a request there", more, err)
	}
}

func TestArmHoldsOffUntilEnough(t *testing.T) {
	f, b, _ := pair(t, ^uint32(0)-20)
	for range 64 {
		f.Put(request{})
	}
	f.Publish()
	if more, err := f.Arm(32); more || err != nil {
		t.Fatal(more, err)
	}
	b.Poll()
	for i := range 64 {
		b.Take()
		b.Put(response{})
		if got, want := b.Publish(), i == 31; got != want {
			t.Fatalf("response %d: notify %v, want %v", i, got, want)
		}
	}
	if n, _ := f.Poll(); n != 64 {
		t.Fatal(n)
	}
}

// A front that waits for more responses than are in flight would wait for ever.
func TestArmNeverAsksForMoreThanIsInFlight(t *testing.T) {
	f, b, _ := pair(t, 0)
	f.Put(request{})
	f.Publish()
	f.Arm(100)
	b.Poll()
	b.Take()
	b.Put(response{})
	if !b.Publish() {
		t.Fatal("the only response did not notify")
	}
}

// A back must not ask for more requests than the front has slots.
func TestArmNeverAsksForMoreThanTheRingHolds(t *testing.T) {
	for _, first := range starts {
		f, b, _ := pair(t, first)
		for range b.Size() - 6 {
			f.Put(request{})
		}
		f.Publish()
		b.Poll()
		for range b.Size() - 6 {
			b.Take()
		}
		if more, err := b.Arm(100); more || err != nil {
			t.Fatal(more, err)
		}
		for i := range 6 {
			f.Put(request{})
			if got, want := f.Publish(), i == 5; got != want {
				t.Fatalf("first %d: request %d: notify %v, want %v", first, i, got, want)
			}
		}
	}
}

func TestABackWaitsUntilEnoughIsThere(t *testing.T) {
	f, b, _ := pair(t, ^uint32(0)-3)
	if more, err := b.Arm(3); more || err != nil || b.Overdue() {
		t.Fatal(more, err, b.Overdue())
	}
	for i := range 4 {
		f.Put(request{})
		if got, want := f.Publish(), i == 2; got != want || b.Overdue() != (i >= 2) {
			t.Fatalf("request %d: notify %v, overdue %v", i, got, b.Overdue())
		}
	}
	if more, err := b.Arm(5); more || err != nil {
		t.Fatal("more than there is: ", more, err)
	}
	if more, err := b.Arm(4); !more || err != nil {
		t.Fatal("as many as there are: ", more, err)
	}
}

// Arm(0) asks for the next slot. If it reported more with an empty ring, its caller would
// spin.
func TestArmAsksForOneAtLeast(t *testing.T) {
	f, b, _ := pair(t, ^uint32(0))
	if more, err := f.Arm(0); more || err != nil {
		t.Fatal("front: ", more, err)
	}
	if more, err := b.Arm(0); more || err != nil {
		t.Fatal("back: ", more, err)
	}
	f.Put(request{})
	if !f.Publish() || !b.Overdue() || f.Overdue() {
		t.Fatal("the first request did not notify the back, or the front takes it for a response")
	}
	if more, err := f.Arm(1); more || err != nil {
		t.Fatal("front, of an unanswered request: ", more, err)
	}
	b.Poll()
	b.Take()
	b.Put(response{})
	if !b.Publish() || !f.Overdue() {
		t.Fatal("the first response did not notify the front")
	}
}

// An owner that loses count must not overwrite a slot that the peer still uses, nor take
// an old record.
func TestAnOwnerThatLosesCountPanics(t *testing.T) {
	f, b, _ := pair(t, ^uint32(0)-100)
	panics := func(name string, do func()) {
		t.Helper()
		defer func() {
			t.Helper()
			if recover() == nil {
				t.Errorf("%s: no panic", name)
			}
		}()
		do()
	}
	panics("request taken that is not there", func() { b.Take() })
	panics("request taken to where it is wanted that is not there", func() { b.TakeTo(new(request)) })
	panics("response without a request", func() { b.Put(response{}) })
	for range f.Size() {
		f.Put(request{})
	}
	panics("request without a slot", func() { f.Put(request{}) })
	panics("response taken that is not there", func() { f.Take() })
	panics("response taken to where it is wanted that is not there", func() { f.TakeTo(new(response)) })
	f.Publish()
	panics("request taken that was not polled", func() { b.Take() })
	b.Poll()
	b.Take()
	b.Put(response{})
	panics("second response to one request", func() { b.Put(response{}) })
	b.Publish()
	panics("response taken that was not polled", func() { f.Take() })
	if n, err := f.Poll(); n != 1 || err != nil {
		t.Error(n, err)
	}
	f.Take()
	f.Put(request{}) // the slot is free again
	panics("another request", func() { f.Put(request{}) })
}

func TestAttachFollowsAnotherBack(t *testing.T) {
	f, b, page := pair(t, ^uint32(0)-4)
	for i := range uint32(20) {
		f.Put(request{A: i})
	}
	f.Publish()
	b.Poll()
	for range 7 {
		r := b.Take()
		b.Put(response{r.A})
	}
	b.Publish()
	for range 5 {
		b.Take() // taken, but never answered
	}
	next, err := AttachBack[request, response](page, stride)
	if err != nil {
		t.Fatal(err)
	}
	if n, _ := next.Poll(); n != 13 {
		t.Fatalf("%d requests left, want 13", n)
	}
	if r := next.Take(); r.A != 7 {
		t.Fatalf("first request taken again is %d, want 7", r.A)
	}
}

func TestAttachRefusesImpossibleIndices(t *testing.T) {
	page := shm.Heap(1)
	page.Out(reqProd).Store(300)
	if _, err := AttachBack[request, response](page, stride); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
}

func TestAttachNeverWritesTheHeader(t *testing.T) {
	page := shm.Heap(1)
	page.Out(reqProd).Store(40)
	page.Out(rspProd).Store(30)
	page.Out(rspEvent).Store(77)
	before := string(page.Bytes())
	if _, err := AttachBack[request, response](page, stride); err != nil {
		t.Fatal(err)
	}
	if string(page.Bytes()) != before {
		t.Fatal("the page changed")
	}
}

// Two goroutines each park whenever the ring allows it: a lost wake-up would stop both.
func TestNoWakeupIsLost(t *testing.T) {
	const total = 20000
	f, b, _ := pair(t, ^uint32(0)-total/2)
	toBack, toFront := make(chan struct{}, 1), make(chan struct{}, 1)
	ring := func(c chan struct{}) {
		select {
		case c <- struct{}{}:
		default:
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for done := 0; done < total; {
			n, err := b.Poll()
			if err != nil {
				t.Error(err)
				return
			}
			for range n {
				r := b.Take()
				b.Put(response{r.A})
				done++
			}
			if b.Publish() {
				ring(toFront)
			}
			if n > 0 {
				continue
			}
			if more, _ := b.Arm(1); !more {
				<-toBack
			}
		}
	})
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(1, 2))
		for sent, got := 0, 0; got < total; {
			for k := rng.IntN(40); k > 0 && f.Free() > 0 && sent < total; k-- {
				f.Put(request{A: uint32(sent)})
				sent++
			}
			if f.Publish() {
				ring(toBack)
			}
			n, err := f.Poll()
			if err != nil {
				t.Error(err)
				return
			}
			for range n {
				if r := f.Take(); r.A != uint32(got) {
					t.Errorf("response %d, want %d", r.A, got)
					return
				}
				got++
			}
			if n == 0 && (f.Free() == 0 || sent == total) {
				if more, _ := f.Arm(f.InFlight()/2 + 1); !more && f.InFlight() > 0 {
					<-toFront
				}
			} else if n == 0 {
				runtime.Gosched()
			}
		}
	})
	wg.Wait()
}

func TestRingDoesNotAllocate(t *testing.T) {
	f, b, _ := pair(t, 0)
	if n := testing.AllocsPerRun(100, func() { burst(f, b, 32) }); n != 0 {
		t.Fatalf("%v allocations a burst", n)
	}
}

func burst(f *Front[request, response], b *Back[request, response], k int) {
	for i := range k {
		f.Put(request{A: uint32(i)})
	}
	f.Publish()
	n, _ := b.Poll()
	for range n {
		b.Put(response{b.Take().A})
	}
	b.Publish()
	n, _ = f.Poll()
	for range n {
		f.Take()
	}
}

// FuzzHostileFront writes arbitrary words into the page between the calls of a back. The
// back must take at most a ring of requests per poll, and never put more responses than
// it took requests.
func FuzzHostileFront(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 1, 2, 3, 0, 0, 1, 1, 0, 4})
	f.Add([]byte{255, 255, 255, 255, 1, 2, 3, 5, 0, 0, 1, 0, 0, 1, 2, 3})
	f.Fuzz(func(t *testing.T, script []byte) {
		page := shm.Heap(1)
		b, err := AttachBack[request, response](page, stride)
		if err != nil {
			t.Fatal(err)
		}
		for len(script) >= 5 {
			op := script[0]
			v := uint32(script[1]) | uint32(script[2])<<8 | uint32(script[3])<<16 | uint32(script[4])<<24
			script = script[5:]
			switch op % 6 {
			case 0:
				page.Out(reqProd).Store(v)
			case 1:
				page.Out(rspProd).Store(v)
			case 2:
				page.Out(int(v%1024) * 4).Store(v)
			case 3:
				n, err := b.Poll()
				if err != nil {
					return
				}
				if n+b.Unanswered() > b.Size() {
					t.Fatalf("%d to take, %d unanswered", n, b.Unanswered())
				}
				for range min(n, v%300) {
					b.Take()
				}
			case 4:
				for b.Unanswered() > v%256 {
					b.Put(response{v})
				}
				b.Publish()
			case 5:
				if _, err := b.Arm(v); err != nil {
					return
				}
			}
		}
	})
}

func BenchmarkRing(b *testing.B) {
	for _, k := range []int{1, 8, 32} {
		b.Run(map[int]string{1: "batch=1", 8: "batch=8", 32: "batch=32"}[k], func(b *testing.B) {
			front, back, _ := pair(b, 0)
			for b.Loop() {
				burst(front, back, k)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*k), "ns/slot")
		})
	}
}

// The front may reuse a slot once its response is published, not once it is put.
func TestRequestsAreBoundedByTheResponsesShown(t *testing.T) {
	for _, first := range starts {
		f, b, page := pair(t, first)
		for range 256 {
			f.Put(request{})
		}
		f.Publish()
		if n, err := b.Poll(); n != 256 || err != nil {
			t.Fatal(n, err)
		}
		for range 10 {
			b.Take()
			b.Put(response{})
		}
		page.Out(reqProd).Store(first + 257)
		if _, err := b.Reload(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("first %d: a request in a slot whose response was not shown: %v", first, err)
		}
		b.Publish()
		if n, err := b.Reload(); n != 247 || err != nil {
			t.Errorf("first %d: after it was shown: %d, %v", first, n, err)
		}
	}
}

// Arm sees a slot that was published after the last Poll.
func TestArmLooksOnceMore(t *testing.T) {
	for _, first := range starts {
		f, b, _ := pair(t, first)
		if n, err := b.Poll(); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		f.Put(request{})
		f.Publish()
		if more, err := b.Arm(1); !more || err != nil {
			t.Errorf("first %d: the back's Arm: %v, %v", first, more, err)
		}
		if n, err := f.Poll(); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		b.Poll()
		b.Take()
		b.Put(response{})
		b.Publish()
		if more, err := f.Arm(1); !more || err != nil {
			t.Errorf("first %d: the front's Arm: %v, %v", first, more, err)
		}
		if more, err := b.Arm(1); more || err != nil {
			t.Errorf("first %d: Arm of a ring at rest: %v, %v", first, more, err)
		}
	}
}

// A front end goes on where another has stopped, with requests in flight and responses that
// nobody has taken.
func TestAFrontEndFollowsAnother(t *testing.T) {
	for _, first := range []uint32{0, ^uint32(0) - 5} {
		page := shm.Heap(1)
		f := newFront[uint64, uint64](page, 8, first)
		b, err := AttachBack[uint64, uint64](page, 8)
		if err != nil {
			t.Fatal(err)
		}
		for i := range uint64(20) {
			f.Put(i)
		}
		f.Publish()
		if n, _ := b.Poll(); n != 20 {
			t.Fatal(n)
		}
		for range 12 {
			b.Put(b.Take() + 100)
		}
		b.Publish()
		f.Poll()
		f.Take()
		for name, at := range map[string][2]uint32{
			"a request more": {f.Next() + 1, f.Consumed()}, "a request less": {f.Next() - 1, f.Consumed()},
			"more than fit": {f.Next(), f.Next() - f.Size() - 1}, "responses of the future": {f.Next(), f.Next()},
			"backwards": {f.Next(), f.Next() + 1},
		} {
			if _, err := ResumeFront[uint64, uint64](page, 8, at[0], at[1]); err != ErrCorrupt {
				t.Errorf("%s: %v", name, err)
			}
		}
		next, err := ResumeFront[uint64, uint64](page, 8, f.Next(), f.Consumed())
		if err != nil {
			t.Fatal(err)
		}
		if n, err := next.Poll(); n != 11 || err != nil {
			t.Fatalf("%d responses, %v", n, err)
		}
		for i := range uint64(11) {
			if r := next.Take(); r != 101+i {
				t.Errorf("response %d is %d", i+1, r)
			}
		}
		next.Put(20)
		if !next.Publish() && next.InFlight() != 9 {
			t.Errorf("%d in flight", next.InFlight())
		}
		if n, err := b.Reload(); n != 9 || err != nil {
			t.Errorf("%d requests, %v", n, err)
		}
	}
}
