//go:build linux

package link

import (
	"context"
	"errors"
	"os"
	"testing"

	"barevif/pvnet"
	"barevif/telemetry"
)

// A seen is a frame that came on a queue of the frontend.
type seen struct {
	queue int
	frame []byte
}

// receiveAll receives on every queue of the frontend until it is disconnected.
func (h *host) receiveAll() <-chan seen {
	h.t.Helper()
	got := make(chan seen, 4096)
	done := make(chan struct{})
	for q := range h.Front.Queues() {
		rx, err := h.Front.OwnRX(q)
		if err != nil {
			h.t.Fatal(err)
		}
		go func() {
			defer func() { done <- struct{}{} }()
			var frames [8]pvnet.Frame
			for {
				n, err := rx.Receive(frames[:])
				if err != nil {
					return
				}
				for i := range frames[:n] {
					b := make([]byte, frames[i].Len())
					frames[i].CopyTo(b)
					got <- seen{q, b}
				}
				rx.Release(frames[:n])
			}
		}()
	}
	h.t.Cleanup(func() {
		h.Front.Disconnect()
		for range h.Front.Queues() {
			<-done
		}
	})
	return got
}

// A packet socket has one queue, the vif several. Its frames are spread over them by flow, or
// as the frontend asks, and the frames of a flow keep their order.
func TestAPacketSocketFeedsAllQueues(t *testing.T) {
	const queues, flows, each = 3, 24, 40
	card, far := veth(t, 1500)
	p := openPacket(t, card)
	h := newHostOf(t, 1500, pvnet.Config{Queues: queues}, pvnet.Config{Queues: queues})
	got := h.receiveAll()
	h.join(context.Background(), h.Back, openPacket(t, far))
	round := func(mark byte) (used map[int]int) {
		t.Helper()
		way := newWindow()
		go func() {
			for i := range each {
				for flow := range flows {
					if !way.enter(t.Context()) {
						return
					}
					f, _ := partialTCP(100)
					f[34], f[35] = byte(flow), 7 // the source port
					f[len(f)-2], f[len(f)-1] = mark, byte(i)
					send(t, p, Offload{}, f)
				}
			}
		}()
		used = make(map[int]int)
		queue, last := make(map[byte]int), make(map[byte]int)
		for range flows * each {
			s := next(t, got)
			way.leave()
			flow, at := s.frame[34], int(s.frame[len(s.frame)-1])
			if s.frame[len(s.frame)-2] != mark {
				t.Fatalf("% x", s.frame)
			}
			if want := h.Back.QueueFor(s.frame); s.queue != want {
				t.Fatalf("flow %d came on queue %d, not %d", flow, s.queue, want)
			}
			if q, there := queue[flow]; there && q != s.queue || at != last[flow] {
				t.Fatalf("flow %d: frame %d after %d, on queue %d after %d", flow, at, last[flow], s.queue, q)
			}
			queue[flow], last[flow] = s.queue, at+1
			used[s.queue]++
		}
		return used
	}
	send(t, p, Offload{}, testFrame(60))
	next(t, got) // the joint runs
	if used := round(1); len(used) != queues {
		t.Errorf("queues used: %v", used)
	}
	if err := h.Front.SetHash(t.Context(), &pvnet.HashConfig{Table: []int{2, 0, 2}}); err != nil {
		t.Fatal(err)
	}
	if used := round(2); len(used) != 2 || used[1] != 0 {
		t.Errorf("the frontend asks for queues 2 and 0; queues used: %v", used)
	}
}

// feederOf returns a feeder of the backend of h, with a ready frame for queue 1.
func feederOf(t *testing.T, h *host) *feeder {
	t.Helper()
	f := &feeder{j: new(Joint), dev: h.Back, size: 100, ending: func() bool { return false }}
	for q := range h.Back.Queues() {
		tx, err := h.Back.OwnTX(q)
		if err != nil {
			t.Fatal(err)
		}
		f.spread.txs = append(f.spread.txs, tx)
	}
	f.tx = f.spread.txs[0]
	f.spread.on, f.spread.queue[0] = true, 1
	n, err := f.tx.AllocWait(f.frames[:1], 100)
	if err != nil {
		t.Fatal(err)
	}
	f.frames[0].CopyFrom(testFrame(100))
	f.n, f.ready = n, n
	return f
}

// A frame for a queue that the vif's present connection does not have waits for no other
// connection.
func TestAFrameForAQueueThatIsGoneTakesTheFirst(t *testing.T) {
	h := newHostOf(t, 1500, pvnet.Config{Queues: 2}, pvnet.Config{Queues: 1})
	got := h.receiveAll()
	f := feederOf(t, h)
	if n, err := f.send(0); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if s := next(t, got); s.queue != 0 || len(s.frame) != 100 {
		t.Errorf("%d bytes on queue %d", len(s.frame), s.queue)
	}
}

// A feeder waits for room on a queue, but not beyond the end of Run.
func TestAFeederWaitsForRoomOnAQueue(t *testing.T) {
	h := newHostOf(t, 1500, pvnet.Config{Queues: 2}, pvnet.Config{Queues: 2})
	f := feederOf(t, h)
	tx := f.spread.txs[1]
	for {
		var one [1]pvnet.Frame
		if n, err := tx.AllocWait(one[:], 60); n != 1 || err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Send(one[:]); err == pvnet.ErrFull {
			one[0].Release()
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	f.ending = func() bool { return true }
	if n, err := f.send(0); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(n, err)
	}
	if st := h.Back.Stats(); st.Queues[1].TX.Get(telemetry.Parks) != 0 {
		t.Error("it waited although Run is about to end")
	}
	f.ending = func() bool { return false }
	sent := make(chan error, 1)
	go func() {
		for n := 0; n == 0; {
			var err error
			if n, err = f.send(0); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	got := h.receiveAll()
	for {
		if s := next(t, got); len(s.frame) == 100 {
			if s.queue != 1 {
				t.Errorf("on queue %d", s.queue)
			}
			break
		}
	}
	if err := next(t, sent); err != nil {
		t.Error(err)
	}
}

// The frames of a queue are sent together, with one notification, and keep their order.
func TestFramesAreSortedByQueue(t *testing.T) {
	h := newHostOf(t, 1500, pvnet.Config{Queues: 2}, pvnet.Config{Queues: 2})
	f := feederOf(t, h)
	more, err := f.tx.AllocWait(f.frames[1:64], 100)
	if err != nil {
		t.Fatal(err)
	}
	f.n, f.ready = 1+more, 1+more
	defer f.release(0)
	for i := range f.frames[:f.ready] {
		b, _ := partialTCP(60)
		b[34], b[60] = byte(i%7), byte(i) // of seven flows
		f.frames[i].CopyFrom(b)
	}
	check := func(sorted bool) {
		t.Helper()
		last, moves := -1, 0
		at := make(map[byte]byte)
		for i := range f.frames[:f.ready] {
			b := f.frames[i].Bytes()
			if q := h.Back.QueueFor(b); f.spread.queue[i] != q {
				t.Fatalf("frame %d is for queue %d, not %d", i, f.spread.queue[i], q)
			} else if q != last {
				last = q
				moves++
			}
			if was, there := at[b[34]]; there && b[60] <= was {
				t.Fatalf("flow %d: frame %d after %d", b[34], b[60], was)
			}
			at[b[34]] = b[60]
		}
		if (moves == 2) != sorted {
			t.Errorf("the queue changes %d times; sorted: %v", moves, sorted)
		}
	}
	f.sort(false)
	check(false)
	f.sort(true)
	check(true)
}
