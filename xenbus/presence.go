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

// A Presence is how other processes of our domain find out that we live: an event
// channel from the domain to itself, to which whoever asks binds. It closes with
// the process. Whoever finds a claim whose port nobody can bind to need not wait
// long for an answer.
type Presence struct {
	dom  hypercall.Domain
	w    hypercall.Waiter // nobody waits at it
	port hypercall.Port
}

// NewPresence opens the port. The caller closes the Presence.
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

// Close closes the port. A nil Presence is none.
func (p *Presence) Close() error {
	if p == nil {
		return nil
	}
	return p.w.Close()
}

// sign puts the port behind the id of a claim.
func (p *Presence) sign(id string) string {
	if p == nil {
		return id
	}
	return fmt.Sprintf("%s:%d", id, p.port.ID())
}

const (
	probes     = 3                      // that have to fail: another may be probing
	probePause = 5 * time.Millisecond   // between them
	lastWord   = 100 * time.Millisecond // what a holder still has to answer whose port is gone
)

// patience shortens the time a holder has to answer, if its port is gone. A port
// that is there proves nothing: its number may be another's by now.
func (p *Presence) patience(ctx context.Context, owner string, wait time.Duration) time.Duration {
	_, number, ok := strings.Cut(owner, ":")
	port, err := xenstore.ParseUint(number, 1<<32-1)
	if p == nil || !ok || err != nil || port == 0 {
		return wait
	}
	for range probes {
		if hypercall.PortID(port) == p.port.ID() {
			break // the number is ours, so it is not the holder's any more
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

// probe binds to a port of our domain, and lets go of it.
func (p *Presence) probe(port hypercall.PortID) error {
	w, err := p.dom.Waiter()
	if err != nil {
		return err
	}
	defer w.Close()
	_, err = w.Bind(p.dom.ID(), port)
	return err
}
