package netif

import (
	"structs"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// A CtrlRequest is struct xen_netif_ctrl_request: a request of the frontend on the
// control ring. Words of Data that Type does not use are 0.
type CtrlRequest struct {
	_    structs.HostLayout
	ID   uint16 // the response repeats it, and Type
	Type CtrlType
	Data [3]uint32
}

// A CtrlResponse is struct xen_netif_ctrl_response. Responses may come in any order; ID
// and Type together identify the request.
type CtrlResponse struct {
	_      structs.HostLayout
	ID     uint16
	Type   CtrlType
	Status CtrlStatus
	Data   uint32
}

// A CtrlType is the type of a request on the control ring: XEN_NETIF_CTRL_TYPE_*.
type CtrlType uint16

const (
	CtrlInvalid            CtrlType = 0
	CtrlGetHashFlags       CtrlType = 1
	CtrlSetHashFlags       CtrlType = 2  // data: flags
	CtrlSetHashKey         CtrlType = 3  // data: ref of the key's page, bytes
	CtrlGetHashMappingSize CtrlType = 4  // answer: entries
	CtrlSetHashMappingSize CtrlType = 5  // data: entries
	CtrlSetHashMapping     CtrlType = 6  // data: ref of the table's page, entries, first entry
	CtrlSetHashAlgorithm   CtrlType = 7  // data: HashAlgorithm
	CtrlGetGrefMappingSize CtrlType = 8  // data: queue; answer: entries
	CtrlAddGrefMapping     CtrlType = 9  // data: queue, ref of the list's page, entries
	CtrlDelGrefMapping     CtrlType = 10 // as CtrlAddGrefMapping; answer: entries removed
)

func (t CtrlType) String() string {
	return nameOf(t, "control type",
		"invalid", "get-hash-flags", "set-hash-flags", "set-hash-key", "get-hash-mapping-size",
		"set-hash-mapping-size", "set-hash-mapping", "set-hash-algorithm",
		"get-gref-mapping-size", "add-gref-mapping", "del-gref-mapping")
}

// A CtrlStatus is the result of a request on the control ring: XEN_NETIF_CTRL_STATUS_*.
type CtrlStatus uint32

const (
	CtrlSuccess          CtrlStatus = 0
	CtrlNotSupported     CtrlStatus = 1
	CtrlInvalidParameter CtrlStatus = 2
	CtrlBufferOverflow   CtrlStatus = 3
)

func (s CtrlStatus) String() string {
	return nameOf(s, "control status", "success", "not supported", "invalid parameter", "buffer overflow")
}

// A HashType names the parts of a packet that were hashed: a bit number,
// _XEN_NETIF_CTRL_HASH_TYPE_*.
type HashType uint8

const (
	HashIPv4    HashType = 0 // source and destination address
	HashIPv4TCP HashType = 1 // the addresses and the ports
	HashIPv6    HashType = 2
	HashIPv6TCP HashType = 3
)

// Flag returns the bit of t in the control ring's hash flags: XEN_NETIF_CTRL_HASH_TYPE_*.
// It is 0 for a t above 31.
func (t HashType) Flag() uint32 { return 1 << t }

// HashFlagsAll has the flags of all defined HashTypes.
const HashFlagsAll uint32 = 1<<HashIPv4 | 1<<HashIPv4TCP | 1<<HashIPv6 | 1<<HashIPv6TCP

func (t HashType) String() string {
	return nameOf(t, "hash type", "ipv4", "ipv4+tcp", "ipv6", "ipv6+tcp")
}

// A HashAlgorithm is XEN_NETIF_CTRL_HASH_ALGORITHM_*.
type HashAlgorithm uint8

const (
	HashNone     HashAlgorithm = 0 // the backend chooses the queue of a packet freely
	HashToeplitz HashAlgorithm = 1
)

func (a HashAlgorithm) String() string { return nameOf(a, "hash algorithm", "none", "toeplitz") }

// A GrefEntry is struct xen_netif_gref: an entry of the list page of
// [CtrlAddGrefMapping] and [CtrlDelGrefMapping].
type GrefEntry struct {
	_      structs.HostLayout
	Ref    hypercall.GrantRef
	Flags  uint16 // GrefReadOnly
	Status uint16 // a CtrlStatus, written by the backend, for CtrlDelGrefMapping only
}

// GrefReadOnly is XEN_NETIF_CTRLF_GREF_readonly: the backend may map the page read-only.
const GrefReadOnly uint16 = 1

const (
	// GrefEntrySize is the size of a [GrefEntry] in the list page, in bytes.
	GrefEntrySize = 8

	// GrefListMax is how many entries a list page holds.
	GrefListMax = shm.PageSize / GrefEntrySize
)
