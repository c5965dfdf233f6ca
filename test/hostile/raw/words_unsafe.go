package raw

import (
	"sync/atomic"
	"unsafe"
)

// word is the word at byte off of b, which the bounds check has seen to lie in b;
// shared pages are aligned, so that a multiple of 4 is an aligned word.
func word(b []byte, off int) *atomic.Uint32 {
	w := b[off : off+4]
	if off%4 != 0 {
		panic("raw: misaligned word")
	}
	return (*atomic.Uint32)(unsafe.Pointer(unsafe.SliceData(w)))
}
