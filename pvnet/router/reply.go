package router

import (
	"encoding/binary"
	"time"

	"barevif/pvnet/packet"
)

// A reply is what AppendReply makes.
type reply struct {
	kind      replyKind
	typ, code uint8
	probe     bool    // the advertisement answers duplicate address detection, which has no source address
	mtu       uint32  // of "fragmentation needed" or "packet too big"; otherwise 0
	from      addr    // the source address; in an advertisement also the target
	port      [6]byte // the source MAC
}

type replyKind uint8

const (
	replyNone replyKind = iota
	replyARP
	replyAdvert
	replyError
	replyReset
)

// refuse drops a packet for a reason that its sender is told, if it may be (RFC 1812, 4.3.2.7;
// RFC 4443, 2.4) and the port has not been told too much. TCP that the filter refuses is answered
// with a reset by the receiver's address, since no TCP ends for an ICMP error; but not a reset
// (RFC 9293, 3.10.7.1).
func (r *Router) refuse(w *work, why Reason) {
	p := w.p
	p.Reason, p.Verdict = why, VerdictDrop
	typ, code := errorType(w.h.Version, why)
	dst := w.t.dst
	_, all := r.snap.bcast[dst]
	reset := why == ReasonFiltered && w.h.Proto == packet.TCP && w.h.Fragment == packet.Whole
	if w.group || w.kind == kindError || reset && w.flags&tcpRST != 0 || w.h.Fragment == packet.Later || dst.multicast() || dst == broadcast || all || w.t.src.unspecified() {
		return
	}
	s := r.state(p.In)
	cost := int64(time.Second) / int64(r.limits.Replies)
	tokens := min(s.tokens+r.now-s.tokensAt, int64(time.Second))
	s.tokensAt = r.now
	if s.tokens = tokens; tokens < cost {
		s.count.Unanswered++
		return
	}
	var from addr
	if !reset {
		var ok bool
		if from, ok = r.speaker(w); !ok {
			s.count.Unanswered++
			return
		}
	}
	s.tokens -= cost
	p.Verdict, p.Out = VerdictReply, p.In
	p.reply = reply{kind: replyError, typ: typ, code: code, mtu: p.reply.mtu, from: from}
	if reset {
		p.reply.kind = replyReset
	}
	if w.port != nil {
		p.reply.port = w.port.MAC
	}
	if why != ReasonTooBig {
		p.reply.mtu = 0
	}
}

func errorType(version uint8, why Reason) (typ, code uint8) {
	four := version == 4
	switch {
	case why == ReasonTTL && four:
		return 11, 0
	case why == ReasonTTL:
		return 3, 0
	case why == ReasonTooBig && four:
		return 3, 4
	case why == ReasonTooBig:
		return 2, 0
	case why == ReasonNoNeighbour && four:
		return 3, 1
	case why == ReasonNoNeighbour:
		return 1, 3
	case why == ReasonFiltered && four:
		return 3, 13
	case why == ReasonFiltered:
		return 1, 1
	case four:
		return 3, 0
	}
	return 1, 0
}

// speaker returns the source address of an ICMP error to the sender of the packet in hand.
func (r *Router) speaker(w *work) (addr, bool) {
	if w.port != nil {
		if a, ok := w.port.source(w.t.src); ok {
			return a, true
		}
	}
	for _, p := range r.snap.ports {
		if p != nil && p != w.port {
			if a, ok := p.natAddr(w.t.src, w.t.src); ok {
				return a, true
			}
		}
	}
	return addr{}, false
}

// Unreachable changes the verdict of a packet with VerdictNeighbour, for which no answer
// came, to VerdictReply or, if there may be no reply, VerdictDrop. Head is as it was then.
func (r *Router) Unreachable(now time.Duration, p *Packet) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advance(now)
	w := &r.w
	*w = work{p: p, head: p.Head[:min(len(p.Head), max(p.Total, 0))]}
	p.Verdict, p.Reason, p.Ask, p.Next, p.reply = VerdictDrop, ReasonNoNeighbour, false, noAddr, reply{}
	if w.port = r.snap.port(p.In); (w.port != nil || p.In == LocalPort) && len(w.head) >= 14 && r.ethernet(w) {
		var ok bool
		if w.h, ok = packet.Parse(w.head, p.Total); ok && r.network(w) && w.h.Fragment != packet.Later && r.transport(w) {
			r.refuse(w, ReasonNoNeighbour)
		}
	}
	r.w = work{}
	r.count(p)
}

// Most bytes of an ICMP error's IP packet (RFC 1812, 4.3.2.3; RFC 4443, 2.4c).
const (
	mostError4 = 576
	mostError6 = 1280
)

// MaxReply is the greatest length of a frame that AppendReply makes, in bytes.
const MaxReply = 14 + mostError6

// AppendReply appends the frame that answers a packet with VerdictReply: an ICMP error, a TCP
// reset, an ARP reply or a neighbour advertisement, with complete checksums. It appends nothing with
// another verdict. Head must be as Process left it.
func (p *Packet) AppendReply(b []byte) []byte {
	if p.Verdict != VerdictReply {
		return b
	}
	head := p.Head[:min(len(p.Head), max(p.Total, 0))]
	x := &p.reply
	switch {
	case x.kind == replyARP && len(head) >= 14+28:
		b = append(b, head[6:12]...)
		b = append(b, x.port[:]...)
		b = append(b, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2)
		b = append(b, x.port[:]...)
		b = append(b, head[38:42]...) // the address that was asked for
		return append(b, head[22:32]...)
	case x.kind == replyAdvert:
		return p.appendAdvert(b, head)
	case x.kind == replyError:
		return p.appendError(b, head)
	case x.kind == replyReset:
		return p.appendReset(b, head)
	}
	return b
}

func (p *Packet) appendAdvert(b, head []byte) []byte {
	h, ok := packet.Parse(head, p.Total)
	if !ok || h.Version != 6 {
		return b
	}
	x := &p.reply
	to, flags := addr16(head[h.L3+8:]), byte(0xe0) // router, solicited, override
	if x.probe {
		b = append(b, 0x33, 0x33, 0, 0, 0, 1)
		to, flags = addr{0xff02 << 48, 1}, 0xa0
	} else {
		b = append(b, head[6:12]...)
	}
	b = append(b, x.port[:]...)
	b = append(b, 0x86, 0xdd)
	at := len(b)
	b = append(b, 0x60, 0, 0, 0, 0, 32, icmp6, 255)
	b = x.from.append(b)
	b = to.append(b)
	b = append(b, neighbourAdvertisement, 0, 0, 0, flags, 0, 0, 0)
	b = x.from.append(b)
	b = append(b, 2, 1)
	b = append(b, x.port[:]...)
	finish6(b[at:])
	return b
}

// appendReset appends the segment that ends, or does not let begin, the connection of the TCP
// packet in head: what its receiver would answer in state CLOSED (RFC 9293, 3.10.7.1).
func (p *Packet) appendReset(b, head []byte) []byte {
	h, ok := packet.Parse(head, p.Total)
	if !ok || h.Proto != packet.TCP || h.L5 == 0 {
		return b
	}
	b = append(b, head[6:12]...)
	b = append(b, p.reply.port[:]...)
	at := len(b) + 2
	if h.Version == 4 {
		b = append(b, 8, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, packet.TCP, 0, 0)
		b = append(b, head[h.L3+16:h.L3+20]...)
		b = append(b, head[h.L3+12:h.L3+16]...)
		binary.BigEndian.PutUint16(b[at+10:], packet.Checksum(b[at:]))
	} else {
		b = append(b, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, packet.TCP, 64)
		b = append(b, head[h.L3+24:h.L3+40]...)
		b = append(b, head[h.L3+8:h.L3+24]...)
	}
	in := head[h.L4:h.L5]
	flags := in[13]
	l4 := len(b)
	b = append(b, in[2], in[3], in[0], in[1])
	if flags&tcpACK != 0 {
		b = append(b, in[8:12]...) // it begins where the sender expects
		b = append(b, 0, 0, 0, 0, 5<<4, tcpRST)
	} else {
		n := binary.BigEndian.Uint32(in[4:]) + uint32(h.End-h.L5)
		if flags&tcpSYN != 0 {
			n++
		}
		if flags&tcpFIN != 0 {
			n++
		}
		b = append(b, 0, 0, 0, 0)
		b = binary.BigEndian.AppendUint32(b, n)
		b = append(b, 5<<4, tcpRST|tcpACK)
	}
	b = append(b, 0, 0, 0, 0, 0, 0) // no window, no urgent data
	addrs := b[at+12 : at+20]
	if h.Version == 6 {
		addrs = b[at+8 : at+40]
	}
	sum := packet.Add(packet.Add(packet.TCP+20, addrs), b[l4:])
	binary.BigEndian.PutUint16(b[l4+16:], ^packet.Fold(sum))
	return b
}

func (p *Packet) appendError(b, head []byte) []byte {
	h, ok := packet.Parse(head, p.Total)
	if !ok {
		return b
	}
	x := &p.reply
	quote := head[h.L3:min(len(head), h.End)]
	b = append(b, head[6:12]...)
	b = append(b, x.port[:]...)
	at := len(b) + 2
	if h.Version == 4 {
		quote = quote[:min(len(quote), mostError4-28)]
		b = append(b, 8, 0, 0x45, 0xc0)
		b = binary.BigEndian.AppendUint16(b, uint16(28+len(quote)))
		b = append(b, 0, 0, 0x40, 0, 64, icmp4, 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(x.from.lo))
		b = append(b, head[h.L3+12:h.L3+16]...)
		binary.BigEndian.PutUint16(b[at+10:], packet.Checksum(b[at:]))
		b = append(b, x.typ, x.code, 0, 0)
		b = binary.BigEndian.AppendUint32(b, x.mtu)
		b = append(b, quote...)
		binary.BigEndian.PutUint16(b[at+22:], packet.Checksum(b[at+20:]))
		return b
	}
	quote = quote[:min(len(quote), mostError6-48)]
	b = append(b, 0x86, 0xdd, 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(quote)))
	b = append(b, icmp6, 64)
	b = x.from.append(b)
	b = append(b, head[h.L3+8:h.L3+24]...)
	b = append(b, x.typ, x.code, 0, 0)
	b = binary.BigEndian.AppendUint32(b, x.mtu)
	b = append(b, quote...)
	finish6(b[at:])
	return b
}
