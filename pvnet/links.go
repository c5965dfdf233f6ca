package pvnet

import (
	"context"
	"iter"
	"slices"
	"time"
)

// A LinkEvent says that the link came up or went down, or, if it was up before, that its
// MTU has changed, or that its frontend has stopped taking frames or takes them again.
type LinkEvent struct {
	Up      bool
	Stalled bool   // of a link that is up, as [Device.Stalled]
	Reason  string // why the link is down: "the other end is Closing", "the backend has no carrier", or the error that ended the device
	MAC     MAC    // of the connection, or of the last one; zero before the first
	MTU     int    // in bytes, as [Device.MTU] when the link came up, or changed its MTU
}

// Links yields the present state of the link and then its changes, until ctx ends or the
// device does; the last event then says why. A reader that falls 16 events behind loses
// the oldest.
func (d *Device) Links(ctx context.Context) iter.Seq[LinkEvent] {
	return func(yield func(LinkEvent) bool) {
		c := d.subscribe()
		defer d.unsubscribe(c)
		for ctx.Err() == nil {
			select {
			case ev, open := <-c:
				if !open || !yield(ev) {
					return
				}
			case <-ctx.Done():
			}
		}
	}
}

func (d *Device) subscribe() chan LinkEvent {
	c := make(chan LinkEvent, 16)
	d.mu.Lock()
	defer d.mu.Unlock()
	c <- d.last
	if d.link.Load() == linkGone {
		close(c)
	} else {
		d.subs = append(d.subs, c)
	}
	return c
}

func (d *Device) unsubscribe(c chan LinkEvent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.subs = slices.DeleteFunc(d.subs, func(s chan LinkEvent) bool { return s == c })
}

// linkError returns the error of a call that finds its gate shut; nil if the link is up.
func (d *Device) linkError() error {
	switch d.link.Load() {
	case linkUp:
		return nil
	case linkDown:
		return ErrLinkDown
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cause
}

// endError returns the error of every call once the device has ended; nil before.
func (d *Device) endError() error {
	if d.link.Load() != linkGone {
		return nil
	}
	return d.linkError()
}

// linkErrorOf is linkError for one half: the link of a queue that the connection does not have is
// down.
func (d *Device) linkErrorOf(h *half) error {
	err := d.linkError()
	if err == nil && h.queue >= int(d.active.Load()) {
		return ErrLinkDown
	}
	return err
}

// awaitUp waits until the link of h is up, the device has ended, or the deadline of h has
// passed.
func (d *Device) awaitUp(h *half) error {
	for {
		d.mu.Lock()
		changed := d.changed
		d.mu.Unlock()
		if err := d.linkErrorOf(h); err != ErrLinkDown {
			return err
		}
		if h.ending.Load() {
			return errInterrupted
		}
		if t := h.deadline(); t.IsZero() {
			<-changed
		} else {
			timer := time.NewTimer(time.Until(t))
			select {
			case <-changed:
				timer.Stop()
			case <-timer.C:
				return errTimeout
			}
		}
	}
}

// notifyWaiters makes the callers in awaitUp look at their deadlines again.
func (d *Device) notifyWaiters() {
	d.mu.Lock()
	close(d.changed)
	d.changed = make(chan struct{})
	d.mu.Unlock()
}

// announce changes the link's state and tells waiting callers and subscribers.
func (d *Device) announce(word uint32, ev LinkEvent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ev.MAC, ev.MTU = d.last.MAC, d.last.MTU
	if ev.Up {
		ev.MAC, ev.MTU, ev.Stalled = d.MAC(), d.MTU(), d.stalled.Load()
	}
	d.link.Store(word)
	close(d.changed)
	d.changed = make(chan struct{})
	if ev == d.last && word != linkGone {
		return
	}
	d.last = ev
	for _, c := range d.subs {
		select {
		case c <- ev:
		default:
			select {
			case <-c:
			default:
			}
			c <- ev
		}
		if word == linkGone {
			close(c)
		}
	}
	if word == linkGone {
		d.subs = nil
	}
}
