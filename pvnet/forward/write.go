package forward

import (
	"math/bits"

	"barevif/pvnet"
)

// mostWritten is how many frames of [Sender.Write] may wait for a queue of the vif, and
// mostWrittenBytes how many bytes they may have together.
const (
	mostWritten      = 256
	mostWrittenBytes = 512 << 10
)

// Write sends a copy of one frame that no device received: an answer of the router's own. It
// does not wait. Frames of Write go before those of the inputs, in their order if they take the
// same queue of the vif, and are among the Stats. It reports false if so many wait already (256,
// or 512 KiB), if the frame has fewer than [pvnet.MinFrame] or more than [pvnet.MaxFrame] bytes, or
// if the Sender has ended. Its checksums must be complete. Any goroutine may call it. It allocates
// only while more bytes wait for a queue than ever did before.
func (s *Sender) Write(frame []byte) bool {
	if len(frame) < pvnet.MinFrame || len(frame) > pvnet.MaxFrame {
		return false
	}
	q := s.queues[0]
	if n := s.dev.Active(); n > 1 {
		q = s.queues[min(s.dev.QueueFor(frame), len(s.queues)-1)]
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.over != nil || !q.written.put(frame) {
		s.own.count(full, 1)
		return false
	}
	if !q.busy {
		q.busy = true
		q.handOverLocked()
	}
	return true
}

// A writtenQueue is a FIFO of copies of frames. Their bytes lie behind each other in a ring.
type writtenQueue struct {
	ring   []byte // a power of two
	from   int    // where the bytes of the first frame are
	bytes  int    // of all frames
	sizes  [mostWritten]uint16
	first  int // index in sizes of the first frame
	frames int
}

// put adds a copy of a frame, or reports false: so many wait already.
func (w *writtenQueue) put(frame []byte) bool {
	if w.frames == len(w.sizes) || w.bytes+len(frame) > mostWrittenBytes {
		return false
	}
	if w.bytes+len(frame) > len(w.ring) {
		w.grow(w.bytes + len(frame))
	}
	w.sizes[(w.first+w.frames)%len(w.sizes)] = uint16(len(frame))
	at := (w.from + w.bytes) & (len(w.ring) - 1)
	n := copy(w.ring[at:], frame)
	copy(w.ring, frame[n:])
	w.frames++
	w.bytes += len(frame)
	return true
}

// grow makes the ring one of at least n bytes.
func (w *writtenQueue) grow(n int) {
	const least = 4 << 10
	ring := make([]byte, max(1<<bits.Len(uint(n-1)), least))
	a, b := w.span(w.bytes)
	copy(ring[copy(ring, a):], b)
	w.ring, w.from = ring, 0
}

// span returns the first n bytes, which may go on at the ring's beginning.
func (w *writtenQueue) span(n int) (a, b []byte) {
	if end := w.from + n; end > len(w.ring) {
		return w.ring[w.from:], w.ring[:end-len(w.ring)]
	}
	return w.ring[w.from : w.from+n], nil
}

// peek returns the bytes of the first frame, in two parts. There is one.
func (w *writtenQueue) peek() (a, b []byte) { return w.span(int(w.sizes[w.first])) }

// drop removes the first frame. There is one.
func (w *writtenQueue) drop() {
	n := int(w.sizes[w.first])
	w.from = (w.from + n) & (len(w.ring) - 1)
	w.bytes -= n
	w.first = (w.first + 1) % len(w.sizes)
	w.frames--
}

// fillWritten moves written frames to batch while it has room. It drops those for which the vif has
// no page, and all while its link is down: their sender sends them again, or does without. The
// caller has set busy and holds mu.
func (q *queue) fillWritten() {
	for own := q.s.own; q.written.frames > 0 && q.n < Batch; q.written.drop() {
		a, b := q.written.peek()
		f := q.batch[q.n : q.n+1]
		if q.tx.AllocSize(f, len(a)+len(b)) == 0 {
			lost := full
			if _, err := q.tx.Send(nil); err == pvnet.ErrLinkDown {
				lost = down
			}
			own.count(lost, 1)
			continue
		}
		f[0].CopyFrom(a, b)
		q.owners[q.n] = own
		own.src.held.Add(pagesOf(&f[0]))
		own.count(waiting, 1)
		q.n++
	}
}
