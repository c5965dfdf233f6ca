package pvnet

import (
	"fmt"
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
