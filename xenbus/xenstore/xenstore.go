// Package xenstore is a client of xenstore.
//
// A [Client] speaks the xenstore protocol (docs/misc/xenstore.txt) over any
// io.ReadWriteCloser: the kernel's /dev/xen/xenbus, a daemon's socket, a ring, an
// emulator. It connects again when the connection breaks, sets its watches again and says
// which requests may have been lost.
//
// Other domains write the values in xenstore, so nothing read here is trusted: lengths
// are checked before they are used, [Values] are parsed strictly, and the memory a peer
// can make a Client hold is bounded. The package depends on no operating system and keeps
// no global state. A Client may be used from any goroutine; the caller that opened it
// closes it.
package xenstore
