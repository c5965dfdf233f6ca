package netstack

import (
	"slices"
	"sync"
	"time"

	"barevif/pvnet"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// maxWaiting is how many bytes wait for room in the ring: what one connection may
// have under way, headers included. The stack has nothing like Linux's small
// queues, which keep a connection from filling the queue of its own card, and
// recovers slowly from what is lost there.
const maxWaiting = bufferMost + bufferMost/8

// A sender moves packets into one transmit half. The stack's own goroutines send,
// and never wait: the one that receives may be among them, and two ends that wait
// for each other would wait for ever. What the ring has no room for waits here,
// and work sends it in their stead until there is no more.
type sender struct {
	card *card

	mu      sync.Mutex
	tx      *pvnet.TX             // used by whoever holds mu, or by work while busy
	busy    bool                  // guarded by mu: packets wait, and work has the half
	ended   bool                  // guarded by mu
	waiting []*stack.PacketBuffer // guarded by mu; oldest first
	bytes   int                   // guarded by mu; of waiting
	changed *sync.Cond            // busy or ended did

	frames [batch]pvnet.Frame // goes with tx
	pieces [][]byte           // goes with tx
}

func newSender(c *card, tx *pvnet.TX) *sender {
	s := &sender{card: c, tx: tx}
	s.changed = sync.NewCond(&s.mu)
	return s
}

// write sends packets in order, or has them wait, and returns how many of them:
// the others are lost. It does not wait, and does not keep the slice.
func (s *sender) write(packets []*stack.PacketBuffer) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		s.card.unsent.Add(uint64(len(packets)))
		return 0
	}
	n := 0
	if !s.busy {
		if n = s.send(packets); n == len(packets) {
			return n
		}
		s.busy = true
		s.changed.Broadcast()
	}
	for _, p := range packets[n:] {
		size := p.Size()
		if s.bytes+size > maxWaiting {
			s.card.overflow.Add(uint64(len(packets) - n))
			return n
		}
		s.waiting = append(s.waiting, p.IncRef())
		s.bytes += size
		n++
	}
	return n
}

// send sends what there is room for. The caller has tx.
func (s *sender) send(packets []*stack.PacketBuffer) (done int) {
	for done < len(packets) {
		next, size := s.next(packets[done:])
		if len(next) == 0 {
			done++
			continue
		}
		n := s.tx.AllocSize(s.frames[:len(next)], size)
		if n == 0 {
			return done
		}
		for i := range s.frames[:n] {
			s.fill(&s.frames[i], next[i])
		}
		sent, err := s.tx.Send(s.frames[:n])
		lost, ok := s.after(sent, n, err)
		done += sent + lost
		if !ok {
			return done
		}
	}
	return done
}

// after cleans up behind a send of n frames of which sent were taken. lost counts
// those that never will be. ok says that the next may be tried at once.
func (s *sender) after(sent, n int, err error) (lost int, ok bool) {
	for i := sent; i < n; i++ {
		_ = s.frames[i].Release() // the sender did not take it over
	}
	if err == pvnet.ErrFrameSize || err == pvnet.ErrOffload { // about frames[sent]; it will not change
		s.card.unsent.Add(1)
		return 1, true
	}
	return 0, err == nil
}

// work sends what waits, and waits for room to do so.
func (s *sender) work() {
	var packets [batch]*stack.PacketBuffer
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for !s.busy && !s.ended {
			s.changed.Wait()
		}
		if s.ended {
			s.card.unsent.Add(uint64(len(s.waiting)))
			release(s.waiting)
			s.waiting, s.bytes, s.busy = nil, 0, false
			s.changed.Broadcast()
			return
		}
		for len(s.waiting) > 0 && !s.ended {
			n := copy(packets[:], s.waiting)
			s.waiting = slices.Delete(s.waiting, 0, n)
			for _, p := range packets[:n] {
				s.bytes -= p.Size()
			}
			s.mu.Unlock()
			done := s.sendAll(packets[:n])
			s.card.unsent.Add(uint64(n - done))
			release(packets[:n])
			s.mu.Lock()
		}
		s.busy = s.ended
		s.changed.Broadcast()
	}
}

// sendAll waits for room for each packet. It returns how many it sent before the
// device ended.
func (s *sender) sendAll(packets []*stack.PacketBuffer) (done int) {
	most := len(packets)
	for done < len(packets) {
		next, size := s.next(packets[done:])
		if len(next) == 0 {
			done++
			continue
		}
		next = next[:min(most, len(next))]
		n, err := s.tx.AllocWait(s.frames[:len(next)], size)
		if err != nil {
			return done
		}
		for i := range s.frames[:n] {
			s.fill(&s.frames[i], next[i])
		}
		sent, err := s.tx.SendWait(s.frames[:n])
		lost, ok := s.after(sent, n, err)
		done += sent + lost
		switch {
		case ok:
		case err == pvnet.ErrNoBuffers && most > 1:
			most = 1 // a new peer does not take long frames: they are cut into what the others held
		default:
			return done
		}
	}
	return done
}

// release lets go of packets, which were counted already.
func release(packets []*stack.PacketBuffer) {
	for i, p := range packets {
		p.DecRef()
		packets[i] = nil
	}
}

// next is the packets to send at once, which take as many pages each, and the size of
// the largest; none if the first is too long for any vif, which is counted as lost.
func (s *sender) next(packets []*stack.PacketBuffer) (run []*stack.PacketBuffer, size int) {
	for i, p := range packets[:min(batch, len(packets))] {
		n := p.Size()
		if n > pvnet.MaxFrame {
			if i == 0 {
				s.card.unsent.Add(1)
			}
			return packets[:i], size
		}
		if i > 0 && n/pageSize != size/pageSize {
			return packets[:i], size
		}
		size = max(size, n)
	}
	return packets[:min(batch, len(packets))], size
}

// pageSize is in bytes: what one buffer of a frame holds.
const pageSize = 4096

// fill copies a packet into a frame that is as long or longer, with its offloads.
func (s *sender) fill(f *pvnet.Frame, p *stack.PacketBuffer) {
	list, skip := p.AsViewList()
	s.pieces = s.pieces[:0]
	for v := list.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		k := min(skip, len(b))
		skip -= k
		if k < len(b) {
			s.pieces = append(s.pieces, b[k:])
		}
	}
	f.Truncate(f.CopyFrom(s.pieces...))
	clear(s.pieces)
	gso := pvnet.GSO{Size: p.GSOOptions.MSS}
	// A connection keeps the size it began with, and the card may have got a smaller
	// MTU since.
	room := int(s.card.MTU()) - len(p.NetworkHeader().Slice()) - len(p.TransportHeader().Slice())
	gso.Size = uint16(min(int(gso.Size), max(room, 1)))
	switch p.GSOOptions.Type {
	case stack.GSOTCPv4:
		gso.Type = pvnet.GSOTCPv4
	case stack.GSOTCPv6:
		gso.Type = pvnet.GSOTCPv6
	case stack.GSOGvisor: // cut by the stack, and not made into fragments
		if p.Data().Size() <= room {
			return
		}
		gso.Type = unsummed(f, p)
	default:
		return
	}
	// What the stack made cannot be refused, but for one with over 8192 pieces.
	if f.SetGSO(gso) != nil {
		f.SetChecksum(pvnet.ChecksumPartial)
	}
}

// unsummed makes the checksum of a TCP segment one that whoever cuts it completes.
func unsummed(f *pvnet.Frame, p *stack.PacketBuffer) pvnet.GSOType {
	var network header.Network
	typ := pvnet.GSOTCPv4
	if p.NetworkProtocolNumber == header.IPv6ProtocolNumber {
		typ, network = pvnet.GSOTCPv6, header.IPv6(p.NetworkHeader().Slice())
	} else {
		network = header.IPv4(p.NetworkHeader().Slice())
	}
	tcp := p.TransportHeader().Slice()
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, network.SourceAddress(),
		network.DestinationAddress(), uint16(len(tcp)+p.Data().Size()))
	for head := range f.Pieces() { // all headers are in the first
		at := len(p.LinkHeader().Slice()) + len(p.NetworkHeader().Slice())
		header.TCP(head[at:]).SetChecksum(sum)
		break
	}
	return typ
}

// drain waits until nothing waits, or for end.
func (s *sender) drain(end time.Time) {
	timer := time.AfterFunc(time.Until(end), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.changed.Broadcast()
	})
	defer timer.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.busy && !s.ended && time.Now().Before(end) {
		s.changed.Wait()
	}
}

// stop ends work.
func (s *sender) stop() {
	s.mu.Lock()
	s.ended = true
	s.changed.Broadcast()
	s.mu.Unlock()
	s.tx.SetDeadline(past)
}
