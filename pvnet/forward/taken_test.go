package forward

import (
	"slices"
	"testing"

	"barevif/pvnet"
)

// A worker that has frames all the time looks for room for a while, and then leaves that to the goroutine,
// as it does before it waits for frames, and after its pool was closed.
func TestAWorkerLooksForRoomForAWhile(t *testing.T) {
	for _, c := range []struct {
		awake     bool
		fruitless int
		taken     bool
	}{{true, 0, true}, {true, mostFruitless - 1, true}, {true, mostFruitless, false}, {false, 0, false}} {
		q := newQueue(nil, nil)
		q.worker, q.fruitless = &poolWorker{awake: c.awake}, c.fruitless
		q.handOverLocked()
		if taken := len(q.worker.queues) == 1; taken != c.taken || q.handed == taken {
			t.Errorf("%+v: taken %v, handed %v", c, taken, q.handed)
		}
		if !c.taken && q.fruitless != 0 {
			t.Errorf("%+v: its time does not begin again", c)
		}
		if watched := len(q.worker.waiting) == 1; watched == c.taken {
			t.Errorf("%+v: taken %v, watched %v", c, c.taken, watched)
		}
	}
}

// A worker watches a queue once, while the queue's goroutine is to send, and an ended worker watches none.
func TestAWorkerWatchesWhoWaits(t *testing.T) {
	w := &poolWorker{}
	sender := &Sender{ended: make(chan struct{})}
	sender.own = &Input{s: sender, src: NewSource(0)}
	q := newQueue(sender, &pvnet.TX{})
	q.worker = w
	for _, end := range []func(){q.restLocked, func() { q.mu.Lock(); q.finish(ErrClosed) }} {
		for range 2 {
			q.leaveLocked()
			w.nudgeWaiting()
			if !slices.Equal(w.waiting, []*queue{q}) {
				t.Fatalf("%d queues are watched", len(w.waiting))
			}
		}
		if end(); len(w.waiting) != 0 || q.watched {
			t.Error("a queue is watched that waits for nothing")
		}
	}
	w.closed = true
	if q.leaveLocked(); len(w.waiting) != 0 {
		t.Error("a worker that has ended watches a queue")
	}
}

// A worker looks at some of the queues that it watches in each turn, and at all of them in turns.
func TestAWorkerNudgesInTurns(t *testing.T) {
	w := &poolWorker{}
	const queues = 3*mostNudged + 5
	looked := make(map[*queue]int)
	for range queues {
		q := newQueue(nil, &pvnet.TX{})
		q.worker = w
		q.leaveLocked()
	}
	for range queues {
		for _, q := range w.pick() {
			looked[q]++
		}
	}
	for _, n := range looked {
		if n != mostNudged {
			t.Errorf("%d looks at a queue", n)
		}
	}
	if len(looked) != queues {
		t.Errorf("looks at %d queues", len(looked))
	}
}
