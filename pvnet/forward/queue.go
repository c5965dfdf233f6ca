package forward

import (
	"errors"
	"runtime"
	"sync"

	"barevif/hypercall"
	"barevif/pvnet"
)

// mostFruitless is for how many of its turns in a row a pool's worker looks for room in a ring that has
// none. It bounds how much later than the drain time frames are dropped.
const mostFruitless = 1000

// turns is how many batches one caller sends for others before the queue's goroutine takes
// over.
const turns = 4

// A queue is one queue of the vif, with the frames that wait for it: those of batch, which are
// next, and those in the lanes.
//
// The goroutine that sends has set busy, and owns tx, batch and undelivered until it clears busy.
// Frames wait only while busy is set: by a goroutine that sends, for the queue's own goroutine, which is
// to send (handed), or for the worker of a pool, which has the queue among its own.
type queue struct {
	s      *Sender
	tx     *pvnet.TX
	worker *poolWorker // of Config.Pool; nil: there is none

	mu     sync.Mutex
	change sync.Cond // with mu: handed, busy or over has changed
	busy   bool      // guarded by mu
	handed bool      // guarded by mu: the queue's own goroutine sends, or is about to
	over   error     // guarded by mu: why nothing is sent any more

	first, last *lane // guarded by mu: a FIFO of the lanes with frames; each takes its turn

	batch  [Batch]pvnet.Frame // written with mu held, by the goroutine that set busy
	owners [Batch]*Input      // of batch
	n      int                // frames in batch

	written writtenQueue // guarded by mu: frames of Sender.Write

	watched   bool // guarded by mu: the worker nudges the queue's own goroutine
	fruitless int  // guarded by mu: how often in a row there was no room at all when the worker looked

	undelivered uint64 // frames lost that the device has not counted yet
}

func newQueue(s *Sender, tx *pvnet.TX) *queue {
	q := &queue{s: s, tx: tx}
	q.change.L = &q.mu
	return q
}

// A lane is the queue of one input for one queue of the vif.
type lane struct {
	in *Input
	q  *queue

	// The rest is guarded by q.mu.
	ring    []pvnet.Frame // a power of two; made when the first frame waits
	from, n uint32        // where the first frame is, and how many there are
	pages   int32         // that they hold
	credit  int           // bytes that it may still send in this turn (the deficit counter)
	inTurn  bool          // credit has its share of this turn
	queued  bool          // it is in the FIFO of q
	next    *lane         // in that FIFO
}

// pageSize is the size of a page of a device, and room how much a device leaves free in front of a
// frame of several pages, both in bytes.
const (
	pageSize = 4096
	room     = 128
)

// pagesOf returns how many pages a frame holds.
func pagesOf(f *pvnet.Frame) int32 {
	if f.Len() <= pageSize {
		return 1
	}
	return int32(f.Len()+room+pageSize-1) / pageSize
}

// costOf returns how many bytes of its input's credit a frame takes: the frame's length on a wire,
// where a short frame is padded, and each has a preamble, a frame check sequence and a gap.
func costOf(f *pvnet.Frame) int { return max(f.Len(), 60) + 24 }

// share is how many bytes an input may send in a turn.
const share = 4096

// send gives at most Batch frames to the queue, and returns how many were lost.
func (l *lane) send(frames []pvnet.Frame) (lost int, err error) {
	q, in := l.q, l.in
	for {
		seen := in.src.freed.Load()
		q.mu.Lock()
		switch {
		case q.over != nil || in.closed.Load():
			if err = q.over; err == nil {
				err = ErrClosed
			}
			q.mu.Unlock()
			in.drop(frames, ended)
			return lost + len(frames), err
		case !q.busy:
			q.busy = true
			q.mu.Unlock()
			k, err := q.push(frames, in, false)
			q.mu.Lock()
			n, err := q.pushed(in, frames[k:], err)
			return lost + n, err
		}
		frames = frames[l.put(frames):]
		q.mu.Unlock()
		if len(frames) == 0 {
			return lost, nil
		}
		if q.s.cfg.Full == Drop {
			in.drop(frames, full)
			return lost + len(frames), nil
		}
		in.src.await(seen)
	}
}

// pushed queues or drops rest, which are the frames of the Input in that push did not send because
// of err, and sends the frames that other goroutines have queued meanwhile. It returns how many of
// rest were lost, and the error that has ended the queue. The caller has set busy and holds mu;
// pushed gives up both.
func (q *queue) pushed(in *Input, rest []pvnet.Frame, err error) (lost int, end error) {
	switch {
	case q.over != nil:
		end = q.over
	case err == nil:
		return 0, q.pump()
	case err == pvnet.ErrFull, err == pvnet.ErrLinkDown && q.s.cfg.Full == Wait:
		lost = q.pend(in, rest)
		q.handOverLocked()
		q.mu.Unlock()
		return lost, nil
	case err == pvnet.ErrLinkDown:
		in.drop(rest, down)
		return len(rest), q.pump()
	default:
		end = err
	}
	in.drop(rest, ended)
	q.finish(end)
	return len(rest), end
}

// pump sends the frames that wait in the queue, a few batches at most. The caller has set busy and
// holds mu; pump gives up both. It returns the error that has ended the queue.
func (q *queue) pump() error {
	for turn := 0; ; turn++ {
		if q.over != nil {
			end := q.over
			q.finish(end)
			return end
		}
		if !q.fill() {
			q.restLocked()
			q.mu.Unlock()
			return nil
		}
		if turn == turns {
			q.handOverLocked()
			q.mu.Unlock()
			return nil
		}
		q.mu.Unlock()
		k, err := q.push(q.batch[:q.n], nil, false)
		q.mu.Lock()
		q.sent(k)
		if q.fruitless++; k > 0 {
			q.fruitless = 0
		}
		switch {
		case err == nil, q.over != nil:
		case err == pvnet.ErrFull, err == pvnet.ErrLinkDown && q.s.cfg.Full == Wait:
			q.handOverLocked()
			q.mu.Unlock()
			return nil
		case err == pvnet.ErrLinkDown:
			q.dropBatch(down)
		default:
			q.finish(err)
			return err
		}
	}
}

// work is the queue's goroutine: it sends when it is told to, and waits for room.
func (q *queue) work() {
	q.mu.Lock()
	for {
		for !q.handed && q.over == nil {
			q.change.Wait()
		}
		if !q.handed { // the queue has ended: a goroutine that has set busy drops what is left
			q.mu.Unlock()
			return
		}
		if end := q.drainLocked(); end != nil {
			q.finish(end)
			return
		}
		q.restLocked()
	}
}

// drainLocked sends what waits until nothing does, or the device ends.
func (q *queue) drainLocked() error {
	for q.over == nil && q.fill() {
		q.mu.Unlock()
		k, err := q.push(q.batch[:q.n], nil, true)
		if k == Batch {
			runtime.Gosched() // receivers with few frames are not to wait for all that waits here
		}
		q.mu.Lock()
		q.sent(k)
		switch {
		case err == nil, q.over != nil:
		case err == pvnet.ErrLinkDown, errors.Is(err, hypercall.ErrDeadlineExceeded): // the link is down, and the policy is not to wait for it
			q.dropBatch(down)
		default:
			return err
		}
	}
	return q.over
}

// handOverLocked tells the pool's worker, or else the queue's goroutine, to send the frames of the
// queue, and makes it the one that is busy. The worker looks for room in each of its turns, mostFruitless
// times at most: only the queue's goroutine, in SendWait, drops frames after the vif's drain time, and looks at the ring
// of a guest that sends no events.
func (q *queue) handOverLocked() {
	if q.worker != nil && q.fruitless < mostFruitless && q.worker.take(q) {
		return
	}
	q.leaveLocked()
}

// leaveLocked leaves the sending to the queue's goroutine, which can wait for room.
func (q *queue) leaveLocked() {
	q.fruitless = 0
	q.handed = true
	q.change.Broadcast()
	if q.worker != nil {
		q.worker.watch(q)
	}
}

// restLocked clears busy: no goroutine sends now.
func (q *queue) restLocked() {
	q.busy, q.handed = false, false
	if q.watched {
		q.worker.unwatch(q)
	}
	if q.over != nil {
		q.change.Broadcast()
	}
}

// finish drops the frames that wait in the queue and ends the Sender. The caller has set busy and holds mu; finish gives
// up both.
func (q *queue) finish(end error) {
	if q.over == nil {
		q.over = end
	}
	q.dropBatch(ended)
	for q.first != nil {
		l := q.first
		l.drop()
		q.first, l.next, l.queued = l.next, nil, false
	}
	q.last = nil
	q.s.own.count(ended, q.written.frames)
	q.written = writtenQueue{}
	q.restLocked()
	q.mu.Unlock()
	q.s.end(end)
}

// close ends the queue. Frames wait only while a goroutine has set busy, and that goroutine drops
// them.
func (q *queue) close(why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.over == nil {
		q.over = why
	}
	q.change.Broadcast()
}

// awaitIdle waits until no goroutine has set busy. The queue is closed, so none sets it again.
func (q *queue) awaitIdle() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.busy {
		q.change.Wait()
	}
}

// push sends frames, which are in's or, if in is nil, those of batch. It returns how many the device
// took over or refused for good, and why not all: [pvnet.ErrFull], [pvnet.ErrLinkDown], a deadline,
// or the end of the device. The caller has set busy and does not hold mu.
func (q *queue) push(frames []pvnet.Frame, in *Input, wait bool) (k int, err error) {
	for k < len(frames) {
		var n int
		if wait {
			n, err = q.tx.SendWait(frames[k:])
		} else {
			n, err = q.tx.Send(frames[k:])
		}
		q.count(sent, in, k, n)
		k += n
		switch err {
		case nil:
			continue
		case pvnet.ErrStale, pvnet.ErrFrameSize, pvnet.ErrOffload, pvnet.ErrNoBuffers: // about one frame
			frames[k].Release() // a stale one is released already
			q.count(refused, in, k, 1)
			q.undelivered++
			k++
			err = nil
			continue
		}
		break
	}
	if q.undelivered > 0 && q.tx.CountUndelivered(q.undelivered) == nil {
		q.undelivered = 0
	}
	return k, err
}

// count counts n frames from number k on, which are in's or, if in is nil, those of batch.
func (q *queue) count(what kind, in *Input, k, n int) {
	if in != nil {
		in.count(what, n)
		return
	}
	for end := k + n; k < end; {
		owner, run := q.owners[k], 1
		for k+run < end && q.owners[k+run] == owner {
			run++
		}
		owner.count(what, run)
		k += run
	}
}

// fill takes the next frames out of the lanes, in turns by bytes, unless batch still has some.
// It reports whether batch has frames. The caller holds mu.
func (q *queue) fill() bool {
	if q.n > 0 {
		return true
	}
	if q.written.frames > 0 {
		q.fillWritten()
	}
	for q.n < Batch && q.first != nil {
		l := q.first
		if !l.inTurn {
			l.credit += share
			l.inTurn = true
		}
		for q.n < Batch && l.n > 0 {
			f := &l.ring[l.from&uint32(len(l.ring)-1)]
			cost := costOf(f)
			if cost > l.credit {
				break
			}
			l.credit -= cost
			l.pages -= pagesOf(f)
			q.batch[q.n], q.owners[q.n] = *f, l.in
			*f = pvnet.Frame{}
			l.from++
			l.n--
			q.n++
		}
		if l.n > 0 && q.n == Batch {
			break // its turn goes on with the next batch
		}
		q.first, l.next, l.queued, l.inTurn = l.next, nil, false, false
		if q.first == nil {
			q.last = nil
		}
		if l.n == 0 {
			l.credit = 0
		} else {
			q.enqueue(l)
		}
	}
	return q.n > 0
}

// enqueue puts a lane at the end of the FIFO.
func (q *queue) enqueue(l *lane) {
	if l.queued = true; q.last == nil {
		q.first = l
	} else {
		q.last.next = l
	}
	q.last = l
}

// put takes over as many frames as the lane has room for. The caller holds q.mu.
func (l *lane) put(frames []pvnet.Frame) (n int) {
	src := l.in.src
	var taken int32
	if l.ring == nil {
		l.ring = make([]pvnet.Frame, l.q.s.cfg.Frames)
	}
	for n < len(frames) && int(l.n) < len(l.ring) {
		pages := pagesOf(&frames[n])
		if l.pages+pages > src.limit-src.held.Load()-taken || !l.q.s.keep(src, &frames[n]) {
			break
		}
		l.ring[(l.from+l.n)&uint32(len(l.ring)-1)] = frames[n]
		l.n++
		l.pages += pages
		taken += pages
		n++
	}
	if n == 0 {
		return 0
	}
	src.held.Add(taken)
	l.in.count(waiting, n)
	if !l.queued {
		l.q.enqueue(l)
	}
	return n
}

// pend makes frames, the rest of a batch of in, the next batch. It returns how many of them it
// dropped: lent ones for which there was no page. The caller has set busy and holds mu; batch is
// empty.
func (q *queue) pend(in *Input, frames []pvnet.Frame) (lost int) {
	pages := int32(0)
	for i := range frames {
		if !q.s.keep(in.src, &frames[i]) {
			frames[i].Release()
			lost++
			continue
		}
		q.batch[q.n], q.owners[q.n] = frames[i], in
		pages += pagesOf(&frames[i])
		q.n++
	}
	in.src.held.Add(pages)
	in.count(waiting, q.n)
	in.count(full, lost)
	return lost
}

// keep prepares a frame to wait. A backend answers its guest in order, so a lent page of the guest's
// that waited here would hold up all that the guest has sent since, for as long as another guest takes
// nothing. So keep replaces a lent frame by a copy, and reports false if there is no page for that: the
// caller drops the frame or keeps it. With the policy Wait senders wait for their frames anyway, and
// nothing is copied.
func (s *Sender) keep(src *Source, f *pvnet.Frame) bool {
	return s.cfg.Full == Wait || !f.ReadOnly() || src.copy(f)
}

// sent removes the first k frames of batch, which the device has taken over. The caller has set
// busy and holds mu.
func (q *queue) sent(k int) {
	for i := 0; i < k; {
		in, run, pages := q.owners[i], 0, int32(0)
		for ; i < k && q.owners[i] == in; i++ {
			pages += pagesOf(&q.batch[i])
			run++
		}
		in.count(waiting, -run)
		in.src.free(pages)
	}
	left := copy(q.batch[:], q.batch[k:q.n])
	copy(q.owners[:], q.owners[k:q.n])
	clear(q.batch[left:q.n])
	clear(q.owners[left:q.n])
	q.n = left
}

// dropBatch drops the frames of batch. The caller has set busy and holds mu.
func (q *queue) dropBatch(why kind) {
	for i := range q.batch[:q.n] {
		q.batch[i].Release() // it may be stale by a mistake of the one who gave it
	}
	q.count(why, nil, 0, q.n)
	q.undelivered += uint64(q.n)
	q.sent(q.n)
}

// drop drops the frames of a lane. The caller holds q.mu.
func (l *lane) drop() {
	n, pages := l.n, l.pages
	for ; l.n > 0; l.n-- {
		f := &l.ring[l.from&uint32(len(l.ring)-1)]
		f.Release() // it may be stale by a mistake of the one who gave it
		*f = pvnet.Frame{}
		l.from++
	}
	l.pages, l.credit = 0, 0
	l.in.count(ended, int(n))
	l.in.count(waiting, -int(n))
	l.in.src.free(pages)
}

// close drops what waits in the lane, whose input is closed. The lane stays in the FIFO until
// its turn, and then has nothing.
func (l *lane) close() {
	l.q.mu.Lock()
	defer l.q.mu.Unlock()
	l.drop()
}
