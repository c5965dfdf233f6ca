package pvnet

import (
	"fmt"
	"runtime/debug"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/xenbus/xenstore"
)

// A ctrlEnd is this end of a connection's control ring: a [ctrlClient] or a [ctrlServer].
// The ring has a goroutine of its own while the link is up, so that a slow or hostile peer
// on it delays neither frames nor the lifecycle.
type ctrlEnd interface {
	// start starts the goroutine. The lifecycle goroutine calls it when the link comes up,
	// also after waitGone.
	start()

	// leave asks the goroutine to end. It may be called again.
	leave()

	// waitGone waits, after leave, until the goroutine has ended: nothing touches the ring
	// any more, and a request that was taken has its response. It reports false if the
	// goroutine still runs at end: it may never leave.
	waitGone(end time.Time) bool

	// watch wakes the goroutine if it waits although the ring has reached the event that it
	// armed. The slow tick calls it.
	watch()
}

// A ctrlLoop is what both ends of a control ring have in common: the event channel and the
// goroutine. Its methods are the lifecycle goroutine's.
type ctrlLoop struct {
	d    *Device
	w    hypercall.Waiter
	port hypercall.Port

	end  chan struct{} // closed: the goroutine is to end; nil: it does not run
	done chan struct{} // closed: it has ended
}

// A ctrlStep does what there is to do on the ring, without waiting for the peer. It reports
// whether it did something, and whether the loop may wait now: it has armed the ring. An
// error is final for the device.
type ctrlStep func() (worked, wait bool, err error)

// run starts the goroutine.
func (l *ctrlLoop) run(step ctrlStep) {
	l.end, l.done = make(chan struct{}), make(chan struct{})
	go l.loop(step, l.end, l.done)
}

func (l *ctrlLoop) loop(step ctrlStep, end, done chan struct{}) {
	defer close(done)
	debug.SetPanicOnFault(true)
	worked := false // since the last wait
	for {
		select {
		case <-end:
			return
		default:
		}
		w, wait, err := l.try(step)
		worked = worked || w
		switch {
		case err != nil:
			l.d.callError(err)
			return
		case !wait:
			continue
		}
		// A peer that fires the channel without a request waits longer and longer for its
		// events to count.
		if l.w.Wait(time.Time{}, worked) != nil {
			return // the domain has ended
		}
		worked = false
	}
}

// try does a step. A fault on the ring page counts as the peer's.
func (l *ctrlLoop) try(step ctrlStep) (worked, wait bool, err error) {
	v := catchFault(func() { worked, wait, err = step() })
	if v != nil {
		err = l.violation(0, v.Reason)
	}
	return worked, wait, err
}

// violation counts a violation at a slot of the ring, and returns the error that ends the
// device.
func (l *ctrlLoop) violation(slot uint32, reason string) error {
	l.d.ctrlViolations.Add(1)
	return &PeerError{Ring: "ctrl", Slot: slot, Reason: reason}
}

func (l *ctrlLoop) leave() {
	if l.end == nil {
		return
	}
	select {
	case <-l.end: // it was asked before
	default:
		close(l.end)
		l.w.Wake()
	}
}

func (l *ctrlLoop) waitGone(end time.Time) bool {
	if l.end == nil {
		return true
	}
	t := time.NewTimer(time.Until(end))
	defer t.Stop()
	select {
	case <-l.done:
		l.end = nil
		return true
	case <-t.C:
		return false
	}
}

// open opens the ring's event channel on a waiter of its own.
func (l *ctrlLoop) open(m *setup, port func(hypercall.Waiter) (hypercall.Port, error)) error {
	w, err := m.dom.Waiter()
	if err != nil {
		return err
	}
	m.c.closes(w)
	l.w = w
	l.port, err = port(w)
	return err
}

// ctrlKeys are the gref and the port that the frontend publishes for its control ring.
type ctrlKeys struct {
	ring hypercall.GrantRef
	port hypercall.PortID
}

// parseCtrl reads the keys of the control ring; ok is false if the frontend has none. As in
// Linux's netback, ctrl-ring-ref decides, and then event-channel-ctrl must be there. The
// ring must be none of the queues' rings, and the event channel none of theirs.
func parseCtrl(v xenstore.Values, queues []queueKeys) (k ctrlKeys, ok bool, err error) {
	if !v.Has(netif.KeyCtrlRingRef) {
		return k, false, nil
	}
	ref, err := nameIn(v, netif.KeyCtrlRingRef)
	if err != nil {
		return k, false, err
	}
	port, err := nameIn(v, netif.KeyEventChannelCtrl)
	if err != nil {
		return k, false, err
	}
	k = ctrlKeys{hypercall.GrantRef(ref), hypercall.PortID(port)}
	for i, q := range queues {
		if k.ring == q.txRing || k.ring == q.rxRing {
			return k, false, fmt.Errorf("%s: grant %d is also a ring of queue %d", netif.KeyCtrlRingRef, k.ring, i)
		}
		if k.port == q.txPort || k.port == q.rxPort {
			return k, false, fmt.Errorf("%s: event channel %d is also queue %d's", netif.KeyEventChannelCtrl, k.port, i)
		}
	}
	return k, true, nil
}
