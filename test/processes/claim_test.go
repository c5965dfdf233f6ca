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

// A claimant is a backend's process, as far as claims go.
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

// claim claims the device and returns how long that took.
func (c *claimant) claim() (time.Duration, error) {
	begun := time.Now()
	err := c.device.ClaimAs(c.t.Context(), c.presence, time.Hour)
	return time.Since(begun), err
}

// crash ends the process: xenstore keeps its claim.
func (c *claimant) crash() {
	c.client.Close()
	c.presence.Close()
}

// A claim is taken over at once if its holder's event channel is gone, and not if the
// holder lives. If another process has got the holder's port number, the claimant has to
// wait.
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
		first.crash()
		if took, err := second.claim(); err != nil || took > time.Second {
			t.Errorf("a claim of the dead, after %v: %v", took, err)
		}

		second.crash()
		third := newClaimant(t, dom) // has the port number of second or of first
		fourth := newClaimant(t, dom)
		if took, err := fourth.claim(); err != nil || took < time.Hour {
			t.Errorf("a claim whose port is another's, after %v: %v", took, err)
		}
		third.crash()
		fourth.crash()
	})
}
