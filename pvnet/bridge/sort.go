package bridge

import (
	"slices"

	"barevif/pvnet"
	"barevif/pvnet/forward"
)

// Values of sorter.at for a frame that does not go to the port of that number.
const (
	nowhere   = -1 - iota // it is dropped
	toAll                 // it is for a group, and goes to all ports
	toUnknown             // it is for a station that the bridge does not know, and goes to the ports that may have it
	sentOn                // it was given to its port
)

// A sorter decides where the frames of one queue of a port go. One goroutine uses it.
type sorter struct {
	at     [forward.Batch]int          // by frame: the number of its port, or one of the constants above
	macs   [forward.Batch][2]pvnet.MAC // by frame: destination, source
	news   [forward.Batch]int          // the indexes of frames from stations to be learned
	nnews  int                         // how many of them there are
	group  [forward.Batch]pvnet.Frame  // the frames that go to one port together
	counts [counters]uint64            // of this batch, to be added to Port.counts
}

// forward passes on what a queue of the port has received. It takes over all frames, and
// returns how many of those for one port were lost.
func (p *Port) forward(queue int, frames []pvnet.Frame) (lost int, err error) {
	s := &p.sorters[queue]
	outs := p.outs.Load()
	s.counts[received] += uint64(len(frames))
	groups := p.sort(s, frames, outs)
	p.learn(s)
	for i, n := range s.counts {
		if n > 0 {
			p.counts[i].Add(n)
			s.counts[i] = 0
		}
	}
	if groups {
		return s.flood(frames, outs), nil
	}
	return s.sendEach(frames, outs), nil
}

// sort decides where the frames go, and releases those that go nowhere. It reports whether
// some go to several ports.
func (p *Port) sort(s *sorter, frames []pvnet.Frame, outs *outs) (groups bool) {
	t := &p.b.table
	now := t.now.Load()
	for i := range frames {
		var head [12]byte // a copy, since the peer may still change a page that it lends
		frames[i].CopyTo(head[:])
		s.macs[i] = [2]pvnet.MAC{pvnet.MAC(head[:6]), pvnet.MAC(head[6:])}
	}
	s.nnews = 0
	t.mu.RLock()
	var from, to *entry // of the frame before
	for i := range frames {
		dst, src := s.macs[i][0], s.macs[i][1]
		if i == 0 || src != s.macs[i-1][1] {
			if from = t.entries[src]; from != nil && !from.fixed && from.port == p && from.seen.Load() != now {
				from.seen.Store(now)
			}
		}
		if i == 0 || dst != s.macs[i-1][0] {
			to = t.entries[dst]
		}
		s.at[i] = p.place(s, i, dst, src, from, to, outs)
		groups = groups || s.at[i] == toAll || s.at[i] == toUnknown
	}
	t.mu.RUnlock()
	for i := range frames {
		if s.at[i] == nowhere {
			frames[i].Release()
		}
	}
	return groups
}

// place returns where a frame goes; from and to are what the table has of its addresses. The
// caller holds the table's mu for reading.
func (p *Port) place(s *sorter, i int, dst, src pvnet.MAC, from, to *entry, outs *outs) int {
	drop := func(why int) int {
		s.counts[why]++
		return nowhere
	}
	switch {
	case !station(src):
		return drop(invalid)
	case from != nil && from.fixed && from.port != p, p.guarded && (from == nil || !from.fixed):
		return drop(spoofed)
	case from != nil && from.port == p:
	case p.b.table.fullFor(p, from):
		s.counts[unlearned]++
	default:
		s.news[s.nnews] = i
		s.nnews++
	}
	switch {
	case isReserved(dst):
		return drop(reserved)
	case dst[0]&1 != 0:
		if len(outs.all) == 0 {
			return drop(alone)
		}
		s.counts[flooded]++
		return toAll
	case to == nil:
		if len(outs.unknown) == 0 {
			return drop(alone)
		}
		s.counts[flooded]++
		return toUnknown
	case to.port == p:
		return drop(local)
	case outs.input(to.port.number) == nil:
		return drop(isolated)
	}
	s.counts[unicast]++
	return to.port.number
}

// isReserved reports whether dst is a group that no bridge forwards (IEEE 802.1D, table 7-10).
func isReserved(dst pvnet.MAC) bool {
	return dst[0] == 0x01 && dst[1] == 0x80 && dst[2] == 0xc2 && dst[3] == 0 && dst[4] == 0 && dst[5] < 0x10
}

// learn learns the stations that sort has found.
func (p *Port) learn(s *sorter) {
	if s.nnews == 0 {
		return
	}
	t := &p.b.table
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, i := range s.news[:s.nnews] {
		moves, full := t.learnLocked(p, s.macs[i][1])
		if moves {
			s.counts[moved]++
		}
		if full {
			s.counts[unlearned]++
		}
	}
}

// sendEach gives each frame to its port; frames for the same port go together. It returns how many were lost.
func (s *sorter) sendEach(frames []pvnet.Frame, outs *outs) (lost int) {
	for i := range frames {
		at := s.at[i]
		if at < 0 {
			continue
		}
		n := 0
		for j := i; j < len(frames); j++ {
			if s.at[j] == at {
				s.group[n] = frames[j]
				s.at[j] = sentOn
				n++
			}
		}
		lost += send(outs.to[at], s.group[:n])
	}
	return lost
}

// flood is sendEach for a batch in which some frames go to several ports. Each of these holds
// them once. A port gets its frames in their order. lost is only of those for one port.
func (s *sorter) flood(frames []pvnet.Frame, outs *outs) (lost int) {
	for i := range frames {
		switch s.at[i] {
		case toAll:
			retain(&frames[i], len(outs.all)-1)
		case toUnknown:
			retain(&frames[i], len(outs.unknown)-1)
		}
	}
	for _, at := range outs.all {
		in := outs.to[at]
		all := slices.Contains(outs.unknown, at)
		n, single := 0, false
		flush := func() {
			if k := send(in, s.group[:n]); single {
				lost += k
			}
			n = 0
		}
		for i := range frames {
			one := s.at[i] == at
			if !one && s.at[i] != toAll && !(all && s.at[i] == toUnknown) {
				continue
			}
			if one != single {
				flush()
				single = one
			}
			s.group[n] = frames[i]
			n++
		}
		flush()
	}
	return lost
}

// send gives frames to a port, which counts those that it loses. One that is being removed
// loses all.
func send(in *forward.Input, frames []pvnet.Frame) (lost int) {
	if len(frames) > 0 {
		lost, _ = in.Send(frames)
	}
	return lost
}

// retain adds n holders. The frame was just received, so it is not stale.
func retain(f *pvnet.Frame, n int) {
	for range n {
		f.Retain()
	}
}
