package emu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall/epoll"
)

// An fdBell is an eventfd, which works across processes too. park waits in the runtime's
// poller.
type fdBell struct {
	file  *os.File
	one   [8]byte
	count [8]byte   // used by the parked goroutine only
	until time.Time // used by the parked goroutine only: the deadline of file
}

func newFDBell() (bell, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("emu: eventfd: %w", err)
	}
	return openFDBell(fd), nil
}

// openFDBell takes over a non-blocking eventfd.
func openFDBell(fd int) *fdBell {
	b := &fdBell{file: os.NewFile(uintptr(fd), "eventfd")}
	binary.NativeEndian.PutUint64(b.one[:], 1)
	return b
}

// ring ignores the error of a write to a closed eventfd: no goroutine waits for it then.
func (b *fdBell) ring() { _, _ = b.file.Write(b.one[:]) }

func (b *fdBell) park(until time.Time) {
	if until != b.until {
		if b.file.SetReadDeadline(until) != nil {
			return // closed: the caller checks before it parks again
		}
		b.until = until
	}
	_, err := b.file.Read(b.count[:]) // rung, past the deadline or closed: the caller checks
	if errors.Is(err, os.ErrDeadlineExceeded) {
		b.until = past // perhaps nudge has set it
	}
}

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// nudge makes the parked goroutine ready. A ring does so only once Go's scheduler has asked epoll for events.
func (b *fdBell) nudge() { _ = b.file.SetReadDeadline(past) }

// close waits for a goroutine in the park of a threadBell: call ring first.
func (b *fdBell) close() { _ = b.file.Close() }
func (b *fdBell) letGo() {}

// attach adds the eventfd to the epoll set of the group. The group never reads the eventfd:
// each ring is a new edge for epoll.
func (b *fdBell) attach(s *seat) error {
	set, ok := s.g.set.(*epoll.Set)
	if !ok { // the group is of a domain that takes nothing of the system
		return fmt.Errorf("emu: a group without an epoll set takes no eventfd: %w", errors.ErrUnsupported)
	}
	return b.control(func(fd int) error { return set.Add(fd, s.tag, true) })
}

// detach takes the eventfd out of the group's epoll set. A closed one has left it already.
func (b *fdBell) detach(s *seat) {
	if set, ok := s.g.set.(*epoll.Set); ok {
		_ = b.control(func(fd int) error { return set.Remove(fd) })
	}
}

func (b *fdBell) control(f func(fd int) error) error {
	conn, err := b.file.SyscallConn()
	if err != nil {
		return err
	}
	return errors.Join(conn.Control(func(fd uintptr) { err = f(int(fd)) }), err)
}

// A threadBell is an fdBell whose park blocks the thread. The eventfd is never read: each
// ring is a new edge for epoll, which saves a system call per park.
type threadBell struct {
	*fdBell
	conn  syscall.RawConn // of the eventfd, which stays open while a goroutine parks
	epoll *os.File        // stays open while a goroutine parks, too
	set   syscall.RawConn // of epoll

	// Used by the parked goroutine only.
	hold, block func(uintptr)
	events      [1]unix.EpollEvent
	millis      int
}

// newThreadBell takes over b, an fdBell, unless it fails.
func newThreadBell(b bell) (bell, error) {
	fb, ok := b.(*fdBell)
	if !ok { // of a waiter that was made for a goroutine without a thread
		return nil, fmt.Errorf("emu: no eventfd to block a thread on: %w", errors.ErrUnsupported)
	}
	t := &threadBell{fdBell: fb}
	var err error
	if t.conn, err = t.file.SyscallConn(); err != nil {
		return nil, fmt.Errorf("emu: eventfd: %w", err)
	}
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("emu: epoll: %w", err)
	}
	t.epoll = os.NewFile(uintptr(fd), "epoll")
	t.set, err = t.epoll.SyscallConn()
	if err == nil {
		ctlErr := t.conn.Control(func(bell uintptr) {
			err = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, int(bell), &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET})
		})
		err = errors.Join(ctlErr, err)
	}
	if err != nil {
		return nil, fmt.Errorf("emu: epoll: %w", errors.Join(err, t.epoll.Close()))
	}
	// The caller of park checks why the wait ended, or whether a file was closed.
	t.hold = func(uintptr) { _ = t.set.Control(t.block) }
	t.block = func(fd uintptr) { _, _ = unix.EpollWait(int(fd), t.events[:], t.millis) }
	return t, nil
}

func (t *threadBell) park(until time.Time) {
	t.millis = -1
	if !until.IsZero() {
		left := max(time.Until(until), 0)
		t.millis = int(min((left+time.Millisecond-1)/time.Millisecond, math.MaxInt32))
	}
	_ = t.conn.Control(t.hold)
}

func (t *threadBell) nudge() {} // the kernel wakes the thread at once

func (t *threadBell) close() {
	t.fdBell.close()
	t.letGo()
}

// letGo closes the epoll set once no goroutine parks. It does not wait for that: the caller rings the bell
// before, so that park returns.
func (t *threadBell) letGo() { _ = t.epoll.Close() }
