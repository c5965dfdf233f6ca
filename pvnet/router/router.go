package router

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"time"

	"barevif/pvnet/packet"
)

// A Router decides about packets. See the package comment. [New] makes one; it has no port
// until Configure.
type Router struct {
	limits Limits

	configuring sync.Mutex // held by Configure, above mu

	mu      sync.Mutex // guards what follows
	now     int64      // of the latest batch; never goes back
	snap    *snapshot
	table   table
	swept   int64        // until when sweepSome has swept what was due
	states  []*portState // by PortID
	local   portState    // of LocalPort
	present int          // ports of snap
	neigh   uint32       // changes when a neighbour's MAC does, or one is forgotten
	random  *rand.Rand
	w       work
	noPort  uint64 // packets that came in by a port that is not there
}

// A portState is what belongs to a port and changes.
type portState struct {
	lists      [classes]list // of the flows that began at the port
	flows      int           // in these lists
	most       int           // of flows at once
	translated int           // of flows, with a translated source
	refused    uint64        // flows
	evicted    uint64        // flows
	count      PortStats
	neighbours map[addr]*neighbour
	fragments  []fragment
	tokens     int64 // the token bucket of replies, in nanoseconds: a reply costs a second / Limits.Replies
	tokensAt   int64 // when tokens was computed
}

// A work is what Process knows of the packet in hand.
type work struct {
	p     *Packet
	h     packet.Headers
	head  []byte
	t     tuple
	port  *port // nil for LocalPort
	kind  kind
	flags uint8 // TCP's
	typ   uint8 // ICMP's
	group bool  // the frame is for a group of stations
	hash  uint64
	seg   segment // of a TCP packet of a flow
}

// A kind says how a packet is matched with flows.
type kind uint8

const (
	kindFlow  kind = iota
	kindError      // an ICMP error
	kindQuery      // ICMP that is neither an error nor an echo
)

// New makes a Router without ports. It allocates the flow table; Configure allocates the tables of ports. The
// error joins a [ConfigError] for each limit out of its bounds.
func New(limits Limits) (*Router, error) {
	var bad complaints
	check := func(n *int, name string, def, least, most int) {
		switch {
		case *n == 0:
			*n = def
		case *n < least || *n > most:
			bad.add("limit "+name, "is %d: use %d to %d, or 0 for %d", *n, least, most, def)
		}
	}
	check(&limits.Flows, "Flows", 65536, 2, 1<<24)
	check(&limits.FlowsPerPort, "FlowsPerPort", max(limits.Flows/4, 1), 1, max(limits.Flows, 1))
	check(&limits.NATPerPort, "NATPerPort", min(16384, limits.FlowsPerPort), 1, 64512)
	check(&limits.Fragments, "Fragments", 256, fragmentWays, 65536)
	check(&limits.Neighbours, "Neighbours", 1024, 1, 65536)
	check(&limits.Replies, "Replies", 100, 1, 1e6)
	if err := bad.err(); err != nil {
		return nil, err
	}
	r := &Router{
		limits: limits,
		snap:   &snapshot{},
		table:  newTable(limits.Flows),
		states: make([]*portState, MaxPorts),
		random: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())),
	}
	r.local.init(limits)
	return r, nil
}

func (s *portState) init(limits Limits) {
	s.tokens = int64(time.Second)
	s.lists = [classes]list{{none, none}, {none, none}}
	s.neighbours = map[addr]*neighbour{}
	s.fragments = make([]fragment, (limits.Fragments+fragmentWays-1)/fragmentWays*fragmentWays)
}

// state returns what belongs to a port; nil for one that never was.
func (r *Router) state(id PortID) *portState {
	if id == LocalPort {
		return &r.local
	}
	return r.states[id]
}

// Configure replaces the whole configuration, between two batches. Flows go on; each is
// compared with the new rules, routes and translations at its next packet, and ends there if
// a new flow would not be accepted or not be translated in the same way. A port whose ID,
// Name and MAC stay is the same port; otherwise its flows and neighbours end. On an error the
// old configuration stays: it joins one [ConfigError] for each wrong entry.
func (r *Router) Configure(c Config) error {
	r.configuring.Lock()
	defer r.configuring.Unlock()
	s, err := compile(&c)
	if err != nil {
		return err
	}
	fresh := make([]*portState, len(s.ports)) // allocated before the lock is taken
	for id, p := range s.ports {
		if p != nil {
			fresh[id] = &portState{}
			fresh[id].init(r.limits)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.snap
	s.gen = old.gen + 1
	names := map[string]*rule{}
	for i := range old.rules {
		if n := old.rules[i].name; n != "" {
			names[n] = &old.rules[i]
		}
	}
	for i := range s.rules {
		if before := names[s.rules[i].name]; before != nil {
			s.rules[i].matched = before.matched
			delete(names, s.rules[i].name)
		}
	}
	r.present = 1
	for id := range r.states {
		was, is := old.port(PortID(id)), s.port(PortID(id))
		if is != nil {
			r.present++
			is.born = s.gen
			if was != nil && was.Name == is.Name && was.MAC == is.MAC {
				is.born = was.born
			} else if r.states[id] == nil {
				r.states[id] = fresh[id]
			}
		}
		if was != nil && (is == nil || is.born == s.gen) {
			r.flush(PortID(id))
			if is == nil {
				r.states[id] = nil
			} else {
				r.states[id] = fresh[id]
			}
		}
	}
	r.snap = s
	return nil
}

// Flush ends all flows that began at a port or answer there, and forgets its neighbours and
// fragments: its vif was unplugged, or has another guest.
func (r *Router) Flush(id PortID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flush(id)
}

func (r *Router) flush(id PortID) {
	if id != LocalPort && (id >= MaxPorts || r.states[id] == nil) {
		return
	}
	for i := range r.table.flows {
		if f := &r.table.flows[i]; f.used && (f.in == id || f.side[answer].in == id) {
			r.end(uint32(i))
		}
	}
	s := r.state(id)
	clear(s.neighbours)
	clear(s.fragments)
	r.neigh++
}

// Tick ends flows whose time is over while no packets come; call it every second or so. now is
// as for Process.
func (r *Router) Tick(now time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advance(now)
	r.sweep(max(len(r.table.flows)/16, 64))
}

func (r *Router) advance(now time.Duration) { r.now = max(r.now, int64(now)) }

// Process gives each packet of the batch its verdict and rewrites its head; it never fails.
// now is a time that does not go back, since any moment, by the same clock for all callers; it
// is read once for the batch. A batch should be short, at most 128 packets, since others wait
// meanwhile. Process holds nothing of a packet afterwards.
func (r *Router) Process(now time.Duration, batch []Packet) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advance(now)
	for i := range batch {
		r.one(&batch[i])
	}
	r.sweepSome(2*len(batch) + 2)
	r.w = work{}
}

// one decides about a packet.
func (r *Router) one(p *Packet) {
	p.Verdict, p.Reason, p.Out, p.Ask, p.Learnt, p.Translated, p.Hash, p.MTU = VerdictDrop, ReasonNone, 0, false, false, false, 0, 0
	if p.Next.IsValid() {
		p.Next = noAddr
	}
	p.reply.kind = replyNone
	r.decide(p)
	r.count(p)
}

// decide sets the verdict of a packet.
func (r *Router) decide(p *Packet) {
	w := &r.w
	w.p, w.port, w.group = p, nil, false
	w.head = p.Head
	if len(w.head) > p.Total {
		w.head = w.head[:max(p.Total, 0)]
	}
	if p.In != LocalPort {
		if w.port = r.snap.port(p.In); w.port == nil {
			p.Reason = ReasonNoPort
			return
		}
	}
	if len(w.head) < 14 {
		p.Reason = ReasonMalformed
		return
	}
	if !r.ethernet(w) {
		return
	}
	var ok bool
	w.h, ok = packet.Parse(w.head, p.Total)
	switch {
	case w.h.Tags != 0:
		p.Reason = ReasonTagged
	case w.h.Kind == etherARP:
		r.arp(w)
	case w.h.Kind != packet.IPv4 && w.h.Kind != packet.IPv6:
		p.Reason = ReasonNotIP
	case !ok:
		p.Reason = ReasonMalformed
	case !r.network(w):
	case w.h.Fragment == packet.Later:
		r.later(w)
	case !r.transport(w):
	case w.kind == kindError:
		r.related(w)
	case w.kind == kindQuery:
		r.query(w)
	default:
		r.flowed(w)
	}
}

// ethernet checks the frame's addresses.
func (r *Router) ethernet(w *work) bool {
	if w.port == nil {
		return true
	}
	dst := [6]byte(w.head[0:6])
	w.group = dst[0]&1 != 0
	switch {
	case !w.group && dst != w.port.MAC:
		w.p.Reason = ReasonNotForUs
	case w.port.guardMAC && [6]byte(w.head[6:12]) != w.port.SourceMAC, w.head[6]&1 != 0:
		w.p.Reason = ReasonSourceMAC
	default:
		return true
	}
	return false
}

// network checks the IP header and reads its addresses.
func (r *Router) network(w *work) bool {
	p, h := w.p, &w.h
	ip := w.head[h.L3:]
	w.t.proto, w.t.ports = uint32(h.Proto), 0
	if h.Version == 4 {
		n := int(ip[0]&15) * 4
		if len(ip) < n {
			p.Reason = ReasonMalformed
			return false
		}
		if packet.Fold(packet.Add(0, ip[:n])) != 0xffff {
			p.Reason = ReasonChecksum
			return false
		}
		if n > 20 {
			if p.Reason = options(ip[20:n]); p.Reason != ReasonNone {
				return false
			}
		}
		if ip[6]&0x80 != 0 { // the reserved flag
			p.Reason = ReasonMalformed
			return false
		}
		w.t.src, w.t.dst = addr4(ip[12:]), addr4(ip[16:])
		return true
	}
	w.t.src, w.t.dst = addr16(ip[8:]), addr16(ip[24:])
	switch {
	case h.Extensions&packet.HasRoutingLeft != 0:
		p.Reason = ReasonSourceRoute
	case h.Extensions&packet.HasJumbo != 0:
		p.Reason = ReasonMalformed
	case w.t.src.is4() || w.t.dst.is4():
		p.Reason = ReasonMartian
	default:
		return true
	}
	return false
}

// options walks the options of an IPv4 header.
func options(b []byte) Reason {
	const end, nop, looseRoute, strictRoute = 0, 1, 131, 137
	for len(b) > 0 {
		switch {
		case b[0] == end:
			return ReasonNone
		case b[0] == nop:
			b = b[1:]
			continue
		case b[0] == looseRoute, b[0] == strictRoute:
			return ReasonSourceRoute
		case len(b) < 2, b[1] < 2, int(b[1]) > len(b):
			return ReasonMalformed
		}
		b = b[b[1]:]
	}
	return ReasonNone
}

// transport reads the ports of a packet, or the identifier of an ICMP echo, and its kind.
func (r *Router) transport(w *work) bool {
	p, h := w.p, &w.h
	short := ReasonMalformed
	if h.Fragment == packet.First {
		short = ReasonTinyFragment
	}
	w.kind, w.flags, w.typ = kindFlow, 0, 0
	if h.L4 == 0 {
		p.Reason = short
		return false
	}
	if p.Partial && (!hasPorts(w.t.proto) || h.Fragment != packet.Whole) || p.GSO != 0 && (h.Proto != packet.TCP || !p.Partial) {
		p.Reason = ReasonMalformed
		return false
	}
	b := w.head[h.L4:min(len(w.head), h.End)]
	switch {
	case hasPorts(w.t.proto):
		if h.L5 == 0 {
			p.Reason = short
			return false
		}
		w.t.ports = binary.BigEndian.Uint32(b)
		if h.Proto == packet.TCP {
			if w.flags = b[13]; badFlags(w.flags) {
				p.Reason = ReasonInvalid
				return false
			}
		} else if n := int(be16(b[4:])); n < 8 || h.Fragment == packet.Whole && n > h.End-h.L4 {
			p.Reason = ReasonMalformed
			return false
		}
	case w.t.proto == icmp4 && h.Version == 4, w.t.proto == icmp6 && h.Version == 6:
		if len(b) < 8 {
			p.Reason = short
			return false
		}
		w.typ = b[0]
		request, reply := icmpTypes(h.Version)
		switch {
		case w.typ == request:
			w.t.ports = uint32(be16(b[4:])) << 16
		case w.typ == reply:
			w.t.ports = uint32(be16(b[4:]))
		case isError(h.Version, w.typ):
			w.kind = kindError
		default:
			w.kind = kindQuery
		}
	}
	return true
}

// icmpTypes returns the types of echo requests and replies.
func icmpTypes(version uint8) (request, reply uint8) {
	if version == 4 {
		return 8, 0
	}
	return 128, 129
}

func isError(version, typ uint8) bool {
	if version == 4 {
		switch typ {
		case 3, 4, 5, 11, 12:
			return true
		}
		return false
	}
	return typ < 128
}

// flowed handles a packet that belongs to a flow or may begin one.
func (r *Router) flowed(w *work) {
	i, d, h, ok := r.find(&w.t)
	w.hash = h
	if ok {
		f := &r.table.flows[i]
		switch {
		case w.port != nil && f.side[d].in != w.p.In && !w.port.AnySource, w.port == nil && f.side[d].in != LocalPort, w.group:
			w.p.Reason = ReasonSpoofed
			if w.group {
				w.p.Reason = ReasonNotForUs
			}
			return
		case w.t.proto == packet.TCP && f.reopens(d, w.flags):
			r.end(i)
		case f.gen != r.snap.gen && !r.recheck(i):
			r.end(i)
		default:
			r.pass(w, i, d)
			return
		}
	}
	r.fresh(w)
}

// count adds a verdict to the counters.
func (r *Router) count(p *Packet) {
	var s *portState
	if p.In == LocalPort {
		s = &r.local
	} else if p.In < MaxPorts {
		s = r.states[p.In]
	}
	if s == nil {
		r.noPort++
		return
	}
	c := &s.count
	switch p.Verdict {
	case VerdictForward, VerdictFragment:
		c.Forwarded++
		c.ForwardedBytes += uint64(p.Total)
		if out := r.state(p.Out); out != nil {
			out.count.Sent++
			out.count.SentBytes += uint64(p.Total)
		}
	case VerdictLocal:
		c.Local++
	case VerdictNeighbour:
		c.Waiting++
	case VerdictReply:
		c.Replies++
		fallthrough
	case VerdictDrop:
		if p.Reason != ReasonNone { // ARP and discovery have done their work
			c.Dropped[p.Reason]++
		}
	}
}
