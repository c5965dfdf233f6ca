package main

import (
	"errors"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/atomicbitops"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/link/sharedmem"
	"gvisor.dev/gvisor/pkg/tcpip/link/sharedmem/pipe"
	"gvisor.dev/gvisor/pkg/tcpip/link/sharedmem/queue"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// An endpointLink has both link endpoints of gVisor's package sharedmem. WritePackets takes
// the packets; a goroutine of the library delivers them, and blocks on an eventfd while there
// are none.
type endpointLink struct {
	client, server stack.LinkEndpoint
	end            func()
	batch          int
	first, second  dispatcher // of the client and of the server
}

// A dispatcher gets the packets that arrive at an endpoint.
type dispatcher struct {
	j     *job
	party int
	once  sync.Once
	mu    sync.Mutex
	fn    func(*stack.PacketBuffer) // guarded by mu
}

func (d *dispatcher) set(fn func(*stack.PacketBuffer)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fn = fn
}

// await waits until packets have a receiver: the ones before are dropped.
func (d *dispatcher) await(j *job) {
	for !j.stopped() {
		d.mu.Lock()
		ready := d.fn != nil
		d.mu.Unlock()
		if ready {
			return
		}
		spinPause()
	}
}

func (d *dispatcher) DeliverNetworkPacket(_ tcpip.NetworkProtocolNumber, p *stack.PacketBuffer) {
	d.once.Do(func() { d.j.pin(d.party) })
	d.mu.Lock()
	fn := d.fn
	d.mu.Unlock()
	if fn != nil {
		fn(p)
	}
}

func (d *dispatcher) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

func endpointPeer(batch int) peer {
	return setupFunc(func(j *job) (link, error) {
		pair, err := sharedmem.NewQueuePair(sharedmem.QueueOptions{SharedMemPath: j.tmp})
		if err != nil {
			return nil, err
		}
		opt := sharedmem.Options{MTU: 65535, BufferSize: 2048, TX: pair.TXQueueConfig(), RX: pair.RXQueueConfig(), PeerFD: -1}
		client, err := sharedmem.New(opt)
		if err != nil {
			pair.Close()
			return nil, err
		}
		server, err := sharedmem.NewServerEndpoint(opt)
		if err != nil {
			pair.Close()
			return nil, err
		}
		l := &endpointLink{client: client, server: server, batch: batch,
			first: dispatcher{j: j, party: 0}, second: dispatcher{j: j, party: 1}}
		server.Attach(&l.second)
		client.Attach(&l.first)
		l.end = func() {
			// A server that waits sees that it was closed only after another packet.
			server.Close()
			l.write(client, ipPacket(j.source()).frame)
			server.Wait()
			client.Close()
			client.Wait()
			pair.Close()
		}
		return l, nil
	})
}

func (l *endpointLink) close() error {
	l.first.set(nil)
	l.second.set(nil)
	l.end()
	return nil
}

// ipPacket makes the source's frame one that an endpoint delivers. The endpoint checks only
// the IP version in the first byte.
func ipPacket(s *source) *source {
	s.frame[0] = 4<<4 | 5
	return s
}

func packet(b []byte) *stack.PacketBuffer {
	return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
}

func (l *endpointLink) write(e stack.LinkEndpoint, frame []byte) {
	var list stack.PacketBufferList
	p := packet(frame)
	list.PushBack(p)
	e.WritePackets(list)
	p.DecRef()
}

func (l *endpointLink) send(j *job) error {
	src, sent := j.batchSource(l.batch), tally{to: &j.sent}
	for _, s := range src.sources {
		ipPacket(s)
	}
	packets := make([]*stack.PacketBuffer, l.batch)
	l.second.await(j)
	for !j.stopped() {
		for i, frame := range src.next() {
			packets[i] = packet(frame)
		}
		for done := 0; done < l.batch && !j.stopped(); {
			var list stack.PacketBufferList
			for _, p := range packets[done:] {
				list.PushBack(p)
			}
			n, err := l.client.WritePackets(list)
			if done += n; err != nil {
				spinPause() // the ring is full
			}
			sent.add(n)
		}
		for _, p := range packets {
			p.DecRef()
		}
	}
	return nil
}

func (l *endpointLink) receive(j *job) error {
	s, rcvd := j.sink(), tally{to: &j.rcvd}
	ipPacket(&s.want)
	wrong := make(chan error, 1)
	l.second.set(func(p *stack.PacketBuffer) {
		rcvd.add(1)
		if !j.verify {
			return
		}
		if err := s.check(p.Data().AsRange().ToSlice()); err != nil {
			select {
			case wrong <- err:
			default:
			}
		}
	})
	for !j.stopped() {
		select {
		case err := <-wrong:
			return err
		case <-time.After(3 * time.Millisecond):
		}
	}
	return nil
}

func (l *endpointLink) ping(j *job, rtt []int64) error {
	frame := ipPacket(j.source()).frame
	arrived := make(chan int64, 1)
	l.first.set(func(*stack.PacketBuffer) { arrived <- nano() })
	l.second.await(j)
	limit := time.NewTimer(hangLimit / 2)
	defer limit.Stop()
	for i := range rtt {
		start := nano()
		l.write(l.client, frame)
		select {
		case end := <-arrived:
			rtt[i] = end - start
		case <-limit.C:
			return errors.New("no answer")
		}
	}
	return nil
}

func (l *endpointLink) echo(j *job) error {
	frame := ipPacket(j.source()).frame
	l.second.set(func(*stack.PacketBuffer) { l.write(l.server, frame) })
	for !j.stopped() {
		time.Sleep(3 * time.Millisecond)
	}
	return nil
}

// A queueLink uses the queues below the endpoints, polled and without packet buffers:
// queue.Tx at the sender, pipe.Rx and pipe.Tx at the receiver.
type queueLink struct {
	mem  *memory
	slot int // bytes of a buffer
	tx   queue.Tx
	in   pipe.Rx
	acks pipe.Tx
}

const (
	pipeSize   = 64 << 10
	queueState = 2 * pipeSize
	queueData  = queueState + pageSize
)

func queuePeer(j *job) (link, error) {
	l := &queueLink{slot: (j.size + pageSize - 1) &^ (pageSize - 1)}
	var err error
	if l.mem, err = newMemory("peers-queue", queueData+256*l.slot); err != nil {
		return nil, err
	}
	there, back := l.mem.b[:pipeSize:pipeSize], l.mem.b[pipeSize:2*pipeSize:2*pipeSize]
	there[7], back[7] = 0x80, 0x80 // the first slot of both pipes is free
	l.in.Init(there)
	l.acks.Init(back)
	state := at[atomicbitops.Uint32](l.mem.b, queueState)
	state.Store(queue.EventFDDisabled)
	l.tx.Init(there, back, state)
	return l, nil
}

func (l *queueLink) close() error {
	l.mem.close()
	return nil
}

func (l *queueLink) send(j *job) error {
	src, sent := j.source(), tally{to: &j.sent}
	buffers := make([]queue.TxBuffer, 256)
	free := make([]uint64, 0, len(buffers))
	for i := range buffers {
		buffers[i] = queue.TxBuffer{Offset: uint64(i * l.slot), Size: uint32(l.slot)}
		free = append(free, uint64(i))
	}
	data := l.mem.b[queueData:]
	for !j.stopped() {
		for {
			id, ok := l.tx.CompletedPacket()
			if !ok {
				break
			}
			free = append(free, id)
		}
		if len(free) == 0 {
			spinPause()
			continue
		}
		id := free[len(free)-1]
		b := &buffers[id]
		copy(data[b.Offset:], src.next())
		for !l.tx.Enqueue(id, uint32(j.size), 1, b) {
			if spinPause(); j.stopped() {
				return nil
			}
		}
		free = free[:len(free)-1]
		sent.add(1)
	}
	return nil
}

func (l *queueLink) receive(j *job) error {
	s, rcvd := j.sink(), tally{to: &j.rcvd}
	data := l.mem.b[queueData:]
	for !j.stopped() {
		m := l.in.Pull()
		if m == nil {
			spinPause()
			continue
		}
		info := queue.DecodeTxPacketHeader(m)
		b := queue.DecodeTxBufferHeader(m, 0)
		n := copy(s.frame, data[b.Offset:][:info.Size])
		if err := s.check(s.frame[:n]); err != nil {
			return err
		}
		l.in.Flush()
		ack := l.acks.Push(8)
		if ack == nil {
			return errors.New("the pipe of completions is full")
		}
		queue.EncodeTxCompletion(ack, info.ID)
		l.acks.Flush()
		rcvd.add(1)
	}
	return nil
}
