// Package xenbus is a domain's side of the xenbus handshake.
//
// [Next] is the xenbus state machine of both ends, as a pure function. A [Device]
// is one end of one device: its own directory in xenstore, the other end's, and the
// states of both as they change. It reads and writes through a [xenstore.Client].
//
// Values in xenstore are written by other domains. Nothing read here is trusted:
// numbers are parsed strictly, and what a peer can make us hold is bounded. The
// package knows no operating system and keeps no global state. A Device may be used
// from any goroutine; whoever opened one closes it.
package xenbus
