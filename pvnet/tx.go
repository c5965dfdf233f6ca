package pvnet

import (
	"cmp"
	"time"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/pvnet/packet"
	"barevif/telemetry"
)

// A TX is the sending half of a queue. It has one owner at a time: no two goroutines may
// call its methods at once, except SetDeadline.
type TX struct {
	half
	eng   sender       // of the connection; written by the life goroutine while the gate is shut
	stall stall        // life goroutine and slow tick only
	cuts  cutting      // inside the gate
	mine  [batch]Frame // the frames of Write; guarded by mu
}

// A cutting is the state of a GSO frame that is being cut.
type cutting struct {
	packet.Cutter
	pieces [32]Frame // some of the frames that it is cut into

	// A frame that was sent in part, for lack of room. If the caller sends it again
	// unchanged, the cutting continues where it stopped.
	frame   arena.Buffer
	headers uint32 // a hash of the frame's headers
	done    int    // bytes of its payload already sent; 0: no such frame
}

// A sender moves frames into one connection's ring.
type sender interface {
	// alloc makes frames of size bytes and returns how many there was room for.
	alloc(frames []Frame, size int) (int, error)

	// send takes over frames[:n], where n is the result.
	send(frames []Frame) (int, error)

	// wants returns what it takes to send f.
	wants(f *Frame) need

	// offers returns the offloads that the peer takes.
	offers() offers

	// avail returns how many slots of the ring are free.
	avail() (int, error)

	// room reports whether n is there.
	room(n need) (bool, error)

	// stuck returns ErrNoBuffers if only the caller can free the buffers of n.
	stuck(n need) error

	// arm asks the peer for an event when n is there, and reports whether it already is.
	arm(n need) (more bool, err error)

	// rested is called after a wait; it may take responses, to time one.
	rested() error

	// answered reports whether any slot came from the peer since arm. The watchdog calls
	// it while the owner waits.
	answered() bool

	// settle takes the responses that are in the ring and updates the ring's gauges. The
	// slow tick calls it while no caller is inside the gate.
	settle() error

	// standing returns the peer's index, the index it must reach for the call that last
	// found no room, and how many calls found no room. The slow tick calls it.
	standing() (index, goal, tries uint32)

	engine
}

// A need is what a call to the sending half lacks or waits for.
type need struct{ slots, bufs int }

// buffersFor returns how many buffers build takes for size bytes.
func buffersFor(size int) int {
	if size <= shm.PageSize {
		return 1
	}
	return (headroom + size + shm.PageSize - 1) / shm.PageSize
}

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
		tx.refresh()
		tx.lacks(func() need { return need{bufs: buffersFor(size)} })
	}
	tx.leaveWith(err)
	return n
}

// AllocWait is AllocSize, but it waits for at least one frame. It returns the errors of
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
	n, err = tx.put(frames)
	tx.counted(n)
	if err == ErrFull {
		tx.refresh()
		tx.lacks(func() need { return tx.wants(&frames[n]) })
	}
	return n, tx.leaveWith(err)
}

// lacks tells the half's Poller, if it is in one, to report the half once n is there.
func (tx *TX) lacks(n func() need) {
	if m := tx.member.Load(); m != nil {
		m.want(n())
	}
}

// put sends as many frames as there is room for, and cuts those whose GSO the peer does
// not take.
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

// cut sends a frame in as many pieces as there is room for, and takes it over with the
// last piece.
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

// begin prepares c to cut f, from the start or from where it stopped.
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

// cutSome sends the next pieces: as many as there is room for, but at most len(c.pieces).
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
	tx.counted(n) // else an event that made room for a part would count as spurious
	return err
}

// wants returns what it takes to send f, or its next piece if it has to be cut.
func (tx *TX) wants(f *Frame) need {
	if tx.eng.offers().fit(f) == uncut && tx.cuts.begin(f) {
		bufs := buffersFor(tx.cuts.Len())
		return need{slots: bufs, bufs: bufs}
	}
	return tx.eng.wants(f)
}

// SendWait is Send, but it waits until it has taken every frame, the deadline passes
// (os.ErrDeadlineExceeded), or the device is disconnected. While the link is down it
// waits for the link. [ErrNoBuffers] if a frame must be copied or cut and the caller
// holds the buffers for that.
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

// wait waits inside the gate until n may be there, and leaves the gate.
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

// settle takes the responses of a half that no caller uses now. Without it, a ring whose
// last requests are all answered would be shown as full. The slow tick calls it.
func (tx *TX) settle(eng sender) error {
	if !tx.gate.state.CompareAndSwap(gateOpen, gateReading) {
		return nil
	}
	defer tx.gate.state.Store(gateOpen)
	err := eng.settle()
	tx.count.Publish()
	return err
}

// leaveWith leaves the gate and returns the error of the call; a violation ends the
// device.
func (tx *TX) leaveWith(err error) error {
	tx.gate.leave()
	return tx.dev.judge(err)
}

// SetDeadline sets when waiting calls give up, those under way included; the zero Time
// means never. Any goroutine may call it.
func (tx *TX) SetDeadline(t time.Time) { tx.setDeadline(t) }

// slots returns how many pieces of the frame hold bytes, which is how many slots it takes
// if it is sent without a copy. It is 0 if the pieces do not add up to the length: then
// another copy of the Frame was cut.
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
