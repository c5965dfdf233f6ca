package router

import (
	"encoding/binary"

	"barevif/pvnet/packet"
)

// What follows is the tracking of TCP's windows after G. van Rooij, "Real Stateful TCP Packet
// Filtering in IP Filter" (2000): a segment that a TCP can have sent lies between what its receiver
// has acknowledged and what the receiver has offered. Only such a one moves a flow to another
// state, or the bounds themselves. So who can neither see a connection nor guess its numbers
// does not end it; nor by an ICMP error, which has to quote a segment that is under way.

// A window is what a flow knows of the bytes that one of its sides sends. Sequence numbers are
// compared modulo 2^32.
type window struct {
	acked uint32 // up to where the other side has acknowledged; at first what a SYN's answer acknowledges at least
	end   uint32 // behind the last byte, SYN or FIN that this side has sent
	edge  uint32 // behind the last byte that the other side has room for; a FIN may follow, and then segments begin one further
	most  uint32 // the greatest window that this side has offered, in bytes; at least 1
	shift uint8  // of the windows that it offers, if both sides scale
	flags windowFlags
}

type windowFlags uint8

const (
	windowKnown  windowFlags = 1 << iota // a SYN of this side was seen: the fields above say something
	windowScales                         // it had a window scale option (RFC 7323)
)

// A segment is what a TCP packet says.
type segment struct {
	seq, end uint32 // end is behind its last byte, SYN or FIN
	ack      uint32 // with flag ACK
	win      uint32 // not scaled
	shift    uint8  // of a SYN
	scales   bool   // a SYN has the option for it
	guessed  bool   // end is a bound: of a first fragment nobody knows how long the rest is
	fit      fit
}

// A fit is how a segment fits a flow.
type fit uint8

const (
	within  fit = iota // it may change the flow's state
	beside             // it may not, but is forwarded: its receiver decides, and answers what it does not believe
	without            // it is a RST or FIN that its receiver would not believe, and is dropped
)

// oldAck is how far behind the newest acknowledgement an older one may be that comes late, in
// bytes, unless the window is larger.
const oldAck = 1 << 16

// mostShift is the greatest window scale (RFC 7323, 2.3).
const mostShift = 14

// segment reads the TCP header of the packet in hand.
func (w *work) segment() (s segment) {
	b := w.head[w.h.L4:w.h.L5]
	s.seq, s.ack, s.win = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:]), uint32(be16(b[14:]))
	s.end = s.seq + uint32(w.h.End-w.h.L5)
	if w.h.Fragment == packet.First {
		s.end, s.guessed = s.seq+0xffff, true
	}
	if w.flags&tcpFIN != 0 {
		s.end++
	}
	if w.flags&tcpSYN != 0 {
		s.end++
		s.shift, s.scales = windowScale(b[20:])
	}
	return s
}

// windowScale finds the window scale among the options of a SYN.
func windowScale(b []byte) (shift uint8, ok bool) {
	const end, nop, scale = 0, 1, 3
	for len(b) > 0 && b[0] != end {
		if b[0] == nop {
			b = b[1:]
			continue
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			break
		}
		if b[0] == scale && b[1] == 3 {
			return min(b[2], mostShift), true
		}
		b = b[b[1]:]
	}
	return 0, false
}

// upTo reports whether a is b or before it.
func upTo(a, b uint32) bool { return int32(b-a) >= 0 }

// judge returns how a segment of direction d fits the flow.
func (f *flow) judge(d int, flags uint8, s *segment) fit {
	from, to := &f.window[d], &f.window[1-d]
	answers := flags&tcpACK != 0 && upTo(to.acked, s.ack) && upTo(s.ack, to.end)
	switch {
	case flags&tcpSYN != 0:
		switch {
		case f.state > answered, flags&tcpACK != 0 && to.known() && !answers,
			flags&tcpACK == 0 && from.known() && to.known() && s.seq+1 != from.acked:
			return beside // of an earlier or a later connection: a TCP answers with what it knows (RFC 5961, 4)
		}
		return within
	case !to.known():
		return beside // nobody knows what it may send
	case !from.known(): // of a side whose SYN was not seen: it can refuse the connection
		if flags&tcpRST == 0 {
			return beside
		}
		if !answers {
			return without
		}
		return within
	case flags&tcpRST != 0:
		// Its receiver believes it at most where it has room (RFC 5961, 3.2). The number that it
		// acknowledges says nothing: some send none with the flag set.
		if !upTo(from.acked, s.seq) || !upTo(s.seq, from.edge+1) {
			return without
		}
		return within
	}
	late := max(from.most, oldAck)
	if upTo(from.acked, s.end) && upTo(s.seq, from.edge+1) &&
		(flags&tcpACK == 0 || upTo(s.ack, to.end) && upTo(to.acked, s.ack+late)) {
		return within
	}
	if flags&tcpFIN != 0 {
		return without
	}
	return beside
}

// underWay reports whether a segment of direction d with sequence number seq can still be on its way:
// the router believes an ICMP error about such a segment alone (RFC 5927, 4.1). Its number is at least
// the other side's acknowledgement, less one for a SYN and for a keep-alive probe, and at most the
// number that follows the sender's last byte, which a segment without data has.
func (f *flow) underWay(d int, seq uint32) bool {
	w := &f.window[d]
	return w.known() && upTo(w.acked-1, seq) && upTo(seq, w.end)
}

func (w *window) known() bool { return w.flags&windowKnown != 0 }

// track moves the bounds by a segment of direction d that is within them.
func (f *flow) track(d int, flags uint8, s *segment) {
	from, to := &f.window[d], &f.window[1-d]
	offered := max(s.win, 1) // also without room a sender tries one byte
	switch {
	case flags&tcpSYN != 0:
		first := !from.known()
		*from = window{acked: s.seq + 1, end: s.end, edge: s.seq + 1, most: offered, shift: s.shift, flags: windowKnown}
		if s.scales {
			from.flags |= windowScales
		}
		if to.known() {
			from.edge += to.most
			if first && flags&tcpACK == 0 { // both open at once
				to.edge += offered
			}
		}
	case !from.known() || !to.known():
		return // a RST that refuses
	default:
		if from.flags&to.flags&windowScales != 0 {
			offered = max(s.win<<from.shift, 1)
		}
		from.most = max(from.most, offered)
		end := s.end
		if s.guessed && !upTo(end, from.edge) {
			end = from.edge
		}
		if !upTo(end, from.end) {
			from.end = end
		}
	}
	if flags&tcpACK == 0 || !to.known() {
		return
	}
	if !upTo(s.ack, to.acked) {
		to.acked = s.ack
	}
	if edge := s.ack + offered; !upTo(edge, to.edge) {
		to.edge = edge
	}
}
