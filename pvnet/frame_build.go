package pvnet

import (
	"barevif/arena"
	"barevif/arena/shm"
	"barevif/pvnet/packet"
)

// gather appends the frame's pieces to bufs.
func (f *Frame) gather(bufs [][]byte) [][]byte {
	for p := range f.Pieces() {
		bufs = append(bufs, p)
	}
	return bufs
}

// reset makes the frame total bytes long, from where it begins, without a checksum state.
// All headers must fit its first piece. ErrStale, ErrShared, ErrShortFrame.
func (f *Frame) reset(total uint32) error {
	if !f.buf.Exclusive() {
		if f.buf.Valid() {
			return ErrShared
		}
		return ErrStale
	}
	size := uint32(f.buf.Size())
	room := size - uint32(f.off)
	if f.pieces > 1 {
		for p, ok := f.buf.Next(); ok; p, ok = f.buf.After(p) {
			room += size - uint32(p.Off)
		}
	}
	if room < total || size-uint32(f.off) < min(total, packet.MaxHeaders) {
		return ErrShortFrame
	}
	*f = Frame{buf: f.buf, off: f.off, pieces: f.pieces, total: total}
	f.n = uint16(min(total, size-uint32(f.off)))
	if f.pieces > 1 {
		left := total - uint32(f.n)
		for p, ok := f.buf.Next(); ok; p, ok = f.buf.After(p) {
			k := min(left, size-uint32(p.Off))
			f.buf.Resize(p, p.Off, uint16(k))
			left -= k
		}
	}
	return nil
}

// refill is reset for the fast paths: if n bytes fit the frame's one buffer, and the
// caller alone holds it, it makes the frame n bytes long and returns the bytes. Otherwise
// it returns nil and changes nothing; reset then says why.
func (f *Frame) refill(n uint16) []byte {
	if f.pieces != 1 || !f.buf.Exclusive() || int(f.off)+int(n) > f.buf.Size() {
		return nil
	}
	f.total, f.n = uint32(n), n
	f.csum, f.gso, f.hash = ChecksumUnknown, GSO{}, 0
	return f.Bytes()
}

// copyFrame overwrites f with the bytes and the offload state of g, which is not longer
// than f.
func (f *Frame) copyFrame(g *Frame) {
	f.csum, f.gso = g.csum, g.gso
	f.copyHash(g)
	if g.pieces <= 1 {
		f.CopyFrom(g.Bytes())
		return
	}
	var srcs [maxPieces][]byte
	f.CopyFrom(g.gather(srcs[:0])...)
}

// headroom is how many bytes Alloc and Receive leave free before a frame, or less where
// the frame then fits one piece: room for a tunnel's headers (an outer IPv6 and UDP, and
// 80 bytes more), a multiple of a cache line.
const headroom = 128

// build makes a frame of total bytes behind the headroom, from buffers of a. It reports
// false, and takes none, if there are too few.
func build(a *arena.Arena, total int, f *Frame) bool {
	size := a.Size()
	if total <= size { // one piece, with as much of the headroom as fits
		var one [1]uint32
		if a.Get(one[:]) == 0 {
			return false
		}
		f.buf = a.Buffer(one[0])
		f.total, f.csum, f.gso, f.hash, f.pieces = uint32(total), ChecksumUnknown, GSO{}, 0, 1
		f.off, f.n = uint16(min(headroom, size-total)), uint16(total)
		return true
	}
	if total > MaxFrame {
		return false
	}
	var l packer
	l.begin(uint32(total), maxFrameBuffers, uint32(size-headroom), 1)
	l.add(uint32(total))
	return buildPacked(a, &l, f)
}

// buildPacked makes a frame of more than one buffer, whose pieces are as long as l says,
// behind the headroom. It reports false, and takes none, if a has too few.
func buildPacked(a *arena.Arena, l *packer, f *Frame) bool {
	var bufs [maxFrameBuffers]uint32
	n := l.pages()
	if got := a.Get(bufs[:n]); got < n {
		a.Put(bufs[:got]...)
		return false
	}
	total := uint32(l.sizes[0])
	for i := 1; i < n; i++ {
		a.Link(bufs[i-1], bufs[i], 0, l.sizes[i])
		total += uint32(l.sizes[i])
	}
	*f = Frame{buf: a.Buffer(bufs[0]), total: total, off: headroom, n: l.sizes[0], pieces: uint8(n)}
	return true
}

// buildAll builds as many frames as there are buffers for and returns how many. Frames of
// one buffer, the usual ones, come off the arena's stack many at a time.
func buildAll(a *arena.Arena, total int, frames []Frame) (n int) {
	if total > a.Size() {
		for n < len(frames) && build(a, total, &frames[n]) {
			n++
		}
		return n
	}
	off := uint16(min(headroom, a.Size()-total))
	for n < len(frames) {
		var bufs [32]uint32
		k := a.Get(bufs[:min(len(frames)-n, len(bufs))])
		for i, b := range bufs[:k] {
			frames[n+i].single(a.Buffer(b), off, uint16(total))
		}
		if n += k; k < len(bufs) {
			break
		}
	}
	return n
}

// single makes f the n bytes at off of one buffer. It stores field by field: a literal
// would be built elsewhere first, and be read back before its stores have settled.
func (f *Frame) single(buf arena.Buffer, off, n uint16) {
	f.buf = buf
	f.total, f.off, f.n = uint32(n), off, n
	f.csum, f.pieces, f.gso, f.hash = ChecksumUnknown, 1, GSO{}, 0
}

// plain reports whether the frame takes exactly one slot and no extra info, as the fast
// paths of all four engines require. It does not check whether the frame is stale.
func (f *Frame) plain() bool {
	return f.pieces == 1 && f.csum != ChecksumPartial && f.gso.Size == 0 &&
		f.total == uint32(f.n) && f.total >= MinFrame
}

// maxFrameBuffers is how many buffers of 4096 bytes MaxFrame bytes behind the headroom take.
const maxFrameBuffers = (headroom + MaxFrame + shm.PageSize - 1) / shm.PageSize

// maxPieces bounds the pieces of any frame. A lent frame has the pieces that the peer
// made.
const maxPieces = max(maxFrameBuffers, maxRxSlots)

// buffersFor returns how many buffers build takes for size bytes.
func buffersFor(size int) int {
	if size <= shm.PageSize {
		return 1
	}
	return (headroom + size + shm.PageSize - 1) / shm.PageSize
}

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

// pages returns how many pages of the peer the frame fills.
func (f *Frame) pages() int { return int(f.total+shm.PageSize-1) / shm.PageSize }

// buffer makes f size bytes in buffer i of a, which it had no frame in, and returns them.
func (f *Frame) buffer(a *arena.Arena, i uint32, size uint16) []byte {
	off := min(headroom, shm.PageSize-size)
	f.single(a.Buffer(i), off, size)
	return a.Bytes(i)[off : off+size]
}
