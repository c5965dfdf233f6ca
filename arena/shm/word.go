package shm

import (
	"sync/atomic"
	"unsafe"
)

// address returns the address of the first byte of b.
func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

func aligned(b []byte, n uintptr) bool { return address(b)%n == 0 }

// word returns the aligned word at off; check has made sure that it lies in m.
func (m Memory) word(off int) *atomic.Uint32 {
	m.check(off, 4)
	return (*atomic.Uint32)(unsafe.Pointer(&m.b[off]))
}

// load loads a shared word. All loads of the package go through it, so that builds with
// -tags shmdebug observe every one.
func load(w *atomic.Uint32) uint32 { return observe(w.Load()) }

// In is a word that only the peer writes.
type In struct{ w *atomic.Uint32 }

// In returns the word at byte off, for loads. off must be a multiple of 4.
func (m Memory) In(off int) In { return In{m.word(off)} }

// Load loads the word once. Go's atomics are sequentially consistent: the stores that the
// peer made before this word are visible afterwards (a load barrier), and the load does
// not pass an earlier [Out.Store] of ours (a full barrier).
func (w In) Load() uint32 { return load(w.w) }

// Out is a word that only we write. It cannot be read back.
type Out struct{ w *atomic.Uint32 }

// Out returns the word at byte off, for stores. off must be a multiple of 4.
func (m Memory) Out(off int) Out { return Out{m.word(off)} }

// Store stores the word after all earlier stores and before any later [In.Load].
func (w Out) Store(v uint32) { w.w.Store(v) }
