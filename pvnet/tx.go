package pvnet

import (
	"cmp"
	"time"

	"barevif/arena"
	"barevif/pvnet/packet"
	"barevif/telemetry"
)

// A TX is the sending half of a queue. It has one owner at a time: its methods,
// but SetDeadline, must not be called by two goroutines at once.
type TX struct {
	half
	eng   sender       // of the connection; written by the life goroutine behind the shut gate
	stall stall        // the life goroutine's alone
	cuts  cutting      // inside the gate
	mine  [batch]Frame // of Write; guarded by mu
}

// A cutting is the frame that is being cut.
type cutting struct {
	packet.Cutter
	pieces [32]Frame // some of what it becomes

	// One that was sent in part, for lack of room: it goes on where it stopped if it is
	// sent again as it was.
	frame   arena.Buffer
	headers uint32 // a hash of them
	done    int    // bytes of payload sent; 0: no such frame
}

// A sender moves frames into one connection's ring.
type sender interface {
	// alloc makes frames of size bytes and returns how many there was room for.
	alloc(frames []Frame, size int) (int, error)

	// send takes over the frames it returns the count of.
	send(frames []Frame) (int, error)

	// wants is what sending f takes.
	wants(f *Frame) need

	// offers is what the peer takes beyond whole frames.
	offers() offers

	// avail is how many slots of the ring there are room for.
	avail() (int, error)

	// room reports whether there is what is needed.
	room(n need) (bool, error)

	// stuck is ErrNoBuffers if what is needed can only come from the caller.
	stuck(n need) error

	// arm asks for a wake-up when there is what is needed, and reports whether
	// there already is.
	arm(n need) (more bool, err error)

	// rested takes in what there is after a wait.
	rested() error

	// answered reports whether anything came back since arm. The watchdog calls
	// it while the owner waits.
	answered() bool

	// settle takes the responses that came back and updates the gauges of the ring. The
	// slow tick calls it for a half that no caller is inside.
	settle() error

	// standing is where the peer's index stands, where it has to get for the call
	// that last found no room, and how many calls found none. The slow tick calls
	// it.
	standing() (index, goal, tries uint32)

	engine
}

// A need is what a call waits for.
type need struct{ slots, bufs int }

// buffersFor is how many buffers build takes.
func buffersFor(size int) int {
	if size <= 4096 {
		return 1
	}
	return (headroom + size + 4095) / 4096
}

// Alloc makes empty frames with headroom, in pages the peer already has a grant
// for, and returns how many: fewer than asked if the pages are all in use, none
// while the link is down. Frames that are not sent must be released.
func (tx *TX) Alloc(frames []Frame) int { return tx.AllocSize(frames, 0) }

// AllocSize is Alloc for frames that already have size bytes, at most MaxFrame.
// They are not cleared; what the peer may see of them is what an earlier frame to
// the same peer left there.
func (tx *TX) AllocSize(frames []Frame, size int) int {
	if size < 0 || size > MaxFrame || tx.enter() != nil {
		return 0
	}
	n, err := tx.eng.alloc(frames, size)
	if n == 0 {
		tx.refresh()
		tx.lacks(func() need { return need{bufs: buffersFor(size)} })
	}
	tx.leaveWith(err)
	return n
}

// AllocWait is AllocSize that waits for at least one frame. Errors are those of
// SendWait.
func (tx *TX) AllocWait(frames []Frame, size int) (int, error) {
	if size < 0 || size > MaxFrame {
		return 0, cmp.Or(tx.dev.over(), ErrFrameSize)
	}
	for len(frames) > 0 {
		if err := tx.enter(); err != nil {
			if err = tx.retry(err); err != nil {
				return 0, err
			}
			continue
		}
		n, err := tx.eng.alloc(frames, size)
		if n > 0 || err != nil {
			return n, tx.leaveWith(err)
		}
		if err = tx.wait(need{bufs: buffersFor(size)}); err != nil {
			return 0, err
		}
	}
	return 0, tx.dev.over()
}

// Send queues frames in order and takes over those it accepted, frames[:n]; the
// caller keeps the rest. It never blocks: a short count comes with [ErrFull],
// [ErrLinkDown], [ErrDisconnected], a [*PeerError], [ErrStale], [ErrFrameSize] or
// [ErrOffload], the last three about frames[n].
//
// A frame of this half is sent where it lies. Any other is copied first, one that
// is held more than once too. A checksum that is partial is completed, and a frame
// that is to be cut is cut, if the peer does not do so itself. Of the latter there may be
// room for a part: with ErrFull that part is sent and the frame is the caller's still. Sent
// again as it was, it goes on from there.
func (tx *TX) Send(frames []Frame) (n int, err error) {
	if err := tx.enter(); err != nil {
		return 0, err
	}
	n, err = tx.put(frames)
	tx.counted(n)
	if err == ErrFull {
		tx.refresh()
		tx.lacks(func() need { return tx.wants(&frames[n]) })
	}
	return n, tx.leaveWith(err)
}

// lacks has the Poller that the half is in, if it is, say when there is what n says.
func (tx *TX) lacks(n func() need) {
	if m := tx.member.Load(); m != nil {
		m.want(n())
	}
}

// put sends what there is room for, and cuts what the peer does not.
func (tx *TX) put(frames []Frame) (n int, err error) {
	n, err = tx.eng.send(frames)
	for err == errUncut {
		if err = tx.cut(&frames[n]); err != nil {
			break
		}
		k := 0
		k, err = tx.eng.send(frames[n+1:])
		n += 1 + k
	}
	return n, err
}

// cut sends a frame in pieces, as many as there is room for, and takes it over with the
// last one.
func (tx *TX) cut(f *Frame) error {
	c := &tx.cuts
	if !c.begin(f) {
		return ErrOffload
	}
	for c.Left() > 0 {
		done := c.Done()
		err := tx.cutSome(f)
		if c.Done() == done && err == nil {
			err = ErrFull
		}
		if err != nil {
			return err
		}
	}
	c.frame, c.done = arena.Buffer{}, 0
	return f.Release()
}

// begin makes c cut f, or go on.
func (c *cutting) begin(f *Frame) bool {
	cut, ok := f.gso.cut()
	if !ok || !c.Init(f.Bytes(), int(f.total), cut) {
		return false
	}
	headers := fnv(f.total, f.Bytes()[:c.HeaderLen()])
	if c.done != 0 && c.frame == f.buf && c.headers == headers {
		c.Skip(c.done)
	} else {
		c.frame, c.headers, c.done = f.buf, headers, 0
	}
	return true
}

// cutSome sends as many pieces as there is room for, and a few at the most.
func (tx *TX) cutSome(f *Frame) error {
	c := &tx.cuts
	bufs := buffersFor(c.Len())
	if ok, err := tx.eng.room(need{slots: bufs, bufs: bufs}); err != nil || !ok {
		if !ok && err == nil {
			tx.count.Add(telemetry.RingFull, 1)
			err = ErrFull
		}
		return err
	}
	slots, err := tx.eng.avail()
	if err != nil {
		return err
	}
	k, err := tx.eng.alloc(c.pieces[:min(c.Left(), len(c.pieces), slots/bufs)], c.Len())
	if err != nil {
		return err
	}
	var srcs [mostPieces][]byte
	var parts [1 + mostPieces][]byte
	all := f.gather(srcs[:0])
	for i := range c.pieces[:k] {
		g := &c.pieces[i]
		g.Truncate(c.Len())
		head, payload := c.Next(all, parts[:1])
		payload[0] = head
		g.CopyFrom(payload...)
		g.csum = ChecksumVerified
	}
	n, err := tx.eng.send(c.pieces[:k])
	for i := n; i < k; i++ {
		c.pieces[i].Release()
	}
	if n < k {
		c.begin(f)
		c.Skip(n * int(f.gso.Size))
	}
	c.done = c.Done()
	tx.counted(n) // or an event that brought room for a part would seem to have brought none
	return err
}

// wants is what sending f takes: whole, or its next piece.
func (tx *TX) wants(f *Frame) need {
	if tx.eng.offers().fit(f) == uncut && tx.cuts.begin(f) {
		bufs := buffersFor(tx.cuts.Len())
		return need{slots: bufs, bufs: bufs}
	}
	return tx.eng.wants(f)
}

// SendWait is Send that waits until every frame is taken, the deadline passes
// (os.ErrDeadlineExceeded), or the device is disconnected. While the link is down
// it waits for it to come back. [ErrNoBuffers] if a frame has to be copied or cut and
// the caller holds what that takes.
func (tx *TX) SendWait(frames []Frame) (n int, err error) {
	for n < len(frames) {
		if err := tx.enter(); err != nil {
			if err = tx.retry(err); err != nil {
				return n, err
			}
			continue
		}
		k, err := tx.put(frames[n:])
		n += k
		tx.counted(k)
		if err != ErrFull {
			return n, tx.leaveWith(err)
		}
		if err = tx.wait(tx.wants(&frames[n])); err != nil {
			return n, err
		}
	}
	if n == 0 {
		return 0, tx.dev.over()
	}
	return n, nil
}

// wait leaves the gate after there may be what is needed.
func (tx *TX) wait(n need) error {
	err := tx.eng.stuck(n)
	if err != nil {
		return tx.leaveWith(err)
	}
	more := tx.spin.found(&tx.half, tx.eng, n.slots)
	if !more {
		more, err = tx.eng.arm(n)
	}
	switch {
	case err != nil:
	case !more:
		err = tx.rest()
	case tx.expired():
		err = errTimeout
	}
	if v := tx.eng.rested(); v != nil {
		err = v
	}
	return tx.leaveWith(err)
}

// settle takes the responses of a half that no caller uses just now. The slow tick does
// so, lest a ring whose last requests are all answered be shown as full.
func (tx *TX) settle(eng sender) error {
	if !tx.gate.state.CompareAndSwap(gateOpen, gateReading) {
		return nil
	}
	defer tx.gate.state.Store(gateOpen)
	err := eng.settle()
	tx.count.Publish()
	return err
}

// leaveWith leaves the gate; a violation of the peer's ends the device.
func (tx *TX) leaveWith(err error) error {
	tx.gate.leave()
	return tx.dev.judge(err)
}

// SetDeadline is when waiting calls give up; the zero Time is never. It holds for
// calls under way too, and may be called from any goroutine.
func (tx *TX) SetDeadline(t time.Time) { tx.setDeadline(t) }

// slots is how many pieces of the frame hold bytes: what it takes in a ring when
// it is sent where it lies. It is 0 if the pieces do not add up to the frame:
// another copy of the value was cut.
func (f *Frame) slots() int {
	if f.pieces <= 1 {
		if f.total != uint32(f.n) {
			return 0
		}
		return 1
	}
	used, sum := 1, uint32(f.n)
	for p, ok := f.buf.Next(); ok; p, ok = f.buf.After(p) {
		if p.Len > 0 {
			used++
			sum += uint32(p.Len)
		}
	}
	if sum != f.total {
		return 0
	}
	return used
}
