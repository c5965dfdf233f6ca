package netif

import (
	"structs"

	"barevif/hypercall"
)

// An Extra is struct netif_extra_info. It takes a slot of either ring: one of a
// [TxRequest], whose last four bytes are then padding, or one of an [RxResponse].
type Extra struct {
	_     structs.HostLayout
	_     [0]uint32 // for the alignment: slots are read in 32-bit words
	Type  ExtraType
	Flags uint8
	Body  [6]byte // depends on Type: see GSO, Mcast, Hash and XDP
}

// ExtraMore is XEN_NETIF_EXTRA_FLAG_MORE: another Extra follows.
const ExtraMore uint8 = 1

// An ExtraType says what an [Extra] holds: XEN_NETIF_EXTRA_TYPE_*.
type ExtraType uint8

const (
	ExtraNone     ExtraType = 0 // never valid
	ExtraGSO      ExtraType = 1
	ExtraMcastAdd ExtraType = 2
	ExtraMcastDel ExtraType = 3
	ExtraHash     ExtraType = 4

	// ExtraXDP is in Linux's include/xen/interface/io/netif.h only; Xen's own
	// header stops at ExtraHash.
	ExtraXDP ExtraType = 5
)

// extraTypes says of each type what a log calls it, and which bodies [Extra.Check]
// refuses. A new type takes a constant, an entry here, and a body with its codec; the list
// [Extras] then holds it, too.
var extraTypes = [...]struct {
	name  string
	check func(Extra) error // nil: every body is valid
}{
	ExtraNone:     {"none", func(Extra) error { return BadExtraType }},
	ExtraGSO:      {"gso", checkGSO},
	ExtraMcastAdd: {name: "mcast-add"},
	ExtraMcastDel: {name: "mcast-del"},
	ExtraHash:     {name: "hash"},
	ExtraXDP:      {name: "xdp"},
}

func (t ExtraType) String() string {
	if int(t) < len(extraTypes) {
		return extraTypes[t].name
	}
	return unnamed("extra type", t)
}

// More reports whether another Extra follows.
func (e Extra) More() bool { return e.Flags&ExtraMore != 0 }

// WithMore returns e with [ExtraMore] set or cleared.
func (e Extra) WithMore(more bool) Extra {
	e.Flags &^= ExtraMore
	if more {
		e.Flags |= ExtraMore
	}
	return e
}

// An ExtraError says why [Extra.Check] refuses an Extra. No correct peer sends such an
// Extra.
type ExtraError uint8

const (
	BadExtraType ExtraError = iota + 1 // none, or an undefined type
	BadGSOSize                         // a segment size of 0
	BadGSOType                         // neither TCPv4 nor TCPv6
)

func (e ExtraError) Error() string {
	switch e {
	case BadExtraType:
		return "netif: unknown extra type"
	case BadGSOSize:
		return "netif: gso size is zero"
	case BadGSOType:
		return "netif: unknown gso type"
	}
	return "netif: bad extra"
}

// Check returns an [ExtraError] for an Extra that Linux's netback and netfront refuse: a
// type out of range, or a GSO body without a size or with an unknown type. It does not
// check other bodies: a Hash is a hint and a Mcast an address. It does not allocate.
func (e Extra) Check() error {
	if int(e.Type) >= len(extraTypes) {
		return BadExtraType
	}
	if check := extraTypes[e.Type].check; check != nil {
		return check(e)
	}
	return nil
}

// ExtraOfTx returns the Extra in a slot of the tx ring that was read as a request.
func ExtraOfTx(r TxRequest) Extra {
	return Extra{
		Type:  ExtraType(r.Ref),
		Flags: uint8(r.Ref >> 8),
		Body: [6]byte{
			byte(r.Ref >> 16), byte(r.Ref >> 24),
			byte(r.Offset), byte(r.Offset >> 8),
			byte(r.Flags), byte(r.Flags >> 8)},
	}
}

// TxRequest returns e as the tx ring holds it. The padding is zero, so that an old id
// does not reach the peer.
func (e Extra) TxRequest() TxRequest {
	b := &e.Body
	return TxRequest{
		Ref: hypercall.GrantRef(e.Type) | hypercall.GrantRef(e.Flags)<<8 |
			hypercall.GrantRef(b[0])<<16 | hypercall.GrantRef(b[1])<<24,
		Offset: uint16(b[2]) | uint16(b[3])<<8,
		Flags:  TxFlags(b[4]) | TxFlags(b[5])<<8,
	}
}

// ExtraOfRx returns the Extra in a slot of the rx ring that was read as a response.
func ExtraOfRx(r RxResponse) Extra {
	return Extra{
		Type:  ExtraType(r.ID),
		Flags: uint8(r.ID >> 8),
		Body: [6]byte{
			byte(r.Offset), byte(r.Offset >> 8),
			byte(r.Flags), byte(r.Flags >> 8),
			byte(r.Status), byte(r.Status >> 8)},
	}
}

// RxResponse returns e as the rx ring holds it.
func (e Extra) RxResponse() RxResponse {
	b := &e.Body
	return RxResponse{
		ID:     uint16(e.Type) | uint16(e.Flags)<<8,
		Offset: uint16(b[0]) | uint16(b[1])<<8,
		Flags:  RxFlags(b[2]) | RxFlags(b[3])<<8,
		Status: int16(uint16(b[4]) | uint16(b[5])<<8),
	}
}

// A GSOType is the protocol of a packet to be segmented: XEN_NETIF_GSO_TYPE_*.
type GSOType uint8

const (
	GSONone  GSOType = 0 // never valid in an Extra
	GSOTCPv4 GSOType = 1
	GSOTCPv6 GSOType = 2
)

func (t GSOType) String() string { return nameOf(t, "gso type", "none", "tcpv4", "tcpv6") }

// A GSO says how to segment a packet that is larger than the link's MTU.
type GSO struct {
	Size     uint16 // bytes of payload in each segment
	Type     GSOType
	Features uint16 // XEN_NETIF_GSO_FEAT_*: none is defined
}

// GSOExtra returns the Extra that carries g.
func GSOExtra(g GSO) Extra {
	return Extra{Type: ExtraGSO, Body: [6]byte{
		byte(g.Size), byte(g.Size >> 8), byte(g.Type), 0, byte(g.Features), byte(g.Features >> 8)}}
}

// GSO returns the body of an [ExtraGSO]. It is meaningless for another type.
func (e Extra) GSO() GSO {
	return GSO{
		Size:     uint16(e.Body[0]) | uint16(e.Body[1])<<8,
		Type:     GSOType(e.Body[2]),
		Features: uint16(e.Body[4]) | uint16(e.Body[5])<<8,
	}
}

func checkGSO(e Extra) error {
	g := e.GSO()
	if g.Size == 0 {
		return BadGSOSize
	}
	if g.Type != GSOTCPv4 && g.Type != GSOTCPv6 {
		return BadGSOType
	}
	return nil
}

// A Mcast is a multicast group that the frontend joins or leaves.
type Mcast struct {
	MAC [6]byte
}

// McastAddExtra returns the Extra that joins a group.
func McastAddExtra(m Mcast) Extra { return Extra{Type: ExtraMcastAdd, Body: m.MAC} }

// McastDelExtra returns the Extra that leaves a group.
func McastDelExtra(m Mcast) Extra { return Extra{Type: ExtraMcastDel, Body: m.MAC} }

// Mcast returns the body of an [ExtraMcastAdd] or [ExtraMcastDel]. It is meaningless for
// another type.
func (e Extra) Mcast() Mcast { return Mcast{MAC: e.Body} }

// A Hash is the value that chose a packet's queue.
type Hash struct {
	Type      HashType
	Algorithm HashAlgorithm
	Value     uint32
}

// HashExtra returns the Extra that carries h.
func HashExtra(h Hash) Extra {
	return Extra{Type: ExtraHash, Body: [6]byte{byte(h.Type), byte(h.Algorithm),
		byte(h.Value), byte(h.Value >> 8), byte(h.Value >> 16), byte(h.Value >> 24)}}
}

// Hash returns the body of an [ExtraHash]. It is meaningless for another type.
func (e Extra) Hash() Hash {
	return Hash{
		Type:      HashType(e.Body[0]),
		Algorithm: HashAlgorithm(e.Body[1]),
		Value: uint32(e.Body[2]) | uint32(e.Body[3])<<8 |
			uint32(e.Body[4])<<16 | uint32(e.Body[5])<<24,
	}
}

// An XDP says how many bytes the backend left free in front of the data (Linux only).
type XDP struct {
	Headroom uint16
}

// XDPExtra returns the Extra that carries x.
func XDPExtra(x XDP) Extra {
	return Extra{Type: ExtraXDP, Body: [6]byte{byte(x.Headroom), byte(x.Headroom >> 8)}}
}

// XDP returns the body of an [ExtraXDP]. It is meaningless for another type.
func (e Extra) XDP() XDP {
	return XDP{Headroom: uint16(e.Body[0]) | uint16(e.Body[1])<<8}
}
