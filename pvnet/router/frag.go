package router

import (
	"encoding/binary"
	"time"

	"barevif/pvnet/packet"
)

// fragmentWays is how many places a fragmented packet may have in its port's table. The table is
// the port's own, so that a flood of first fragments drives out those of its own port only.
const fragmentWays = 4

// fragmentLife is how long later fragments are waited for (RFC 791 suggests 15 s, Linux
// takes 30).
const fragmentLife = 30 * time.Second

// A fragment is a packet of which the first fragment was accepted.
type fragment struct {
	src, dst addr
	id       uint32
	proto    uint32
	flow     uint32 // the index of its flow
	serial   uint32 // flow.serial of that flow: if it differs, the entry has another flow now
	d        uint8  // the direction of the packet
	header   uint16 // bytes of the fragmented part that no later fragment may overwrite
	deadline int64  // 0: the place is free
}

// identify returns the identification of a fragment, and the offset in bytes.
func (w *work) identify() (id uint32, offset int, ok bool) {
	if w.h.Version == 4 {
		ip := w.head[w.h.L3:]
		return uint32(be16(ip[4:])), int(be16(ip[6:])&0x1fff) * 8, true
	}
	if w.h.FragmentAt == 0 {
		return 0, 0, false
	}
	b := w.head[w.h.FragmentAt:]
	return binary.BigEndian.Uint32(b[4:]), int(be16(b[2:]) &^ 7), true
}

func (w *work) fragmentKey() (f fragment, offset int, ok bool) {
	id, offset, ok := w.identify()
	f = fragment{src: w.t.src, dst: w.t.dst, id: id}
	if w.h.Version == 4 {
		f.proto = w.t.proto // in IPv6 the fragment header of a later one names another header
	}
	return f, offset, ok
}

func (r *Router) ways(in PortID, f *fragment) []fragment {
	all := r.state(in).fragments
	h := r.table.hash(&tuple{src: f.src, dst: f.dst, ports: f.id, proto: f.proto})
	at := int(h%uint64(len(all)/fragmentWays)) * fragmentWays
	return all[at : at+fragmentWays]
}

func (f *fragment) same(g *fragment) bool {
	return f.deadline != 0 && f.src == g.src && f.dst == g.dst && f.id == g.id && f.proto == g.proto
}

// remember notes the first fragment of a packet, whose later ones go the same way.
func (r *Router) remember(w *work, i uint32, d int) {
	f, _, ok := w.fragmentKey()
	if !ok {
		return
	}
	f.flow, f.serial, f.d = i, r.table.flows[i].serial, uint8(d)
	f.deadline = r.now + int64(fragmentLife)
	begins := w.h.L4
	if w.h.Version == 6 {
		begins = w.h.FragmentAt + 8
	}
	end := w.h.L4 + 8
	if w.h.L5 != 0 {
		end = w.h.L5
	}
	f.header = uint16(end - begins)
	ways := r.ways(w.p.In, &f)
	best := &ways[0]
	for j := range ways {
		if ways[j].same(&f) {
			best = &ways[j]
			break
		}
		if ways[j].deadline < best.deadline {
			best = &ways[j]
		}
	}
	*best = f
}

// later handles a fragment that is not the first.
func (r *Router) later(w *work) {
	p := w.p
	if p.Partial || p.GSO != 0 {
		p.Reason = ReasonMalformed
		return
	}
	f, offset, ok := w.fragmentKey()
	if !ok {
		p.Reason = ReasonMalformed
		return
	}
	size := w.h.End - w.h.L3
	if w.h.Version == 4 {
		size -= int(w.head[w.h.L3]&15) * 4
	} else {
		size -= w.h.FragmentAt + 8 - w.h.L3
	}
	if size <= 0 || offset+size > 0xffff {
		p.Reason = ReasonMalformed
		return
	}
	p.Reason = ReasonFragment
	for _, known := range r.ways(p.In, &f) {
		if !known.same(&f) || known.deadline <= r.now {
			continue
		}
		fl := &r.table.flows[known.flow]
		if !fl.used || fl.serial != known.serial || fl.deadline <= r.now {
			return
		}
		if offset < int(known.header) {
			p.Reason = ReasonTinyFragment
			return
		}
		if fl.gen != r.snap.gen && !r.recheck(known.flow) {
			r.end(known.flow)
			return
		}
		p.Reason = ReasonNone
		w.flags, w.typ, w.kind, w.hash = 0, 0, kindFlow, r.table.hash(&fl.key[known.d])
		w.h.L4, w.h.L5 = 0, 0
		r.pass(w, known.flow, int(known.d))
		return
	}
}

// A Fragmenter cuts an IPv4 packet into fragments (RFC 791), for [VerdictFragment]. It
// allocates nothing.
type Fragmenter struct {
	head    [14 + 60]byte
	size    int // of the first fragment's headers
	short   int // of the others': with the options that are copied
	ip      [60]byte
	data    int // offset of the payload in the frame
	left    int
	at      int
	base    int // offset of the packet itself, if it is a fragment
	more    bool
	payload int // most bytes in a fragment
}

// Init makes f cut the frame that begins with head, of total bytes, into frames whose IP
// packets have at most mtu bytes. The packet's checksum must be complete. It reports false for
// what is not IPv4, must not be fragmented, or fits no fragment into mtu.
func (f *Fragmenter) Init(head []byte, total, mtu int) bool {
	if len(head) > total {
		head = head[:max(total, 0)]
	}
	h, ok := packet.Parse(head, total)
	if !ok || h.Version != 4 || h.L3 != 14 {
		return false
	}
	n := int(head[14]&15) * 4
	flags := be16(head[20:])
	if len(head) < 14+n || flags&0x4000 != 0 || h.End-14 > 0xffff {
		return false
	}
	*f = Fragmenter{size: 14 + n, data: 14 + n, left: h.End - 14 - n, base: int(flags & 0x1fff), more: flags&0x2000 != 0}
	f.payload = (mtu - n) &^ 7
	if f.payload < 8 || f.left == 0 {
		return false
	}
	copy(f.head[:], head[:f.size])
	// Options with the high bit are in all fragments, the others in the first alone.
	f.short = 20
	for b := head[34:f.size]; len(b) > 0 && b[0] != 0; {
		k := 1
		if b[0] != 1 {
			if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
				return false
			}
			k = int(b[1])
			if b[0]&0x80 != 0 {
				f.short += copy(f.ip[f.short:], b[:k])
			}
		}
		b = b[k:]
	}
	for f.short%4 != 0 {
		f.ip[f.short] = 0
		f.short++
	}
	return true
}

// Next returns the next fragment: its headers, valid until the next call, and which bytes of
// the original frame follow them: n from offset from on. ok is false after the last.
func (f *Fragmenter) Next() (head []byte, from, n int, ok bool) {
	if f.left == 0 {
		return nil, 0, 0, false
	}
	if f.at > 0 && f.size != 14+f.short {
		copy(f.head[34:], f.ip[20:f.short])
		f.size = 14 + f.short
	}
	n = min(f.left, f.payload)
	from = f.data + f.at
	ip := f.head[14:f.size]
	ip[0] = 0x40 | uint8(len(ip)/4)
	flags := uint16(f.base + f.at/8)
	if f.left > n || f.more {
		flags |= 0x2000
	}
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+n))
	binary.BigEndian.PutUint16(ip[6:], flags)
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], packet.Checksum(ip))
	f.at += n
	f.left -= n
	return f.head[:f.size], from, n, true
}
