package forward

import (
	"cmp"
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"barevif/hypercall"
	"barevif/pvnet"
)

// A Pool receives for many vifs of a domain with few goroutines, each of which polls its
// share in turns ([pvnet.Poller]), one batch of each. A vif whose frames come all the time does
// not delay the others' by more than such a turn: Go's scheduler, which [Receive] leaves the
// turns to, may wait for milliseconds before it looks for events while all processors are busy.
// A vif that is idle costs nothing.
//
// Its methods may be called from any goroutine.
type Pool struct {
	workers            []*poolWorker
	receiving, sending atomic.Uint32 // number of the worker that takes the next queue
	wg                 sync.WaitGroup
}

// A poolWorker is one goroutine of a Pool.
type poolWorker struct {
	poller *pvnet.Poller

	mu      sync.Mutex
	members []*poolMember // guarded by mu
	leaving []*poolMember // guarded by mu: those that the goroutine is to stop receiving for
	queues  []*queue      // guarded by mu: queues that the worker has taken: its goroutine sends their frames
	waiting []*queue      // guarded by mu: queues whose own goroutines send, or wait for room
	awake   bool          // guarded by mu: the goroutine looks at queues before it waits
	closed  bool          // guarded by mu

	// Used by the goroutine only.
	spare      []*queue // memory for queues
	empty      int      // how many turns had no frames while it had queues
	nudged     []*queue // memory of nudgeWaiting
	lastNudged int      // the index in waiting of the queue that it looked at last
}

// A poolMember is one queue of a vif. Its worker's goroutine uses it, until it closes left.
type poolMember struct {
	rx          *pvnet.RX
	fn          func([]pvnet.Frame) (int, error)
	undelivered uint64 // frames lost that the device has not counted yet
	over        bool   // it has left the pool: nothing is received any more
	err         error  // written before left is closed: why
	left        chan struct{}
}

// NewPool makes a pool of so many goroutines for vifs of domain. The errors are those of
// [pvnet.NewPoller]: a domain that cannot wait for many events at once is
// [pvnet.ErrUnimplemented]; use [Receive] there.
func NewPool(domain hypercall.Domain, goroutines int) (*Pool, error) {
	if goroutines < 1 || goroutines > 1024 {
		return nil, fmt.Errorf("forward: a pool of %d goroutines: it takes 1 to 1024", goroutines)
	}
	p := &Pool{}
	for range goroutines {
		poller, err := pvnet.NewPoller(domain, pvnet.PollerConfig{})
		if err != nil {
			for _, w := range p.workers {
				w.poller.Close()
			}
			return nil, fmt.Errorf("forward: %w", err)
		}
		p.workers = append(p.workers, &poolWorker{poller: poller})
	}
	for _, w := range p.workers {
		p.wg.Go(w.run)
	}
	return p, nil
}

// worker returns the worker that takes the next queue, to receive from or to send to.
func (p *Pool) worker(next *atomic.Uint32) *poolWorker {
	return p.workers[int(next.Add(1)%uint32(len(p.workers)))]
}

// Receive is [Receive] of the package, and calls fn from the pool's goroutines. So fn must not
// wait: it is for Senders that [Drop]. It also returns [ErrClosed] after [Pool.Close].
//
// A queue all of whose pages are held by fn, or by those that it gave frames to, is looked at
// again once one of them is released.
func (p *Pool) Receive(ctx context.Context, dev *pvnet.Device, fn func(queue int, frames []pvnet.Frame) (lost int, err error)) error {
	rxs, err := ownAll(dev)
	if err != nil {
		return unlessOrderly(err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for i, rx := range rxs {
		m := &poolMember{rx: rx, left: make(chan struct{}), fn: func(frames []pvnet.Frame) (int, error) { return fn(i, frames) }}
		w := p.worker(&p.receiving)
		if err := w.add(m); err != nil {
			cancel(err)
			break
		}
		wg.Go(func() {
			select {
			case <-m.left:
			case <-ctx.Done():
				w.letGo(m)
				<-m.left
			}
			cancel(m.err)
		})
	}
	wg.Wait()
	return unlessOrderly(context.Cause(ctx))
}

// Close ends every Receive of the pool, and returns once its goroutines have ended. It is
// idempotent and returns nil.
func (p *Pool) Close() error {
	for _, w := range p.workers {
		w.mu.Lock()
		w.closed = true
		w.mu.Unlock()
		w.poller.Wake()
	}
	p.wg.Wait()
	return nil
}

func (w *poolWorker) add(m *poolMember) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return ErrClosed
	}
	if err := w.poller.Add(m.rx, m); err != nil {
		return fmt.Errorf("forward: %w", err)
	}
	w.members = append(w.members, m)
	return nil
}

// letGo makes the goroutine stop receiving for m, and then close m.left.
func (w *poolWorker) letGo(m *poolMember) {
	w.mu.Lock()
	w.leaving = append(w.leaving, m)
	w.mu.Unlock()
	w.poller.Wake()
}

// take adds q to the queues whose frames the worker's goroutine sends at the end of its turn. It reports
// false, and adds nothing, while that goroutine waits for events. The caller holds q.mu.
func (w *poolWorker) take(q *queue) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.awake {
		w.queues = append(w.queues, q)
	}
	return w.awake
}

// watch has the worker nudge q's own goroutine until unwatch. The caller holds q.mu.
func (w *poolWorker) watch(q *queue) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !q.watched && !w.closed {
		q.watched = true
		w.waiting = append(w.waiting, q)
	}
}

// unwatch undoes watch. The caller holds q.mu.
func (w *poolWorker) unwatch(q *queue) {
	w.mu.Lock()
	defer w.mu.Unlock()
	q.watched = false
	w.waiting = slices.DeleteFunc(w.waiting, func(o *queue) bool { return o == q })
}

// mostNudged is how many queues a worker looks at in one turn, so that many guests that take nothing do not delay the
// frames of others.
const mostNudged = 32

// nudgeWaiting lets the goroutines of queues run that wait for room which is there now, or have more to send. The worker
// does not wait while frames come, so with all processors busy Go's scheduler might let them run ten milliseconds
// later.
func (w *poolWorker) nudgeWaiting() {
	yield := false
	for _, q := range w.pick() {
		q.mu.Lock()
		if q.handed && !q.tx.Nudge() {
			yield = true
		}
		q.mu.Unlock()
	}
	clear(w.nudged)
	if yield {
		runtime.Gosched()
	}
}

// pick returns the queues that nudgeWaiting looks at in this turn.
func (w *poolWorker) pick() []*queue {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nudged = w.nudged[:0]
	for range min(len(w.waiting), mostNudged) {
		w.lastNudged = (w.lastNudged + 1) % len(w.waiting)
		w.nudged = append(w.nudged, w.waiting[w.lastNudged])
	}
	return w.nudged
}

// emptyTurns is for how many turns in a row without received frames a worker looks for room in the
// rings of the queues that it has taken. Then it gives the queues back, and waits for events: so a guest that takes
// no frames costs no processor time.
const emptyTurns = 64

// next waits for the members of the next turn. It does not wait while the worker has queues to send
// from.
func (w *poolWorker) next() ([]pvnet.Ready, error) {
	w.mu.Lock()
	if len(w.queues) > 0 && w.empty < emptyTurns {
		w.mu.Unlock()
		ready, err := w.poller.Poll()
		if w.empty++; len(ready) > 0 {
			w.empty = 0
		}
		return ready, err
	}
	w.awake = false
	queues := w.grabLocked()
	w.mu.Unlock()
	w.empty = 0
	w.giveBack(queues)
	ready, err := w.poller.Wait()
	w.mu.Lock()
	w.awake = !w.closed
	w.mu.Unlock()
	return ready, err
}

// grabLocked returns the queues that were taken. [poolWorker.keep] takes the list back.
func (w *poolWorker) grabLocked() []*queue {
	queues := w.queues
	w.queues, w.spare = w.spare[:0], nil
	return queues
}

// keep keeps the memory of a list that grabLocked has returned.
func (w *poolWorker) keep(queues []*queue) {
	clear(queues)
	w.spare = queues
}

// sendQueues sends the frames of the queues that the worker has taken, as far as the rings have room.
// The worker takes a queue again whose frames were not all sent.
func (w *poolWorker) sendQueues() {
	w.mu.Lock()
	queues := w.grabLocked()
	w.mu.Unlock()
	for _, q := range queues {
		q.mu.Lock()
		q.pump()
	}
	w.keep(queues)
}

// giveBack leaves queues to their own goroutines, which wait for room.
func (w *poolWorker) giveBack(queues []*queue) {
	for _, q := range queues {
		q.mu.Lock()
		if q.over != nil { // that goroutine has ended
			q.finish(q.over)
			continue
		}
		q.leaveLocked()
		q.mu.Unlock()
	}
	w.keep(queues)
}

func (w *poolWorker) run() {
	var frames [Batch]pvnet.Frame
	for {
		ready, err := w.next()
		if err != nil {
			w.end(err) // the domain itself is gone
			return
		}
		for _, r := range ready {
			m := r.Value.(*poolMember)
			switch {
			case m.over:
			case r.Err != nil:
				w.leave(m, r.Err)
			default:
				if err := w.receive(m, frames[:]); err != nil {
					w.leave(m, err)
				}
			}
		}
		w.sendQueues()
		w.mu.Lock()
		leaving, closed, waiting := w.leaving, w.closed, len(w.waiting) > 0
		w.leaving = nil
		w.mu.Unlock()
		if waiting {
			w.nudgeWaiting()
		}
		for _, m := range leaving {
			w.leave(m, cmp.Or(deviceError(m), context.Canceled)) // of one that was cancelled, Receive knows the cause
		}
		if closed {
			w.end(ErrClosed)
			return
		}
	}
}

// deviceError returns the error that has ended the device of m; nil if it has not ended.
func deviceError(m *poolMember) error {
	_, err := m.rx.Receive(nil)
	return err
}

// receive passes one batch of frames of m on to its fn.
func (w *poolWorker) receive(m *poolMember, frames []pvnet.Frame) error {
	n, err := m.rx.Poll(frames)
	switch {
	case err == pvnet.ErrLinkDown, err == pvnet.ErrNoBuffers: // the Poller tells when that has changed
		return nil
	case err != nil:
		return err
	case n == 0:
		return nil
	}
	lost, err := m.fn(frames[:n])
	m.undelivered += uint64(lost)
	if m.undelivered > 0 && m.rx.CountUndelivered(m.undelivered) == nil {
		m.undelivered = 0
	}
	return err
}

// leave stops receiving for m, because of err, and closes m.left.
func (w *poolWorker) leave(m *poolMember, err error) {
	if m.over {
		return
	}
	m.over = true
	w.mu.Lock()
	w.members = slices.DeleteFunc(w.members, func(o *poolMember) bool { return o == m })
	w.mu.Unlock()
	w.poller.Remove(m.rx)
	if m.undelivered > 0 {
		m.rx.CountUndelivered(m.undelivered) // a device that has ended counts nothing
	}
	m.err = err
	close(m.left)
}

// end stops receiving for all members, because of err, and closes the poller.
func (w *poolWorker) end(err error) {
	w.mu.Lock()
	w.closed, w.awake, w.waiting = true, false, nil
	members, queues := slices.Clone(w.members), w.grabLocked()
	w.mu.Unlock()
	w.giveBack(queues)
	for _, m := range members {
		w.leave(m, err)
	}
	w.poller.Close()
}
