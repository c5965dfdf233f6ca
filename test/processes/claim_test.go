package processes

import (
	"errors"
	"strings"
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

// A process whose new id for the claim may or may not have been written passes both ids on.
// The next one holds the claim with either, and puts an id of its own there.
func TestAClaimPassesWithBothItsIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := labtest.New(t, emu.Config{})
		l.Domain(1)
		dom := l.Domain(2)
		v := l.Add(toolstack.Vif{Front: 1, Back: 2})
		claim := func() string {
			s, err := l.Store.Read(v.BackDir() + "/claim")
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		first := newClaimant(t, dom)
		if _, err := first.claim(); err != nil {
			t.Fatal(err)
		}
		if err := first.device.SetState(t.Context(), xenbus.Connected); err != nil {
			t.Fatal(err)
		}
		written := first.device.ClaimState()
		before := claim()
		first.device.PassClaim()
		lost := xenbus.ClaimState{Claim: strings.Repeat("0", 32), Mark: written.Mark}
		for _, c := range []struct {
			earlier string
			want    error
		}{{"", xenbus.ErrClaimed}, {strings.Repeat("1", 32), xenbus.ErrClaimed}, {written.Claim, nil}} {
			next := newClaimant(t, dom)
			lost.Earlier = c.earlier
			if err := next.device.AdoptClaim(lost); err != nil {
				t.Fatal(err)
			}
			if err := next.device.Renew(t.Context(), next.presence); !errors.Is(err, c.want) {
				t.Errorf("earlier %q: %v, want %v", c.earlier, err, c.want)
			}
			if now := claim(); (now != before) != (c.want == nil) {
				t.Errorf("earlier %q: the claim %q is now %q", c.earlier, before, now)
			}
			if c.want == nil {
				if err := next.device.SetState(t.Context(), xenbus.Closed); err != nil {
					t.Errorf("the claim is not ours: %v", err)
				}
				if s := next.device.ClaimState(); s.Earlier != "" || !strings.HasPrefix(claim(), s.Claim) {
					t.Errorf("it passes %+v on, the claim is %q", s, claim())
				}
			}
			next.crash()
		}
		first.crash()
	})
}
