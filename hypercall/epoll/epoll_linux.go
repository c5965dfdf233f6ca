// Package epoll waits for many of Linux's file descriptors at once, parked in the runtime's
// poller or blocking the thread. The domains of hypercall/emu and hypercall/xendev make
// their groups with it.
package epoll

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Set is a set of file descriptors that one goroutine waits for. Only that goroutine calls
// Wait and Poll; any goroutine may call the other methods.
type Set struct {
	fd, bell int
	file     *os.File // of fd, in the runtime's poller; nil: Wait blocks its thread
	raw      syscall.RawConn
	woken    atomic.Bool // the bell was rung, and Wait or Poll has not seen it yet

	use    sync.RWMutex // held shared while fd or bell is used, in Wait too
	closed atomic.Bool

	// Used by the goroutine in Wait or Poll only.
	events [64]unix.EpollEvent
	most   int // events that one epoll_wait may return
	n      int
	err    error
	rung   bool      // the bell was seen, by Poll too, and Wait is to return
	armed  time.Time // the file's read deadline
	try    func(fd uintptr) (done bool)
}

// bellTag is the tag of the set's own eventfd.
const bellTag = -1

// one is the number that ring adds to the eventfd.
var one = binary.NativeEndian.AppendUint64(nil, 1)

// New makes an empty Set. With onThread, Wait blocks the thread that calls it; else it parks
// in the runtime's poller.
func New(onThread bool) (*Set, error) {
	s := &Set{bell: -1}
	var err error
	if s.fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if err := s.init(onThread); err != nil {
		return nil, fmt.Errorf("epoll: %w", errors.Join(err, s.Close()))
	}
	return s, nil
}

func (s *Set) init(onThread bool) (err error) {
	if s.bell, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		return err
	}
	if err = s.Add(s.bell, bellTag, true); err != nil || onThread {
		return err
	}
	if err = unix.SetNonblock(s.fd, true); err != nil { // else os.NewFile does not put fd into the poller
		return err
	}
	s.file = os.NewFile(uintptr(s.fd), "epoll")
	s.try = func(uintptr) bool { s.look(0); return s.n != 0 || s.err != nil }
	if s.raw, err = s.file.SyscallConn(); err != nil {
		return err
	}
	return s.file.SetReadDeadline(time.Time{}) // fails if it is not in the poller
}

// Add makes Wait return tag, which must not be negative, when fd can be read: with edge each
// time that more arrives (EPOLLET), else for as long as there is something to read.
func (s *Set) Add(fd, tag int, edge bool) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(tag)}
	if edge {
		ev.Events |= unix.EPOLLET
	}
	return s.control(unix.EPOLL_CTL_ADD, fd, &ev)
}

// Remove takes fd out of the set. Closing fd does so only if it is the last descriptor of its
// open file, in any process.
func (s *Set) Remove(fd int) error { return s.control(unix.EPOLL_CTL_DEL, fd, nil) }

func (s *Set) control(op, fd int, ev *unix.EpollEvent) error {
	s.use.RLock()
	defer s.use.RUnlock()
	if s.closed.Load() {
		return net.ErrClosed
	}
	return unix.EpollCtl(s.fd, op, fd, ev)
}

// look calls epoll_wait once.
func (s *Set) look(millis int) {
	s.n, s.err = unix.EpollWait(s.fd, s.events[:s.most], millis)
	if s.err == unix.EINTR {
		s.n, s.err = 0, nil
	}
}

// take fills tags with those of the events that look found, and notes a ring of the bell.
func (s *Set) take(tags []int) (n int) {
	for i := range s.events[:max(s.n, 0)] {
		if tag := int(s.events[i].Fd); tag != bellTag {
			tags[n] = tag
			n++
			continue
		}
		s.rung = true
		s.woken.Store(false) // a Wake from now on rings again
	}
	return n
}

// Wait waits until a descriptor can be read, Wake is called, or the deadline passes (the
// zero Time: never). It fills tags and returns their number, 0 after a Wake. Errors:
// os.ErrDeadlineExceeded, net.ErrClosed.
func (s *Set) Wait(tags []int, deadline time.Time) (n int, err error) {
	s.use.RLock()
	defer s.use.RUnlock()
	s.most = min(len(tags), len(s.events))
	for {
		if s.closed.Load() {
			return 0, net.ErrClosed
		}
		if s.rung {
			s.rung = false
			return 0, nil
		}
		late := false
		if s.file == nil {
			s.look(millis(deadline))
		} else if late, err = s.inPoller(deadline); err != nil {
			return 0, err
		}
		if s.err != nil {
			return 0, fmt.Errorf("epoll: %w", s.err)
		}
		if n = s.take(tags); n > 0 {
			s.rung = false
			return n, nil
		}
		if !s.rung && !deadline.IsZero() && (late || !time.Now().Before(deadline)) {
			return 0, os.ErrDeadlineExceeded
		}
	}
}

func (s *Set) inPoller(deadline time.Time) (late bool, err error) {
	if !deadline.Equal(s.armed) {
		if s.file.SetReadDeadline(deadline) != nil {
			return false, net.ErrClosed
		}
		s.armed = deadline
	}
	s.n, s.err = 0, nil
	err = s.raw.Read(s.try)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.look(0) // events from before the deadline count, and Read returned without calling try
		return true, nil
	}
	if err != nil {
		return false, net.ErrClosed
	}
	return false, nil
}

// millis returns how long epoll_wait may block; -1: without limit.
func millis(deadline time.Time) int {
	if deadline.IsZero() {
		return -1
	}
	left := max(time.Until(deadline), 0)
	return int(min((left+time.Millisecond-1)/time.Millisecond, math.MaxInt32))
}

// Poll is a Wait that does not block.
func (s *Set) Poll(tags []int) (n int, err error) {
	s.use.RLock()
	defer s.use.RUnlock()
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	s.most = min(len(tags), len(s.events))
	if s.look(0); s.err != nil {
		return 0, fmt.Errorf("epoll: %w", s.err)
	}
	return s.take(tags), nil
}

// Wake makes the current Wait, or else the next, return.
func (s *Set) Wake() {
	if s.woken.Swap(true) {
		return // Wait has not seen the previous ring yet
	}
	s.use.RLock()
	defer s.use.RUnlock()
	if !s.closed.Load() {
		s.ring()
	}
}

// ring rings the bell. The eventfd is never read: each write is a new edge.
func (s *Set) ring() { _, _ = unix.Write(s.bell, one) }

// Close ends Wait, and returns when the calls in progress have ended. It is idempotent. The
// descriptors in the set stay open.
func (s *Set) Close() (err error) {
	if s.closed.Swap(true) {
		return nil
	}
	if s.bell >= 0 {
		s.ring()
	}
	s.use.Lock()
	defer s.use.Unlock()
	if s.file != nil {
		err = s.file.Close()
	} else {
		err = unix.Close(s.fd)
	}
	if s.bell >= 0 {
		err = errors.Join(err, unix.Close(s.bell))
	}
	return err
}
