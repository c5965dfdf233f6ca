package link

import (
	"errors"
	"os"
	"time"

	"barevif/pvnet"
)

// A spread is the part of a feeder that spreads the frames of a single link over the queues
// of a vif with several. The queues of a TAP are spread by the kernel.
type spread struct {
	txs    []*pvnet.TX // by queue; one: there is nothing to spread
	on     bool        // the frames that are ready have been sorted
	queue  [batch]int  // by ready frame
	sorted [batch]pvnet.Frame
	at     [batch]int // queue, while frames are sorted
}

// sort finds out the queues of the frames that are ready. With move it puts the frames into the
// order of their queues, so that those of a queue are sent together; the frames of a flow keep
// their order. It does nothing for a vif of one queue.
func (f *feeder) sort(move bool) {
	s := &f.spread
	if s.on = len(s.txs) > 1 && f.dev.Active() > 1; !s.on || f.ready == 0 {
		return
	}
	most, inOrder := 0, true
	for i := range f.frames[:f.ready] {
		q := f.dev.QueueOf(&f.frames[i]) % len(s.txs)
		inOrder = inOrder && q >= most
		most, s.queue[i] = max(most, q), q
	}
	if inOrder || !move {
		return
	}
	k := 0
	for q := range most + 1 {
		for i := range f.frames[:f.ready] {
			if s.queue[i] == q {
				s.sorted[k], s.at[k] = f.frames[i], q
				k++
			}
		}
	}
	copy(f.frames[:k], s.sorted[:k])
	s.queue = s.at
}

// patience is how long a feeder waits for room on one queue before it looks again on which
// queue the frame belongs: the next connection of a vif may have fewer.
const patience = time.Second

// send sends the frames from done on that belong on one queue, and waits for room. It returns
// how many it sent, and the errors of [pvnet.TX.SendWait].
func (f *feeder) send(done int) (n int, err error) {
	s := &f.spread
	if !s.on {
		return f.tx.SendWait(f.frames[done:f.ready])
	}
	q, end := s.queue[done], done+1
	for end < f.ready && s.queue[end] == q {
		end++
	}
	if q == 0 { // a queue of every connection
		return f.tx.SendWait(f.frames[done:end])
	}
	tx := s.txs[q]
	switch n, err = tx.Send(f.frames[done:end]); {
	case err == pvnet.ErrLinkDown: // or the connection does not have the queue any longer
		return f.tx.SendWait(f.frames[done : done+1])
	case err != pvnet.ErrFull:
		return n, err
	case n > 0:
		return n, nil
	case f.ending():
		return 0, os.ErrDeadlineExceeded
	}
	tx.SetDeadline(time.Now().Add(patience))
	n, err = tx.SendWait(f.frames[done:end])
	if errors.Is(err, os.ErrDeadlineExceeded) && !f.ending() {
		err = nil // the next try finds out whether the queue is still there
	}
	return n, err
}
