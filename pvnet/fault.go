package pvnet

import (
	"fmt"

	"barevif/arena"
)

// faultError judges the value of a recover: nil for nil, a violation for a fault on shared
// memory that was taken away. It panics again with any other value. A fault is any value that
// says its address, as those of Go's runtime after debug.SetPanicOnFault, or those of a port's
// own page fault handler (see Porting of package hypercall).
func faultError(r any) *PeerError {
	if r == nil {
		return nil
	}
	if f, ok := r.(interface{ Addr() uintptr }); ok {
		return &PeerError{Reason: fmt.Sprintf("shared memory is gone at %#x", f.Addr())}
	}
	panic(r)
}

// catchFault runs f, which touches shared memory, and returns a violation if that memory is
// gone. The goroutine must have set debug.SetPanicOnFault.
func catchFault(f func()) (v *PeerError) {
	defer func() { v = faultError(recover()) }()
	f()
	return nil
}

// An unfinished records the pages and frames that a call of receive has taken out of its arenas
// and has not handed to its caller yet. If the peer's memory is gone, the call ends in a panic
// without handing them over; the trap that catches the panic then gives them back to the arenas.
type unfinished struct {
	taken int     // of the engine's got: pages for frames of one page
	built []Frame // the batch, as far as it has other frames
}

// finish takes note that the caller gets the batch.
func (u *unfinished) finish() { u.taken, u.built = 0, nil }

// takeBack gives the pages and the buffers of the batch back to their arenas, of which the first
// one has the pages. Handles in the caller's frames become stale.
func (u *unfinished) takeBack(pages []uint32, arenas ...*arena.Arena) {
	for _, i := range pages {
		if i == released {
			continue
		}
		if _, err := arenas[0].Take(arenas[0].Buffer(i)); err == nil {
			arenas[0].PutOne(i)
		}
	}
	for i := range u.built {
		for _, a := range arenas {
			if b := u.built[i].buf; b.Of(a) {
				a.Release(b) // does nothing for one that is back already
			}
		}
	}
	u.finish()
}

// released stands for a page that went back before its batch was finished.
const released = ^uint32(0)
