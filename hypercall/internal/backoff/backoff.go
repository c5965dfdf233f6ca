// Package backoff decides when an event channel that fired is unmasked, so that a peer's
// storm of spurious events costs the peer. Every implementation of hypercall.Waiter uses it.
//
// An event is spurious if the wake-up it caused brought no work. A port may fire [Free]
// spurious events in a row: races with an honest peer cause a few. After each further one it
// stays masked for 1 ms, then 2, up to 1 s, or until some wake-up brings work. The other ports
// of its waiter are not delayed. Linux's late EOI (drivers/xen/events/events_base.c) does the
// same for the kernel's own ports, but not for those of user space.
//
// The package reads no clock and takes no lock: the caller does both.
package backoff

import (
	"slices"
	"time"
)

// Free is how many spurious events in a row do not delay a port.
const Free = 4

const (
	minDelay = time.Millisecond
	maxDelay = time.Second
)

// delay returns how long a port stays masked after n spurious events in a row.
func delay(n uint8) time.Duration {
	if n <= Free {
		return 0
	}
	return min(minDelay<<min(n-Free-1, 10), maxDelay)
}

// A Port holds the spurious events of one event channel and the time at which the channel
// is unmasked. The caller's port type embeds it.
type Port struct {
	Spurious uint8     // spurious events in a row
	Due      time.Time // when it is unmasked, if it is late

	masked bool
}

func (p *Port) backoff() *Port { return p }

// A port is a pointer to a type that embeds Port.
type port interface {
	comparable
	backoff() *Port
}

// Masked is the masked ports of a waiter.
type Masked[P port] struct {
	fired []P // since the last Settle
	late  []P // until they are due
}

// Grow makes room for n ports, so that no other method allocates.
func (m *Masked[P]) Grow(n int) {
	m.fired = slices.Grow(m.fired, n)
	m.late = slices.Grow(m.late, n)
}

// Fire adds p, which has fired and is masked now. It returns false if p was masked already.
func (m *Masked[P]) Fire(p P) bool {
	b := p.backoff()
	if b.masked {
		return false
	}
	b.masked = true
	m.fired = append(m.fired, p)
	return true
}

// Fired returns the ports that have fired since the last Settle. It is valid until then.
func (m *Masked[P]) Fired() []P { return m.fired }

// Late reports whether a port stays masked until it is due.
func (m *Masked[P]) Late() bool { return len(m.late) > 0 }

// Settle calls unmask for each port that fired, or makes the port late. worked says whether
// the wake-up that they caused brought work. Work also unmasks all late ports, but does not
// reset their counts: only work that the port itself brought does. now is not used after work.
func (m *Masked[P]) Settle(worked bool, now time.Time, unmask func(P)) {
	for _, p := range m.fired {
		b := p.backoff()
		if worked {
			b.Spurious = 0
		} else if b.Spurious < 255 {
			b.Spurious++
		}
		if d := delay(b.Spurious); d > 0 {
			b.Due = now.Add(d)
			m.late = append(m.late, p)
			continue
		}
		b.masked = false
		unmask(p)
	}
	clear(m.fired)
	m.fired = m.fired[:0]
	m.unmaskLate(unmask, func(b *Port) bool { return worked || !now.Before(b.Due) })
}

// UnmaskDue calls unmask for each late port that is due.
func (m *Masked[P]) UnmaskDue(now time.Time, unmask func(P)) {
	m.unmaskLate(unmask, func(b *Port) bool { return !now.Before(b.Due) })
}

func (m *Masked[P]) unmaskLate(unmask func(P), due func(*Port) bool) {
	m.late = slices.DeleteFunc(m.late, func(p P) bool {
		b := p.backoff()
		if !due(b) {
			return false
		}
		b.masked = false
		unmask(p)
		return true
	})
}

// Next returns when the waiter must stop parking: at the deadline (the zero Time: never), or
// earlier if a late port is due.
func (m *Masked[P]) Next(deadline time.Time) time.Time {
	for _, p := range m.late {
		if due := p.backoff().Due; deadline.IsZero() || due.Before(deadline) {
			deadline = due
		}
	}
	return deadline
}

// Remove forgets p, which is closed: another port may have its number now.
func (m *Masked[P]) Remove(p P) {
	same := func(q P) bool { return q == p }
	m.fired = slices.DeleteFunc(m.fired, same)
	m.late = slices.DeleteFunc(m.late, same)
}
