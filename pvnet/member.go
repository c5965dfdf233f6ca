package pvnet

import (
	"fmt"
	"sync/atomic"
	"time"

	"barevif/telemetry"
)

// A Half is an [*RX] or a [*TX].
type Half interface{ base() *half }

func (h *half) base() *half { return h }

// A member is a half in a Poller.
type member struct {
	p     *Poller
	h     *half
	rx    *RX // one of rx and tx is nil
	tx    *TX
	value any
	tag   int // by which the Group names it

	inNews  bool        // guarded by p.mu: it is in p.news
	removed atomic.Bool // it was removed
	asleep  atomic.Bool // its event is armed, and the Poller does not look at it

	// Used by the owner only.
	known    bool      // it is in byTag
	polled   bool      // it is in Poller.polled
	held     bool      // it is in Poller.held
	starving bool      // its next frame waits for pages
	until    time.Time // while held: when it gets credit; zero: nobody knows
	slept    bool      // it slept, and has not been looked at since
	event    bool      // an event ended its sleep
	worked   bool      // it had work since its last sleep
	waits    bool      // of a sending half: it waits for space
	empty    uint8     // consecutive turns without work
	seq      uint32    // number of its sleep, as in half.waitSeq
	taken    uint32    // of a receiving half: the ring's index when it fell asleep
	space    space     // of a sending half: what it lacks
	park     *parker   // the parker at which it last slept
}

// leave takes m out of its parker and ends its sleep. It does not free its slot.
func (m *member) leave() {
	if k := m.h.park.Load(); k != nil {
		k.leavePoller(m)
	}
	m.wake()
}

// mark puts m among the news and wakes the owner.
func (m *member) mark() {
	p := m.p
	p.mu.Lock()
	if !m.inNews {
		m.inNews = true
		p.news = append(p.news, m)
	}
	p.hasNews.Store(true)
	p.mu.Unlock()
	p.group.Wake()
}

// markMember marks the member of h, if it is in a Poller.
func (h *half) markMember() {
	if m := h.member.Load(); m != nil {
		m.mark()
	}
}

// wake ends the sleep of m, and reports whether it slept.
func (m *member) wake() bool {
	if !m.asleep.CompareAndSwap(true, false) {
		return false
	}
	m.h.waitSeq.Add(1)
	return true
}

// look reports whether m has work. It returns the errors of a call of its half.
func (m *member) look() (ready bool, err error) {
	h := m.h
	if err = h.enter(); err != nil {
		return false, err
	}
	if m.slept {
		err = m.afterSleep()
	}
	if err == nil {
		if m.rx != nil {
			ready = m.rx.eng.ready(1)
		} else if m.waits {
			ready, err = m.tx.eng.hasSpace(m.space)
		}
	}
	h.gate.leave()
	return ready, h.dev.callError(err)
}

// afterSleep does the accounts of a sleep that ended. m is inside the gate.
func (m *member) afterSleep() error {
	h := m.h
	m.slept = false
	if m.event {
		h.count.Add(telemetry.Events, 1)
		if m.park.peerClosed() {
			h.dev.wakeLifecycle()
		}
	}
	h.serveRequests()
	if h.rescued.CompareAndSwap(m.seq, 0) {
		h.count.Add(telemetry.RescuedWakeups, 1)
	}
	if m.tx != nil {
		return m.tx.eng.afterWait()
	}
	return nil
}

// sleep arms m's event and puts m to sleep. It reports false if m has work by now.
func (m *member) sleep() (slept bool, err error) {
	h := m.h
	if err = h.enter(); err != nil {
		return false, err
	}
	defer h.gate.leave()
	if m.slept {
		if err = m.afterSleep(); err != nil {
			return false, h.dev.callError(err)
		}
	}
	var more bool
	var taken uint32
	if m.rx != nil {
		taken = m.rx.eng.consumed()
		if more = m.rx.eng.ready(1); !more {
			more, err = m.rx.eng.arm()
		}
	} else {
		if !m.waits || m.tx.eng.starved(m.space) != nil {
			return true, nil // only a call of the owner can give it work
		}
		more, err = m.tx.eng.arm(m.space)
	}
	if more || err != nil {
		return false, h.dev.callError(err)
	}
	worked := m.worked || m.park != h.park.Load() || taken != m.taken // dropped frames count as work
	if m.event && !worked {
		h.count.Add(telemetry.EventsSpurious, 1)
	}
	m.event, m.worked, m.taken, m.park = false, false, taken, h.park.Load()
	h.unpublished, h.hadWork = 0, false
	h.count.Add(telemetry.Parks, 1)
	h.count.Flush()
	m.seq = h.waitSeq.Add(1)
	m.asleep.Store(true)
	if err = m.park.joinPoller(m, worked); err != nil {
		m.wake()
		if m.removed.Load() {
			return true, nil
		}
		return false, &UnknownError{"wait for the events of queue " + fmt.Sprint(h.queue), err}
	}
	return true, nil
}

// waitFor stores what a sending half lacks, and lists it. The owner is inside the gate.
func (m *member) waitFor(n space) {
	m.waits, m.space = true, n
	m.p.startPolling(m)
}
