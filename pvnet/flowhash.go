package pvnet

import "barevif/pvnet/netif"

// HashType says which parts of a packet a hash covers: _XEN_NETIF_CTRL_HASH_TYPE_* of
// xen/include/public/io/netif.h.
type HashType = netif.HashType

const (
	HashIPv4    = netif.HashIPv4 // source and destination address
	HashIPv4TCP = netif.HashIPv4TCP
	HashIPv6    = netif.HashIPv6
	HashIPv6TCP = netif.HashIPv6TCP
)

// A FlowHash is the Toeplitz hash of a frame's addresses and, for TCP, ports: the same for
// all frames of one direction of a flow.
type FlowHash struct {
	Type  HashType
	Value uint32
}

// What Frame.hash is: 0 for no hash, otherwise a HashType and 1, and perhaps hashToSend.
// The value is the note of the frame's buffer, so that a Frame stays small.
const (
	hashType   = 7
	hashToSend = 8 // SetHash was called: the frame is sent with its hash
)

// Hash returns the hash that came with a received frame, or that SetHash gave it. ok is
// false if there is none, or if the frame is stale.
//
// A frontend's frames have one if [Config.Hash] asks for it, the backend supports it, the
// connection has at least two queues, and a type of the hash applies to the frame. It was
// computed by the peer, which may be wrong. A frame keeps its hash when it is copied, cut,
// or changed: who rewrites addresses or ports should clear it.
func (f *Frame) Hash() (h FlowHash, ok bool) {
	if f.hash == 0 || !f.buf.Valid() {
		return h, false
	}
	return FlowHash{HashType(f.hash&hashType - 1), f.buf.Note()}, true
}

// SetHash gives the frame a hash, which a frontend sends with it if the connection has a
// control ring; then the frame takes one more slot. A backend ignores it and computes its
// own, since each frontend chooses its key. A received hash is not sent on unless SetHash
// says so. The frame must have one holder: [ErrStale], [ErrShared]. [ErrOffload] for an
// undefined type.
func (f *Frame) SetHash(h FlowHash) error {
	switch {
	case !f.buf.Valid():
		return ErrStale
	case !f.buf.Exclusive():
		return ErrShared
	case h.Type > HashIPv6TCP:
		return ErrOffload
	}
	f.setHash(h)
	f.hash |= hashToSend
	f.buf.Mark()
	return nil
}

// ClearHash removes the frame's hash.
func (f *Frame) ClearHash() { f.hash = 0 }

// setHash stores a hash of a defined type. The caller alone holds the frame.
func (f *Frame) setHash(h FlowHash) {
	f.hash = uint8(h.Type) + 1
	f.buf.SetNote(h.Value)
}

// copyHash gives f, which the caller alone holds, the hash of g.
func (f *Frame) copyHash(g *Frame) {
	if f.hash = g.hash; f.hash != 0 {
		f.buf.SetNote(g.buf.Note())
		if f.hash&hashToSend != 0 {
			f.buf.Mark()
		}
	}
}

// takeHash takes over the hash of an extra info, if it is one that we know.
func (f *Frame) takeHash(x netif.Extra) (taken bool) {
	h := x.Hash()
	if x.Type != netif.ExtraHash || h.Algorithm != netif.HashToeplitz || h.Type > netif.HashIPv6TCP {
		return false
	}
	f.setHash(FlowHash{h.Type, h.Value})
	return true
}

// hashExtra returns the extra info that carries h.
func hashExtra(h FlowHash) netif.Extra {
	return netif.HashExtra(netif.Hash{Type: h.Type, Algorithm: netif.HashToeplitz, Value: h.Value})
}
