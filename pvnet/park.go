package pvnet

import (
	"sync"
	"time"

	"barevif/hypercall"
)

// direction tells the two halves of a queue apart.
type direction uint8

const (
	receive direction = iota
	transmit
)

// A parker is where a half waits. With an event channel for each direction each
// half has its own. With one channel for both they share one: the first to come
// leads and waits for both, and whatever ends its wait ends the other's too, since
// an event does not say whom it is for.
type parker struct {
	w      hypercall.Waiter
	follow chan struct{} // wakes the half that does not lead

	mu        sync.Mutex
	leading   bool    // guarded by mu
	following bool    // guarded by mu
	woken     [2]bool // guarded by mu: look before waiting
	worked    bool    // guarded by mu: since the last wait, or nobody knows
}

func newParker(w hypercall.Waiter) *parker {
	return &parker{w: w, follow: make(chan struct{}, 1)}
}

// wait parks half d until an event, a wake, or the deadline. worked says whether
// the last wake-up brought work. Errors are those of [hypercall.Waiter].Wait.
func (p *parker) wait(d direction, deadline time.Time, worked bool) error {
	p.mu.Lock()
	p.worked = p.worked || worked
	if p.woken[d] {
		p.woken[d] = false
		p.mu.Unlock()
		return nil
	}
	if p.leading {
		return p.waitBehindLocked(d, deadline)
	}
	p.leading = true
	worked, p.worked = p.worked, false
	p.mu.Unlock()

	err := p.w.Wait(deadline, worked)

	p.mu.Lock()
	p.leading = false
	p.woken[d] = false
	p.woken[1-d] = true
	p.worked = p.following // it may have been for the other half, which will not be asked
	p.passLocked()
	p.mu.Unlock()
	return err
}

// waitBehindLocked waits while the other half leads. It releases mu.
func (p *parker) waitBehindLocked(d direction, deadline time.Time) error {
	p.following = true
	p.mu.Unlock()
	var err error
	if deadline.IsZero() {
		<-p.follow
	} else {
		t := time.NewTimer(time.Until(deadline))
		select {
		case <-p.follow:
		case <-t.C:
			err = errTimeout
		}
		t.Stop()
	}
	p.mu.Lock()
	p.following = false
	p.woken[d] = false
	p.mu.Unlock()
	return err
}

// passLocked wakes the half that follows, which may then lead.
func (p *parker) passLocked() {
	if !p.following {
		return
	}
	select {
	case p.follow <- struct{}{}:
	default:
	}
}

// wake ends the current or next wait of both halves.
func (p *parker) wake() {
	p.mu.Lock()
	p.woken = [2]bool{true, true}
	p.passLocked()
	p.mu.Unlock()
	p.w.Wake()
}
