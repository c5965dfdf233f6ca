package pvnet

import (
	"iter"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/pvnet/netif"
	"barevif/pvnet/packet"
)

// Limits of a frame in bytes, Ethernet header included, FCS not.
const (
	MinFrame = netif.MinFrame  // an Ethernet header; every peer refuses shorter frames
	MaxFrame = netif.MaxTxSize // 65535
)

// A Frame is one Ethernet frame in pages of a device. It is a value, of which only one
// copy may be used at a time. Its bytes are one piece in the common case, otherwise a
// chain of up to 19.
//
// The holder of a Frame may read it, and may write it if nobody else retained it. A call
// that takes a frame over makes every copy of the value stale: batch calls refuse stale
// frames with [ErrStale], and Bytes panics.
type Frame struct {
	buf    arena.Buffer
	total  uint32 // bytes of all pieces
	off, n uint16 // the first piece
	csum   Checksum
	pieces uint8
	gso    GSO
}

// Checksum is the state of a frame's TCP or UDP checksum.
type Checksum uint8

const (
	// ChecksumUnknown is a complete checksum that nobody has verified.
	ChecksumUnknown Checksum = iota
	// ChecksumVerified is a complete checksum that the peer says it verified.
	ChecksumVerified
	// ChecksumPartial is a checksum field that holds only the sum of the pseudo-header.
	// The checksum must be completed before the frame leaves the host. It is received
	// only with Config.Offload.
	ChecksumPartial
)

// Len returns the number of bytes in the frame.
func (f *Frame) Len() int { return int(f.total) }

// Single reports whether all bytes are in one piece.
func (f *Frame) Single() bool { return f.pieces <= 1 }

// Checksum returns the state of the L4 checksum.
func (f *Frame) Checksum() Checksum { return f.csum }

// Valid reports whether the frame is still held.
func (f *Frame) Valid() bool { return f.buf.Valid() }

// Bytes returns the first piece: the whole frame if it is [Frame.Single]. It panics if
// the frame is stale.
func (f *Frame) Bytes() []byte {
	return f.buf.Bytes()[f.off : f.off+f.n : f.off+f.n]
}

// Pieces yields the frame's bytes in order, piece by piece. It does not allocate. It
// panics if the frame is stale.
func (f *Frame) Pieces() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		if !yield(f.Bytes()) || f.pieces <= 1 {
			return
		}
		for p, ok := f.buf.Next(); ok; p, ok = f.buf.After(p) {
			if !yield(f.buf.PieceBytes(p)[p.Off : p.Off+p.Len : p.Off+p.Len]) {
				return
			}
		}
	}
}

// CopyTo copies the frame to dst and returns how many bytes it copied: the shorter of the
// two lengths.
func (f *Frame) CopyTo(dst []byte) int {
	if f.pieces <= 1 {
		return copy(dst, f.Bytes())
	}
	n := 0
	for p := range f.Pieces() {
		n += copy(dst[n:], p)
	}
	return n
}

// CopyFrom overwrites the frame from its first byte with the bytes of srcs, one slice
// after the other, and returns how many bytes it copied. The length of the frame does not
// change.
func (f *Frame) CopyFrom(srcs ...[]byte) int {
	n := 0
	var src []byte
	for dst := range f.Pieces() {
		for len(dst) > 0 {
			for len(src) == 0 {
				if len(srcs) == 0 {
					return n
				}
				src, srcs = srcs[0], srcs[1:]
			}
			k := copy(dst, src)
			dst, src, n = dst[k:], src[k:], n+k
		}
	}
	return n
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
	f.csum, f.gso = ChecksumUnknown, GSO{}
	return f.Bytes()
}

// copyFrame overwrites f with the bytes and the offload state of g, which is not longer
// than f.
func (f *Frame) copyFrame(g *Frame) {
	f.csum, f.gso = g.csum, g.gso
	if g.pieces <= 1 {
		f.CopyFrom(g.Bytes())
		return
	}
	var srcs [mostPieces][]byte
	f.CopyFrom(g.gather(srcs[:0])...)
}

// Headroom returns how many bytes Prepend can add.
func (f *Frame) Headroom() int { return int(f.off) }

// Prepend makes the frame n bytes longer at the front and returns the new bytes, which
// are not cleared. It returns nil if the headroom is less than n.
func (f *Frame) Prepend(n int) []byte {
	if n < 0 || n > int(f.off) || int(f.total)+n > MaxFrame {
		return nil
	}
	f.off -= uint16(n)
	f.n += uint16(n)
	f.total += uint32(n)
	return f.Bytes()[:n:n]
}

// TrimFront removes n bytes from the front. They must lie in the first piece, else it
// reports false and changes nothing.
func (f *Frame) TrimFront(n int) bool {
	if n < 0 || n > int(f.n) {
		return false
	}
	f.off += uint16(n)
	f.n -= uint16(n)
	f.total -= uint32(n)
	return true
}

// Tailroom returns how many bytes Append can add after the last piece.
func (f *Frame) Tailroom() int {
	if f.pieces <= 1 {
		return min(f.buf.Size()-int(f.off)-int(f.n), MaxFrame-int(f.total))
	}
	last := f.last()
	return min(f.buf.Size()-int(last.Off)-int(last.Len), MaxFrame-int(f.total))
}

// Append adds as much of b to the end of the frame as there is tailroom for and returns
// how many bytes it copied.
func (f *Frame) Append(b []byte) int { return copy(f.Extend(min(len(b), f.Tailroom())), b) }

// Extend makes the frame n bytes longer at the end and returns the new bytes, which are
// not cleared. It returns nil if the tailroom is less than n, or for a chain with more
// than one holder.
func (f *Frame) Extend(n int) []byte {
	if n < 0 || n > f.Tailroom() || f.pieces > 1 && f.buf.Valid() && !f.buf.Exclusive() {
		return nil
	}
	f.total += uint32(n)
	if f.pieces <= 1 {
		f.n += uint16(n)
		return f.Bytes()[int(f.n)-n:]
	}
	last := f.last()
	end := int(last.Off) + int(last.Len)
	f.buf.Resize(last, last.Off, last.Len+uint16(n))
	return f.buf.PieceBytes(last)[end : end+n : end+n]
}

// Truncate cuts the frame to its first n bytes. It reports false, and changes nothing, if
// the frame is shorter or a chain with more than one holder.
func (f *Frame) Truncate(n int) bool {
	if n < 0 || n > int(f.total) || f.pieces > 1 && !f.buf.Exclusive() {
		return false
	}
	f.total = uint32(n)
	if f.pieces <= 1 || n <= int(f.n) {
		f.n = uint16(min(n, int(f.n)))
	}
	left := n - int(f.n)
	if f.pieces > 1 {
		for p, ok := f.buf.Next(); ok; p, ok = f.buf.After(p) {
			k := min(left, int(p.Len))
			f.buf.Resize(p, p.Off, uint16(k))
			left -= k
		}
	}
	return true
}

func (f *Frame) last() arena.Piece {
	last, _ := f.buf.Next()
	for p, ok := f.buf.After(last); ok; p, ok = f.buf.After(p) {
		last = p
	}
	return last
}

// Retain adds a holder: the frame must be released, or sent, once more. With more than
// one holder, nobody may write the bytes. [ErrStale].
func (f *Frame) Retain() error { return f.buf.Retain() }

// Release gives the frame back to its device. It may be called from any goroutine; for
// the owner, [RX.Release] is faster. [ErrStale].
func (f *Frame) Release() error { return f.buf.Release() }

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
		f.total, f.csum, f.gso, f.pieces = uint32(total), ChecksumUnknown, GSO{}, 1
		f.off, f.n = uint16(min(headroom, size-total)), uint16(total)
		return true
	}
	var bufs [maxPieces]uint32
	n := (headroom + total + size - 1) / size
	if n > maxPieces {
		return false
	}
	if got := a.Get(bufs[:n]); got < n {
		a.Put(bufs[:got]...)
		return false
	}
	first := size - headroom
	left := total - first
	for i := 1; i < n; i++ {
		k := min(left, size)
		a.Link(bufs[i-1], bufs[i], 0, uint16(k))
		left -= k
	}
	*f = Frame{buf: a.Buffer(bufs[0]), total: uint32(total), off: headroom, n: uint16(first), pieces: uint8(n)}
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
	f.csum, f.pieces, f.gso = ChecksumUnknown, 1, GSO{}
}

// plain reports whether the frame takes exactly one slot and no extra info, as the fast
// paths of all four engines require. It does not check whether the frame is stale.
func (f *Frame) plain() bool {
	return f.pieces == 1 && f.csum != ChecksumPartial && f.gso.Size == 0 &&
		f.total == uint32(f.n) && f.total >= MinFrame
}

// maxPieces is how many page-sized buffers MaxFrame bytes behind the headroom take.
const maxPieces = (headroom + MaxFrame + shm.PageSize - 1) / shm.PageSize

// mostPieces bounds the pieces of any frame. A lent frame has the pieces that the peer
// made.
const mostPieces = max(maxPieces, maxRxSlots)
