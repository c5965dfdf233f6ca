package pvnet

import (
	"net"
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
	port   hypercall.JoinedPort // nil: nobody can say whether the peer's end is there
	follow chan struct{}        // wakes the half that does not lead

	mu        sync.Mutex
	leading   bool    // guarded by mu
	following bool    // guarded by mu
	woken     [2]bool // guarded by mu: look before waiting
	nudged    bool    // guarded by mu: a Wake has been asked for that no Wait has returned for
	fired     bool    // guarded by mu: an event ended the last Wait
	asked     [2]bool // guarded by mu: has yet to say whether the last event was for it
	useful    bool    // guarded by mu: one of those asked had work
	worked    bool    // guarded by mu: the answer of all who were asked, once they gave it
	doubted   bool    // guarded by mu: the last Wait began with the answer no

	group  hypercall.Group // guarded by mu: of the Poller that waits for w; nil: none does
	polled [2]*member      // guarded by mu: the halves that slept there last
	vain   [2]bool         // guarded by mu: those of them that had no work before that
}

func newParker(w hypercall.Waiter) *parker {
	return &parker{w: w, follow: make(chan struct{}, 1)}
}

// deserted reports whether the peer's end of the channel is known not to be there.
func (p *parker) deserted() bool { return p.port != nil && !p.port.Joined() }

// wait parks half d until an event, a wake, or the deadline, and reports whether
// it was an event, to one half if they share a channel. Errors are those of
// [hypercall.Waiter].Wait.
func (p *parker) wait(d direction, deadline time.Time) (event bool, err error) {
	p.mu.Lock()
	if p.woken[d] {
		p.woken[d] = false
		p.mu.Unlock()
		return false, nil
	}
	if p.leading {
		return false, p.waitBehindLocked(d, deadline)
	}
	p.leading = true
	if p.group != nil { // this half is not in the Poller that the other one is in
		p.group.Remove(p.w)
		p.group = nil
	}
	worked := p.worked
	p.doubted = !worked
	p.mu.Unlock()

	err = p.w.Wait(deadline, worked)

	p.mu.Lock()
	// With both an event and a wake the Wait after this one returns at once, and
	// is taken for the event's.
	event = err == nil && !p.nudged
	if err == nil {
		p.nudged = false
	}
	p.fired = event
	p.leading = false
	p.woken[d] = false
	p.woken[1-d] = true
	p.asked[d], p.asked[1-d], p.useful = true, p.following, false
	p.passLocked()
	polled := p.polled
	p.mu.Unlock()
	markAll(polled)
	return event, err
}

// mayHold reports whether the wait under way may be one in which the waiter holds
// events back, because those before brought nothing.
func (p *parker) mayHold() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.doubted
}

// answer takes in whether half d had work since it was woken. Until all that were
// woken have said so the verdict on the event before stands. It reports whether
// it is now known that an event was for nothing.
func (p *parker) answer(d direction, worked bool) (spurious bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.useful = p.useful || worked
	if !p.asked[d] {
		return false
	}
	p.asked[d] = false
	if p.asked != [2]bool{} {
		return false
	}
	p.worked = p.useful
	return p.fired && !p.useful
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
	p.nudged = true
	p.passLocked()
	polled := p.polled
	p.mu.Unlock()
	p.w.Wake()
	markAll(polled)
}

// markAll has the owners of members look at them.
func markAll(members [2]*member) {
	for _, m := range members {
		if m != nil {
			m.mark()
		}
	}
}

// poll has m's Poller wait for events from now on. While the other half waits here by
// itself, what ends that wait is an event of m's, too. net.ErrClosed if m was removed: who
// does so says it first, and calls unpoll then.
func (p *parker) poll(m *member, worked bool) error {
	d := m.h.dir
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.out.Load() {
		return net.ErrClosed
	}
	p.polled[d], p.vain[d] = m, !worked
	if p.leading {
		return nil
	}
	g := m.p.group
	if p.group == nil {
		if err := g.Add(p.w, m.slot); err != nil {
			p.polled[d] = nil
			return err
		}
		p.group = g
	}
	if p.group != g {
		p.polled[d] = nil
		return hypercall.ErrGrouped
	}
	// An event does not say for whom it was: it was for nothing if both say so.
	worked = worked || p.polled[1-d] != nil && !p.vain[1-d]
	p.doubted = !worked
	return g.Rearm(p.w, worked)
}

// unpoll takes m out of where its Poller waits.
func (p *parker) unpoll(m *member) {
	p.mu.Lock()
	other := p.polled[1-m.h.dir]
	if p.polled[m.h.dir] != m {
		p.mu.Unlock()
		return
	}
	p.polled[m.h.dir] = nil
	if p.group == m.p.group && p.group != nil {
		p.group.Remove(p.w) // by m's tag, maybe
		p.group = nil
	}
	p.mu.Unlock()
	if other != nil {
		other.mark()
	}
}

// inPoller gives the halves that sleep in a Poller for events of this channel.
func (p *parker) inPoller(q *Poller) (in [2]*member) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for d, m := range p.polled {
		if m != nil && m.p == q {
			in[d] = m
		}
	}
	return in
}

// spare says that an event was not for m, which waits for none.
func (p *parker) spare(m *member) {
	p.mu.Lock()
	p.vain[m.h.dir] = true
	p.mu.Unlock()
}
