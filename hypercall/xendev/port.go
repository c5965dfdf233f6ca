//go:build linux

package xendev

import (
	"errors"
	"fmt"
	"net"
	"sync"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/internal/backoff"
	"barevif/hypercall/xendev/privcmd"
)

// A port is one end of an event channel.
type port struct {
	backoff.Port // guarded by w.mu
	w            *waiter
	id           hypercall.PortID

	mu     sync.Mutex       // held for a whole Notify; the driver would serialise them too
	ring   func(fd uintptr) // EVTCHN_NOTIFY; made once, because a closure for each Notify would be garbage
	err    error            // guarded by mu; the error of ring
	bell   *privcmd.Doorbell
	closed bool // guarded by mu
}

func newPort(w *waiter, id hypercall.PortID) (*port, error) {
	p := &port{w: w, id: id}
	p.ring = func(fd uintptr) { p.err = w.d.evtchn.notify(int(fd), id) }
	if w.d.cfg.Doorbell == DoorbellHypercall {
		c, err := w.d.hypercalls()
		if err != nil {
			return nil, err
		}
		if p.bell, err = c.Doorbell(id); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// ID implements [hypercall.Port].
func (p *port) ID() hypercall.PortID { return p.id }

// Notify implements [hypercall.Port]. After Close it returns net.ErrClosed.
func (p *port) Notify() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return net.ErrClosed
	}
	if p.w.dead.Load() {
		return nil // as for any peer that is gone
	}
	if p.bell != nil {
		return p.bell.Ring()
	}
	if p.w.raw.Control(p.ring) != nil {
		return net.ErrClosed
	}
	if p.err != nil {
		return fmt.Errorf("xendev: notify event channel %d: %w", p.id, p.err)
	}
	return nil
}

// Close implements [hypercall.Port].
func (p *port) Close() error {
	d := p.w.d
	d.begin()
	defer d.end()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	p.w.remove(p)
	if p.bell != nil {
		p.bell.Close()
	}
	if p.w.dead.Load() {
		return nil
	}
	delete(p.w.bound, p.id)
	if p.w.given.Load() {
		return nil // the file is another process's too, and the port stays in it
	}
	var err error
	if p.w.raw.Control(func(fd uintptr) { err = d.evtchn.unbind(int(fd), p.id) }) != nil {
		return nil // the Waiter is closed, and its ports with it
	}
	if err != nil && !errors.Is(err, unix.ENOTCONN) {
		return fmt.Errorf("xendev: close event channel %d: %w", p.id, err)
	}
	return nil
}
