//go:build linux

package xendev

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/epoll"
	"barevif/hypercall/internal/backoff"
)

// A group is where one goroutine waits for many waiters. The kernel's epoll set lists the
// files that have port numbers to read. A read gives the ports of one file that fired;
// each stays masked until its number is written back.
type group struct {
	set    *epoll.Set
	woken  atomic.Bool
	closed atomic.Bool

	mu      sync.Mutex               // never held while parked; taken before a waiter's
	waiters []*waiter                // guarded by mu; by tag
	late    backoff.Waiters[*waiter] // guarded by mu
	raised  [64]int                  // tags from set; used by the goroutine in Wait or Poll only
}

// Group implements [hypercall.GroupDomain].
func (d *Domain) Group(onThread bool) (hypercall.Group, error) {
	set, err := epoll.New(onThread)
	if err != nil {
		return nil, fmt.Errorf("xendev: %w", err)
	}
	return &group{set: set}, nil
}

func (g *group) Add(hw hypercall.Waiter, tag int) error {
	w, ok := hw.(*waiter)
	if !ok || tag < 0 || tag > hypercall.MaxTag {
		return fmt.Errorf("xendev: a group takes no %T as number %d", hw, tag)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed.Load() {
		return net.ErrClosed
	}
	for len(g.waiters) <= tag {
		g.waiters = append(g.waiters, nil)
	}
	if g.waiters[tag] != nil || !w.group.CompareAndSwap(nil, g) {
		return hypercall.ErrGrouped
	}
	w.mu.Lock()
	closed := w.closed                   // else Close finds the group, and removes the waiter
	w.raised = len(w.masked.Fired()) > 0 // by its own Wait, or in another group: Rearm unmasks them
	w.mu.Unlock()
	if closed {
		w.group.Store(nil)
		return net.ErrClosed
	}
	// Level-triggered, because one read may leave numbers in the file.
	var err error
	if w.raw.Control(func(fd uintptr) { err = g.set.Add(int(fd), tag, false) }) != nil {
		err = net.ErrClosed
	}
	if err != nil {
		w.group.Store(nil)
		return fmt.Errorf("xendev: wait for event channels: %w", err)
	}
	w.tag, g.waiters[tag] = tag, w
	if g.late.Add(w) { // its last Wait or group delayed the unmasking
		g.set.Wake()
	}
	return nil
}

func (g *group) Remove(hw hypercall.Waiter) {
	w, ok := hw.(*waiter)
	if !ok {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removeLocked(w)
}

func (g *group) removeLocked(w *waiter) {
	if w.group.Load() != g {
		return
	}
	// A closed file has left the epoll set by itself.
	_ = w.raw.Control(func(fd uintptr) { _ = g.set.Remove(int(fd)) })
	g.waiters[w.tag] = nil
	g.late.Remove(w)
	w.group.Store(nil)
}

func (g *group) Wait(tags []int, deadline time.Time) (int, error) {
	for {
		if g.woken.Swap(false) {
			return 0, nil
		}
		n, err := g.set.Wait(g.raised[:min(len(tags), len(g.raised))], g.next(deadline))
		timedOut := errors.Is(err, os.ErrDeadlineExceeded)
		if err != nil && !timedOut {
			return 0, err
		}
		if n, err = g.read(tags, n); n > 0 || err != nil {
			return n, err
		}
		if timedOut {
			if err := g.unmaskDue(); err != nil {
				return 0, err
			}
			if !deadline.IsZero() && !time.Now().Before(deadline) && !g.woken.Load() {
				return 0, os.ErrDeadlineExceeded
			}
		}
	}
}

func (g *group) Poll(tags []int) (int, error) {
	if g.late.Late() {
		if err := g.unmaskDue(); err != nil {
			return 0, err
		}
	}
	n, err := g.set.Poll(g.raised[:min(len(tags), len(g.raised))])
	if err != nil {
		return 0, err
	}
	return g.read(tags, n)
}

// read reads the port numbers of the n waiters whose tags are in raised, and fills tags
// with the tags of those whose ports fired.
func (g *group) read(tags []int, n int) (fired int, err error) {
	if n == 0 {
		return 0, nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, tag := range g.raised[:n] {
		w := g.waiters[tag]
		if w == nil {
			continue // removed meanwhile
		}
		w.got = false
		if w.raw.Control(w.look) != nil || !w.got {
			continue // closed, or read since
		}
		was := w.raised
		event, err := w.note()
		if err != nil {
			return 0, err
		}
		if event && !was {
			w.raised = true
			tags[fired] = tag
			fired++
		}
	}
	return fired, nil
}

func (g *group) Rearm(hw hypercall.Waiter, worked bool) error {
	w, ok := hw.(*waiter)
	if !ok {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if w.group.Load() != g || !w.raised {
		return nil
	}
	w.raised = false
	if err := w.settle(worked); err != nil {
		if errors.Is(err, net.ErrClosed) {
			return nil // w is being closed, which removes it
		}
		return err
	}
	g.late.Add(w)
	return nil
}

// next returns when Wait must stop parking: at the caller's deadline, or earlier if a late
// port is due.
func (g *group) next(deadline time.Time) time.Time {
	if !g.late.Late() {
		return deadline
	}
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
	for _, w := range g.waiters {
		if w != nil {
			g.removeLocked(w)
		}
	}
	g.mu.Unlock()
	return g.set.Close()
}
