package router

import (
	"encoding/binary"

	"barevif/pvnet/packet"
)

// fresh handles a packet that belongs to no flow.
func (r *Router) fresh(w *work) {
	p, s := w.p, r.snap
	state := StateNew
	switch {
	case w.kind == kindQuery && !w.t.dst.multicast():
		state = StateInvalid
	case w.kind == kindQuery:
	case w.t.proto == packet.TCP && w.flags&(tcpSYN|tcpACK) != tcpSYN:
		state = StateInvalid
	case isEcho(w.t.proto) && w.t.ports != 0 && w.t.sport() == 0:
		state = StateInvalid // an answer nobody asked for
	case isEcho(w.t.proto):
		if request, _ := icmpTypes(w.h.Version); w.typ != request {
			state = StateInvalid
		}
	}
	if !r.source(w) {
		return
	}
	target := w.t.dst
	port := w.t.dport()
	translated := false
	if f := s.forwarded(p.In, &w.t); f != nil && state == StateNew && !w.group {
		target, port, translated = f.to, f.first+(port-f.ports.First), true
	}
	if !translated && r.isLocal(w) {
		r.toRouter(w, state)
		return
	}
	next, ok := r.destination(w, target)
	if !ok {
		return
	}
	q := candidate{
		in: p.In, out: next.out, src: w.t.src, dst: target, sport: w.t.sport(), dport: port,
		proto: w.h.Proto, icmpType: w.typ, state: state,
	}
	if !r.allowed(w, &q) || !r.lives(w) {
		return
	}
	if state == StateInvalid {
		r.untracked(w, next)
		return
	}
	i, why := r.enter(w, target, port, translated, next)
	if why != ReasonNone {
		p.Reason = why
		return
	}
	r.pass(w, i, orig)
}

// source checks that the source address may come in here.
func (r *Router) source(w *work) bool {
	p, src := w.p, w.t.src
	switch {
	case src.unspecified():
		if w.port != nil && !w.group {
			p.Reason = ReasonMartian // only frames to groups may have this source: DHCP, neighbour discovery
			return false
		}
	case src.reserved(), src.multicast(), src == broadcast:
		p.Reason = ReasonMartian
		return false
	case w.port == nil: // our own
	case src.linkLocal():
		if w.port.has(src) {
			p.Reason = ReasonSpoofed
			return false
		}
	case !r.snap.admits(w.port, src):
		p.Reason = ReasonSpoofed
		return false
	}
	if _, all := r.snap.bcast[src]; all {
		p.Reason = ReasonMartian
		return false
	}
	return true
}

// isLocal reports whether a packet is for the router itself.
func (r *Router) isLocal(w *work) bool {
	dst := w.t.dst
	if _, own := r.snap.own[dst]; own {
		return true
	}
	if w.port == nil {
		return false
	}
	if dst == broadcast || dst.multicast() || dst == w.port.linkLocal && dst != (addr{}) {
		return true
	}
	id, all := r.snap.bcast[dst]
	return all && id == w.p.In
}

// toRouter handles a packet to the router itself.
func (r *Router) toRouter(w *work, state States) {
	p, dst := w.p, w.t.dst
	group := dst == broadcast || dst.multicast()
	if _, all := r.snap.bcast[dst]; all {
		group = true
	}
	if w.group && !group {
		p.Reason = ReasonNotForUs
		return
	}
	q := candidate{
		in: p.In, out: LocalPort, src: w.t.src, dst: dst, sport: w.t.sport(), dport: w.t.dport(),
		proto: w.h.Proto, icmpType: w.typ, state: state,
	}
	if !r.allowed(w, &q) {
		return
	}
	if group || state == StateInvalid || w.port == nil {
		p.Verdict, p.Out = VerdictLocal, LocalPort // without a flow
		return
	}
	i, why := r.enter(w, dst, w.t.dport(), false, hop{out: LocalPort})
	if why != ReasonNone {
		p.Reason = why
		return
	}
	r.pass(w, i, orig)
}

// destination finds the way of a packet that is forwarded to target.
func (r *Router) destination(w *work, target addr) (hop, bool) {
	p := w.p
	_, all := r.snap.bcast[target]
	switch {
	case target.multicast(), target == broadcast, all, target.reserved(), target.unspecified():
		p.Reason = ReasonMartian
	case w.port != nil && (target.linkLocal() || w.t.src.linkLocal() || w.t.src.unspecified()):
		p.Reason = ReasonMartian
	case w.group:
		p.Reason = ReasonNotForUs
	default:
		next, ok := r.snap.routes.find(target)
		if ok {
			return next, true
		}
		r.refuse(w, ReasonNoRoute)
	}
	return hop{}, false
}

// allowed asks the filter.
func (r *Router) allowed(w *work, q *candidate) bool {
	switch r.snap.decide(q, true) {
	case Accept:
		return true
	case Reject:
		r.refuse(w, ReasonFiltered)
	default:
		w.p.Reason = ReasonFiltered
		if q.state == StateInvalid {
			w.p.Reason = ReasonInvalid
		}
	}
	return false
}

// ttl returns the packet's TTL or hop limit.
func (w *work) ttl() uint8 {
	if w.h.Version == 4 {
		return w.head[w.h.L3+8]
	}
	return w.head[w.h.L3+7]
}

// lives checks the TTL of a packet to be forwarded; that of the router's own is not lowered.
func (r *Router) lives(w *work) bool {
	if w.port != nil && w.ttl() <= 1 {
		r.refuse(w, ReasonTTL)
		return false
	}
	return true
}

// enter makes the flow of the packet in hand, which leaves for target and port by next.
func (r *Router) enter(w *work, target addr, port uint16, translated bool, next hop) (i uint32, why Reason) {
	p := w.p
	s := r.snap
	out := s.port(next.out)
	source, masked := w.t.src, false
	if out != nil && w.port != nil {
		yes := out.Masquerade
		if !source.is4() {
			yes = out.Masquerade6
		}
		if yes && next.out != p.In || translated && next.out == p.In {
			via := next.via
			if via == (addr{}) {
				via = target
			}
			var ok bool
			if source, ok = out.natAddr(target, via); !ok {
				return none, ReasonTranslation
			}
			masked = source != w.t.src
		}
	}
	back := w.t.inverse()
	back.src, back.dst = target, source
	if hasPorts(w.t.proto) {
		back.ports = uint32(port)<<16 | back.ports&0xffff
	}
	if _, _, _, taken := r.find(&back); masked || taken {
		// A packet of the router's own gets another port, too, if its own is in use.
		if !masked && w.port != nil || !r.choose(w, &back, masked) {
			return none, ReasonTranslation
		}
		masked = true
	}
	if back == w.t {
		return none, ReasonMartian // it would be its own answer
	}
	if i, why = r.take(p.In, masked); why != ReasonNone {
		return none, why
	}
	f := &r.table.flows[i]
	r.table.free = f.next[0]
	*f = flow{serial: f.serial, key: [2]tuple{w.t, back}, echoType: w.typ}
	f.side[orig].in, f.side[answer].in = p.In, next.out
	if masked {
		f.flags |= snat
	}
	if translated {
		f.flags |= dnat
	}
	f.changes()
	r.begin(i, p.In)
	f.deadline = r.now + int64(r.snap.times.TCPOpening)
	if w.t.proto != packet.TCP {
		f.deadline = r.now + int64(min(r.snap.times.UDPNew, r.snap.times.ICMP))
	}
	return i, ReasonNone
}

// changes computes how translation changes the checksums.
func (f *flow) changes() {
	for d := range f.side {
		from, to := &f.key[d], f.key[1-d].inverse()
		var c change
		c.words(from.src.sum(), to.src.sum())
		c.words(from.dst.sum(), to.dst.sum())
		f.side[d].ip = change(packet.Fold(uint64(c)))
		if from.proto == icmp4 {
			c = 0 // it has no pseudo-header
		}
		if hasPorts(from.proto) || isEcho(from.proto) {
			c.words(uint64(from.sport()), uint64(to.sport()))
			c.words(uint64(from.dport()), uint64(to.dport()))
		}
		f.side[d].l4 = change(packet.Fold(uint64(c)))
	}
}

// tries is how many port numbers are tried for a new flow.
const tries = 128

// choose finds a free port number, or identifier, for the answers back to a masqueraded flow.
func (r *Router) choose(w *work, back *tuple, masked bool) bool {
	if !hasPorts(back.proto) && !isEcho(back.proto) {
		_, _, _, taken := r.find(back)
		return !taken
	}
	const first, n = 1024, 65536 - 1024
	// The first try depends on the source alone, so that it has one port for all
	// destinations.
	of := tuple{src: w.t.src, dst: back.dst, ports: uint32(w.t.sport()), proto: back.proto}
	port := first + uint16(r.table.hash(&of)%n)
	for range tries {
		back.ports = back.ports&^0xffff | uint32(port)
		if _, _, _, taken := r.find(back); !taken && !r.snap.reservedPort(back.dst, back.proto, port) {
			return true
		}
		port = first + uint16(r.random.Uint32N(n))
	}
	return false
}

// recheck reports whether a flow would be accepted today, in the same way. It is called at the
// first packet after a Configure.
func (r *Router) recheck(i uint32) bool {
	f, s := &r.table.flows[i], r.snap
	from, back := &f.key[orig], &f.key[answer]
	in := s.port(f.in)
	if f.in != LocalPort && (in == nil || int32(in.born-f.gen) > 0 || !from.src.linkLocal() && !s.admits(in, from.src)) {
		return false
	}
	target, port := from.dst, from.dport()
	if fw := s.forwarded(f.in, from); fw != nil {
		target, port = fw.to, fw.first+(port-fw.ports.First)
	}
	if target != back.src || hasPorts(from.proto) && port != back.sport() {
		return false
	}
	next := hop{out: LocalPort}
	if f.side[answer].in != LocalPort || f.flags&dnat != 0 {
		if _, own := s.own[target]; own {
			return false
		}
		var ok bool
		if next, ok = s.routes.find(target); !ok {
			return false
		}
		out := s.port(next.out)
		masked := out.Masquerade
		if !from.src.is4() {
			masked = out.Masquerade6
		}
		masked = masked && next.out != f.in || f.flags&dnat != 0 && next.out == f.in
		switch {
		case f.in == LocalPort:
			if _, own := s.own[from.src]; !own {
				return false
			}
		case masked:
			if !out.has(back.dst) {
				return false
			}
		case f.flags&snat != 0:
			return false
		}
		if int32(out.born-f.gen) > 0 {
			return false
		}
	} else if _, own := s.own[target]; !own && !s.linkLocal(f.in, target) {
		return false
	}
	q := candidate{
		in: f.in, out: next.out, src: from.src, dst: target, sport: from.sport(), dport: port,
		proto: uint8(from.proto), icmpType: f.echoType, state: StateNew,
	}
	if s.decide(&q, false) != Accept {
		return false
	}
	f.side[answer].in = next.out
	f.gen = s.gen
	return true
}

func (s *snapshot) linkLocal(id PortID, a addr) bool {
	p := s.port(id)
	return p != nil && a == p.linkLocal
}

// pass sends a packet on its flow's way, in direction d.
func (r *Router) pass(w *work, i uint32, d int) {
	p := w.p
	f := &r.table.flows[i]
	sd := &f.side[d]
	p.Hash = uint32(w.hash) | 1
	if w.t.proto == packet.TCP && w.h.Fragment != packet.Later {
		w.seg = w.segment()
		if w.seg.fit = f.judge(d, w.flags, &w.seg); w.seg.fit == without {
			p.Reason = ReasonWindow
			return
		}
	}
	if f.side[1-d].in == LocalPort {
		if w.h.Fragment == packet.First {
			r.remember(w, i, d)
		}
		if w.h.Fragment != packet.Later {
			r.follow(w, i, d)
		}
		r.rewrite(w, f, d)
		p.Verdict, p.Out = VerdictLocal, LocalPort
		return
	}
	if !r.lives(w) {
		return
	}
	if sd.gen != r.snap.gen || sd.neigh != r.neigh || r.now >= sd.until {
		if !r.resolve(w, f, d) {
			if p.Verdict == VerdictNeighbour && w.h.Fragment == packet.First {
				r.remember(w, i, d) // so that the later ones may wait, too
			}
			return
		}
	}
	out := r.snap.port(sd.out)
	verdict, ok := r.fits(w, out)
	if !ok {
		return
	}
	if w.h.Fragment == packet.First {
		r.remember(w, i, d)
	}
	if w.h.Fragment != packet.Later {
		r.follow(w, i, d)
	}
	r.rewrite(w, f, d)
	if r.snap.clamp && w.flags&tcpSYN != 0 {
		r.clampMSS(w, out)
	}
	r.leave(w, out, sd.mac)
	p.Verdict, p.Out = verdict, sd.out
}

// resolve finds where packets of direction d of a flow go next.
func (r *Router) resolve(w *work, f *flow, d int) bool {
	p := w.p
	dst := f.key[1-d].src
	next, ok := r.snap.routes.find(dst)
	if ok && dst.linkLocal() {
		next, ok = hop{out: f.side[1-d].in}, r.snap.port(f.side[1-d].in) != nil
	}
	if !ok {
		r.refuse(w, ReasonNoRoute)
		return false
	}
	if d == answer && next.out != f.in && !r.snap.port(f.in).AnySource {
		p.Reason = ReasonNoRoute // the answer's receiver is behind another port now, which must not get it
		return false
	}
	via := next.via
	if via == (addr{}) {
		via = dst
	}
	mac, until, ok := r.neighbour(w, next.out, via)
	if !ok {
		return false
	}
	sd := &f.side[d]
	sd.out, sd.mac, sd.until, sd.gen, sd.neigh = next.out, mac, until, r.snap.gen, r.neigh
	return true
}

// fits checks a packet against the MTU of the port it leaves by.
func (r *Router) fits(w *work, out *port) (Verdict, bool) {
	size := w.h.End - w.h.L3
	if w.p.GSO != 0 {
		size = min(size, w.h.L5-w.h.L3+int(w.p.GSO))
	}
	if size <= out.MTU {
		return VerdictForward, true
	}
	const dontFragment = 0x40
	if w.h.Version == 4 && w.head[w.h.L3+6]&dontFragment == 0 && w.p.GSO == 0 {
		w.p.MTU = out.MTU
		return VerdictFragment, true
	}
	w.p.reply.mtu = uint32(out.MTU)
	r.refuse(w, ReasonTooBig)
	return 0, false
}

// rewrite translates a packet of direction d of a flow.
func (r *Router) rewrite(w *work, f *flow, d int) {
	if f.flags&(snat|dnat) == 0 {
		return
	}
	w.p.Translated = true
	sd := &f.side[d]
	to := f.key[1-d].inverse()
	ip := w.head[w.h.L3:]
	if w.h.Version == 4 {
		binary.BigEndian.PutUint16(ip[10:], sd.ip.apply(be16(ip[10:])))
		to.src.put(ip[12:16])
		to.dst.put(ip[16:20])
	} else {
		to.src.put(ip[8:24])
		to.dst.put(ip[24:40])
	}
	if w.h.L4 == 0 || w.h.Fragment == packet.Later {
		return
	}
	l4 := w.head[w.h.L4:]
	switch w.t.proto {
	case packet.TCP:
		binary.BigEndian.PutUint32(l4, to.ports)
		field := be16(l4[16:])
		if w.p.Partial {
			field = sd.ip.applySum(field)
		} else {
			field = sd.l4.apply(field)
		}
		binary.BigEndian.PutUint16(l4[16:], field)
	case packet.UDP:
		binary.BigEndian.PutUint32(l4, to.ports)
		field := be16(l4[6:])
		switch {
		case w.p.Partial:
			field = sd.ip.applySum(field)
		case field != 0: // 0 is no checksum
			if field = sd.l4.apply(field); field == 0 {
				field = 0xffff
			}
		}
		binary.BigEndian.PutUint16(l4[6:], field)
	case icmp4, icmp6:
		id := to.sport()
		if id == 0 {
			id = to.dport()
		}
		binary.BigEndian.PutUint16(l4[4:], id)
		binary.BigEndian.PutUint16(l4[2:], sd.l4.apply(be16(l4[2:])))
	}
}

// leave writes TTL and MACs of a packet that is forwarded.
func (r *Router) leave(w *work, out *port, mac [6]byte) {
	ip := w.head[w.h.L3:]
	if w.port != nil {
		if w.h.Version == 4 {
			var c change
			put16(ip, 8, be16(ip[8:])-0x100, &c)
			binary.BigEndian.PutUint16(ip[10:], c.apply(be16(ip[10:])))
		} else {
			ip[7]--
		}
	}
	copy(w.head[0:6], mac[:])
	copy(w.head[6:12], out.MAC[:])
}

// untracked forwards a packet that begins no flow, as a rule with StateInvalid allows.
func (r *Router) untracked(w *work, next hop) {
	p := w.p
	out := r.snap.port(next.out)
	if w.t.src.is4() && out.Masquerade || !w.t.src.is4() && out.Masquerade6 {
		p.Reason = ReasonInvalid // there is no flow to say how it is translated
		return
	}
	r.direct(w, next, w.t.dst)
}

// direct forwards a packet that is not translated to dst.
func (r *Router) direct(w *work, next hop, dst addr) {
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
	r.leave(w, out, mac)
	w.p.Verdict, w.p.Out = verdict, next.out
}

// clampMSS lowers the MSS option of a SYN to what fits both ports.
func (r *Router) clampMSS(w *work, out *port) {
	const end, nop, mss = 0, 1, 2
	mtu := out.MTU
	if w.port != nil {
		mtu = min(mtu, w.port.MTU)
	}
	most := mtu - 40
	if w.h.Version == 6 {
		most = mtu - 60
	}
	l4 := w.head[w.h.L4:w.h.L5]
	for at := 20; at < len(l4); {
		switch {
		case l4[at] == end:
			return
		case l4[at] == nop:
			at++
			continue
		case at+2 > len(l4), l4[at+1] < 2, at+int(l4[at+1]) > len(l4):
			return
		}
		if l4[at] == mss && l4[at+1] == 4 {
			if int(be16(l4[at+2:])) > most {
				old := [4]byte{l4[at+2], l4[at+3]}
				binary.BigEndian.PutUint16(l4[at+2:], uint16(most))
				if !w.p.Partial { // what is still to be summed needs no change
					var c change
					from, to := be16(old[:]), uint16(most)
					if at&1 != 0 { // the option may begin inside a word
						from, to = from<<8|from>>8, to<<8|to>>8
					}
					c.words(uint64(from), uint64(to))
					binary.BigEndian.PutUint16(l4[16:], c.apply(be16(l4[16:])))
				}
			}
			return
		}
		at += int(l4[at+1])
	}
}
