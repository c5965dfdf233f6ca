package pvnet

import (
	"cmp"
	"runtime/debug"
	"time"

	"barevif/telemetry"
)

// A TX is the sending half of a queue. It has one owner at a time: no two goroutines may
// call its methods at once, except SetDeadline.
type TX struct {
	half
	eng     sender           // of the connection; written by the lifecycle goroutine while the gate is shut
	stall   stall            // lifecycle goroutine and slow tick only
	cutting cutting          // inside the gate
	nudging nudging          // of the goroutine that has borrowed the counters
	frames  [callBatch]Frame // the frames of Write; guarded by mu
}

// A sender moves frames into one connection's ring.
type sender interface {
	// alloc makes frames of size bytes and returns how many there was room for.
	alloc(frames []Frame, size int) (int, error)

	// send takes over frames[:n], where n is the result.
	send(frames []Frame) (int, error)

	// spaceFor returns what it takes to send f.
	spaceFor(f *Frame) space

	// peerOffloads returns the offloads that the peer takes.
	peerOffloads() offloads

	// pieceExtras returns how many extra infos each piece may have that f is cut into.
	pieceExtras(f *Frame) int

	// freeSlots returns how many slots of the ring are free.
	freeSlots() (int, error)

	// hasSpace reports whether n is there.
	hasSpace(n space) (bool, error)

	// starved returns ErrNoBuffers if only the caller can free the buffers of n.
	starved(n space) error

	// arm asks the peer for an event when n is there, or later: a frontend waits for half
	// of its requests. It reports whether n is there already.
	arm(n space) (more bool, err error)

	// afterWait is called after a wait; it may take responses, to time one.
	afterWait() error

	// givesEarly reports whether the wait for what arm asked for should end early: a
	// frontend's once any response has come, since the peer may never give as many as the
	// half waits for; a backend's once all slots asked for are there. The slow tick calls
	// it while the owner waits.
	givesEarly() bool

	// settle takes the responses that are in the ring and updates the ring's gauges. The
	// slow tick calls it while no caller is inside the gate.
	settle() error

	// peerProgress returns the peer's index, the index it must reach for the call that last
	// found no room, and how many calls found no room. The slow tick calls it.
	peerProgress() (index, goal, tries uint32)

	engine
}

// A space is what a call to the sending half lacks or waits for.
type space struct{ slots, bufs int }

// Alloc makes empty frames with headroom, which a frontend makes in pages that are
// granted already. It returns how many: fewer than len(frames) if all pages are in use,
// none while the link is down. The caller must send or release them.
func (tx *TX) Alloc(frames []Frame) int { return tx.AllocSize(frames, 0) }

// AllocSize is Alloc for frames that already have size bytes, at most MaxFrame. The bytes
// are not cleared: until the caller writes them, they are those of an earlier frame to
// the same peer.
func (tx *TX) AllocSize(frames []Frame, size int) int {
	if size < 0 || size > MaxFrame || tx.enter() != nil {
		return 0
	}
	n, err := tx.eng.alloc(frames, size)
	if n == 0 {
		tx.serveRequests()
		tx.reportSpace(func() space { return space{bufs: buffersFor(size)} })
	}
	tx.leave(err)
	return n
}

// AllocWait is AllocSize, but it waits for at least one frame. It returns the errors of
// SendWait.
func (tx *TX) AllocWait(frames []Frame, size int) (int, error) {
	if size < 0 || size > MaxFrame {
		return 0, cmp.Or(tx.dev.endError(), ErrFrameSize)
	}
	for len(frames) > 0 {
		if err := tx.enter(); err != nil {
			if err = tx.afterShutGate(err); err != nil {
				return 0, err
			}
			continue
		}
		n, err := tx.eng.alloc(frames, size)
		if n > 0 || err != nil {
			return n, tx.leave(err)
		}
		if err = tx.wait(space{bufs: buffersFor(size)}); err != nil {
			return 0, err
		}
	}
	return 0, tx.dev.endError()
}

// Send queues frames in order and takes over those it accepted, frames[:n]; the
// caller keeps the rest. It never blocks: a short count comes with [ErrFull],
// [ErrLinkDown], [ErrDisconnected], a [*PeerError], [ErrBusy], [ErrStale], [ErrFrameSize]
// or [ErrOffload], the last three about frames[n].
//
// A frame that this half allocated is sent without a copy. A frame from elsewhere, or
// with another holder, is copied first. If the peer does not take partial checksums or
// GSO frames, Send completes the checksum or cuts the frame. There may be room for some
// of the pieces of a cut frame only: then ErrFull comes after these were sent, and the
// caller still holds the frame. If it sends the frame again unchanged, Send continues
// with the next piece.
func (tx *TX) Send(frames []Frame) (n int, err error) {
	if err := tx.enter(); err != nil {
		return 0, err
	}
	n, err = tx.sendOrCut(frames)
	tx.countMoved(n)
	if err == ErrFull {
		tx.serveRequests()
		tx.reportSpace(func() space { return tx.spaceFor(&frames[n]) })
	}
	return n, tx.leave(err)
}

// reportSpace tells the half's Poller, if it is in one, to report the half once n is there.
func (tx *TX) reportSpace(n func() space) {
	if m := tx.member.Load(); m != nil {
		m.waitFor(n())
	}
}

// sendOrCut sends as many frames as there is room for, and cuts those whose GSO the peer does
// not take.
func (tx *TX) sendOrCut(frames []Frame) (n int, err error) {
	n, err = tx.push(frames)
	for err == errMustCut {
		if err = tx.cut(&frames[n]); err != nil {
			break
		}
		k := 0
		k, err = tx.push(frames[n+1:])
		n += 1 + k
	}
	return n, err
}

// spaceFor returns what it takes to send f, or its next piece if it has to be cut.
func (tx *TX) spaceFor(f *Frame) space {
	if tx.eng.peerOffloads().needs(f) == needCut && tx.cutting.start(f) {
		bufs := buffersFor(tx.cutting.Len())
		return space{slots: bufs + tx.eng.pieceExtras(f), bufs: bufs}
	}
	return tx.eng.spaceFor(f)
}

// SendWait is Send, but it waits until it has taken every frame, the deadline passes
// (os.ErrDeadlineExceeded), or the device is disconnected. While the link is down it
// waits for the link. [ErrNoBuffers] if a frame must be copied or cut and the caller
// holds the buffers for that. [ErrPolled] if the half is in a [Poller] and there is no
// room.
//
// A backend drops the frames of a call that has waited for [ServeConfig].DrainTimeout: it
// takes them over, counts them as [telemetry.DropGuestStalled], and returns no error. A
// goroutine that sends to many vifs should call Send, which never waits, and drop the
// frames that it returns ([TX.CountDropped]).
func (tx *TX) SendWait(frames []Frame) (n int, err error) {
	waits := false
	n, err = tx.sendWait(frames, &waits)
	if waits {
		tx.drain.end()
	}
	if n == 0 && err == nil {
		err = tx.dev.endError()
	}
	return n, err
}

// sendWait sets waits once it has to wait for room.
func (tx *TX) sendWait(frames []Frame, waits *bool) (n int, err error) {
	for n < len(frames) {
		if err := tx.enter(); err != nil {
			if err = tx.afterShutGate(err); err != nil {
				return n, err
			}
			continue
		}
		k, err := tx.sendOrCut(frames[n:])
		n += k
		tx.countMoved(k)
		if err != ErrFull {
			return n, tx.leave(err)
		}
		if !*waits {
			*waits = true
			tx.drain.begin()
		}
		if tx.drain.over(tx.eng) {
			k, err = tx.dropWaiting(frames[n:])
			return n + k, err
		}
		if err = tx.wait(tx.spaceFor(&frames[n])); err != nil {
			return n, err
		}
	}
	return n, nil
}

// wait waits inside the gate until n may be there, and leaves the gate.
func (tx *TX) wait(n space) error {
	err := tx.eng.starved(n)
	if err != nil {
		return tx.leave(err)
	}
	more := tx.spin.spin(&tx.half, tx.eng, n.slots)
	if !more {
		more, err = tx.eng.arm(n)
	}
	switch {
	case err != nil:
	case !more:
		err = tx.parkUntilEvent()
	case tx.expired():
		err = errTimeout
	}
	if err == errTimeout && !tx.expired() {
		err = nil // the drain time ended the park, or asks for a look
	}
	if v := tx.eng.afterWait(); v != nil {
		err = v
	}
	return tx.leave(err)
}

// settle takes the responses of a half that no caller uses now. Without it, a ring whose
// last requests are all answered would be shown as full. The slow tick calls it.
func (tx *TX) settle(eng sender) error {
	if !tx.gate.state.CompareAndSwap(gateOpen, gateBorrowed) {
		return nil
	}
	defer tx.gate.state.Store(gateOpen)
	err := eng.settle()
	tx.count.Publish()
	return err
}

// leave leaves the gate and returns the error of the call; a violation ends the
// device.
func (tx *TX) leave(err error) error {
	tx.gate.leave()
	return tx.dev.callError(err)
}

// SetDeadline sets when waiting calls give up, those under way included; the zero Time
// means never. Any goroutine may call it.
func (tx *TX) SetDeadline(t time.Time) { tx.setDeadline(t) }

// A nudging holds the state of Nudge for one SendWait of a TX: how often the ring had room, and whether its memory is
// gone. Only a goroutine that has borrowed the counters of the half uses it.
type nudging struct {
	wait uint32 // number of the wait, as in half.waitSeq
	due  uint32 // how often there was room
	gone bool   // the ring's memory is gone
}

// Nudge makes the call that waits for room look for its event, if the peer has made the room. It reports false after
// it has done so, and if no call waits; else true: the call waits on.
//
// Go's scheduler may look for events ten milliseconds late while goroutines keep all processors busy. Such a
// goroutine calls Nudge, and after false [runtime.Gosched], which lets the goroutine of the call run. If a peer
// makes room and sends no event, only the first, second, fourth, eighth ... Nudge that finds the room wakes the call;
// those between report true. A call that looks at the ring by itself, because its drain time is short, is not nudged.
// Any goroutine may call Nudge.
func (tx *TX) Nudge() (waits bool) {
	if !tx.counterUser.CompareAndSwap(countersLent, countersBorrowed) {
		return false // no call waits, or somebody has the counters for a microsecond
	}
	// While the counters are used here the call stays inside the gate, and so the connection stays.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // the goroutine may be a user's
	n := &tx.nudging
	if seq := tx.waitSeq.Load(); seq != n.wait {
		*n = nudging{wait: seq}
	}
	due := false
	// After a fault the slow tick ends the device. With a short drain time the call looks by itself.
	if !n.gone && !tx.drain.short() {
		n.gone = catchFault(func() { due = tx.eng.overdue() }) != nil
	}
	if due = due && !n.gone; due {
		n.due++
		due = n.due&(n.due-1) == 0
	}
	park := tx.park.Load()
	tx.returnCounters()
	if due {
		park.nudge()
	}
	return !due
}

// CountDropped counts n frames that the owner should have sent and dropped itself, for
// reason r. While the link is down it counts nothing and returns [ErrLinkDown]; after the
// end of the device, the error that ended it. [ErrBusy].
func (tx *TX) CountDropped(r telemetry.Reason, n uint64) error {
	return tx.withCounters(func(b *telemetry.Block) { b.Drop(r, n) })
}

// CountUndelivered counts n frames that the owner should have sent but never got, since
// they were lost on the way to it. It returns the errors of CountDropped.
func (tx *TX) CountUndelivered(n uint64) error { return tx.undelivered(n) }
