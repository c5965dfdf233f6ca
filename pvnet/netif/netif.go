// Package netif is the wire format of Xen's paravirtual network interface: the records of
// xen/include/public/io/netif.h, and the names of the nodes that both ends use in
// xenstore.
//
// The records are plain values, for use as the T of [barevif/arena/shm.Slots]: the result
// of Load is already private. Only [Extra.Check] refuses anything; the owner of the ring
// decides which record may follow which, and how to treat a peer that sends a bad one.
// The package holds no state, allocates only in String methods, and never panics on a
// peer's data.
//
// Xen is little-endian on every machine, and so are these records: the package does not
// build for a big-endian GOARCH.
package netif

import (
	"structs"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// A shared ring page begins with RingHeader bytes that hold four indices. Then come slots
// of the size of the larger record; their number is rounded down to a power of two
// (xen/include/public/io/ring.h, __RING_SIZE).
const (
	RingHeader = 64 // bytes

	TxStride   = 12 // bytes per slot
	RxStride   = 8
	CtrlStride = 16

	TxRingSize   = 256 // slots
	RxRingSize   = 256
	CtrlRingSize = 128
)

const (
	// SlotsMin is XEN_NETIF_NR_SLOTS_MIN: the data slots per packet that every backend
	// accepts and no frontend should exceed. Extras do not count.
	SlotsMin = 18

	// MaxTxSize is XEN_NETIF_MAX_TX_SIZE: the size of the largest packet, in bytes.
	MaxTxSize = 0xFFFF

	// MinFrame is the size of an Ethernet header, in bytes. Linux's netback answers Error
	// to a packet whose first slot holds less, and its netfront drops a shorter frame
	// (drivers/net/xen-netback/netback.c, ETH_HLEN).
	MinFrame = 14
)

// A TxRequest is struct netif_tx_request: one piece of a packet that the frontend sends.
type TxRequest struct {
	_      structs.HostLayout
	Ref    hypercall.GrantRef
	Offset uint16 // bytes into the page
	Flags  TxFlags
	ID     uint16 // the response repeats it
	Size   uint16 // bytes: in the first request those of the whole packet, else those of this piece
}

// Plain reports whether r is a whole packet inside its page, without an extra and without
// a partial checksum.
func (r *TxRequest) Plain() bool {
	return r.Flags&(TxMoreData|TxExtraInfo|TxCsumBlank) == 0 &&
		r.Size >= MinFrame && uint32(r.Offset)+uint32(r.Size) <= shm.PageSize
}

// A TxResponse is struct netif_tx_response. Its ID is meaningless if Status is [Null].
type TxResponse struct {
	_      structs.HostLayout
	_      [0]uint32 // for the alignment: slots are read in 32-bit words
	ID     uint16
	Status Status
}

// An RxRequest is struct netif_rx_request: a page that the backend may fill.
type RxRequest struct {
	_   structs.HostLayout
	ID  uint16 // the response repeats it; by custom the number of the slot
	Pad uint16
	Ref hypercall.GrantRef
}

// An RxResponse is struct netif_rx_response: one piece of a packet that the backend
// sends. It takes the slot of a request that it answers.
type RxResponse struct {
	_      structs.HostLayout
	_      [0]uint32 // for the alignment: slots are read in 32-bit words
	ID     uint16
	Offset uint16 // bytes into the page
	Flags  RxFlags
	Status int16 // > 0: bytes of this piece; < 0: a Status, or from Linux a grant status
}

// Plain reports whether r is a whole packet inside its page, without an extra and without
// a partial checksum.
func (r *RxResponse) Plain() bool {
	return r.Flags&(RxMoreData|RxExtraInfo|RxCsumBlank) == 0 &&
		r.Status >= MinFrame && uint32(r.Offset)+uint32(r.Status) <= shm.PageSize
}

// A Status is the result of a request: NETIF_RSP_*.
type Status int16

const (
	Dropped Status = -2
	Error   Status = -1
	Okay    Status = 0 // the backend returns the buffer; it does not mean that the packet was delivered
	Null    Status = 1 // the slot held an Extra
)

func (s Status) String() string {
	switch s {
	case Dropped:
		return "dropped"
	case Error:
		return "error"
	case Okay:
		return "okay"
	case Null:
		return "null"
	}
	return unnamed("status", s)
}
