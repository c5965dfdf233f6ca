package forward

import "barevif/pvnet"

// mostWritten is how many frames of [Sender.Write] may wait for a queue of the vif, and
// mostWrittenBytes how long they may be together.
const (
	mostWritten      = 256
	mostWrittenBytes = 512 << 10
)

// Write sends a copy of one frame that no device received: an answer of the router's own. It
// does not wait. Frames of Write go before those of the inputs, in their order if they take the
// same queue of the vif, and are among the Stats. It reports false if so many wait already, if
// the frame has fewer than [pvnet.MinFrame] or more than [pvnet.MaxFrame] bytes, or if the Sender
// has ended. Its checksums must be complete. Any goroutine may call it.
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
	if q.over != nil || len(q.written) >= mostWritten || q.writtenBytes+len(frame) > mostWrittenBytes {
		s.own.count(full, 1)
		return false
	}
	q.written = append(q.written, append([]byte(nil), frame...))
	q.writtenBytes += len(frame)
	if !q.busy {
		q.busy = true
		q.handOverLocked()
	}
	return true
}

// fillWritten moves written frames to batch, as long as there is room and the vif has pages. The
// caller is busy and holds mu.
func (q *queue) fillWritten() {
	k, own := 0, q.s.own
	for ; k < len(q.written) && q.n < Batch; k++ {
		f := q.batch[q.n : q.n+1]
		if q.tx.AllocSize(f, len(q.written[k])) == 0 {
			// No page, or no link: the sender of such a frame sends it again, or does without.
			q.writtenBytes -= len(q.written[k])
			own.count(full, 1)
			continue
		}
		f[0].CopyFrom(q.written[k])
		q.writtenBytes -= len(q.written[k])
		q.owners[q.n] = own
		own.src.held.Add(pagesOf(&f[0]))
		own.count(waiting, 1)
		q.n++
	}
	left := copy(q.written, q.written[k:])
	clear(q.written[left:])
	q.written = q.written[:left]
}
