// Package shm is the only code that points at memory another domain can write.
//
// Such memory has three views. An [In] is a word that the peer writes and we only load.
// An [Out] is a word that we write and never read back. [Slots] are fixed records of
// 32-bit words; a load copies a whole record into a private value, one atomic load per
// word. The types enforce the two rules behind the advisories on shared rings: load a
// word once, and never trust memory to hold the value we wrote.
//
// No pointer into a slot leaves the package. The bytes of frames do, as slices of a page:
// copy from them with a length that is private, then check the copy.
//
// With -tags shmdebug a second load of a word in one slot generation panics, and [Tamper]
// can change the result of every load.
package shm

import (
	"errors"
	"fmt"
)

// PageSize is the page size of the ring protocol in bytes: 4096 on every architecture and
// for every kernel page size (xen/include/public/io/ring.h).
const PageSize = 4096

// A Memory is a run of whole pages. The zero Memory holds none. A Memory does not own its
// pages: their maker decides when they go.
type Memory struct {
	b []byte
}

// ErrMisaligned is returned by [New] for memory that is not a number of whole pages,
// aligned to 8 bytes.
var ErrMisaligned = errors.New("shm: memory is not a whole number of aligned pages")

// New returns a Memory of b, whose length must be a multiple of [PageSize] and whose
// first byte must be aligned to 8. b is lent for as long as the Memory is used.
func New(b []byte) (Memory, error) {
	if len(b)%PageSize != 0 || !aligned(b, 8) {
		return Memory{}, ErrMisaligned
	}
	return Memory{b: b[:len(b):len(b)]}, nil
}

// Heap makes n zeroed pages on the Go heap, aligned to [PageSize]. The race detector
// watches heap memory, but not mapped memory.
func Heap(n int) Memory {
	b := make([]byte, (n+1)*PageSize)
	off := int((PageSize - address(b)%PageSize) % PageSize)
	return Memory{b: b[off : off+n*PageSize : off+n*PageSize]}
}

// Pages returns the number of pages.
func (m Memory) Pages() int { return len(m.b) / PageSize }

// Bytes returns all of the memory. The peer may write it at any time.
func (m Memory) Bytes() []byte { return m.b }

// Page returns page i. It panics if there is no such page: page numbers come from us,
// never from the peer.
func (m Memory) Page(i int) []byte {
	return m.b[i*PageSize : (i+1)*PageSize : (i+1)*PageSize]
}

// Slice returns n pages from page i on.
func (m Memory) Slice(i, n int) Memory {
	return Memory{b: m.b[i*PageSize : (i+n)*PageSize : (i+n)*PageSize]}
}

// check panics unless n bytes at off lie in m and off is a multiple of 4.
// Offsets are constants of a layout, so a failure is a bug of ours.
func (m Memory) check(off, n int) {
	if off%4 != 0 || off+n > len(m.b) { // the callers index b, which panics on a negative offset
		panic(fmt.Sprintf("shm: %d bytes at %d of %d", n, off, len(m.b)))
	}
}
