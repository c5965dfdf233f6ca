//go:build linux

package xendev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/internal/backoff"
)

// past is a deadline that has passed. SetReadDeadline(past) unblocks a pending Read.
var past = time.Unix(1, 0)

// portBytes is the size of a port number in evtchn's read and write.
const portBytes = 4

// A waiter is one open file of evtchn. Reading it gives the numbers of ports that fired;
// the driver keeps each masked until its number is written back.
type waiter struct {
	d    *Domain
	file *os.File // in the runtime's poller; never call its Fd, which would take it out
	raw  syscall.RawConn

	dead  atomic.Bool                   // the domain was resumed: no call for a port reaches the driver; set with the life's mu held
	bound map[hypercall.PortID]struct{} // guarded by the life's mu; ports in the driver's list for the file

	given atomic.Bool // another process has the file too, and keeps the ports

	group atomic.Pointer[group] // the group the waiter is in, or nil; changed under the group's mu

	woken atomic.Bool // a Wake that Wait has not seen yet
	poked atomic.Bool // a Wake may have moved the file's read deadline

	mu     sync.Mutex                 // never held while parked
	ports  map[hypercall.PortID]*port // guarded by mu
	closed bool                       // guarded by mu
	masked backoff.Masked[*port]      // guarded by mu
	out    []byte                     // guarded by mu; numbers to write back
	sent   int                        // guarded by mu; bytes of out that write wrote
	outErr error                      // guarded by mu; error of write
	write  func(fd uintptr)           // writes the first bytes of out; made once, like try

	// Guarded by the group's mu.
	tag    int
	raised bool // the group has returned the tag, and Rearm is to follow

	// Used by the goroutine in Wait only, or guarded by the group's mu.
	in    [64 * portBytes]byte
	n     int   // bytes of in
	err   error // error of the read that filled in
	got   bool  // look read something
	armed time.Time
	try   func(fd uintptr) (done bool) // reads into in; made once, because a closure for each Wait would be garbage
	look  func(fd uintptr)

	// Used by a waiter that blocks its thread.
	wakeFile *os.File // an eventfd that Wake writes; nil: the goroutine waits in the runtime's poller
	wakeRaw  syscall.RawConn
	polled   [2]unix.PollFd
	millis   int              // timeout of the next poll
	hold     func(fd uintptr) // calls poll while the driver's file cannot be closed
	poll     func(fd uintptr)
}

// Waiter opens a Waiter: an open file of /dev/xen/evtchn, whose ports exist as long as it
// is open.
func (d *Domain) Waiter() (hypercall.Waiter, error) {
	f, err := d.evtchn.open(d.cfg)
	if err != nil {
		return nil, err
	}
	w, err := newWaiter(d, f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return w, nil
}

// ThreadWaiter is [Domain.Waiter] for a goroutine that is locked to its thread; see
// [hypercall.ThreadDomain].
func (d *Domain) ThreadWaiter() (hypercall.Waiter, error) {
	w, err := d.Waiter()
	if err != nil {
		return nil, err
	}
	if err := w.(*waiter).onThread(); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// onThread makes Wait block the thread.
func (w *waiter) onThread() error {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("xendev: eventfd: %w", err)
	}
	wake := os.NewFile(uintptr(fd), "eventfd")
	if w.wakeRaw, err = wake.SyscallConn(); err != nil {
		return errors.Join(err, wake.Close())
	}
	w.wakeFile = wake
	w.polled[0].Events, w.polled[1].Events = unix.POLLIN, unix.POLLIN
	w.hold = func(fd uintptr) {
		w.polled[0].Fd = int32(fd)
		_ = w.wakeRaw.Control(w.poll) // closed: Wait looks for that
	}
	w.poll = w.pollAndRead
	return nil
}

// pollAndRead waits for the driver or a Wake, and reads from both. Neither descriptor is
// closed meanwhile: Close of a file waits for its users.
func (w *waiter) pollAndRead(wake uintptr) {
	w.polled[1].Fd = int32(wake)
	w.polled[1].Revents = 0
	_, _ = unix.Poll(w.polled[:], w.millis) // whatever ended the poll, both are checked
	if w.polled[1].Revents != 0 {
		_, _ = unix.Read(int(wake), w.in[:8])
	}
	w.got = w.tryRead(uintptr(w.polled[0].Fd))
}

func newWaiter(d *Domain, f *os.File) (*waiter, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := f.SetReadDeadline(time.Time{}); err != nil { // fails if the file is not in the poller
		return nil, fmt.Errorf("xendev: wait on %s: %w", f.Name(), err)
	}
	w := &waiter{d: d, file: f, raw: raw, ports: make(map[hypercall.PortID]*port), bound: make(map[hypercall.PortID]struct{})}
	w.try = w.tryRead
	w.look = func(fd uintptr) { w.got = w.tryRead(fd) }
	w.write = func(fd uintptr) { w.sent, w.outErr = writeNow(fd, w.out[:min(len(w.out), maxWrite)]) }
	return w, nil
}

func (w *waiter) tryRead(fd uintptr) (done bool) {
	for {
		w.n, w.err = readNow(fd, w.in[:])
		switch w.err {
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			if w.n == 0 && w.err == nil {
				w.err = io.ErrUnexpectedEOF
			}
			return true
		}
	}
}

// Wait implements [hypercall.Waiter].
func (w *waiter) Wait(deadline time.Time, worked bool) error {
	if err := w.settle(worked); err != nil {
		return err
	}
	if w.wakeFile != nil {
		return w.waitOnThread(deadline)
	}
	for {
		if err := w.arm(deadline); err != nil {
			return err
		}
		// Check after arm: the deadline of an earlier Wake is overwritten by arm, and a
		// later Wake ends the read.
		if w.woken.Swap(false) {
			return w.ended()
		}
		err := w.raw.Read(w.try)
		switch {
		case err == nil:
			if fired, err := w.note(); fired || err != nil {
				return err
			}
			continue // the port was closed meanwhile
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return net.ErrClosed
		}

		w.armed = past // used up: the next arm sets the deadline again
		if w.woken.Swap(false) {
			return w.ended()
		}
		// The poller does not read past the deadline, but events from before it count.
		w.got = false
		if w.raw.Control(w.look) != nil {
			return net.ErrClosed
		}
		if w.got {
			if fired, err := w.note(); fired || err != nil {
				return err
			}
		}
		now := time.Now()
		if !deadline.IsZero() && !now.Before(deadline) {
			return os.ErrDeadlineExceeded
		}
		if err := w.UnmaskDue(now); err != nil {
			return err
		}
	}
}

func (w *waiter) waitOnThread(deadline time.Time) error {
	for {
		w.millis = -1
		if until := w.Next(deadline); !until.IsZero() {
			left := max(time.Until(until), 0)
			w.millis = int(min((left+time.Millisecond-1)/time.Millisecond, math.MaxInt32))
		}
		// A later Wake writes the eventfd, which ends the poll at once.
		if w.woken.Swap(false) {
			return w.ended()
		}
		w.got = false
		if w.raw.Control(w.hold) != nil {
			return net.ErrClosed
		}
		if w.got {
			if fired, err := w.note(); fired || err != nil {
				return err
			}
		}
		now := time.Now()
		if !deadline.IsZero() && !now.Before(deadline) && !w.woken.Load() {
			return os.ErrDeadlineExceeded
		}
		if err := w.UnmaskDue(now); err != nil {
			return err
		}
	}
}

// ended returns net.ErrClosed if it was Close that woke Wait.
func (w *waiter) ended() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return net.ErrClosed
	}
	return nil
}

// Next returns when Wait has to look up: at the caller's deadline, or when the next late
// port is due.
func (w *waiter) Next(deadline time.Time) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.masked.Next(deadline)
}

// arm sets the read deadline to the result of Next, unless it is set already.
func (w *waiter) arm(deadline time.Time) error {
	deadline = w.Next(deadline)
	if !w.poked.Swap(false) && deadline.Equal(w.armed) {
		return nil
	}
	w.armed = deadline
	if err := w.file.SetReadDeadline(deadline); err != nil {
		return net.ErrClosed
	}
	return nil
}

// settle unmasks the ports of the last wake-up, or delays that.
func (w *waiter) settle(worked bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return net.ErrClosed
	}
	if worked {
		w.masked.Settle(true, time.Time{}, w.unmaskLocked)
	} else if len(w.masked.Fired()) > 0 || w.masked.Late() {
		w.masked.Settle(false, time.Now(), w.unmaskLocked)
	}
	return w.flushLocked()
}

// UnmaskDue unmasks the late ports that are due.
func (w *waiter) UnmaskDue(now time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.masked.UnmaskDue(now, w.unmaskLocked)
	return w.flushLocked()
}

// unmaskLocked adds p to the numbers to write back.
func (w *waiter) unmaskLocked(p *port) {
	w.out = binary.NativeEndian.AppendUint32(w.out, uint32(p.id))
}

// maxWrite is how many bytes the driver accepts in one write.
const maxWrite = 4096

func (w *waiter) flushLocked() error {
	if w.dead.Load() {
		w.out = w.out[:0]
	}
	for len(w.out) > 0 {
		if w.raw.Control(w.write) != nil {
			return net.ErrClosed
		}
		switch w.outErr {
		case nil:
			if w.sent == 0 {
				return fmt.Errorf("xendev: unmask event channels: %w", io.ErrShortWrite)
			}
			w.out = w.out[:copy(w.out, w.out[w.sent:])]
		case unix.EINTR:
		default:
			return fmt.Errorf("xendev: unmask event channels: %w", w.outErr)
		}
	}
	return nil
}

// note handles the result of try: it collects our ports that fired and were not masked.
func (w *waiter) note() (fired bool, err error) {
	if w.err == unix.EFBIG {
		return true, w.overflow()
	}
	if w.err != nil {
		return false, fmt.Errorf("xendev: wait for event channels: %w", w.err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for b := w.in[:w.n]; len(b) >= portBytes; b = b[portBytes:] {
		// A number without a port is left from one that has been closed.
		if p := w.ports[hypercall.PortID(binary.NativeEndian.Uint32(b))]; p != nil && w.masked.Fire(p) {
			fired = true
		}
	}
	return fired, nil
}

// overflow resets evtchn after the driver lost numbers. Any port may be among the lost
// ones, so all are taken to have fired, and are written back.
func (w *waiter) overflow() error {
	var err error
	if w.raw.Control(func(fd uintptr) { err = resetEvents(int(fd)) }) != nil {
		return net.ErrClosed
	}
	if err != nil {
		return fmt.Errorf("xendev: reset event channels: %w", err)
	}
	w.allFired()
	return nil
}

func (w *waiter) allFired() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.ports {
		w.masked.Fire(p)
	}
}

// one is the increment that is written to an eventfd.
var one = binary.NativeEndian.AppendUint64(nil, 1)

// Wake implements [hypercall.Waiter].
func (w *waiter) Wake() {
	if w.woken.Swap(true) {
		return // an earlier Wake does the rest
	}
	if w.wakeFile != nil {
		_, _ = w.wakeFile.Write(one[:]) // fails only if nobody waits
		return
	}
	w.poked.Store(true)
	// It fails only if the file is closed, and then nobody waits.
	_ = w.file.SetReadDeadline(past)
}

// Nudge implements [hypercall.Nudger]. It does nothing for a thread that waits: the kernel wakes that one at once.
func (w *waiter) Nudge() {
	if w.wakeFile == nil {
		_ = w.file.SetReadDeadline(past) // Wait looks at the file, and sets its deadline again
	}
}

// Close implements [hypercall.Waiter].
func (w *waiter) Close() error {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return nil
	}
	w.closed = true
	ports := w.ports
	w.ports = nil
	w.mu.Unlock()
	if g := w.group.Load(); g != nil {
		g.Remove(w)
	}
	w.Wake() // makes Wait return: Close of a file waits for a thread in Wait, and after a resume no file is closed
	for _, p := range ports {
		p.Close() // gives its doorbell back; the driver would unbind the port by itself
	}
	w.d.begin()
	w.d.leave(w)
	var err error
	if !slices.Contains(w.d.unclosed, w.file) {
		err = w.file.Close()
	}
	w.d.end()
	if w.wakeFile != nil {
		err = errors.Join(err, w.wakeFile.Close())
	}
	return err
}

// errResumed is the error of opening a port on a Waiter of before a resume.
var errResumed = errors.New("the domain was resumed since the Waiter was made: make another")

// errNoPorts names the setting of xl.cfg(5) that limits a domain's event channels.
var errNoPorts = fmt.Errorf("%w: raise max_event_channels in the domain's configuration", hypercall.ErrNoPorts)

// Unbound implements [hypercall.Waiter]. Xen does not say whether peer exists.
func (w *waiter) Unbound(peer hypercall.DomID) (hypercall.Port, error) {
	p, err := w.open(func(fd int) (hypercall.PortID, error) { return w.d.evtchn.bindUnbound(fd, w.d.other(peer)) })
	if errors.Is(err, unix.ENOSPC) {
		err = errNoPorts
	}
	if err != nil {
		return nil, fmt.Errorf("xendev: open an event channel for domain %d: %w", peer, err)
	}
	return p, nil
}

// Bind implements [hypercall.Waiter].
func (w *waiter) Bind(peer hypercall.DomID, remote hypercall.PortID) (hypercall.Port, error) {
	p, err := w.open(func(fd int) (hypercall.PortID, error) { return w.d.evtchn.bindPeer(fd, w.d.other(peer), remote) })
	switch {
	case errors.Is(err, unix.ENOSPC):
		err = errNoPorts
	case errors.Is(err, unix.ESRCH):
		err = hypercall.ErrNoDomain
	case errors.Is(err, unix.EINVAL):
		err = hypercall.ErrNoPort
	}
	if err != nil {
		return nil, fmt.Errorf("xendev: bind to event channel %d of domain %d: %w", remote, peer, err)
	}
	return p, nil
}

// open opens a port with bind and enters it in the map, under one lock, because a port
// that is bound to its peer may fire before bind returns.
func (w *waiter) open(bind func(fd int) (hypercall.PortID, error)) (*port, error) {
	w.d.begin()
	defer w.d.end()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil, net.ErrClosed
	}
	if w.dead.Load() {
		return nil, errResumed
	}
	w.d.enter(w)
	var id hypercall.PortID
	var err error
	if w.raw.Control(func(fd uintptr) { id, err = bind(int(fd)) }) != nil {
		return nil, net.ErrClosed
	}
	if err != nil {
		return nil, err
	}
	p, err := newPort(w, id)
	if err != nil {
		cerr := w.raw.Control(func(fd uintptr) { err = errors.Join(err, w.d.evtchn.unbind(int(fd), id)) })
		return nil, errors.Join(err, cerr)
	}
	w.bound[id] = struct{}{}
	w.enterLocked(p)
	return p, nil
}

// enterLocked adds p, and grows the slices to which Wait may append it.
func (w *waiter) enterLocked(p *port) {
	w.ports[p.id] = p
	n := len(w.ports)
	w.masked.Grow(n)
	w.out = slices.Grow(w.out, 2*n*portBytes)
}

// remove removes p, unless Close of the waiter did.
func (w *waiter) remove(p *port) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.masked.Remove(p)
	if w.ports[p.id] == p {
		delete(w.ports, p.id)
	}
}
