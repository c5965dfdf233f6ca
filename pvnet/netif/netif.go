// Package netif is the wire format of Xen's paravirtual network interface: the
// records of xen/include/public/io/netif.h and the names both ends use in
// xenstore.
//
// The records are plain values, meant as the T of [barevif/arena/shm.Slots]:
// what Load gives is already private. The package refuses nothing by itself
// except in [Extra.Check]; which record may follow which, and what a bad one
// costs its sender, is for the ring's owner to say. It holds no state, never
// allocates outside the String methods, and never panics on what a peer wrote.
//
// Xen is little-endian on every machine it runs on, and so are these records:
// the package does not build for a big-endian GOARCH.
package netif

import (
	"structs"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// A shared ring page holds four indices in its first RingHeader bytes and then
// slots of the size of the larger record; the number of slots is rounded down to
// a power of two (xen/include/public/io/ring.h, __RING_SIZE).
const (
	RingHeader = 64 // bytes

	TxStride   = 12 // bytes a slot
	RxStride   = 8
	CtrlStride = 16

	TxRingSize   = 256 // slots
	RxRingSize   = 256
	CtrlRingSize = 128
)

const (
	// SlotsMin is XEN_NETIF_NR_SLOTS_MIN: the data slots of one packet that
	// every backend accepts and no frontend should exceed. Extras are not
	// counted.
	SlotsMin = 18

	// MaxTxSize is XEN_NETIF_MAX_TX_SIZE: the bytes of the largest packet.
	MaxTxSize = 0xFFFF

	// MinFrame is the bytes of an Ethernet header. Linux's netback answers
	// Error to a packet whose first slot holds less, its netfront drops a
	// shorter frame (drivers/net/xen-netback/netback.c, ETH_HLEN).
	MinFrame = 14
)

// A TxRequest is struct netif_tx_request: one piece of a packet the frontend
// sends.
type TxRequest struct {
	_      structs.HostLayout
	Ref    hypercall.GrantRef
	Offset uint16 // bytes into the page
	Flags  TxFlags
	ID     uint16 // comes back in the response
	Size   uint16 // bytes: of the whole packet in its first request, else of this piece
}

// Plain reports whether r is a whole packet by itself, inside its page, with no
// extra behind it and no checksum to be completed.
func (r *TxRequest) Plain() bool {
	return r.Flags&(TxMoreData|TxExtraInfo|TxCsumBlank) == 0 &&
		r.Size >= MinFrame && uint32(r.Offset)+uint32(r.Size) <= shm.PageSize
}

// A TxResponse is struct netif_tx_response. Its ID means nothing if Status is
// [Null].
type TxResponse struct {
	_      structs.HostLayout
	_      [0]uint32 // slots are read by the word
	ID     uint16
	Status Status
}

// An RxRequest is struct netif_rx_request: a page the backend may fill.
type RxRequest struct {
	_   structs.HostLayout
	ID  uint16 // comes back in the response; by custom the slot's number
	Pad uint16
	Ref hypercall.GrantRef
}

// An RxResponse is struct netif_rx_response: one piece of a packet the backend
// sends. It takes the slot of the request it answers.
type RxResponse struct {
	_      structs.HostLayout
	_      [0]uint32 // slots are read by the word
	ID     uint16
	Offset uint16 // bytes into the page
	Flags  RxFlags
	Status int16 // > 0: bytes of this piece; < 0: a Status, or a grant's from Linux
}

// Plain reports whether r is a whole packet by itself, inside its page, with no
// extra behind it and no checksum to be completed.
func (r *RxResponse) Plain() bool {
	return r.Flags&(RxMoreData|RxExtraInfo|RxCsumBlank) == 0 &&
		r.Status >= MinFrame && uint32(r.Offset)+uint32(r.Status) <= shm.PageSize
}

// A Status is what became of a request: NETIF_RSP_*.
type Status int16

const (
	Dropped Status = -2
	Error   Status = -1
	Okay    Status = 0 // the buffer is given back; it says nothing of delivery
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
	return "status " + itoa(int64(s))
}
