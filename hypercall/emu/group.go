package emu

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/internal/backoff"
)

// A group is where one goroutine waits for many waiters. Each waiter has a bit that says
// its bell was rung. A chanBell sets the bit itself; an eventfd, which another process may
// ring, is in the sleeper's epoll set, and the kernel lists those that were rung. So the
// goroutine that waits never looks at the ports of the other waiters.
type group struct {
	d      *Domain
	set    sleeper
	asleep atomic.Bool // Wait may be in the sleeper: a ring that sets a bit must wake it
	woken  atomic.Bool
	closed atomic.Bool

	mu     sync.Mutex               // never held while parked
	chunks atomic.Pointer[[]*chunk] // grown under mu
	late   backoff.Waiters[*waiter] // guarded by mu
	rung   [64]int                  // tags from set; used by the goroutine in Wait or Poll only
}

// A chunk is the waiters of 64 tags.
type chunk struct {
	bits    atomic.Uint64
	waiters [64]*waiter // guarded by the group's mu
}

// A sleeper is where the goroutine of a group waits until one of its waiters' bells rings. A
// bell either calls Wake, or has an eventfd, which is in the sleeper's epoll set.
type sleeper interface {
	// Wait fills tags with those of the eventfds that rang, and returns their number; 0 after
	// a Wake, of before the call too. Errors: hypercall.ErrDeadlineExceeded and ErrClosed.
	Wait(tags []int, deadline time.Time) (n int, err error)
	// Poll is a Wait that does not block.
	Poll(tags []int) (n int, err error)
	Wake()
	// Close ends Wait.
	Close() error
}

// A chanSleeper waits for bells of its process alone, and needs nothing but Go's scheduler.
type chanSleeper struct {
	rung   chan struct{} // holds one: Wakes merge
	closed atomic.Bool
	timer  *time.Timer // used by the goroutine in Wait only
}

func newChanSleeper(onThread bool) (sleeper, error) {
	if onThread {
		return nil, errNoThread
	}
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &chanSleeper{rung: make(chan struct{}, 1), timer: t}, nil
}

func (s *chanSleeper) Wait(_ []int, deadline time.Time) (int, error) {
	if s.closed.Load() {
		return 0, hypercall.ErrClosed
	}
	if deadline.IsZero() {
		<-s.rung
	} else {
		s.timer.Reset(time.Until(deadline))
		select {
		case <-s.rung:
			s.timer.Stop()
		case <-s.timer.C:
			return 0, hypercall.ErrDeadlineExceeded
		}
	}
	if s.closed.Load() {
		return 0, hypercall.ErrClosed
	}
	return 0, nil
}

func (s *chanSleeper) Poll([]int) (int, error) {
	if s.closed.Load() {
		return 0, hypercall.ErrClosed
	}
	return 0, nil // a bell that rang has set its bit in the group
}

func (s *chanSleeper) Wake() {
	select {
	case s.rung <- struct{}{}:
	default:
	}
}

func (s *chanSleeper) Close() error {
	s.closed.Store(true)
	s.Wake()
	return nil
}

// A seat is a waiter's place in a group.
type seat struct {
	g     *group
	chunk *chunk
	tag   int
}

// ring says that there may be an event.
func (s *seat) ring() {
	bit := uint64(1) << (s.tag % 64)
	if s.chunk.bits.Load()&bit != 0 {
		return // the goroutine that set the bit wakes the group
	}
	s.chunk.bits.Or(bit)
	if s.g.asleep.Load() && s.g.asleep.CompareAndSwap(true, false) {
		s.g.set.Wake()
	}
}

// Group implements [hypercall.GroupDomain]. A Group that blocks a thread needs Linux.
func (d *Domain) Group(onThread bool) (hypercall.Group, error) {
	set, err := d.sys.sleeper(onThread)
	if err != nil {
		return nil, err
	}
	g := &group{d: d, set: set}
	g.chunks.Store(new([]*chunk))
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.waiters != nil { // else the domain is dead: Wait and Poll of g return hypercall.ErrClosed
		d.groups[g] = struct{}{}
	}
	return g, nil
}

func (g *group) Add(hw hypercall.Waiter, tag int) error {
	w, ok := hw.(*waiter)
	if !ok || tag < 0 || tag > hypercall.MaxTag {
		return fmt.Errorf("emu: a group takes no %T as number %d", hw, tag)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed.Load() {
		return hypercall.ErrClosed
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed.Load() {
		return hypercall.ErrClosed
	}
	chunks := *g.chunks.Load()
	for len(chunks) <= tag/64 {
		chunks = append(slices.Clip(chunks), new(chunk))
	}
	g.chunks.Store(&chunks)
	s := &seat{g, chunks[tag/64], tag}
	if s.chunk.waiters[tag%64] != nil || w.seat.Load() != nil {
		return hypercall.ErrGrouped
	}
	if err := w.bell.attach(s); err != nil {
		return err
	}
	w.seat.Store(s)
	s.chunk.waiters[tag%64] = w
	if g.late.Add(w) { // its last Wait or group delayed the unmasking
		g.set.Wake()
	}
	s.ring() // events from before Add count
	return nil
}

func (g *group) Remove(hw hypercall.Waiter) {
	if w, ok := hw.(*waiter); ok {
		g.remove(w)
	}
}

func (g *group) remove(w *waiter) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removeLocked(w)
}

func (g *group) removeLocked(w *waiter) {
	s := w.seat.Load()
	if s == nil || s.g != g {
		return
	}
	w.bell.detach(s)
	s.chunk.waiters[s.tag%64] = nil
	g.late.Remove(w)
	w.seat.Store(nil)
}

func (g *group) Wait(tags []int, deadline time.Time) (int, error) {
	for {
		n, err := g.gather(tags)
		if n > 0 || err != nil {
			return n, err
		}
		if g.woken.Swap(false) {
			return 0, nil
		}
		g.asleep.Store(true)
		if g.any() { // the bit was set by a ring that did not see asleep
			g.asleep.Store(false)
			continue
		}
		until := g.next(deadline)
		n, err = g.set.Wait(g.rung[:], until)
		g.asleep.Store(false)
		g.note(n)
		if errors.Is(err, hypercall.ErrDeadlineExceeded) {
			if err := g.unmaskDue(); err != nil {
				return 0, err
			}
			if n, err := g.gather(tags); n > 0 || err != nil {
				return n, err
			}
			if !deadline.IsZero() && !time.Now().Before(deadline) && !g.woken.Load() {
				return 0, hypercall.ErrDeadlineExceeded
			}
		} else if err != nil {
			return 0, err
		}
	}
}

func (g *group) Poll(tags []int) (int, error) {
	n, err := g.set.Poll(g.rung[:])
	if err != nil {
		return 0, err
	}
	g.note(n)
	if g.late.Late() {
		if err := g.unmaskDue(); err != nil {
			return 0, err
		}
	}
	return g.gather(tags)
}

// note sets the bits of the n waiters whose eventfds the epoll set reported in rung.
func (g *group) note(n int) {
	chunks := *g.chunks.Load()
	for _, tag := range g.rung[:n] {
		chunks[tag/64].bits.Or(1 << (tag % 64))
	}
}

// any reports whether a bit is set.
func (g *group) any() bool {
	for _, c := range *g.chunks.Load() {
		if c.bits.Load() != 0 {
			return true
		}
	}
	return false
}

// gather takes the events of the waiters whose bits are set, and fills tags with the tags
// of those that have some.
func (g *group) gather(tags []int) (n int, err error) {
	if g.closed.Load() || g.d.dead.Load() {
		return 0, hypercall.ErrClosed
	}
	for i, c := range *g.chunks.Load() {
		if c.bits.Load() == 0 {
			continue
		}
		g.mu.Lock()
		for b := c.bits.Swap(0); b != 0; b &= b - 1 {
			if n == len(tags) {
				c.bits.Or(b) // the next call returns the rest
				break
			}
			at := bits.TrailingZeros64(b)
			if w := c.waiters[at]; w != nil && len(w.masked.Fired()) == 0 && w.collect() {
				tags[n] = i*64 + at
				n++
			}
		}
		g.mu.Unlock()
	}
	return n, nil
}

func (g *group) Rearm(hw hypercall.Waiter, worked bool) error {
	w, ok := hw.(*waiter)
	if !ok {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	s := w.seat.Load()
	if s == nil || s.g != g || len(w.masked.Fired()) == 0 {
		return nil
	}
	w.settle(worked)
	s.ringIfPending(w)
	g.late.Add(w)
	return nil
}

// Next returns when the first late port of w is due, if that is before the deadline.
func (w *waiter) Next(deadline time.Time) time.Time { return w.masked.Next(deadline) }

// UnmaskDue unmasks the late ports of w that are due. w is in a group.
func (w *waiter) UnmaskDue(now time.Time) error {
	w.unmaskDue(now)
	w.seat.Load().ringIfPending(w)
	return nil
}

// ringIfPending rings for events that came while the ports of w were masked: such an event
// rings no bell.
func (s *seat) ringIfPending(w *waiter) {
	w.d.gate.RLock()
	defer w.d.gate.RUnlock()
	if w.d.dead.Load() {
		return
	}
	for _, p := range *w.ports.Load() {
		if p.word.Load()&(portPending|portMasked) == portPending {
			s.ring()
			return
		}
	}
}

// next returns when Wait must stop parking: at the caller's deadline, or earlier if a late
// port is due.
func (g *group) next(deadline time.Time) time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.late.Next(deadline)
}

func (g *group) unmaskDue() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.late.UnmaskDue(time.Now())
}

func (g *group) Wake() {
	g.woken.Store(true)
	g.set.Wake()
}

func (g *group) Close() error {
	g.mu.Lock()
	if g.closed.Swap(true) {
		g.mu.Unlock()
		return nil
	}
	for _, c := range *g.chunks.Load() {
		for _, w := range c.waiters {
			if w != nil {
				g.removeLocked(w)
			}
		}
	}
	g.mu.Unlock()
	g.d.mu.Lock()
	delete(g.d.groups, g)
	g.d.mu.Unlock()
	return g.set.Close()
}
