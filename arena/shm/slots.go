package shm

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// Slots is an array of records with stride bytes from one to the next, as a ring
// page holds it. T must be made of 32-bit words (its size a multiple of 4, no
// pointers in it); stride may be larger than T where two record types share the
// slots.
type Slots[T any] struct {
	base   unsafe.Pointer // of n strides, checked in NewSlots
	mask   uint32
	stride uint32
	debug  slotDebug
}

// NewSlots views n records from byte off of m. n must be a power of two. It
// panics if they do not fit: the layout is ours, never the peer's.
func NewSlots[T any](m Memory, off, n, stride int) Slots[T] {
	var v T
	if n <= 0 || n&(n-1) != 0 || stride%4 != 0 ||
		unsafe.Sizeof(v)%4 != 0 || unsafe.Sizeof(v) > maxWords*4 || int(unsafe.Sizeof(v)) > stride {
		panic(fmt.Sprintf("shm: %d slots of %d bytes for a %T", n, stride, v))
	}
	m.check(off, n*stride)
	return Slots[T]{
		base:   unsafe.Pointer(&m.b[off]),
		mask:   uint32(n - 1),
		stride: uint32(stride),
		debug:  newSlotDebug(n * stride / 4),
	}
}

// maxWords bounds a record: the largest of the netif and control rings has 4.
const maxWords = 8

// Len is the number of slots.
func (s *Slots[T]) Len() uint32 { return s.mask + 1 }

// Load copies slot i into private memory.
func (s *Slots[T]) Load(i uint32) (v T) {
	s.Fetch(i, &v)
	return v
}

// Fetch copies slot i to v, one 32-bit load a word, and spares the copies of a
// result. i is a free-running index; it is masked here, and base was checked to hold
// n strides.
func (s *Slots[T]) Fetch(i uint32, v *T) {
	p := unsafe.Add(s.base, uintptr(i&s.mask)*uintptr(s.stride))
	q := unsafe.Pointer(v)
	var size T
	for w := uintptr(0); w < unsafe.Sizeof(size); w += 4 {
		s.debug.load(i, (i&s.mask)*s.stride/4+uint32(w/4))
		*(*uint32)(unsafe.Add(q, w)) = load((*atomic.Uint32)(unsafe.Add(p, w)))
	}
}

// Store writes slot i. The stores are plain: the producer index, an [Out] that
// is stored after them, is what shows them to the peer.
func (s *Slots[T]) Store(i uint32, v T) {
	p := unsafe.Add(s.base, uintptr(i&s.mask)*uintptr(s.stride))
	*(*T)(p) = v
}
