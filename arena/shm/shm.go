// Package shm is the only code that points at memory another domain can write.
//
// Such memory has three views. An [In] is a word the peer writes and we only
// load; an [Out] is a word we write and never read back; [Slots] are fixed
// records of 32-bit words, copied whole into a private value, one atomic load a
// word. The types keep the two rules every advisory of this field comes down
// to: fetch once, and never believe what we wrote to be what is there.
//
// No pointer into a slot leaves the package. Frame bytes do, as a slice of a
// page: copy from it with a length that is already private, then look at the
// copy.
//
// With -tags shmdebug a second load of a word of one slot generation panics, and
// [Tamper] can make every load return something else.
package shm

import (
	"errors"
	"fmt"
)

// PageSize is the page of the ring protocol in bytes: 4096 on every architecture
// and for every kernel page size (xen/include/public/io/ring.h).
const PageSize = 4096

// Memory is a run of whole pages. The zero Memory holds none. A Memory does not
// own its pages: whoever made them says when they go.
type Memory struct {
	b []byte
}

// ErrMisaligned is what [New] answers to memory that is not whole, 8-byte
// aligned pages.
var ErrMisaligned = errors.New("shm: memory is not a whole number of aligned pages")

// New makes a Memory of b, whose length must be a multiple of [PageSize] and
// whose first byte must be aligned to 8. b is lent for as long as the Memory is
// used.
func New(b []byte) (Memory, error) {
	if len(b)%PageSize != 0 || !aligned(b, 8) {
		return Memory{}, ErrMisaligned
	}
	return Memory{b: b[:len(b):len(b)]}, nil
}

// Heap makes n zeroed pages on the Go heap. The race detector sees these, and
// does not see mapped ones. Heap pages are aligned to [PageSize].
func Heap(n int) Memory {
	b := make([]byte, (n+1)*PageSize)
	off := int((PageSize - address(b)%PageSize) % PageSize)
	return Memory{b: b[off : off+n*PageSize : off+n*PageSize]}
}

// Pages is the number of pages.
func (m Memory) Pages() int { return len(m.b) / PageSize }

// Bytes is all of the memory. The peer may write it at any time.
func (m Memory) Bytes() []byte { return m.b }

// Page is page i. It panics if there is none: page numbers are ours, never the
// peer's.
func (m Memory) Page(i int) []byte {
	return m.b[i*PageSize : (i+1)*PageSize : (i+1)*PageSize]
}

// Slice is n pages from page i on.
func (m Memory) Slice(i, n int) Memory {
	return Memory{b: m.b[i*PageSize : (i+n)*PageSize : (i+n)*PageSize]}
}

// check panics unless n bytes at off lie in m and off is a multiple of 4.
// Offsets are constants of a layout, so a failure is a bug of ours.
func (m Memory) check(off, n int) {
	if off%4 != 0 || off+n > len(m.b) { // the index of b refuses what is below 0
		panic(fmt.Sprintf("shm: %d bytes at %d of %d", n, off, len(m.b)))
	}
}
