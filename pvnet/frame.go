package pvnet

import (
	"iter"

	"barevif/arena"
	"barevif/pvnet/netif"
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
	hash   uint8 // see hashType
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

// ReadOnly reports whether nobody may write the frame's bytes, not even its only holder: a
// backend lends pages that its frontend granted read-only ([Config].LendRx). A write is a
// memory fault.
func (f *Frame) ReadOnly() bool { return f.buf.ReadOnly() }

// Headroom returns how many bytes Prepend can add: none to a frame that is read-only.
func (f *Frame) Headroom() int {
	if f.buf.ReadOnly() {
		return 0
	}
	return int(f.off)
}

// Prepend makes the frame n bytes longer at the front and returns the new bytes, which
// are not cleared. It returns nil if the headroom is less than n.
func (f *Frame) Prepend(n int) []byte {
	if n < 0 || n > f.Headroom() || int(f.total)+n > MaxFrame {
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

// Tailroom returns how many bytes Append can add after the last piece: none to a frame
// that is read-only.
func (f *Frame) Tailroom() int {
	if f.buf.ReadOnly() {
		return 0
	}
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
