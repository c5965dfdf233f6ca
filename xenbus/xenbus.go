// Package xenbus is a domain's side of the xenbus handshake.
//
// [Next] is the xenbus state machine of both ends, as a pure function. A [Device] is one
// end of one device: it follows its own directory in xenstore, the other end's, and the
// states in both. It reads and writes through a [xenstore.Client].
//
// Other domains write the values in xenstore, so nothing read here is trusted: numbers
// are parsed strictly, and the memory a peer can make us hold is bounded. The package
// depends on no operating system and keeps no global state. A Device may be used from any
// goroutine; the caller that opened it closes it.
package xenbus
