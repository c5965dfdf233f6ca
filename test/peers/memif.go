package main

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"go.fd.io/govpp/extras/gomemif/memif"
)

// A memifLink is VPP's memif as implemented in go.fd.io/govpp/extras, polled, with rings of
// 256 packets. Single packets go from the slave to the master. Bursts go from the master to
// the slave, because a master's Refill overwrites the lengths of packets in flight to it.
type memifLink struct {
	path          string
	master, slave *memifEnd
	burst         bool
	taken         atomic.Uint64 // packets that the receiver of bursts has taken
}

func memifPeer(burst bool) peer {
	return setupFunc(func(j *job) (link, error) {
		var err error
		// Now and then the library's handshake does not finish.
		for range 4 {
			var l *memifLink
			if l, err = newMemif(j, burst); err == nil {
				return l, nil
			}
		}
		return nil, err
	})
}

func newMemif(j *job, burst bool) (l *memifLink, err error) {
	l = &memifLink{path: j.socketPath("memif"), burst: burst}
	if l.master, err = openMemif(l.path, true, j.size); err == nil {
		l.slave, err = openMemif(l.path, false, j.size)
	}
	if err == nil {
		err = errors.Join(l.master.wait(), l.slave.wait())
	}
	if err != nil {
		return nil, errors.Join(err, l.close())
	}
	if burst {
		l.slave.rx.Refill(0) // refills all slots: the library ignores the count
	}
	return l, nil
}

func (l *memifLink) close() error {
	for _, e := range []*memifEnd{l.slave, l.master} {
		if e != nil {
			e.socket.StopPolling()
		}
	}
	os.Remove(l.path)
	return nil
}

type memifEnd struct {
	socket *memif.Socket
	card   *memif.Interface
	up     chan struct{}
	rx, tx *memif.Queue
}

func openMemif(path string, master bool, size int) (*memifEnd, error) {
	socket, err := memif.NewSocket("peers", path)
	if err != nil {
		return nil, fmt.Errorf("memif socket: %w", err)
	}
	e := &memifEnd{socket: socket, up: make(chan struct{}, 1)}
	e.card, err = socket.NewInterface(&memif.Arguments{
		IsMaster: master, Name: "peers",
		// A descriptor has 16 bits for a length, also for that of a buffer.
		MemoryConfig:     memif.MemoryConfig{NumQueuePairs: 1, Log2RingSize: 8, PacketBufferSize: uint32(max(pageSize, size))},
		ConnectedFunc:    func(*memif.Interface) error { e.up <- struct{}{}; return nil },
		DisconnectedFunc: func(*memif.Interface) error { return nil },
	})
	if err != nil {
		return nil, fmt.Errorf("memif interface: %w", err)
	}
	// The library's polling goroutine would block for good on an error that nobody
	// reads, and never closes the channel.
	errs := make(chan error, 64)
	go func() {
		for range errs {
		}
	}()
	socket.StartPolling(errs)
	if !master {
		if err := e.card.RequestConnection(); err != nil {
			socket.StopPolling()
			return nil, fmt.Errorf("memif connection: %w", err)
		}
	}
	return e, nil
}

func (e *memifEnd) wait() (err error) {
	select {
	case <-e.up:
	case <-time.After(time.Second):
		return errors.New("the memif handshake did not finish in a second")
	}
	if e.rx, err = e.card.GetRxQueue(0); err != nil {
		return err
	}
	e.tx, err = e.card.GetTxQueue(0)
	return err
}

func (l *memifLink) send(j *job) error {
	src, sent := j.source(), tally{to: &j.sent}
	if l.burst {
		return l.sendBursts(j)
	}
	for !j.stopped() {
		frame := src.next()
		for l.slave.tx.WritePacket(frame) == 0 {
			if spinPause(); j.stopped() {
				return nil
			}
		}
		sent.add(1)
	}
	return nil
}

// sendBursts tracks how many packets the receiver has taken: Tx_burst checks for only one
// free slot, and overwrites packets in the others.
func (l *memifLink) sendBursts(j *job) error {
	const burst = 32
	src := j.batchSource(burst)
	packets := make([]memif.MemifPacketBuffer, burst)
	for n := uint64(0); !j.stopped(); {
		if n-l.taken.Load() > 256-burst {
			spinPause()
			continue
		}
		for i, frame := range src.next() {
			packets[i] = memif.MemifPacketBuffer{Buf: frame, Buflen: len(frame)}
		}
		l.master.tx.Tx_burst(packets)
		n += burst
		j.sent.Store(n)
	}
	return nil
}

func (l *memifLink) receive(j *job) error {
	s, rcvd := j.sink(), tally{to: &j.rcvd}
	if l.burst {
		return l.receiveBursts(j, s)
	}
	for !j.stopped() {
		n, err := l.master.rx.ReadPacket(s.frame)
		if err != nil {
			return err
		}
		if n == 0 {
			spinPause()
			continue
		}
		if err := s.check(s.frame[:n]); err != nil {
			return err
		}
		rcvd.add(1)
	}
	return nil
}

func (l *memifLink) receiveBursts(j *job, s *sink) error {
	packets := make([]memif.MemifPacketBuffer, 256)
	for i := range packets {
		packets[i].Buf = make([]byte, j.size)
	}
	for !j.stopped() {
		n, err := l.slave.rx.Rx_burst(packets)
		if err != nil {
			return err
		}
		if n == 0 {
			spinPause()
			continue
		}
		for _, p := range packets[:n] {
			if err := s.check(p.Buf[:p.Buflen]); err != nil {
				return err
			}
		}
		l.slave.rx.Refill(int(n))
		j.rcvd.Add(uint64(n))
		l.taken.Add(uint64(n))
	}
	return nil
}

func (l *memifLink) ping(j *job, rtt []int64) error {
	src, s := j.source(), j.sink()
	for i := range rtt {
		start := nano()
		for frame := src.next(); l.slave.tx.WritePacket(frame) == 0; {
			spinPause()
		}
		n := 0
		for n == 0 {
			var err error
			if n, err = l.slave.rx.ReadPacket(s.frame); err != nil || j.stopped() {
				return err
			}
		}
		if err := s.check(s.frame[:n]); err != nil {
			return err
		}
		rtt[i] = nano() - start
	}
	return nil
}

func (l *memifLink) echo(j *job) error {
	b := make([]byte, j.size)
	for !j.stopped() {
		n, err := l.master.rx.ReadPacket(b)
		if err != nil {
			return err
		}
		for n > 0 && l.master.tx.WritePacket(b[:n]) == 0 {
			spinPause()
		}
	}
	return nil
}
