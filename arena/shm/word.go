package shm

import (
	"sync/atomic"
	"unsafe"
)

// address is where b begins.
func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

func aligned(b []byte, n uintptr) bool { return address(b)%n == 0 }

// word is the aligned word at off, which check has seen to lie in m.
func (m Memory) word(off int) *atomic.Uint32 {
	m.check(off, 4)
	return (*atomic.Uint32)(unsafe.Pointer(&m.b[off]))
}

// load loads a shared word. Every load of the package is this one, so that builds
// with -tags shmdebug see them all.
func load(w *atomic.Uint32) uint32 { return observe(w.Load()) }

// In is a word that only the peer writes.
type In struct{ w *atomic.Uint32 }

// In is the word at byte off, to be loaded. off must be a multiple of 4.
func (m Memory) In(off int) In { return In{m.word(off)} }

// Load reads the word once. Go's atomics are sequentially consistent, so what
// the peer stored before the word is visible after it (a load barrier), and the
// load does not pass an earlier [Out.Store] of ours (a full barrier).
func (w In) Load() uint32 { return load(w.w) }

// Out is a word that only we write. There is no way to read it back.
type Out struct{ w *atomic.Uint32 }

// Out is the word at byte off, to be stored. off must be a multiple of 4.
func (m Memory) Out(off int) Out { return Out{m.word(off)} }

// Store writes the word after everything stored before it, and before any later
// [In.Load].
func (w Out) Store(v uint32) { w.w.Store(v) }
