package raw

import (
	"sync/atomic"
	"unsafe"
)

// word returns the word at byte off of b. The bounds check makes sure that it lies in b.
// Shared pages are aligned, so a multiple of 4 is an aligned word.
func word(b []byte, off int) *atomic.Uint32 {
	w := b[off : off+4]
	if off%4 != 0 {
		panic("raw: misaligned word")
	}
	return (*atomic.Uint32)(unsafe.Pointer(unsafe.SliceData(w)))
}
