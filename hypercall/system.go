package hypercall

import (
	"net"
	"os"
)

// This is the one file of the portable packages that imports net or os, and it takes no more
// of them than these three names. A domain, and everything above it, uses the names below, so
// that a program need not know which package an error comes from: errors.Is with Go's own
// finds them.
var (
	// ErrClosed is net.ErrClosed: the object was closed, or its domain has ended.
	ErrClosed = net.ErrClosed

	// ErrDeadlineExceeded is os.ErrDeadlineExceeded: the deadline of a wait has passed.
	ErrDeadlineExceeded = os.ErrDeadlineExceeded
)

// A File is a descriptor that passes from one process of a domain to another
// ([HandoverDomain]). A domain without processes has none.
type File = *os.File
