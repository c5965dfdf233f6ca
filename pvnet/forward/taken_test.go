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

// A worker watches a queue once, from when the queue's goroutine is to wait until that has nothing left to send.
func TestAWorkerWatchesWhoWaits(t *testing.T) {
	w := &poolWorker{}
	q := newQueue(nil, &pvnet.TX{})
	q.worker = w
	for range 2 {
		q.leaveLocked()
		w.nudgeWaiting()
		if !slices.Equal(w.waiting, []*queue{q}) {
			t.Fatalf("%d queues are watched", len(w.waiting))
		}
	}
	q.restLocked()
	w.nudgeWaiting()
	if len(w.waiting) != 0 || q.watched {
		t.Error("a queue is watched that waits for nothing")
	}
}
