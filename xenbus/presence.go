package xenbus

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/internal/pause"
	"barevif/xenbus/xenstore"
)

// A Presence shows the other processes of our domain that we live. It is an event channel
// from the domain to itself; another process probes it by binding to its port. It closes
// with the process. A process that finds a claim whose port refuses to bind waits only
// briefly for an answer to its challenge.
type Presence struct {
	dom  hypercall.Domain
	w    hypercall.Waiter // nobody waits at it
	port hypercall.Port
}

// NewPresence opens the event channel. The caller closes the Presence.
func NewPresence(dom hypercall.Domain) (*Presence, error) {
	w, err := dom.Waiter()
	if err != nil {
		return nil, fmt.Errorf("xenbus: presence: %w", err)
	}
	port, err := w.Unbound(dom.ID())
	if err != nil {
		w.Close()
		return nil, fmt.Errorf("xenbus: presence: %w", err)
	}
	return &Presence{dom, w, port}, nil
}

// Close closes the port. It does nothing on a nil Presence.
func (p *Presence) Close() error {
	if p == nil {
		return nil
	}
	return p.w.Close()
}

// sign appends the port to the id of a claim.
func (p *Presence) sign(id string) string {
	if p == nil {
		return id
	}
	return fmt.Sprintf("%s:%d", id, p.port.ID())
}

const (
	probes     = 3                      // probes that have to fail: a failed one may have met another process's probe
	probePause = 5 * time.Millisecond   // between two probes
	lastWord   = 100 * time.Millisecond // time that a holder whose port is gone has to answer
)

// patience shortens the time that a holder has to answer if its port is gone. An existing
// port proves nothing: another process may have got its number since.
func (p *Presence) patience(ctx context.Context, owner string, wait time.Duration) time.Duration {
	_, number, ok := strings.Cut(owner, ":")
	port, err := xenstore.ParseUint(number, 1<<32-1)
	if p == nil || !ok || err != nil || port == 0 {
		return wait
	}
	for range probes {
		if hypercall.PortID(port) == p.port.ID() {
			break // we have this number now, so the holder has lost it
		}
		if !errors.Is(p.probe(hypercall.PortID(port)), hypercall.ErrNoPort) {
			return wait
		}
		if pause.Wait(ctx, pause.Jitter(probePause)) != nil {
			return wait
		}
	}
	return min(wait, lastWord)
}

// probe binds to a port of our domain and closes the binding again.
func (p *Presence) probe(port hypercall.PortID) error {
	w, err := p.dom.Waiter()
	if err != nil {
		return err
	}
	defer w.Close()
	_, err = w.Bind(p.dom.ID(), port)
	return err
}
