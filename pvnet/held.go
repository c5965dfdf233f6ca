package pvnet

import (
	"slices"
	"time"
)

// hold takes note of a member whose next frame waits for credit, or for pages that users hold:
// there is no use in looking at it, and no event to wait for. It reports whether m is such a
// member, which the caller then takes off the list of those polled. A change of its limit, or of
// its link, makes m news, and so does a page that comes back.
func (p *Poller) hold(m *member) bool {
	if m.rx == nil || m.h.enter() != nil {
		return false
	}
	if m.starving = m.starves(); m.starving {
		m.h.gate.leave()
		return true
	}
	until, held := m.rx.eng.heldUntil()
	if held && m.h.park.Load().watch(m) { // whoever releases a page that is lent marks m
		until, held = m.rx.eng.heldUntil() // again: one may have come back before the Poller watched
	}
	m.h.gate.leave()
	if !held {
		return false
	}
	if m.until = until; !m.held {
		m.held = true
		p.held = append(p.held, m)
	}
	p.creditAt = sooner(p.creditAt, until)
	return true
}

// starves reports whether the next frame of m waits for pages. Whoever releases one marks m.
// The owner is inside the gate.
func (m *member) starves() bool {
	k := m.h.park.Load()
	return m.rx.eng.starving() && k.watch(m) && m.rx.eng.starving()
}

// creditDue reports whether a member gets credit now. It reads the clock only if a member
// waits for that.
func (p *Poller) creditDue() bool {
	return !p.creditAt.IsZero() && !time.Now().Before(p.creditAt)
}

// releaseHeld has the owner look at the members that get credit now.
func (p *Poller) releaseHeld(now time.Time) {
	p.creditAt = time.Time{}
	p.held = slices.DeleteFunc(p.held, func(m *member) bool {
		if m.until.IsZero() || now.Before(m.until) {
			p.creditAt = sooner(p.creditAt, m.until)
			return false
		}
		m.held = false
		p.startPolling(m)
		return true
	})
}

// sooner returns the earlier of two times, of which the zero Time is none.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
