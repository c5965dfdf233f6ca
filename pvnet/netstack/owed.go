package netstack

import (
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A dueClock counts the timers that are due at once. The stack starts one for work that it may
// not do in the goroutine that receives a frame: to ask for a neighbour's address, and to send
// the packets that waited for it.
type dueClock struct {
	tcpip.Clock
	n atomic.Int64 // timers that are due and have not run to the end
}

// AfterFunc implements tcpip.Clock.
func (c *dueClock) AfterFunc(d time.Duration, f func()) tcpip.Timer {
	if d > 0 {
		return c.Clock.AfterFunc(d, f)
	}
	t := &dueTimer{clock: c}
	t.due.Store(true)
	c.n.Add(1)
	t.Timer = c.Clock.AfterFunc(0, func() {
		f()
		t.settle()
	})
	return t
}

// A dueTimer is a timer that was due at once when it was made.
type dueTimer struct {
	tcpip.Timer
	clock *dueClock
	due   atomic.Bool // it counts in the clock
}

func (t *dueTimer) settle() {
	if t.due.Swap(false) {
		t.clock.n.Add(-1)
	}
}

// Stop implements tcpip.Timer.
func (t *dueTimer) Stop() bool {
	stopped := t.Timer.Stop()
	if stopped {
		t.settle()
	}
	return stopped
}

// Reset implements tcpip.Timer. The function itself calls it in the end, to run again later.
func (t *dueTimer) Reset(d time.Duration) {
	t.Timer.Reset(d)
	t.settle()
}

// resolves reports whether packets wait for a neighbour to say its MAC address.
func (s *Stack) resolves() bool {
	for _, p := range [...]tcpip.NetworkProtocolNumber{ipv4.ProtocolNumber, ipv6.ProtocolNumber} {
		neighbours, _ := s.network.net.Neighbors(nic, p) // fails for a protocol without neighbours
		for i := range neighbours {
			if neighbours[i].State == stack.Incomplete {
				return true
			}
		}
	}
	return false
}

// A sockets is the set of a stack's open datagram sockets.
type sockets struct {
	mu   sync.Mutex
	open map[*packetConn]struct{} // guarded by mu
}

func (s *sockets) add(c *packetConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = make(map[*packetConn]struct{})
	}
	s.open[c] = struct{}{}
}

func (s *sockets) remove(c *packetConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}

// any reports whether is holds for any of the sockets.
func (s *sockets) any(is func(*packetConn) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		if is(c) {
			return true
		}
	}
	return false
}

// owe reports whether a program that reads a socket has not answered all that came.
func (s *sockets) owe() bool { return s.any((*packetConn).owes) }

// read reports whether a program reads a socket.
func (s *sockets) read() bool { return s.any(func(c *packetConn) bool { return c.wasRead.Load() }) }

// A readings counts the datagrams of a socket. A program that reads again is done with one that
// it was given.
type readings struct {
	came    *tcpip.TransportEndpointStats // of the stack
	wasRead atomic.Bool
	given   atomic.Uint64 // datagrams that the program was given
	done    atomic.Uint64 // of given, those behind which it has read again
}

// begins takes note of a call that reads.
func (r *readings) begins() {
	r.wasRead.Store(true)
	for {
		done := r.done.Load()
		if done == r.given.Load() || r.done.CompareAndSwap(done, done+1) {
			return
		}
	}
}

// ends takes note of the end of a call that reads.
func (r *readings) ends(err error) {
	if err == nil {
		r.given.Add(1)
	}
}

// owes reports whether datagrams wait for the program, or the program has not read again.
func (r *readings) owes() bool {
	lost := &r.came.ReceiveErrors
	queued := r.came.PacketsReceived.Value() - lost.ReceiveBufferOverflow.Value() - lost.ClosedReceiver.Value()
	return r.wasRead.Load() && queued != r.done.Load()
}
