package pvnet

import (
	"time"

	"barevif/arena"
)

// An RX is the receiving half of a queue. It has one owner at a time: its methods,
// but SetDeadline, must not be called by two goroutines at once.
type RX struct {
	half
	eng receiver // of the connection; written by the life goroutine behind the shut gate
}

// A receiver moves frames out of one connection's ring.
type receiver interface {
	// receive fills frames and returns how many it did. With into, they are
	// frames of the caller's to copy into.
	receive(frames []Frame, into bool) (int, error)

	// release takes frames back that the caller holds, and goes on after one that
	// is stale.
	release(frames []Frame) error

	// arm asks for a wake-up when the next frame comes, and reports whether one
	// is there already.
	arm() (more bool, err error)

	// consumed is the free-running index of the next slot. It moves for frames
	// that are dropped too.
	consumed() uint32

	engine
}

// Receive waits for at least one frame, the deadline (os.ErrDeadlineExceeded) or
// Disconnect ([ErrDisconnected]), and gives the caller frames[:n] until Release.
// While the link is down it waits. With every buffer in the caller's hands it
// does not wait: [ErrNoBuffers].
func (rx *RX) Receive(frames []Frame) (n int, err error) { return rx.receive(frames, false) }

// ReceiveInto is Receive into frames of the caller's, which may come from another
// device: they are overwritten from where they begin, and get the length and the
// metadata of what arrived. frames[:n] stay the caller's. A frame that does not
// fit frames[n] stays at the head of the queue: [ErrShortFrame].
func (rx *RX) ReceiveInto(frames []Frame) (n int, err error) { return rx.receive(frames, true) }

func (rx *RX) receive(frames []Frame, into bool) (int, error) {
	for len(frames) > 0 {
		if rx.ending.Load() {
			return 0, errInterrupted
		}
		if err := rx.enter(); err != nil {
			if err = rx.retry(err); err != nil {
				return 0, err
			}
			continue
		}
		at := rx.eng.consumed()
		n, err := rx.eng.receive(frames, into)
		garbage := n == 0 && rx.eng.consumed() != at
		rx.worked = rx.worked || garbage // its event had a reason
		if n > 0 || err != nil {
			rx.counted(n)
			rx.gate.leave()
			if n > 0 && err != nil {
				// The frames count; what stopped the batch is met again.
				rx.dev.judge(err)
				err = nil
			}
			return n, rx.dev.judge(err)
		}
		more := rx.spin.found(&rx.half, rx.eng, 1)
		if !more {
			more, err = rx.eng.arm()
		}
		switch {
		case err != nil:
		case !more:
			err = rx.rest()
		case garbage && rx.expired(): // a peer that sends nothing else
			err = errTimeout
		}
		rx.gate.leave()
		if err = rx.dev.judge(err); err != nil {
			return 0, err
		}
	}
	return 0, rx.dev.over()
}

// Poll is Receive that does not wait: n is 0 if there is nothing. Errors are
// those of Receive, and [ErrLinkDown].
func (rx *RX) Poll(frames []Frame) (n int, err error) { return rx.poll(frames, false) }

// PollInto is ReceiveInto that does not wait, as Poll is Receive.
func (rx *RX) PollInto(frames []Frame) (n int, err error) { return rx.poll(frames, true) }

func (rx *RX) poll(frames []Frame, into bool) (n int, err error) {
	if err := rx.enter(); err != nil {
		return 0, err
	}
	n, err = rx.eng.receive(frames, into)
	rx.counted(n)
	rx.gate.leave()
	if err = rx.dev.judge(err); n > 0 {
		err = nil
	}
	return n, err
}

// Release gives frames back. It goes on after a frame that is stale and returns
// [ErrStale] in the end.
func (rx *RX) Release(frames []Frame) (err error) {
	if rx.enter() != nil {
		return releaseAll(frames)
	}
	err = rx.eng.release(frames)
	rx.gate.leave()
	return err
}

// releaseAll gives frames back one by one, from any goroutine.
func releaseAll(frames []Frame) (err error) {
	for i := range frames {
		if e := frames[i].Release(); e != nil {
			err = e
		}
	}
	return err
}

// releaseTo gives frames back, those of a by the owner's shorter way.
func releaseTo(a *arena.Arena, frames []Frame) (err error) {
	for i := range frames {
		f := &frames[i]
		if f.pieces == 1 {
			if b, ok := a.TakeOne(f.buf); ok {
				a.PutOne(b)
				continue
			}
		}
		if e := a.Release(f.buf); e != nil {
			err = e
		}
	}
	return err
}

// SetDeadline is when waiting calls give up; the zero Time is never. It holds for
// calls under way too, and may be called from any goroutine.
func (rx *RX) SetDeadline(t time.Time) { rx.setDeadline(t) }
