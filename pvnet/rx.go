package pvnet

import (
	"time"

	"barevif/arena"
)

// An RX is the receiving half of a queue. It has one owner at a time: no two goroutines
// may call its methods at once, except SetDeadline.
type RX struct {
	half
	eng receiver // of the connection; written by the lifecycle goroutine while the gate is shut
}

// A receiver moves frames out of one connection's ring.
type receiver interface {
	// receive fills frames and returns how many it filled. With into, it copies into
	// frames that the caller holds already.
	receive(frames []Frame, into bool) (int, error)

	// abort gives back what a receive took that met a fault and will not return. The caller is
	// inside the gate, and uses none of the frames.
	abort()

	// release takes frames back from the caller. It skips stale ones and returns ErrStale
	// in the end.
	release(frames []Frame) error

	// arm asks the peer for an event when the next frame comes, and reports whether one
	// is there already.
	arm() (more bool, err error)

	// consumed is the free-running index of the next slot. Frames that are dropped move
	// it too.
	consumed() uint32

	// heldUntil reports whether the next frame waits for credit under a rate limit, and
	// until when; the zero Time: for a change of the limit. No event is armed meanwhile.
	heldUntil() (until time.Time, held bool)

	// starving reports whether the next frame still waits for a page, after receive returned
	// ErrNoBuffers. The next release by another goroutine then wakes the owner.
	starving() bool

	engine
}

// Receive waits for at least one frame, the deadline (os.ErrDeadlineExceeded) or
// Disconnect ([ErrDisconnected]), and gives the caller frames[:n] until Release. While
// the link is down it waits. It returns [ErrNoBuffers] at once if the caller, or those it gave
// frames to, hold every buffer (see [RX.AwaitBuffers]), [ErrPolled] if the half is in a [Poller] and no frame is there, [ErrBusy] if
// another goroutine is inside the half, and the [*PeerError] that ended the device.
func (rx *RX) Receive(frames []Frame) (n int, err error) { return rx.receive(frames, false) }

// ReceiveInto is Receive into frames that the caller holds, also of another device. It
// overwrites them from where they begin, and sets length, checksum state and GSO. The
// caller keeps them. If the next frame does not fit, it stays at the head of the queue:
// [ErrShortFrame]. It also returns the errors of Receive, [ErrStale], and [ErrShared] for a
// frame with more than one holder.
func (rx *RX) ReceiveInto(frames []Frame) (n int, err error) { return rx.receive(frames, true) }

func (rx *RX) receive(frames []Frame, into bool) (int, error) {
	for len(frames) > 0 {
		if rx.ending.Load() {
			return 0, errInterrupted
		}
		if err := rx.enter(); err != nil {
			if err = rx.afterShutGate(err); err != nil {
				return 0, err
			}
			continue
		}
		at := rx.eng.consumed()
		n, err := rx.eng.receive(frames, into)
		if taps := rx.dev.taps.Load(); taps != nil {
			rx.showReceived(*taps, frames[:n])
		}
		garbage := n == 0 && rx.eng.consumed() != at
		rx.hadWork = rx.hadWork || garbage // a frame that was dropped: the event was not spurious
		if n > 0 || err != nil {
			rx.countMoved(n)
			rx.gate.leave()
			if n > 0 && err != nil {
				// The caller gets the frames now, and the error with its next call.
				rx.dev.callError(err)
				err = nil
			}
			return n, rx.dev.callError(err)
		}
		if until, held := rx.eng.heldUntil(); held {
			err = rx.waitForCredit(until)
			rx.gate.leave()
			if err = rx.dev.callError(err); err != nil {
				return 0, err
			}
			continue
		}
		more := rx.spin.spin(&rx.half, rx.eng, 1)
		if !more {
			more, err = rx.eng.arm()
		}
		switch {
		case err != nil:
		case !more:
			err = rx.parkUntilEvent()
		case garbage && rx.expired(): // the peer sends only garbage, so parkUntilEvent is never reached
			err = errTimeout
		}
		rx.gate.leave()
		if err = rx.dev.callError(err); err != nil {
			return 0, err
		}
	}
	return 0, rx.dev.endError()
}

// waitForCredit waits inside the gate until there may be credit for the frame that is held
// back. Only Busy looks: how long the wait is depends on nothing that a look could see.
func (rx *RX) waitForCredit(until time.Time) error {
	if rx.spin.always() && rx.spin.spin(&rx.half, rx.eng, 1) {
		return nil
	}
	err := rx.parkUntil(sooner(rx.deadline(), until), false)
	if err == errTimeout && !rx.expired() {
		return nil
	}
	return err
}

// Poll is Receive that does not wait: n is 0 if no frame is there. It returns the errors
// of Receive, and [ErrLinkDown].
func (rx *RX) Poll(frames []Frame) (n int, err error) { return rx.poll(frames, false) }

// PollInto is ReceiveInto that does not wait. It returns the errors of ReceiveInto, and
// [ErrLinkDown].
func (rx *RX) PollInto(frames []Frame) (n int, err error) { return rx.poll(frames, true) }

func (rx *RX) poll(frames []Frame, into bool) (n int, err error) {
	if err := rx.enter(); err != nil {
		return 0, err
	}
	n, err = rx.eng.receive(frames, into)
	if taps := rx.dev.taps.Load(); taps != nil {
		rx.showReceived(*taps, frames[:n])
	}
	rx.countMoved(n)
	rx.gate.leave()
	if err = rx.dev.callError(err); n > 0 {
		err = nil
	}
	return n, err
}

// Release gives frames back to their device, also those of other devices, while the link
// is down, and after the end. It skips stale frames and returns [ErrStale] in the end.
func (rx *RX) Release(frames []Frame) (err error) {
	if rx.enter() != nil {
		return releaseAll(frames)
	}
	err = rx.eng.release(frames)
	if m := rx.member.Load(); m != nil && m.starving {
		m.starving = false
		m.mark() // the owner releases by itself what its Poller waits for
	}
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

// releaseTo gives frames back, and those of a by the shorter path for its owner.
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

// SetDeadline sets when waiting calls give up, those under way included; the zero Time
// means never. Any goroutine may call it.
func (rx *RX) SetDeadline(t time.Time) { rx.setDeadline(t) }

// CountUndelivered counts n frames that the owner received and could not pass on. They
// also stay counted as received. It returns the errors of [TX.CountDropped].
func (rx *RX) CountUndelivered(n uint64) error { return rx.undelivered(n) }
