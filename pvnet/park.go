package pvnet

import (
	"sync"
	"time"

	"barevif/hypercall"
)

// A parker is where a half waits. With an event channel per direction each half has its
// own parker. With one channel for both directions they share one: the first half to wait
// leads and waits for both. The end of its wait ends the other's too, since an event does
// not tell which half it is for.
type parker struct {
	w      hypercall.Waiter
	port   hypercall.JoinedPort // nil: the system cannot tell whether the peer's end is open
	follow chan struct{}        // wakes the half that does not lead

	mu        sync.Mutex
	leading   bool    // guarded by mu
	following bool    // guarded by mu
	woken     [2]bool // guarded by mu: by direction; the next wait returns at once
	wakeSent  bool    // guarded by mu: wake was called, and no Wait has returned for it yet
	fired     bool    // guarded by mu: an event ended the last Wait
	reportDue [2]bool // guarded by mu: by direction; the half was woken, and has not called report yet
	useful    bool    // guarded by mu: a half that was woken had work
	worked    bool    // guarded by mu: the last complete verdict: the event before brought work

	group   hypercall.Group // guarded by mu: the Group of the Poller that waits for w; nil: none
	members [2]*member      // guarded by mu: by direction; the member that slept here last
	idle    [2]bool         // guarded by mu: by direction; the member had no work before its sleep
}

func newParker(w hypercall.Waiter) *parker {
	return &parker{w: w, follow: make(chan struct{}, 1)}
}

// open opens the parker's event channel.
func (p *parker) open(open func(hypercall.Waiter) (hypercall.Port, error)) (hypercall.Port, error) {
	port, err := open(p.w)
	p.port, _ = port.(hypercall.JoinedPort)
	return port, err
}

// peerClosed reports whether the peer's end of the channel is known to be closed.
func (p *parker) peerClosed() bool { return p.port != nil && !p.port.Joined() }

// wait parks half d until an event, a wake, or the deadline, and reports whether an event
// ended it. If the halves share a channel, only the leading half reports it. Errors are
// those of [hypercall.Waiter].Wait.
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
	if p.group != nil { // the other half is in a Poller, and this one is not
		p.group.Remove(p.w)
		p.group = nil
	}
	worked := p.worked
	p.mu.Unlock()

	err = p.w.Wait(deadline, worked)

	p.mu.Lock()
	// After both an event and a wake, the next Wait returns at once, and counts as the
	// event's.
	event = err == nil && !p.wakeSent
	if err == nil {
		p.wakeSent = false
	}
	p.fired = event
	p.leading = false
	p.woken[d] = false
	p.woken[1-d] = true
	p.reportDue[d], p.reportDue[1-d], p.useful = true, p.following, false
	p.passLocked()
	polled := p.members
	p.mu.Unlock()
	markAll(polled)
	return event, err
}

// report records whether half d had work since it was woken. The earlier verdict holds
// until every woken half has answered. It reports whether the last event is now known to
// have been spurious.
func (p *parker) report(d direction, worked bool) (spurious bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.useful = p.useful || worked
	if !p.reportDue[d] {
		return false
	}
	p.reportDue[d] = false
	if p.reportDue != [2]bool{} {
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

// passLocked wakes the half that follows. It may lead in its next wait.
func (p *parker) passLocked() {
	if !p.following {
		return
	}
	select {
	case p.follow <- struct{}{}:
	default:
	}
}

// wake ends the present or else the next wait of both halves.
func (p *parker) wake() {
	p.mu.Lock()
	p.woken = [2]bool{true, true}
	p.wakeSent = true
	p.passLocked()
	polled := p.members
	p.mu.Unlock()
	p.w.Wake()
	markAll(polled)
}

// nudge makes the wait under way look for its event; see [hypercall.Nudger].
func (p *parker) nudge() {
	if n, ok := p.w.(hypercall.Nudger); ok {
		n.Nudge()
	}
}

// markAll makes the owners look at the members.
func markAll(members [2]*member) {
	for _, m := range members {
		if m != nil {
			m.mark()
		}
	}
}

// joinPoller makes m's Poller wait for the channel's events. If the other half waits here
// outside of a Poller, the end of its wait marks m. net.ErrClosed if m was removed:
// Remove sets removed before it calls leavePoller.
func (p *parker) joinPoller(m *member, worked bool) error {
	d := m.h.dir
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.removed.Load() {
		return hypercall.ErrClosed
	}
	p.members[d], p.idle[d] = m, !worked
	if p.leading {
		return nil
	}
	g := m.p.group
	if p.group == nil {
		if err := g.Add(p.w, m.tag); err != nil {
			p.members[d] = nil
			return err
		}
		p.group = g
	}
	if p.group != g {
		p.members[d] = nil
		return hypercall.ErrGrouped
	}
	// An event does not tell which half it is for: it was spurious if neither had work.
	return g.Rearm(p.w, worked || p.members[1-d] != nil && !p.idle[1-d])
}

// watch has every wake of the parker mark m, as joinPoller does, but waits for no event. It
// reports false if m was removed.
func (p *parker) watch(m *member) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.removed.Load() {
		return false
	}
	p.members[m.h.dir] = m
	return true
}

// leaveGroup takes the waiter out of a Poller's Group. The members join again when they are
// marked.
func (p *parker) leaveGroup() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.group != nil {
		p.group.Remove(p.w)
		p.group = nil
	}
}

// leavePoller undoes joinPoller. The other half's owner looks again, and joins again.
func (p *parker) leavePoller(m *member) {
	p.mu.Lock()
	other := p.members[1-m.h.dir]
	if p.members[m.h.dir] != m {
		p.mu.Unlock()
		return
	}
	p.members[m.h.dir] = nil
	if p.group == m.p.group && p.group != nil {
		p.group.Remove(p.w) // perhaps under the tag of m
		p.group = nil
	}
	p.mu.Unlock()
	if other != nil {
		other.mark()
	}
}

// sleepersOf returns the halves that sleep in q for events of this channel.
func (p *parker) sleepersOf(q *Poller) (in [2]*member) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for d, m := range p.members {
		if m != nil && m.p == q {
			in[d] = m
		}
	}
	return in
}

// markIdle records that an event brought no work for m, which waits for none.
func (p *parker) markIdle(m *member) {
	p.mu.Lock()
	p.idle[m.h.dir] = true
	p.mu.Unlock()
}
