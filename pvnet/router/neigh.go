package router

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"barevif/pvnet/packet"
)

const etherARP = 0x0806

// A neighbour is known for neighbourLife since it was last heard of. After neighbourFresh
// Packet.Ask has the caller solicit it again, at most every askEvery.
const (
	neighbourFresh = 60 * time.Second
	neighbourLife  = 120 * time.Second
	askEvery       = time.Second
)

type neighbour struct {
	mac   [6]byte
	heard int64 // when it was last heard of, by Router.now
	asked int64 // when Packet.Ask was last set for it
}

var noAddr netip.Addr

// neighbour returns the MAC of a neighbour at a port, and when to call neighbour again for it. If the MAC is not
// known it sets VerdictNeighbour.
func (r *Router) neighbour(w *work, out PortID, a addr) (mac [6]byte, until int64, ok bool) {
	p := w.p
	s := r.state(out)
	n := s.neighbours[a]
	if n != nil && r.now-n.heard >= int64(neighbourLife) {
		delete(s.neighbours, a)
		r.neigh++
		n = nil
	}
	if n == nil {
		p.Verdict, p.Reason, p.Out, p.Next = VerdictNeighbour, ReasonNoNeighbour, out, a.netip()
		return mac, 0, false
	}
	until = n.heard + int64(neighbourFresh)
	if r.now >= until {
		until = n.asked + int64(askEvery)
		if r.now >= until {
			n.asked = r.now
			until = r.now + int64(askEvery)
			p.Ask, p.Next = true, a.netip()
		}
		until = min(until, n.heard+int64(neighbourLife))
	}
	return n.mac, until, true
}

// mayBeNeighbour reports whether an address may be that of a host on the port's link.
func (r *Router) mayBeNeighbour(p *port, a addr) bool {
	switch {
	case a.reserved(), a.multicast(), p.has(a):
		return false
	case a.linkLocal() && !a.is4():
		return true
	case len(p.sources) > 0 && !containsAny(p.sources, a):
		return false
	}
	if _, own := r.snap.own[a]; own {
		return false
	}
	if _, all := r.snap.bcast[a]; all {
		return false
	}
	return containsAny(p.onLink, a)
}

// learn notes where a neighbour is. The caller has checked that it may be one.
func (r *Router) learn(id PortID, a addr, mac [6]byte) {
	s := r.state(id)
	n := s.neighbours[a]
	if n == nil {
		if len(s.neighbours) >= r.limits.Neighbours {
			r.forgetOne(s)
		}
		n = &neighbour{}
		s.neighbours[a] = n
	}
	if n.mac != mac {
		r.neigh++
	}
	n.mac, n.heard = mac, r.now
	n.asked = r.now - int64(askEvery)
}

// forgetOne removes the oldest of some neighbours of a port.
func (r *Router) forgetOne(s *portState) {
	var oldest addr
	seen, at := 0, int64(0)
	for a, n := range s.neighbours {
		if seen == 0 || n.heard < at {
			oldest, at = a, n.heard
		}
		if seen++; seen == 8 {
			break
		}
	}
	delete(s.neighbours, oldest)
	r.neigh++
}

// Learn notes that the host with the address is at port, under mac, for two minutes; what
// arrives there by ARP or neighbour discovery is learnt by Process. It refuses, with an error,
// a port that is not there, and an address that is not on the port's link or is the router's own.
func (r *Router) Learn(now time.Duration, port PortID, a netip.Addr, mac [6]byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advance(now)
	p := r.snap.port(port)
	switch {
	case p == nil:
		return fmt.Errorf("router: there is no port %d to learn %v at", port, a)
	case !a.IsValid() || !r.mayBeNeighbour(p, toAddr(a)):
		return fmt.Errorf("router: %v is no address of a neighbour at port %d (%s): its prefixes and sources say which are", a, port, p.Name)
	case mac == [6]byte{} || mac[0]&1 != 0:
		return fmt.Errorf("router: %x is no MAC address of a neighbour", mac)
	}
	r.learn(port, toAddr(a), mac)
	return nil
}

// Forget removes a neighbour. It does nothing for one that is not known.
func (r *Router) Forget(port PortID, a netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.snap.port(port) == nil || !a.IsValid() {
		return
	}
	delete(r.states[port].neighbours, toAddr(a))
	r.neigh++
}

// arp handles a frame of ARP (RFC 826).
func (r *Router) arp(w *work) {
	p := w.p
	if w.port == nil {
		p.Reason = ReasonNotIP
		return
	}
	if len(w.head) < 14+28 {
		p.Reason = ReasonMalformed
		return
	}
	b := w.head[14 : 14+28]
	if [6]byte(b[:6]) != [6]byte{0, 1, 8, 0, 6, 4} {
		p.Reason = ReasonMalformed
		return
	}
	mac, sender, target := [6]byte(b[8:14]), addr4(b[14:]), addr4(b[24:])
	probe := sender.unspecified()
	switch {
	case mac != [6]byte(w.head[6:12]):
		p.Reason = ReasonSourceMAC
		return
	case !probe && !r.mayBeNeighbour(w.port, sender):
		p.Reason = ReasonSpoofed
		return
	}
	const request, answer = 1, 2
	switch op := be16(b[6:]); {
	case op == request && w.port.has(target):
		p.Verdict, p.Out = VerdictReply, p.In
		p.reply = reply{kind: replyARP, port: w.port.MAC}
		fallthrough
	case op == answer, op == request && sender == target, op == request && r.known(p.In, sender):
		if !probe {
			r.learn(p.In, sender, mac)
			p.Learnt, p.Next = true, sender.netip()
		}
		if p.Verdict == VerdictDrop {
			p.Reason = ReasonNotForUs
			if p.Learnt {
				p.Reason = ReasonNone
			}
		}
	default:
		p.Reason = ReasonNotForUs
	}
}

func (r *Router) known(id PortID, a addr) bool { return r.state(id).neighbours[a] != nil }

// discovery handles a neighbour solicitation or advertisement (RFC 4861) whose checksum, hop
// limit and source were checked.
func (r *Router) discovery(w *work, icmp []byte) {
	p := w.p
	if len(icmp) < 24 {
		p.Reason = ReasonMalformed
		return
	}
	target := addr16(icmp[8:])
	const sourceLink, targetLink = 1, 2
	kind := byte(sourceLink)
	if w.typ == neighbourAdvertisement {
		kind = targetLink
	}
	var mac [6]byte
	for opts := icmp[24:]; len(opts) > 0; {
		if len(opts) < 8 || opts[1] == 0 || int(opts[1])*8 > len(opts) {
			p.Reason = ReasonMalformed
			return
		}
		if opts[0] == kind && opts[1] == 1 {
			mac = [6]byte(opts[2:8])
		}
		opts = opts[int(opts[1])*8:]
	}
	if mac != [6]byte{} && (mac[0]&1 != 0 || w.port.guardMAC && mac != w.port.SourceMAC) {
		p.Reason = ReasonSourceMAC
		return
	}
	if w.typ == neighbourAdvertisement {
		if mac == [6]byte{} {
			mac = [6]byte(w.head[6:12])
		}
		if !r.mayBeNeighbour(w.port, target) {
			p.Reason = ReasonSpoofed
			return
		}
		r.learn(p.In, target, mac)
		p.Learnt, p.Next = true, target.netip()
		return
	}
	probe := w.t.src.unspecified()
	if !probe && mac != [6]byte{} {
		r.learn(p.In, w.t.src, mac)
		p.Learnt, p.Next = true, w.t.src.netip()
	}
	if !w.port.has(target) {
		if p.Reason = ReasonNotForUs; p.Learnt {
			p.Reason = ReasonNone
		}
		return
	}
	p.Verdict, p.Out = VerdictReply, p.In
	p.reply = reply{kind: replyAdvert, port: w.port.MAC, from: target, probe: probe}
}

// AppendSolicit appends the frame that asks for the MAC address of a neighbour at port: an ARP
// request or a neighbour solicitation. It appends nothing if the port is not there or has no
// address of the family to ask from.
func (r *Router) AppendSolicit(b []byte, id PortID, a netip.Addr) []byte {
	r.mu.Lock()
	p := r.snap.port(id)
	r.mu.Unlock()
	if p == nil || !a.IsValid() {
		return b
	}
	x := toAddr(a)
	from, ok := p.source(x)
	if !ok {
		return b
	}
	if x.is4() {
		b = append(b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
		b = append(b, p.MAC[:]...)
		b = append(b, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
		b = append(b, p.MAC[:]...)
		b = binary.BigEndian.AppendUint32(b, uint32(from.lo))
		b = append(b, 0, 0, 0, 0, 0, 0)
		return binary.BigEndian.AppendUint32(b, uint32(x.lo))
	}
	group := addr{0xff02 << 48, 1<<32 | 0xff<<24 | x.lo&0xffffff} // solicited-node
	g := uint32(group.lo)
	b = append(b, 0x33, 0x33, byte(g>>24), byte(g>>16), byte(g>>8), byte(g))
	b = append(b, p.MAC[:]...)
	b = append(b, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, icmp6, 255)
	at := len(b) - 8
	b = from.append(b)
	b = group.append(b)
	b = append(b, neighbourSolicitation, 0, 0, 0, 0, 0, 0, 0)
	b = x.append(b)
	b = append(b, 1, 1)
	b = append(b, p.MAC[:]...)
	finish6(b[at:])
	return b
}

func (a addr) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, a.hi)
	return binary.BigEndian.AppendUint64(b, a.lo)
}

// finish6 writes the checksum of an ICMPv6 packet without extension headers, whose field is 0.
func finish6(ip []byte) {
	n := len(ip) - 40
	sum := packet.Add(uint64(n)+icmp6, ip[8:])
	binary.BigEndian.PutUint16(ip[42:], ^packet.Fold(sum))
}

// source returns the port's own address from which it talks to a.
func (p *port) source(a addr) (addr, bool) {
	if !a.is4() && a.linkLocal() {
		return p.linkLocal, p.linkLocal != addr{}
	}
	return p.natAddr(a, a)
}
