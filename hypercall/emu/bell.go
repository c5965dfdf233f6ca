package emu

import "time"

// A bell wakes the goroutine that is parked on it, in this process or another. A ring
// from before park counts. park may also return without a reason.
type bell interface {
	ring()
	// park returns when the bell rings or at until; the zero Time: never.
	park(until time.Time)
	close()
}

type chanBell struct {
	rung  chan struct{} // holds one: rings merge
	timer *time.Timer   // used by the parked goroutine only
}

func newChanBell() (bell, error) {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &chanBell{rung: make(chan struct{}, 1), timer: t}, nil
}

func (b *chanBell) ring() {
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

func (b *chanBell) close() { b.ring() }
