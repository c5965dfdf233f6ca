package router

// Stats are the counters of a whole Router.
type Stats struct {
	Flows     int    // now
	FlowsMost int    // at once, ever
	FlowLimit int    // entries of the table
	PortLimit int    // how many of them the flows of one port may have
	Refused   uint64 // flows, for want of a place
	Evicted   uint64 // flows whose place another got
	NoPort    uint64 // packets from a port that is not there
}

// PortStats are the counters of a port since it was configured. A packet counts where it came
// in, except for Sent.
type PortStats struct {
	Forwarded, ForwardedBytes uint64 // bytes of frames
	Sent, SentBytes           uint64 // forwarded packets that left here
	Local                     uint64 // for the router itself
	Replies                   uint64 // ICMP errors, TCP resets, ARP replies and neighbour advertisements
	Unanswered                uint64 // dropped without the ICMP error or TCP reset they might have got: Limits.Replies was reached, or no port has an address to send it from
	Waiting                   uint64 // verdicts VerdictNeighbour
	Dropped                   [Reasons]uint64

	Flows, FlowsMost int    // that began here: now, and most at once
	Refused, Evicted uint64 // flows that began here
	Neighbours       int
}

// Drops returns the number of all dropped packets.
func (s *PortStats) Drops() (n uint64) {
	for _, d := range s.Dropped {
		n += d
	}
	return n
}

// Stats returns the counters of the Router.
func (r *Router) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Stats{Flows: r.table.n, FlowsMost: r.table.most, FlowLimit: len(r.table.flows), PortLimit: r.limits.FlowsPerPort, NoPort: r.noPort}
	for _, p := range r.states {
		if p != nil {
			s.Refused += p.refused
			s.Evicted += p.evicted
		}
	}
	s.Refused += r.local.refused
	s.Evicted += r.local.evicted
	return s
}

// PortStats returns the counters of a port, which may be LocalPort. ok is false for one that is
// not configured.
func (r *Router) PortStats(id PortID) (s PortStats, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id != LocalPort && r.snap.port(id) == nil {
		return s, false
	}
	p := r.state(id)
	s = p.count
	s.Flows, s.FlowsMost, s.Refused, s.Evicted, s.Neighbours = p.flows, p.most, p.refused, p.evicted, len(p.neighbours)
	return s, true
}

// A RuleStat is the counter of a rule.
type RuleStat struct {
	Name    string
	Matched uint64 // packets that it decided about: the first ones of flows, and those of none
}

// RuleStats returns the counters of the rules, in their order.
func (r *Router) RuleStats() []RuleStat {
	r.mu.Lock()
	defer r.mu.Unlock()
	stats := make([]RuleStat, len(r.snap.rules))
	for i := range r.snap.rules {
		stats[i] = RuleStat{r.snap.rules[i].name, r.snap.rules[i].matched}
	}
	return stats
}
