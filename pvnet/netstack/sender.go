package netstack

import (
	"slices"
	"sync"
	"time"

	"barevif/arena/shm"
	"barevif/pvnet"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// maxWaiting is how many bytes may wait for room in the ring: as many as one connection
// may have in flight, headers included. gVisor has no TCP small queues like Linux, which
// keep a connection from filling the queue of its own card, and recovers slowly from
// packets lost there.
const maxWaiting = bufferMost + bufferMost/8

// A sender moves packets into one transmit half. The stack's goroutines call write, which
// never blocks: one of them may be the goroutine that receives, and two ends that wait for
// each other's ring would deadlock. Packets for which the ring has no room wait in the
// sender, and the goroutine of work sends them.
type sender struct {
	card *card

	mu      sync.Mutex
	tx      *pvnet.TX             // used under mu, or by work without it while busy
	busy    bool                  // guarded by mu: packets wait, and only work may use tx
	ended   bool                  // guarded by mu
	held    bool                  // guarded by mu: nobody uses tx, and packets wait
	inside  bool                  // guarded by mu: work uses tx
	writes  uint64                // guarded by mu: calls of write for other packets than TCP's
	waiting []*stack.PacketBuffer // guarded by mu; oldest first
	bytes   int                   // guarded by mu; total size of waiting
	changed *sync.Cond            // signals changes of busy and ended

	frames [batch]pvnet.Frame // used by the user of tx
	pieces [][]byte           // used by the user of tx
}

func newSender(c *card, tx *pvnet.TX) *sender {
	s := &sender{card: c, tx: tx}
	s.changed = sync.NewCond(&s.mu)
	return s
}

// write sends or queues packets in order and returns how many it took; the others are
// lost. It does not block, and does not keep the slice.
func (s *sender) write(packets []*stack.PacketBuffer) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		s.card.unsent.Add(uint64(len(packets)))
		return 0
	}
	n := 0
	if len(packets) > 0 && packets[0].TransportProtocolNumber != header.TCPProtocolNumber {
		s.writes++
	}
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

// send sends as many packets as the ring has room for. The caller may use tx.
func (s *sender) send(packets []*stack.PacketBuffer) (done int) {
	for done < len(packets) {
		next, size := s.nextBatch(packets[done:])
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
		lost, ok := s.afterSend(sent, n, err)
		done += sent + lost
		if !ok {
			return done
		}
	}
	return done
}

// afterSend releases the frames that a send of n frames did not take. lost is 1 if the device
// will never take the packet of frames[sent]. ok means that the caller may go on with the
// next packet at once.
func (s *sender) afterSend(sent, n int, err error) (lost int, ok bool) {
	for i := sent; i < n; i++ {
		_ = s.frames[i].Release() // still ours
	}
	if err == pvnet.ErrFrameSize || err == pvnet.ErrOffload { // frames[sent] will fail again
		s.card.unsent.Add(1)
		return 1, true
	}
	return 0, err == nil
}

// work sends the waiting packets, and waits for room in the ring for them. It returns after
// stop.
func (s *sender) work() {
	var packets [batch]*stack.PacketBuffer
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for (!s.busy || s.held) && !s.ended {
			s.changed.Wait()
		}
		if s.ended {
			s.card.unsent.Add(uint64(len(s.waiting)))
			release(s.waiting)
			s.waiting, s.bytes, s.busy = nil, 0, false
			s.changed.Broadcast()
			return
		}
		for len(s.waiting) > 0 && !s.ended && !s.held {
			n := copy(packets[:], s.waiting)
			s.waiting = slices.Delete(s.waiting, 0, n)
			for _, p := range packets[:n] {
				s.bytes -= p.Size()
			}
			s.inside = true
			s.mu.Unlock()
			done := s.sendAll(packets[:n])
			s.mu.Lock()
			s.afterWork(packets[:n], done)
		}
		s.busy = s.ended || s.held
		s.changed.Broadcast()
	}
}

// afterWork takes note of what sendAll has done. Packets that it did not send wait on if the sender
// is held; else they are lost.
func (s *sender) afterWork(packets []*stack.PacketBuffer, done int) {
	left := packets[done:]
	if s.held && !s.ended {
		s.waiting = slices.Insert(s.waiting, 0, left...)
		for _, p := range left {
			s.bytes += p.Size()
		}
		clear(left)
		packets = packets[:done]
	} else {
		s.card.unsent.Add(uint64(len(left)))
	}
	release(packets)
	s.inside = false
	s.changed.Broadcast()
}

// sendAll sends packets and waits for room. It returns how many it dealt with before the
// device ended or stop.
func (s *sender) sendAll(packets []*stack.PacketBuffer) (done int) {
	most := len(packets)
	for done < len(packets) {
		next, size := s.nextBatch(packets[done:])
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
		lost, ok := s.afterSend(sent, n, err)
		done += sent + lost
		switch {
		case ok:
		case err == pvnet.ErrNoBuffers && most > 1:
			most = 1 // a new peer takes no long frames, so this one is cut: release the other frames for its pages
		default:
			return done
		}
	}
	return done
}

// release drops the references to packets. The caller has counted them.
func release(packets []*stack.PacketBuffer) {
	for i, p := range packets {
		p.DecRef()
		packets[i] = nil
	}
}

// nextBatch returns the packets to send in one batch, all with the same number of pages, and
// the size of the largest in bytes. It returns none if the first packet is too long for
// any vif, and counts that packet as unsent.
func (s *sender) nextBatch(packets []*stack.PacketBuffer) (run []*stack.PacketBuffer, size int) {
	for i, p := range packets[:min(batch, len(packets))] {
		n := p.Size()
		if n > pvnet.MaxFrame {
			if i == 0 {
				s.card.unsent.Add(1)
			}
			return packets[:i], size
		}
		if i > 0 && n/shm.PageSize != size/shm.PageSize {
			return packets[:i], size
		}
		size = max(size, n)
	}
	return packets[:min(batch, len(packets))], size
}

// fill copies a packet and its offloads into a frame that has room for it.
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
	// A connection keeps its initial segment size, but the card's MTU may have become
	// smaller since.
	room := int(s.card.MTU()) - len(p.NetworkHeader().Slice()) - len(p.TransportHeader().Slice())
	gso.Size = uint16(min(int(gso.Size), max(room, 1)))
	switch p.GSOOptions.Type {
	case stack.GSOTCPv4:
		gso.Type = pvnet.GSOTCPv4
	case stack.GSOTCPv6:
		gso.Type = pvnet.GSOTCPv6
	case stack.GSOGvisor: // a segment that the stack has cut, and does not fragment
		if p.Data().Size() <= room {
			return
		}
		gso.Type = setPartialSum(f, p)
	default:
		return
	}
	// SetGSO refuses a packet of the stack only if it has more than 8192 segments.
	if f.SetGSO(gso) != nil {
		f.SetChecksum(pvnet.ChecksumPartial)
	}
}

// setPartialSum turns the checksum of a TCP segment into a partial one, which the end that cuts
// the segment completes. It returns the segment's GSO type.
func setPartialSum(f *pvnet.Frame, p *stack.PacketBuffer) pvnet.GSOType {
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
	for head := range f.Pieces() { // all headers are in the first piece
		at := len(p.LinkHeader().Slice()) + len(p.NetworkHeader().Slice())
		header.TCP(head[at:]).SetChecksum(sum)
		break
	}
	return typ
}

// drain waits until no packet waits, but not beyond end.
func (s *sender) drain(end time.Time) { s.await(end, func() bool { return !s.busy }) }

// await waits until done reports true or the sender has ended, but not beyond end. It calls done
// under mu, and returns its last answer.
func (s *sender) await(end time.Time, done func() bool) bool {
	timer := time.AfterFunc(time.Until(end), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.changed.Broadcast()
	})
	defer timer.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !done() && !s.ended && time.Now().Before(end) {
		s.changed.Wait()
	}
	return done()
}

// written returns the number of calls of write for other packets than TCP's.
func (s *sender) written() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writes
}

// hold keeps packets waiting, from the next one on, and returns once the others have been sent
// and nobody uses tx. It reports false, and the sender goes on, if that takes beyond end.
// Without a link packets cannot be sent, and wait too.
func (s *sender) hold(end time.Time) bool {
	s.await(end, func() bool { return !s.busy || s.card.down.Load() })
	s.mu.Lock()
	if s.busy && !s.card.down.Load() && !s.ended {
		s.mu.Unlock()
		return false
	}
	s.held, s.busy = true, true
	if s.inside {
		s.tx.SetDeadline(past) // it waits for the link
	}
	s.mu.Unlock()
	return s.await(end.Add(closePatience), func() bool { return !s.inside })
}

// resume ends hold.
func (s *sender) resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held && !s.ended {
		s.tx.SetDeadline(time.Time{})
	}
	s.held = false
	s.changed.Broadcast()
}

// stop makes work return.
func (s *sender) stop() {
	s.mu.Lock()
	s.ended = true
	s.changed.Broadcast()
	s.mu.Unlock()
	s.tx.SetDeadline(past)
}
