// Package xenstore is a client of xenstore.
//
// A [Client] speaks the xenstore protocol (docs/misc/xenstore.txt) over any
// io.ReadWriteCloser: the kernel's /dev/xen/xenbus, a daemon's socket, a ring, an
// emulator. It opens a new connection when it loses one, sets its watches again
// and says which requests may have been lost.
//
// Values in xenstore are written by other domains. Nothing read here is trusted:
// lengths are checked before they are used, [Values] are parsed strictly, and what
// a peer can make a Client hold is bounded. The package knows no operating system and
// keeps no global state. A Client may be used from any goroutine; whoever opened one
// closes it.
package xenstore
