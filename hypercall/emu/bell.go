package emu

import (
	"sync/atomic"
	"time"
)

// A bell wakes the goroutine that is parked on it, in this process or another. A ring
// from before park counts. park may also return without a reason.
type bell interface {
	ring()
	// park returns when the bell rings or at until; the zero Time: never.
	park(until time.Time)
	// nudge ends the park under way if Go's scheduler ends parks. A later park may end early, too.
	nudge()
	close()
	// letGo closes this process's descriptors of the bell. The machine keeps its own, with which it rings the bell for the process that adopted the waiter.
	letGo()

	// attach makes each later ring of the bell set the bit of s in its group, until detach.
	// No goroutine parks at the bell meanwhile. The group sets the bit itself for events
	// that came before.
	attach(s *seat) error
	detach(s *seat)
}

type chanBell struct {
	seat  atomic.Pointer[seat]
	rung  chan struct{} // holds one: rings merge
	timer *time.Timer   // used by the parked goroutine only
}

func newChanBell() (bell, error) {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &chanBell{rung: make(chan struct{}, 1), timer: t}, nil
}

func (b *chanBell) ring() {
	if s := b.seat.Load(); s != nil {
		s.ring()
		return
	}
	select {
	case b.rung <- struct{}{}:
	default:
	}
}

func (b *chanBell) park(until time.Time) {
	if until.IsZero() {
		<-b.rung
		return
	}
	b.timer.Reset(time.Until(until))
	select {
	case <-b.rung:
		b.timer.Stop()
	case <-b.timer.C:
	}
}

func (b *chanBell) nudge() {} // ring has made the goroutine ready
func (b *chanBell) close() { b.ring() }
func (b *chanBell) letGo() {}

func (b *chanBell) attach(s *seat) error {
	b.seat.Store(s)
	return nil
}

// detach rings the bell once, for the next park: a ring that still saw the seat may have
// gone to it after the group stopped listening.
func (b *chanBell) detach(*seat) {
	b.seat.Store(nil)
	b.ring()
}
