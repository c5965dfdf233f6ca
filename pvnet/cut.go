package pvnet

import (
	"barevif/arena"
	"barevif/pvnet/packet"
	"barevif/telemetry"
)

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

// cut sends a frame in as many pieces as there is room for, and takes it over with the
// last piece.
func (tx *TX) cut(f *Frame) error {
	c := &tx.cutting
	if !c.start(f) {
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

// start prepares c to cut f, from the start or from where it stopped.
func (c *cutting) start(f *Frame) bool {
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
	c := &tx.cutting
	bufs := buffersFor(c.Len())
	each := bufs + tx.eng.pieceExtras(f) // slots
	if ok, err := tx.eng.hasSpace(space{slots: each, bufs: bufs}); err != nil || !ok {
		if !ok && err == nil {
			tx.count.Add(telemetry.RingFull, 1)
			err = ErrFull
		}
		return err
	}
	slots, err := tx.eng.freeSlots()
	if err != nil {
		return err
	}
	k, err := tx.eng.alloc(c.pieces[:min(c.Left(), len(c.pieces), slots/each)], c.Len())
	if err != nil {
		return err
	}
	var srcs [maxPieces][]byte
	var parts [1 + maxPieces][]byte
	all := f.gather(srcs[:0])
	for i := range c.pieces[:k] {
		g := &c.pieces[i]
		g.Truncate(c.Len())
		head, payload := c.Next(all, parts[:1])
		payload[0] = head
		g.CopyFrom(payload...)
		g.csum = ChecksumVerified
		g.copyHash(f)
	}
	n, err := tx.push(c.pieces[:k])
	for i := n; i < k; i++ {
		c.pieces[i].Release()
	}
	if n < k {
		c.start(f)
		c.Skip(n * int(f.gso.Size))
	}
	c.done = c.Done()
	tx.countMoved(n) // else an event that made room for a part would count as spurious
	return err
}
