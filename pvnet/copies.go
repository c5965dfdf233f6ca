package pvnet

import (
	"sync"

	"barevif/arena"
	"barevif/arena/shm"
)

// Copies is memory of this process for copies of frames, for one who has to keep a frame that a
// device lends ([Config].LendRx): a peer waits for the page of such a frame, and for nothing of its
// copy. Its methods may be called from any goroutine.
type Copies struct {
	mu    sync.Mutex
	arena *arena.Arena // guarded by mu: it has one owner at a time
}

// NewCopies makes room for copies in so many pages of 4096 bytes, at least one. A frame of at
// most 4096 bytes takes one page. A longer frame has 128 bytes of headroom, and takes as many
// pages as its bytes and the headroom fill.
func NewCopies(pages int) *Copies {
	return &Copies{arena: arena.New(shm.Heap(max(pages, 1)), shm.PageSize)}
}

// Replace makes *f a copy of itself and drops this holder of the frame: the copy has the same
// bytes, checksum state and GSO, no other holder, and may be written. It reports false, and changes
// nothing, if there are too few pages for the copy, or if f is stale. It does not allocate.
func (c *Copies) Replace(f *Frame) bool {
	if !f.Valid() {
		return false
	}
	var g Frame
	c.mu.Lock()
	ok := build(c.arena, f.Len(), &g)
	c.mu.Unlock()
	if !ok {
		return false
	}
	g.copyFrame(f)
	f.Release() // it was valid, and is held by the caller alone to release
	*f = g
	return true
}
