package router

import (
	"hash/maphash"
	"time"

	"barevif/pvnet/packet"
)

// none is no index of a flow or node.
const none = ^uint32(0)

// Directions of a flow's packets.
const (
	orig   = 0 // as the packet that began it
	answer = 1
)

// A flow is one entry of the table. Its index times two, plus a direction, is a node of
// the hash chains.
type flow struct {
	// key names the packets of each direction as they arrive, before translation. They leave as
	// the inverse of the other direction's key.
	key    [2]tuple
	side   [2]side
	window [2]window // of TCP, by the direction in which the bytes go

	next     [2]uint32 // the next node in the chain; next[0] also links the free flows
	deadline int64     // when the flow ends without another packet, by Router.now
	touched  int64     // when it last went to the end of its list
	serial   uint32    // changes when the entry is used for another flow
	gen      uint32    // generation of the snapshot that last accepted it

	before, after uint32 // neighbours in the list of its port and class

	in         PortID // of packets of direction orig; charged with the flow
	state      state
	flags      flowFlags
	echoType   uint8 // ICMP type that began it, for the filter
	listed     uint8 // class of the list it is in
	used       bool
	translated bool
}

type flowFlags uint8

const (
	finOrig   flowFlags = 1 << iota // a FIN came in direction orig; in state reset: the RST did
	finAnswer                       // the same for direction answer
	snat                            // the source is translated
	dnat                            // the destination is translated
)

// A side is what a flow keeps for the packets of one direction: where they come in, and
// where the last one went, as long as that holds.
type side struct {
	in     PortID
	out    PortID
	mac    [6]byte
	gen    uint32 // snapshot.gen when out and mac were found
	neigh  uint32 // Router.neigh when they were
	until  int64  // when the neighbour is looked at again
	ip, l4 change // by translation: of addresses, in the IPv4 header's checksum and in a partial one; of all that the transport's checksum covers
}

// A state is where a flow is in its life.
//
//	state       TCP: entered when                          UDP and others
//	opening     SYN                                        first packet
//	answered    SYN|ACK came back, or a SYN
//	established the first side acknowledged                an answer came
//	closing     one side sent FIN
//	closed      both did
//	reset       RST; back to established if its receiver goes on after resetDoubt
//
// Of TCP only a segment within the flow's windows (tcp.go) moves it.
type state uint8

const (
	opening state = iota
	answered
	established
	closing
	closed
	reset
)

// resetDoubt is how long after a RST a packet of the RST's receiver shows that the receiver did not
// believe it. A packet that comes earlier may have been on its way when the RST came.
const resetDoubt = 2 * time.Second

// Classes of the lists of a port's flows. The flows that are half open or over are evicted first.
const (
	halfOpen = 0
	full     = 1
	classes  = 2
)

// A list holds the flows of a port and class, the one that was longest without a packet first (to
// the second).
type list struct{ first, last uint32 }

// A table holds all flows.
type table struct {
	flows   []flow
	buckets []uint32 // first node of each chain
	mask    uint64
	seed    maphash.Seed
	free    uint32 // first free flow
	sweepAt uint32 // the flow that sweep looks at next
	n, most int    // flows now, and most at once
	serial  uint32 // of the flow that began last
}

func newTable(n int) table {
	size := 1
	for size < n*2 {
		size *= 2
	}
	t := table{flows: make([]flow, n), buckets: make([]uint32, size), mask: uint64(size - 1), seed: maphash.MakeSeed()}
	for i := range t.buckets {
		t.buckets[i] = none
	}
	for i := range t.flows {
		t.flows[i].next[0] = uint32(i + 1)
	}
	t.flows[n-1].next[0] = none
	return t
}

func (t *table) hash(k *tuple) uint64 { return maphash.Comparable(t.seed, *k) }

// lookup returns the node with the key, or none. The flow may be past its deadline.
func (t *table) lookup(k *tuple, h uint64) uint32 {
	n := t.buckets[h&t.mask]
	for n != none {
		f := &t.flows[n>>1]
		if f.key[n&1] == *k {
			return n
		}
		n = f.next[n&1]
	}
	return none
}

func (t *table) link(n uint32) {
	f := &t.flows[n>>1]
	b := &t.buckets[t.hash(&f.key[n&1])&t.mask]
	f.next[n&1] = *b
	*b = n
}

func (t *table) unlink(n uint32) {
	at := &t.buckets[t.hash(&t.flows[n>>1].key[n&1])&t.mask]
	for *at != n {
		at = &t.flows[*at>>1].next[*at&1]
	}
	*at = t.flows[n>>1].next[n&1]
}

// find returns the live flow and direction of packets with the key.
func (r *Router) find(k *tuple) (i uint32, d int, h uint64, ok bool) {
	h = r.table.hash(k)
	n := r.table.lookup(k, h)
	if n == none {
		return 0, 0, h, false
	}
	i = n >> 1
	if r.table.flows[i].deadline <= r.now {
		r.end(i)
		return 0, 0, h, false
	}
	return i, int(n & 1), h, true
}

// take returns a free entry of the table for a flow that begins at port in, or says why
// there is none. It evicts by the rules of the package comment.
func (r *Router) take(in PortID, translated bool) (i uint32, why Reason) {
	t := &r.table
	own := r.state(in)
	if old := own.lists[full].first; old != none && t.flows[old].deadline <= r.now {
		r.end(old)
	}
	if own.flows >= r.limits.FlowsPerPort || translated && own.translated >= r.limits.NATPerPort {
		old := r.spare(own)
		if old == none || translated && own.flows < r.limits.FlowsPerPort && !t.flows[old].translated {
			own.refused++
			return none, ReasonFlowQuota
		}
		own.evicted++
		r.end(old)
	}
	if t.free != none {
		return t.free, ReasonNone
	}
	share := len(t.flows) / max(r.present, 1)
	if own.flows < share {
		worst := own
		for _, s := range r.states {
			if s != nil && s.flows > worst.flows {
				worst = s
			}
		}
		if r.local.flows > worst.flows {
			worst = &r.local
		}
		own = worst
		if old := own.lists[halfOpen].first; old == none && own.lists[full].first != none {
			own.evicted++
			r.end(own.lists[full].first)
			return t.free, ReasonNone
		}
	}
	if old := r.spare(own); old != none {
		own.evicted++
		r.end(old)
		return t.free, ReasonNone
	}
	r.state(in).refused++
	return none, ReasonFlowTable
}

// spare returns the flow of s whose place a new one takes: the oldest that is half open or over. Of
// the router's own it is the oldest of all, since its TCP/IP has a flow for each question that it asks a
// name server, which lives long after the answer; guests cause them as fast as they like, and one that was
// refused is all guests' lack of names.
func (r *Router) spare(s *portState) uint32 {
	old := s.lists[halfOpen].first
	if s != &r.local {
		return old
	}
	if done := s.lists[full].first; old == none || done != none && r.table.flows[done].touched <= r.table.flows[old].touched {
		return done
	}
	return old
}

// begin makes the flow that take returned an entry of the table. Its keys, in and sides are set
// by the caller before.
func (r *Router) begin(i uint32, in PortID) {
	t := &r.table
	f := &t.flows[i]
	t.serial++
	f.serial, f.used, f.in, f.gen = t.serial, true, in, r.snap.gen
	f.state, f.flags = opening, f.flags&(snat|dnat)
	f.translated = f.flags&snat != 0
	t.link(i<<1 | orig)
	t.link(i<<1 | answer)
	s := r.state(in)
	s.flows++
	s.most = max(s.most, s.flows)
	if f.translated {
		s.translated++
	}
	t.n++
	t.most = max(t.most, t.n)
	f.listed = halfOpen
	r.append(i, s)
	f.touched = r.now
}

// end takes a flow out of the table.
func (r *Router) end(i uint32) {
	t := &r.table
	f := &t.flows[i]
	t.unlink(i<<1 | orig)
	t.unlink(i<<1 | answer)
	s := r.state(f.in)
	r.remove(i, s)
	s.flows--
	if f.translated {
		s.translated--
	}
	*f = flow{serial: f.serial}
	f.next[0], t.free = t.free, i
	t.n--
}

// append puts a flow at the end of its list.
func (r *Router) append(i uint32, s *portState) {
	f := &r.table.flows[i]
	l := &s.lists[f.listed]
	f.before, f.after = l.last, none
	if l.last != none {
		r.table.flows[l.last].after = i
	} else {
		l.first = i
	}
	l.last = i
}

func (r *Router) remove(i uint32, s *portState) {
	f := &r.table.flows[i]
	l := &s.lists[f.listed]
	if f.before != none {
		r.table.flows[f.before].after = f.after
	} else {
		l.first = f.after
	}
	if f.after != none {
		r.table.flows[f.after].before = f.before
	} else {
		l.last = f.before
	}
}

// touch notes that a packet of the flow passed and that it lives for d from now.
func (r *Router) touch(i uint32, d time.Duration) {
	f := &r.table.flows[i]
	f.deadline = r.now + int64(d)
	class := uint8(halfOpen)
	if f.state == established || f.state == closing {
		class = full
	}
	if class == f.listed && r.now-f.touched < int64(time.Second) {
		return
	}
	s := r.state(f.in)
	r.remove(i, s)
	f.listed, f.touched = class, r.now
	r.append(i, s)
}

// sweep ends flows past their deadlines among the next n entries.
func (r *Router) sweep(n int) {
	t := &r.table
	for range min(n, len(t.flows)) {
		if f := &t.flows[t.sweepAt]; f.used && f.deadline <= r.now {
			r.end(t.sweepAt)
		}
		if t.sweepAt++; int(t.sweepAt) == len(t.flows) {
			t.sweepAt = 0
		}
	}
}

// sweepRound is how long a look at the whole table may take. A faster one would cost a busy
// router a cache miss for each entry and find nothing.
const sweepRound = 4 * time.Second

// sweepSome sweeps as much as is due since it last did, at most n entries.
func (r *Router) sweepSome(n int) {
	const least = 8 // at once
	each := max(int64(sweepRound)/int64(len(r.table.flows)), 1)
	r.swept = max(r.swept, r.now-int64(sweepRound)) // more than all is never due
	due := (r.now - r.swept) / each
	if due < least {
		return
	}
	due = min(due, int64(n))
	r.swept += due * each
	r.sweep(int(due))
}

// TCP flags.
const (
	tcpFIN = 0x01
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpACK = 0x10
)

// badFlags reports whether no TCP sends a segment with these flags.
func badFlags(flags uint8) bool {
	switch flags & (tcpFIN | tcpSYN | tcpRST | tcpACK) {
	case 0, tcpFIN, tcpSYN | tcpFIN, tcpSYN | tcpRST, tcpSYN | tcpFIN | tcpACK, tcpSYN | tcpRST | tcpACK,
		tcpFIN | tcpRST, tcpFIN | tcpRST | tcpACK, tcpSYN | tcpFIN | tcpRST, tcpSYN | tcpFIN | tcpRST | tcpACK:
		return true
	}
	return false
}

// reopens reports whether a TCP segment of direction d begins a new flow in place of this one,
// which is over. After a RST, which may be forged, the side that began the flow may do so.
func (f *flow) reopens(d int, flags uint8) bool {
	return flags&(tcpSYN|tcpACK) == tcpSYN && (f.state == closed || f.state == reset && d == orig)
}

// follow advances the state of a flow by the packet in hand, of direction d, that is about to
// leave.
func (r *Router) follow(w *work, i uint32, d int) {
	f := &r.table.flows[i]
	times := &r.snap.times
	switch proto := w.h.Proto; {
	case proto == packet.TCP:
		r.touch(i, r.followTCP(f, d, w.flags, &w.seg))
	default:
		if d == answer && f.state == opening {
			f.state = established
		}
		switch {
		case isEcho(uint32(proto)):
			r.touch(i, times.ICMP)
		case proto != packet.UDP:
			r.touch(i, times.Other)
		case f.state == opening:
			r.touch(i, times.UDPNew)
		default:
			r.touch(i, times.UDP)
		}
	}
}

// followTCP returns how long the flow lives from now on.
func (r *Router) followTCP(f *flow, d int, flags uint8, s *segment) time.Duration {
	times := &r.snap.times
	if s.fit == within {
		f.track(d, flags, s)
	} else if f.state != reset {
		return f.lifeTCP(times)
	}
	if f.state == reset {
		since := r.now - (f.deadline - int64(times.TCPReset))
		// finOrig or finAnswer is the sender of the RST here.
		fromReceiver := (f.flags&finOrig != 0) == (d == answer)
		if s.fit != within || flags&tcpRST != 0 || !fromReceiver || since < int64(resetDoubt) {
			return time.Duration(f.deadline - r.now)
		}
		f.state = established
		f.flags &^= finOrig | finAnswer
	}
	switch {
	case flags&tcpRST != 0:
		if f.state == opening && d == orig || f.state >= closed {
			break // it cannot end what the other side has not seen, or what is over
		}
		f.state = reset
		f.flags = f.flags&^(finOrig|finAnswer) | finOrig<<d
		return times.TCPReset
	case flags&tcpSYN != 0:
		if f.state == opening && d == answer {
			f.state = answered
		}
	case f.state == answered && d == orig:
		f.state = established
	}
	if flags&tcpFIN != 0 && f.state >= answered {
		f.flags |= finOrig << d
		f.state = closing
		if f.flags&(finOrig|finAnswer) == finOrig|finAnswer {
			f.state = closed
		}
	}
	return f.lifeTCP(times)
}

// lifeTCP returns how long a flow of TCP lives without a packet.
func (f *flow) lifeTCP(times *Timeouts) time.Duration {
	switch f.state {
	case established:
		return times.TCPEstablished
	case closing:
		return times.TCPClosing
	case closed:
		return times.TCPClosed
	}
	return times.TCPOpening
}
