package xenbus

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"barevif/xenbus/xenstore"
)

// A ClaimState is what the holder of a claimed device leaves to the process of its domain
// that goes on with it: the claim passes from one to the other without a write to
// xenstore, so that no third process can come between.
type ClaimState struct {
	Claim   string // the id in the claim
	Earlier string // the id in the claim if Renew did not learn whether it has replaced it; "" if it did
	Lasting bool   // the claim's node was there before the claim
	Mark    string // a key that was published, to recognise the directory by; "" if none
}

// ClaimState returns what [Device.AdoptClaim] needs in the process that takes the device over.
func (d *Device) ClaimState() ClaimState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return ClaimState{d.claim, d.earlier, d.lasting, d.mark}
}

// passed is the claim of a Device whose claim another process holds now. It is no id.
const passed = "-"

// PassClaim gives the claim up to a process that has taken it over. From now on the Device
// neither answers challenges nor writes: SetState, Publish and PublishState fail with ErrClaimed, and
// Close leaves the claim as it is.
func (d *Device) PassClaim() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.claim, d.earlier = passed, ""
}

// isClaimID reports whether s has the form of the ids that Claim and Presence make: 32 hexadecimal
// digits, and maybe a colon and the number of an event channel.
func isClaimID(s string) bool {
	id, port, signed := strings.Cut(s, ":")
	if len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "" {
		return false
	}
	return !signed || port != "" && len(port) <= 10 && strings.Trim(port, "0123456789") == ""
}

// Check refuses what no Device has left, with a [*xenstore.ValueError] that names the field.
func (e *ClaimState) Check() error {
	switch {
	case !isClaimID(e.Claim):
		return &xenstore.ValueError{Path: "claim", Value: xenstore.Clip(e.Claim), Want: "the id of a claim"}
	case e.Earlier != "" && !isClaimID(e.Earlier):
		return &xenstore.ValueError{Path: "earlier claim", Value: xenstore.Clip(e.Earlier), Want: "the id of a claim"}
	}
	return CheckMark(e.Mark)
}

// AdoptClaim makes the claim of another process ours, in the state Connected. The caller has
// an agreement with that process, which calls PassClaim; both must not use the device at
// once. It writes nothing. The error is a [*xenstore.ValueError] for a ClaimState that no
// Device has left; it names the field.
func (d *Device) AdoptClaim(e ClaimState) error {
	if err := e.Check(); err != nil {
		return err
	}
	d.mu.Lock()
	d.claim, d.earlier, d.lasting, d.mark, d.wrote = e.Claim, e.Earlier, e.Lasting, e.Mark, Connected
	d.mu.Unlock()
	d.requestRead() // the claim may carry a challenge already, or be lost
	return nil
}

// Renew puts an id of our own into the claim, signed with our Presence (see
// [Device.ClaimAs]), in place of the passed one, whose port is gone with the process
// that made it. The error is ErrClaimed or ErrGone as from SetState.
func (d *Device) Renew(ctx context.Context, p *Presence) error {
	var id [16]byte
	rand.Read(id[:])
	me := p.sign(hex.EncodeToString(id[:]))
	d.mu.Lock()
	if d.claim == "" || d.claim == passed {
		d.mu.Unlock()
		return fmt.Errorf("xenbus %s: renew: %w", d.dir, ErrClaimed)
	}
	old, before := d.claim, d.earlier
	d.claim, d.earlier = me, old // both are ours while the transaction runs
	d.mu.Unlock()
	err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
		value, err := tx.Read(d.dir + claimKey)
		if errors.Is(err, xenstore.ErrNotFound) || errors.Is(err, xenstore.ErrAccess) {
			return ErrGone
		}
		_, owner, number, _ := split(value)
		if err != nil || owner != old && (before == "" || owner != before) {
			return errors.Join(err, ErrClaimed)
		}
		d.mu.Lock()
		if d.claim == me {
			d.earlier = owner
		}
		d.mu.Unlock()
		if number == "" {
			number = "0"
		}
		return tx.Write(d.dir+claimKey, me+" "+number)
	})
	if err != nil {
		return fmt.Errorf("xenbus %s: renew: %w", d.dir, err) // with either id the claim stays ours, if it still is
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.claim == me {
		d.earlier = ""
	}
	return nil
}
