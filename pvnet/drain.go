package pvnet

import (
	"fmt"
	"sync/atomic"
	"time"

	"barevif/telemetry"
)

// The times of Linux's netback: rx_drain_timeout_msecs and rx_stall_timeout_msecs of
// drivers/net/xen-netback/netback.c. The short drain time is for a frontend without
// feature-rx-notify (read_xenbus_vif_flags in its xenbus.c), which never says that it has
// posted pages: the backend has to look.
const (
	drainTimeout      = 10 * time.Second
	stallTimeout      = 60 * time.Second
	drainWithoutEvent = 30 * time.Millisecond
)

// Waits for a drain time shorter than this have a timer of their own; the slow tick, which
// comes once a second, ends the others.
const shortDrain = 2 * time.Second

// The first pause between two looks at a ring whose peer gives no events, and the longest.
const (
	firstLook   = time.Millisecond
	longestLook = 8 * time.Millisecond
)

// timeouts are how long a connection's senders wait for a peer that takes nothing. 0 means
// for ever.
type timeouts struct {
	drain time.Duration // until frames that wait are dropped
	stall time.Duration // until the carrier goes off
}

// check refuses times that the slow tick cannot keep.
func (c *ServeConfig) checkTimeouts() error {
	const most = 24 * time.Hour
	if t := c.DrainTimeout; t > 0 && t < time.Millisecond || t > most {
		return fmt.Errorf("ServeConfig.DrainTimeout is %v: it must be 1ms to %v, 0 for %v, or negative for never", t, most, drainTimeout)
	}
	if t := c.StallTimeout; t > 0 && t < time.Second || t > most {
		return fmt.Errorf("ServeConfig.StallTimeout is %v: it must be 1s to %v, 0 for %v, or negative for never", t, most, stallTimeout)
	}
	return nil
}

// timeouts returns the times for a frontend that notifies after it has posted pages, or
// does not.
func (c *ServeConfig) timeouts(notifies bool) timeouts {
	choose := func(t, standard time.Duration) time.Duration {
		if t == 0 {
			return standard
		}
		return max(t, 0)
	}
	t := timeouts{choose(c.DrainTimeout, drainTimeout), choose(c.StallTimeout, stallTimeout)}
	if !notifies {
		t.stall = 0
		if t.drain > 0 {
			t.drain = min(t.drain, drainWithoutEvent)
		}
	}
	return t
}

// A drain ends the waits of a sending half for a peer that has stopped. A frame that waited
// for timeouts.drain is dropped. Once the peer has taken nothing for that long, frames that
// find no room are dropped at once, until the peer gives slots again.
//
// The slow tick measures the time, so a call that does not wait costs nothing, and one that
// waits costs two atomic additions. It sees a time that is over within two seconds.
type drain struct {
	timeouts // written while the gate is shut

	call    atomic.Uint32 // number of the call that waits for slots; odd while it does. Written by the caller
	late    atomic.Uint32 // number of the call that has waited long enough; 0: none. Written by the slow tick
	stopped atomic.Uint64 // peerStopped | the index at which the peer has stopped; 0: it has not
	up      atomic.Uint32 // how often the link has come up: no time before that counts. Written while the gate is shut

	// The caller's, with a short drain time only.
	giveUp time.Time     // when the call that waits gives up; zero: no such call
	seenUp uint32        // up at that time
	look   time.Time     // when it looks at the ring again, without an event
	pause  time.Duration // between this look and the next
}

const peerStopped = 1 << 32

// begin and end enclose the wait of a call.
func (d *drain) begin() { d.call.Add(1) }

func (d *drain) end() {
	d.call.Add(1)
	d.giveUp = time.Time{}
}

// short reports whether the call that waits for room measures its drain time itself. The goroutine that asks is inside
// the gate, or has borrowed the counters of the half.
func (d *drain) short() bool { return d.drain > 0 && d.drain < shortDrain }

// isLate reports whether the slow tick has ended the wait of the present call.
func (d *drain) isLate() bool {
	late := d.late.Load()
	return late != 0 && late == d.call.Load()
}

// over reports whether the waiting call drops its frames. The caller is inside the gate.
func (d *drain) over(eng sender) bool {
	if s := d.stopped.Load(); s != 0 {
		if index, _, _ := eng.peerProgress(); index == uint32(s) {
			return true
		}
		d.stopped.CompareAndSwap(s, 0) // the tick would see it later
	}
	if !d.short() {
		d.giveUp = time.Time{} // of a connection before
		return d.isLate()
	}
	now := time.Now()
	if up := d.up.Load(); d.giveUp.IsZero() || d.seenUp != up {
		d.giveUp, d.seenUp, d.pause = now.Add(d.drain), up, firstLook
	}
	d.look = now.Add(min(d.pause, d.giveUp.Sub(now)))
	d.pause = min(2*d.pause, longestLook)
	return !now.Before(d.giveUp)
}

// hurried reports whether a caller that spins has to look whether its wait is over.
func (d *drain) hurried() bool {
	return d.stopped.Load() != 0 || d.isLate() ||
		!d.giveUp.IsZero() && !time.Now().Before(d.look)
}

// until returns when a park has to end, for a call whose deadline is t.
func (d *drain) until(t time.Time) time.Time {
	if d.giveUp.IsZero() || !t.IsZero() && t.Before(d.look) {
		return t
	}
	return d.look
}

// reset prepares d for a connection, also one that goes on. The gate is shut. While the link
// was down the peer could take nothing, so a call that waits since before begins its time
// again.
func (d *drain) reset(t timeouts) {
	d.timeouts = t
	d.stopped.Store(0)
	d.late.Store(0)
	d.up.Add(1)
}

// dropWaiting takes over frames that have waited long enough, drops them and leaves the
// gate. It returns how many: fewer than all if frames[n] is stale.
func (tx *TX) dropWaiting(frames []Frame) (n int, err error) {
	b := bound{&tx.half}
	for n < len(frames) && err == nil {
		if frames[n].Valid() {
			b.showDropped(&frames[n], telemetry.DropGuestStalled)
		}
		if err = frames[n].Release(); err == nil {
			n++
		}
	}
	tx.count.Drop(telemetry.DropGuestStalled, uint64(n))
	tx.countMoved(n)
	return n, tx.leave(err)
}

// A drainWatch is what the slow tick has seen of a sender's peer.
type drainWatch struct {
	up     uint32    // drain.up at the last tick
	call   uint32    // drain.call at the last tick
	since  time.Time // since when that call waits
	still  time.Time // since when the peer stands still although a call lacked slots; zero: it does not
	silent bool      // it has done so for timeouts.stall
}

// checkDrain looks at a sender whose peer is at index, short slots away from what the last
// call that found no room needed. It reports whether a call must be woken that waits.
func (tx *TX) checkDrain(index uint32, short int32, moved bool, now time.Time) (wake bool) {
	w, d := &tx.stall.drainWatch, &tx.drain
	if up := d.up.Load(); up != w.up {
		*w = drainWatch{up: up, call: d.call.Load(), since: now}
	}
	switch {
	case moved || short <= 0:
		w.still = time.Time{}
		d.stopped.Store(0)
	case w.still.IsZero():
		w.still = now
	}
	stood := time.Duration(0)
	if !w.still.IsZero() {
		stood = now.Sub(w.still)
	}
	w.silent = short > 0 && (w.silent || d.stall > 0 && stood >= d.stall)
	if d.drain == 0 {
		return false
	}
	if stood >= d.drain && stood > 0 {
		d.stopped.Store(peerStopped | uint64(index))
		wake = true
	}
	call := d.call.Load()
	if call != w.call {
		w.call, w.since = call, now
	} else if call%2 == 1 && now.Sub(w.since) >= d.drain && d.late.Load() != call {
		d.late.Store(call)
		wake = true
	}
	return wake && call%2 == 1
}

// checkCarrier turns the carrier off when the peer of a queue has taken nothing for the stall
// time, and on when every queue's takes frames again, as Linux's xenvif_queue_carrier_off
// and xenvif_queue_carrier_on do. The slow tick calls it.
func (l *lifecycle) checkCarrier(now time.Time) {
	d := l.d
	queue, stood := telemetry.NoQueue, time.Duration(0)
	for i := range l.conn.queues {
		if s := &d.tx[i].stall; s.silent {
			queue, stood = i, now.Sub(s.still)
			if s.still.IsZero() { // it has moved, but not far enough
				stood = 0
			}
			break
		}
	}
	if off := queue != telemetry.NoQueue; off == d.stalled.Load() {
		return
	} else if off {
		l.carrierOffAt = now
		d.log.Warn("the other end takes no frames; the carrier is off", "vif", d.id, "peer", d.Peer(), "queue", queue, "for", stood.Round(time.Second))
		d.counters.Record(telemetry.EventCarrierOff, queue, 0, uint64(stood))
		d.tx[queue].request(requestCarrierOff)
	} else {
		took := now.Sub(l.carrierOffAt)
		d.log.Info("the other end takes frames again; the carrier is on", "vif", d.id, "peer", d.Peer(), "after", took.Round(time.Second))
		d.counters.Record(telemetry.EventCarrierOn, telemetry.NoQueue, 0, uint64(took))
	}
	d.setStalled(queue != telemetry.NoQueue)
}

// setStalled stores whether the carrier is off, and tells subscribers. The link is up.
func (d *Device) setStalled(off bool) {
	d.stalled.Store(off)
	d.announce(linkUp, LinkEvent{Up: true})
}

// Stalled reports whether the link is up but the frontend has taken nothing for
// [ServeConfig].StallTimeout: then the interface that the vif is joined to should have no
// carrier, as a [LinkEvent] says. It is not the frontend's carrier ([Device.Carrier]). It
// reports false for a frontend's device.
func (d *Device) Stalled() bool { return d.stalled.Load() }
