package pvnet

import (
	"barevif/arena/shm"
	"barevif/pvnet/packet"
)

// Write sends a copy of one frame and returns its length. It waits for room, and while
// the link is down, until the write deadline. It returns [ErrFrameSize], [ErrOwned] if
// every queue of the connection has an owner, [ErrNoBuffers] if only the caller can free
// the pages it needs, os.ErrDeadlineExceeded, [ErrDisconnected] or a [*PeerError].
func (d *Device) Write(frame []byte) (int, error) { return d.Writev(frame) }

// Writev is Write of one frame whose bytes are in several slices. The first should hold
// the headers: it alone decides which queue the frame takes.
func (d *Device) Writev(bufs ...[]byte) (int, error) {
	if err := d.endError(); err != nil { // before any other error
		return 0, err
	}
	size := 0
	for _, b := range bufs {
		size += len(b)
	}
	if size < MinFrame || size > MaxFrame {
		return 0, ErrFrameSize
	}
	tx, err := d.lockTX(d.queueFor(bufs[0], size))
	if err != nil {
		return 0, err
	}
	defer tx.mu.Unlock()
	frames := tx.frames[:1] // an array here would escape through the engine's interface
	if _, err := tx.AllocWait(frames, size); err != nil {
		return 0, err
	}
	frames[0].CopyFrom(bufs...)
	if _, err := tx.SendWait(frames); err != nil {
		frames[0].Release()
		return 0, err
	}
	tx.flush()
	return size, nil
}

// WriteBatch is Write of several frames, in order within a flow. It costs less than one
// Write each: up to 32 frames are published together, with one notification. It returns
// how many frames were sent; the error is about frames[n].
func (d *Device) WriteBatch(frames [][]byte) (n int, err error) {
	if err := d.endError(); err != nil {
		return 0, err
	}
	for n < len(frames) {
		size := len(frames[n])
		if size < MinFrame || size > MaxFrame {
			return n, ErrFrameSize
		}
		at := d.QueueFor(frames[n])
		run := 1
		for size <= shm.PageSize && run < min(len(frames)-n, callBatch) { // each fits one page, so they may differ in size
			next := frames[n+run]
			if len(next) < MinFrame || len(next) > shm.PageSize || d.QueueFor(next) != at {
				break
			}
			size = max(size, len(next))
			run++
		}
		tx, err := d.lockTX(at)
		if err != nil {
			return n, err
		}
		k, err := tx.write(frames[n:n+run], size)
		tx.mu.Unlock()
		if n += k; err != nil {
			return n, err
		}
	}
	return n, nil
}

// callBatch is how many frames the Device's own calls move at once.
const callBatch = 32

// write sends as many of frames as there are buffers for. No frame is longer than size
// bytes. The caller holds mu.
func (tx *TX) write(frames [][]byte, size int) (n int, err error) {
	mine := tx.frames[:len(frames)]
	k, err := tx.AllocWait(mine, size)
	if err != nil {
		return 0, err
	}
	for i := range mine[:k] {
		mine[i].Truncate(len(frames[i]))
		mine[i].CopyFrom(frames[i])
	}
	n, err = tx.SendWait(mine[:k])
	releaseAll(mine[n:k])
	tx.flush()
	return n, err
}

// QueueFor returns the queue, less than [Device.Active], on which Write sends a frame: the
// same one for all frames of a flow. A backend's device uses the hash and the table that
// its frontend has set. Who owns the sending halves of a backend should ask for each frame
// and send it there, as the frontend expects; a frame sent on another queue arrives all
// the same. [Device.Steerings] tells hash and table to those whose kernel chooses the queue.
// It takes no lock and does not allocate.
func (d *Device) QueueFor(frame []byte) int { return d.queueFor(frame, len(frame)) }

// QueueOf is QueueFor of a frame of this package, which may have several pieces.
func (d *Device) QueueOf(f *Frame) int { return d.queueFor(f.Bytes(), f.Len()) }

// queueFor returns the queue for a frame of total bytes that begins with head.
func (d *Device) queueFor(head []byte, total int) int {
	n := int(d.active.Load())
	if n < 2 {
		return 0
	}
	if s := d.steer.Load(); s != nil {
		return s.queue(head, total, n) % n // the settings may be of a connection with more queues
	}
	return int(flow(head) % uint32(n))
}

// lockTX returns the sending half of queue at with its mu locked, or that of another queue
// if this one has an owner.
func (d *Device) lockTX(at int) (*TX, error) {
	n := max(1, int(d.active.Load()))
	for i := range n {
		tx := d.tx[(at+i)%n]
		if tx.owned.Load() {
			continue
		}
		tx.mu.Lock()
		if !tx.owned.Load() {
			return tx, nil
		}
		tx.mu.Unlock()
	}
	return nil, ErrOwned
}

// flow returns a hash of the frame's addresses and ports, equal for all frames of one
// direction of a flow. Only the first fragment of a packet has ports, so those of
// fragments are left out.
func flow(head []byte) uint32 {
	h, ok := packet.Parse(head, MaxFrame)
	if !ok {
		return fnv(2166136261, head[:min(len(head), 12)])
	}
	sum := fnv(2166136261, h.Addresses(head))
	if (h.Proto == packet.TCP || h.Proto == packet.UDP) && h.Fragment == packet.Whole && h.L4 != 0 && len(head) >= h.L4+4 {
		sum = fnv(sum, head[h.L4:h.L4+4])
	}
	return sum
}

func fnv(h uint32, b []byte) uint32 {
	for _, c := range b {
		h = (h ^ uint32(c)) * 16777619
	}
	return h
}
