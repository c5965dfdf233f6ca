package shm

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// Slots is an array of records with stride bytes from one to the next, as in a ring page.
// T must consist of 32-bit words: a size that is a multiple of 4, and no pointers. stride
// may be larger than T where two record types share the slots.
type Slots[T any] struct {
	base   unsafe.Pointer // n strides of memory, as NewSlots checked
	mask   uint32
	stride uint32
	debug  slotDebug
}

// NewSlots views n records from byte off of m. n must be a power of two. It panics if
// they do not fit: the layout comes from us, never from the peer.
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

// maxWords bounds a record: the largest in the netif and control rings has 4 words.
const maxWords = 8

// Len returns the number of slots.
func (s *Slots[T]) Len() uint32 { return s.mask + 1 }

// Load returns a private copy of slot i.
func (s *Slots[T]) Load(i uint32) (v T) {
	s.Fetch(i, &v)
	return v
}

// Fetch copies slot i to v, with one 32-bit load per word; unlike Load it does not copy
// the result once more. i is a free-running index: it is masked here, and NewSlots
// checked that base holds n strides.
func (s *Slots[T]) Fetch(i uint32, v *T) {
	p := unsafe.Add(s.base, uintptr(i&s.mask)*uintptr(s.stride))
	q := unsafe.Pointer(v)
	var size T
	for w := uintptr(0); w < unsafe.Sizeof(size); w += 4 {
		s.debug.load(i, (i&s.mask)*s.stride/4+uint32(w/4))
		*(*uint32)(unsafe.Add(q, w)) = load((*atomic.Uint32)(unsafe.Add(p, w)))
	}
}

// Store writes slot i with plain stores. The peer sees them when the producer index, an
// [Out], is stored afterwards.
func (s *Slots[T]) Store(i uint32, v T) {
	p := unsafe.Add(s.base, uintptr(i&s.mask)*uintptr(s.stride))
	*(*T)(p) = v
}
