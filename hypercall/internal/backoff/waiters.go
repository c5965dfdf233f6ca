package backoff

import (
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"barevif/hypercall"
)

// A waiter of a group. Its methods are called with the group's lock held.
type waiter interface {
	comparable

	// Next is [Masked].Next of the waiter's ports.
	Next(deadline time.Time) time.Time

	// UnmaskDue is [Masked].UnmaskDue of the waiter's ports. The error net.ErrClosed says
	// that the waiter is being closed.
	UnmaskDue(now time.Time) error
}

// Waiters is the waiters of a group that have late ports. The group's lock guards it, except
// from Late.
type Waiters[W waiter] struct {
	list []W
	late atomic.Bool // list is not empty
}

// Add adds w if a port of it is late, and reports whether one is.
func (l *Waiters[W]) Add(w W) bool {
	if w.Next(time.Time{}).IsZero() {
		return false
	}
	if !slices.Contains(l.list, w) {
		l.list = append(l.list, w)
		l.late.Store(true)
	}
	return true
}

// Remove removes w if it is there.
func (l *Waiters[W]) Remove(w W) {
	l.list = slices.DeleteFunc(l.list, func(v W) bool { return v == w })
	l.late.Store(len(l.list) > 0)
}

// Late reports whether there are any. Any goroutine may call it.
func (l *Waiters[W]) Late() bool { return l.late.Load() }

// Next returns when the group's Wait must stop parking: at the deadline (the zero Time:
// never), or earlier if a late port is due.
func (l *Waiters[W]) Next(deadline time.Time) time.Time {
	for _, w := range l.list {
		deadline = w.Next(deadline)
	}
	return deadline
}

// UnmaskDue unmasks the late ports that are due.
func (l *Waiters[W]) UnmaskDue(now time.Time) (err error) {
	l.list = slices.DeleteFunc(l.list, func(w W) bool {
		// A waiter that is being closed leaves the group next.
		if e := w.UnmaskDue(now); e != nil && !errors.Is(e, hypercall.ErrClosed) {
			err = e
		}
		return w.Next(time.Time{}).IsZero()
	})
	l.late.Store(len(l.list) > 0)
	return err
}
