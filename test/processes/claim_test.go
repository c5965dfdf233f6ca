package processes

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall/emu"
	"barevif/xenbus"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server/labtest"
)

// A claimant is what a backend's process has of a claim.
type claimant struct {
	t        *testing.T
	client   *xenstore.Client
	device   *xenbus.Device
	presence *xenbus.Presence
}

func newClaimant(t *testing.T, dom *emu.Domain) *claimant {
	t.Helper()
	c, err := xenstore.Dial(t.Context(), dom.Store, xenstore.Config{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := xenbus.OpenBackend(t.Context(), c, "vif", 1, "0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := xenbus.NewPresence(dom)
	if err != nil {
		t.Fatal(err)
	}
	return &claimant{t, c, d, p}
}

// claim says how long that took.
func (c *claimant) claim() (time.Duration, error) {
	begun := time.Now()
	err := c.device.ClaimAs(c.t.Context(), c.presence, time.Hour)
	return time.Since(begun), err
}

// die is the end of the process: xenstore keeps the claim.
func (c *claimant) die() {
	c.client.Close()
	c.presence.Close()
}

// A claim whose holder's event channel is gone is taken over at once, one whose
// holder lives is not, and one whose port has become another's is waited for.
func TestTheHolderOfAClaimIsKnownByItsPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := labtest.New(t, emu.Config{})
		l.Domain(1)
		dom := l.Domain(2)
		l.Add(toolstack.Vif{Front: 1, Back: 2})

		first := newClaimant(t, dom)
		if _, err := first.claim(); err != nil {
			t.Fatal(err)
		}
		second := newClaimant(t, dom)
		for range 3 {
			if took, err := second.claim(); !errors.Is(err, xenbus.ErrClaimed) || took > time.Second {
				t.Errorf("a claim that is held, after %v: %v", took, err)
			}
		}
		first.die()
		if took, err := second.claim(); err != nil || took > time.Second {
			t.Errorf("a claim of the dead, after %v: %v", took, err)
		}

		second.die()
		third := newClaimant(t, dom) // has the number of second's port, or of first's
		fourth := newClaimant(t, dom)
		if took, err := fourth.claim(); err != nil || took < time.Hour {
			t.Errorf("a claim whose port is another's, after %v: %v", took, err)
		}
		third.die()
		fourth.die()
	})
}
