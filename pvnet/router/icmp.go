package router

import (
	"encoding/binary"
	"slices"

	"barevif/pvnet/packet"
)

// ICMPv6 types of multicast listener discovery and of neighbour discovery.
const (
	listenerQuery          = 130
	routerSolicitation     = 133
	routerAdvertisement    = 134
	neighbourSolicitation  = 135
	neighbourAdvertisement = 136
	redirect               = 137
)

// quoted returns the key of the packet that an ICMP error quotes, as it left the router, and
// its headers. At least 8 bytes of the transport header are there, which have TCP's sequence number.
func (w *work) quoted() (t tuple, in packet.Headers, ok bool) {
	head := w.head[:min(len(w.head), w.h.End)]
	if in, ok = packet.Quoted(head, w.h.L4+8, w.h.Version); !ok || in.L4 == 0 || in.Fragment == packet.Later {
		return t, in, false
	}
	l4 := head[in.L4:]
	t.proto = uint32(in.Proto)
	if in.Version == 4 {
		t.src, t.dst = addr4(head[in.L3+12:]), addr4(head[in.L3+16:])
	} else {
		t.src, t.dst = addr16(head[in.L3+8:]), addr16(head[in.L3+24:])
	}
	switch {
	case hasPorts(t.proto):
		if len(l4) < 8 {
			return t, in, false
		}
		t.ports = binary.BigEndian.Uint32(l4)
	case t.proto == icmp4 && in.Version == 4, t.proto == icmp6 && in.Version == 6:
		if len(l4) < 8 {
			return t, in, false
		}
		switch request, reply := icmpTypes(in.Version); l4[0] {
		case request:
			t.ports = uint32(be16(l4[4:])) << 16
		case reply:
			t.ports = uint32(be16(l4[4:]))
		default:
			return t, in, false
		}
	}
	return t, in, true
}

// related handles an ICMP error. It goes where the packet came from that it quotes.
func (r *Router) related(w *work) {
	p := w.p
	const quench, oldRedirect = 4, 5
	if w.h.Fragment != packet.Whole {
		p.Reason = ReasonFragment
		return
	}
	if w.h.Version == 4 && (w.typ == quench || w.typ == oldRedirect) {
		p.Reason = ReasonInvalid // RFC 6633; a redirect is for the sender alone
		return
	}
	t, in, ok := w.quoted()
	if !ok || t.src != w.t.dst || w.group {
		p.Reason = ReasonInvalid
		return
	}
	if !r.source(w) {
		return
	}
	arriving := t.inverse() // how the packets arrive that go the error's way
	i, d, _, ok := r.find(&arriving)
	if ok {
		if f := &r.table.flows[i]; f.gen != r.snap.gen && !r.recheck(i) {
			r.end(i)
			ok = false
		}
	}
	if !ok {
		p.Reason = ReasonInvalid
		return
	}
	f := &r.table.flows[i]
	if f.side[d].in != p.In && (w.port == nil || !w.port.AnySource) {
		p.Reason = ReasonSpoofed
		return
	}
	if in.Proto == packet.TCP && !f.underWay(1-d, binary.BigEndian.Uint32(w.head[in.L4+4:])) {
		p.Reason = ReasonQuote
		return
	}
	dst := f.key[1-d].src
	q := candidate{
		in: p.In, out: f.side[1-d].in, src: w.t.src, dst: dst,
		proto: w.h.Proto, icmpType: w.typ, state: StateRelated,
	}
	if action := r.snap.decide(&q, true); action != Accept {
		p.Reason = ReasonFiltered
		return
	}
	if q.out == LocalPort {
		r.rewriteError(w, &in, f, d)
		p.Verdict, p.Out = VerdictLocal, LocalPort
		return
	}
	if !r.lives(w) {
		return
	}
	next, ok := r.snap.routes.find(dst)
	if !ok {
		p.Reason = ReasonNoRoute
		return
	}
	via := next.via
	if via == (addr{}) {
		via = dst
	}
	mac, _, ok := r.neighbour(w, next.out, via)
	if !ok {
		return
	}
	out := r.snap.port(next.out)
	verdict, ok := r.fits(w, out)
	if !ok {
		return
	}
	r.rewriteError(w, &in, f, d)
	r.leave(w, out, mac)
	p.Verdict, p.Out = verdict, next.out
}

// rewriteError translates an ICMP error that travels in direction d of a flow: its own
// addresses, and the packet in it, which travelled the other way.
func (r *Router) rewriteError(w *work, in *packet.Headers, f *flow, d int) {
	if f.flags&(snat|dnat) == 0 {
		return
	}
	w.p.Translated = true
	sent := &f.key[1-d] // the quoted packet as its sender knows it
	is4 := w.h.Version == 4
	head := w.head[:min(len(w.head), w.h.End)]
	src, dst := 8, 24
	if is4 {
		src, dst = 12, 16
	}

	var all, addrs, ports change // all is what changes in the error
	ip := head[in.L3:]
	putAddr(ip, src, is4, sent.src, &addrs)
	putAddr(ip, dst, is4, sent.dst, &addrs)
	all += addrs
	if is4 {
		put16(ip, 10, addrs.apply(be16(ip[10:])), &all)
	}
	l4 := head[in.L4:]
	pseudo := addrs
	if is4 && isEcho(uint32(in.Proto)) {
		pseudo = 0
	}
	switch {
	case hasPorts(uint32(in.Proto)):
		put16(l4, 0, sent.sport(), &ports)
		put16(l4, 2, sent.dport(), &ports)
		all += ports
		field := 6
		if in.Proto == packet.TCP {
			field = 16
		}
		if len(l4) >= field+2 {
			old := be16(l4[field:])
			sum := (pseudo + ports).apply(old)
			switch {
			case in.Proto == packet.UDP && old == 0:
				sum = 0
			case in.Proto == packet.UDP && sum == 0:
				sum = 0xffff
			}
			put16(l4, field, sum, &all)
		}
	case sent.ports != 0:
		id := sent.sport()
		if id == 0 {
			id = sent.dport()
		}
		put16(l4, 4, id, &ports)
		all += ports
		put16(l4, 2, (pseudo + ports).apply(be16(l4[2:])), &all)
	}

	var own change
	outer := head[w.h.L3:]
	putAddr(outer, dst, is4, sent.src, &own)
	if back := sent.dst; back != f.key[d].src {
		// The sender of the quoted packet knows the far end by another address: the error gets that as its source.
		putAddr(outer, src, is4, back, &own)
	}
	if is4 {
		binary.BigEndian.PutUint16(outer[10:], own.apply(be16(outer[10:])))
	} else {
		all += own
	}
	icmp := head[w.h.L4:]
	binary.BigEndian.PutUint16(icmp[2:], all.apply(be16(icmp[2:])))
}

// query handles ICMP that is neither an error nor an echo.
func (r *Router) query(w *work) {
	p := w.p
	if w.h.Version == 6 && w.typ == listenerQuery && w.port != nil && w.port.Listens {
		r.listener(w)
		return
	}
	if w.h.Version == 4 || w.typ < routerSolicitation || w.typ > redirect || w.port == nil {
		r.fresh(w)
		return
	}
	icmp := w.head[w.h.L4:min(len(w.head), w.h.End)]
	if w.ttl() != 255 || icmp[1] != 0 || w.h.End > len(w.head) || w.h.Extensions&packet.HasFragmentHeader != 0 {
		p.Reason = ReasonMalformed // it crossed a router, has another code, or is incomplete or fragmented (RFC 4861, RFC 6980)
		return
	}
	if !w.sums(icmp) {
		p.Reason = ReasonChecksum
		return
	}
	if (w.typ == neighbourSolicitation || w.typ == neighbourAdvertisement) && len(icmp) >= 24 && slices.Contains(w.port.tentative, addr16(icmp[8:])) {
		// It may come from the tentative address itself, whose prefix need not be the port's yet.
		p.Verdict, p.Out = VerdictLocal, LocalPort
		return
	}
	if !w.t.src.unspecified() && !r.mayBeNeighbour(w.port, w.t.src) {
		p.Reason = ReasonSpoofed
		return
	}
	if !w.t.dst.multicast() && !w.port.has(w.t.dst) {
		p.Reason = ReasonNotForUs
		return
	}
	switch w.typ {
	case neighbourSolicitation, neighbourAdvertisement:
		r.discovery(w, icmp)
	default:
		p.Verdict, p.Out = VerdictLocal, LocalPort
	}
}

// sums reports whether the checksum of an ICMPv6 message is right.
func (w *work) sums(icmp []byte) bool {
	return packet.Fold(packet.Add(uint64(w.h.Pseudo(w.head, len(icmp))), icmp)) == 0xffff
}

// listener handles a query of multicast listener discovery. It is one of the link if it has its hop limit
// and comes from a link-local address (RFC 3810, section 6.2). That the options before it have a router
// alert is for the caller to see, who reads the message.
func (r *Router) listener(w *work) {
	p := w.p
	switch {
	case w.ttl() != 1, w.h.Extensions != packet.HasOptions, w.h.End > len(w.head):
		p.Reason = ReasonMalformed
	case !w.sums(w.head[w.h.L4:w.h.End]):
		p.Reason = ReasonChecksum
	case !w.t.src.linkLocal(), w.port.has(w.t.src):
		p.Reason = ReasonSpoofed
	case !w.t.dst.multicast() && !w.port.has(w.t.dst):
		p.Reason = ReasonNotForUs
	default:
		p.Verdict, p.Out = VerdictLocal, LocalPort
	}
}
