package pvnet

import (
	"encoding/binary"
	"slices"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/ctrl"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"
	"barevif/telemetry"
)

// hashMappingMax is how many entries the table of a frontend may have, as in Linux's
// netback (XEN_NETBK_MAX_HASH_MAPPING_SIZE).
const hashMappingMax = 128

// A steering is how a frontend wants its frames to be hashed and spread over its queues. It
// is immutable: each change makes another one, so that senders need no lock.
type steering struct {
	table   *toeplitz.Table
	flags   uint32
	mapping []uint32 // by hash mod its length, a queue; empty: the queue is the hash mod the number of queues
	queues  int      // of the connection
}

// queue returns the queue, of n, for a frame of total bytes that begins with head. The hash
// of a frame that no type applies to is 0.
func (s *steering) queue(head []byte, total, n int) int {
	h, _, _ := s.table.Frame(head, total, s.flags)
	if len(s.mapping) > 0 {
		return int(s.mapping[h%uint32(len(s.mapping))])
	}
	return int(h % uint32(n))
}

// hash returns the hash of f, if a type applies to it.
func (s *steering) hash(f *Frame) (h FlowHash, ok bool) {
	h.Value, h.Type, ok = s.table.Frame(f.Bytes(), int(f.total), s.flags)
	return h, ok
}

// A hashServer answers the messages of a frontend's hash, as Linux's netback does
// (drivers/net/xen-netback/hash.c), and with the same limits. As there, the settings
// outlive the connection. The control ring's goroutine uses it, and the lifecycle goroutine
// while that one does not run.
type hashServer struct {
	d      *Device
	queues int // of the connection
	op     [1]hypercall.CopyOp
	page   [shm.PageSize]byte // private copy of a key or table

	algorithm netif.HashAlgorithm
	key       []byte // of set.table
	set       steering
}

// connect prepares s for a connection of that many queues. A table that names a queue
// which the connection does not have is cleared.
func (s *hashServer) connect(d *Device, queues int) {
	s.d, s.queues, s.set.queues = d, queues, queues
	if s.set.table == nil {
		s.set.table = toeplitz.NewTable(nil)
	}
	if slices.ContainsFunc(s.set.mapping, func(q uint32) bool { return q >= uint32(queues) }) {
		s.set.mapping = make([]uint32, len(s.set.mapping))
	}
	s.publish()
}

// publish makes senders use the settings.
func (s *hashServer) publish() {
	on := s.algorithm == netif.HashToeplitz
	if on {
		now := s.set
		s.d.setSteering(&now)
	} else {
		s.d.setSteering(nil)
	}
	s.d.setFeature(telemetry.FeatureHash, on)
}

// serve adds the messages of the hash to the server of a control ring. read copies from the
// beginning of a page of the frontend.
func (s *hashServer) serve(c *ctrl.Server, dom hypercall.Domain, peer hypercall.DomID) {
	read := func(ref uint32, n int) (b []byte, ok bool) {
		if n == 0 {
			return nil, true // no page is read
		}
		b = s.page[:n]
		s.op[0] = hypercall.CopyOp{
			Src: hypercall.Area{Dom: peer, Ref: hypercall.GrantRef(ref)},
			Dst: hypercall.Area{Local: b}, Len: uint32(n), Status: hypercall.GeneralError,
		}
		err := dom.Copy(s.op[:])
		return b, err == nil && s.op[0].Status == hypercall.OK
	}
	change := func(h func(data [3]uint32) bool) ctrl.Handler {
		return func(r netif.CtrlRequest) (netif.CtrlStatus, uint32) {
			if !h(r.Data) {
				return netif.CtrlInvalidParameter, 0
			}
			s.publish()
			return netif.CtrlSuccess, 0
		}
	}
	c.Handle(netif.CtrlGetHashFlags, func(netif.CtrlRequest) (netif.CtrlStatus, uint32) {
		if s.algorithm == netif.HashNone {
			return netif.CtrlNotSupported, 0
		}
		return netif.CtrlSuccess, netif.HashFlagsAll
	})
	c.Handle(netif.CtrlGetHashMappingSize, func(netif.CtrlRequest) (netif.CtrlStatus, uint32) {
		return netif.CtrlSuccess, hashMappingMax
	})
	c.Handle(netif.CtrlSetHashAlgorithm, change(func(data [3]uint32) bool {
		if data[0] > uint32(netif.HashToeplitz) {
			return false
		}
		s.algorithm = netif.HashAlgorithm(data[0])
		return true
	}))
	c.Handle(netif.CtrlSetHashFlags, change(func(data [3]uint32) bool {
		if s.algorithm == netif.HashNone || data[0]&^netif.HashFlagsAll != 0 {
			return false
		}
		s.set.flags = data[0]
		return true
	}))
	c.Handle(netif.CtrlSetHashKey, change(func(data [3]uint32) bool {
		if data[1] > toeplitz.MaxKey {
			return false
		}
		key, ok := read(data[0], int(data[1]))
		if ok {
			s.key, s.set.table = slices.Clone(key), toeplitz.NewTable(key)
		}
		return ok
	}))
	c.Handle(netif.CtrlSetHashMappingSize, change(func(data [3]uint32) bool {
		if data[0] > hashMappingMax {
			return false
		}
		s.set.mapping = make([]uint32, data[0])
		return true
	}))
	c.Handle(netif.CtrlSetHashMapping, change(func(data [3]uint32) bool {
		n, first, size := data[1], data[2], uint32(len(s.set.mapping))
		if first > size || n > size-first {
			return false
		}
		table, ok := read(data[0], int(4*n))
		if !ok {
			return false
		}
		next := slices.Clone(s.set.mapping)
		for i := range n {
			q := binary.LittleEndian.Uint32(table[4*i:])
			if q >= uint32(s.queues) {
				return false
			}
			next[first+i] = q
		}
		s.set.mapping = next
		return true
	}))
}
