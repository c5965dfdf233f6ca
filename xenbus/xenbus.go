// Package xenbus is a domain's side of xenstore and of the xenbus handshake.
//
// A [Client] speaks the xenstore protocol (docs/misc/xenstore.txt) over any
// io.ReadWriteCloser: the kernel's /dev/xen/xenbus, a daemon's socket, a ring, an
// emulator. It opens a new connection when it loses one, sets its watches again
// and says which requests may have been lost.
//
// [Next] is the xenbus state machine of both ends, as a pure function. A [Device]
// is one end of one device: its own directory, the other end's, and the states of
// both as they change.
//
// Values in xenstore are written by other domains. Nothing read here is trusted:
// lengths are checked before they are used, numbers are parsed strictly, and what
// a peer can make us hold is bounded. The package knows no operating system and
// keeps no global state. A Client and a Device may be used from any goroutine;
// whoever opened one closes it.
package xenbus
