package xenbus

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"barevif/xenbus/xenstore"
)

// A claim is a node in the device's directory. It holds a random id, a blank, and a
// number that the holder increments for each challenge. xenstore keeps the nodes of dead
// processes, so a claim alone proves nothing. A process that finds a claim writes a
// challenge behind it, a blank and its own id, and takes the claim over if the number
// does not move. The holder does no work while nobody challenges it. An empty node is no
// claim: a toolstack may have made it because xenstored would refuse the backend another
// node.
const (
	claimKey = "/claim"
	patience = 3 * time.Second
)

// split takes the value of a claim apart. held is the claim without the challenge.
func split(claim string) (held, owner, number, asker string) {
	owner, number, _ = strings.Cut(claim, " ")
	number, asker, _ = strings.Cut(number, " ")
	if owner == "" {
		return "", "", "", ""
	}
	return owner + " " + number, owner, number, asker
}

// Claim makes the device ours among the processes of this domain. It challenges an
// existing claim: if the holder's Device does not answer within wait (0 means 3 seconds),
// the holder is presumed dead and Claim takes its claim over. Else the error is
// ErrClaimed.
//
// A process that was stopped for long may lose its claim in this way. SetState, Publish and
// PublishState then fail with ErrClaimed, and the Change says Lost. Call Claim before anything
// is written. Close gives the claim back.
func (d *Device) Claim(ctx context.Context, wait time.Duration) error {
	return d.ClaimAs(ctx, nil, wait)
}

// ClaimAs is Claim for a process with a Presence. It also probes the holder's Presence: a
// holder whose port is closed has only a tenth of a second to answer.
func (d *Device) ClaimAs(ctx context.Context, p *Presence, wait time.Duration) error {
	if wait == 0 {
		wait = patience
	}
	var id [16]byte
	rand.Read(id[:])
	me := p.sign(hex.EncodeToString(id[:]))

	w, err := d.c.Watch(ctx, d.dir+claimKey)
	if err != nil {
		return err
	}
	defer w.Close()

	held, err := d.seize(ctx, me, "")
	if err != nil || held == "" {
		return d.claimed(me, err)
	}
	_, owner, _, _ := split(held)
	silence := time.NewTimer(p.patience(ctx, owner, wait))
	defer silence.Stop()
	for {
		select {
		case _, open := <-w.C():
			if !open {
				return w.Err()
			}
			n, err := d.lookup(ctx, d.dir+claimKey)
			if err != nil {
				return err
			}
			switch now, _, _, _ := split(n.value); {
			case n.there && now == held:
				continue
			case now != "":
				return fmt.Errorf("xenbus %s: %w", d.dir, ErrClaimed)
			}
		case <-silence.C:
		case <-ctx.Done():
			return &WaitError{Dir: d.dir, Missing: []string{"an answer of the holder"}, Err: context.Cause(ctx)}
		}
		now, err := d.seize(ctx, me, held)
		if err == nil && now != "" { // another process claimed the device first
			err = fmt.Errorf("xenbus %s: %w", d.dir, ErrClaimed)
		}
		return d.claimed(me, err)
	}
}

// seize takes the claim if nobody holds it or the holder is stale. Else it returns the
// holder's claim as held and, with stale "", leaves a challenge there.
func (d *Device) seize(ctx context.Context, me, stale string) (held string, err error) {
	kept := false
	err = d.c.Transact(ctx, func(tx xenstore.Tx) error {
		if _, err := tx.Read(d.dir + "/state"); errors.Is(err, xenstore.ErrNotFound) || errors.Is(err, xenstore.ErrAccess) {
			return ErrGone
		} else if err != nil {
			return err
		}
		value, err := tx.Read(d.dir + claimKey)
		if err != nil && !errors.Is(err, xenstore.ErrNotFound) {
			return err
		}
		there := err == nil
		now, owner, _, _ := split(value)
		if now == "" || now == stale || owner == me {
			held, kept = "", there && value == ""
			return tx.Write(d.dir+claimKey, me+" 0")
		}
		if held = now; stale != "" {
			return nil
		}
		return tx.Write(d.dir+claimKey, now+" "+me)
	})
	if err == nil && held == "" {
		d.mu.Lock()
		d.lasting = kept
		d.mu.Unlock()
	}
	return held, err
}

func (d *Device) claimed(me string, err error) error {
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.claim = me
	d.mu.Unlock()
	d.requestRead() // read the claim: it may carry a challenge already
	return nil
}

// keepClaim answers a challenge, claims a directory that was made again, and sets Lost
// when another process has our claim.
func (d *Device) keepClaim(ctx context.Context) (renewed bool, err error) {
	d.mu.Lock()
	me, earlier := d.claim, d.earlier
	d.mu.Unlock()
	if me == "" || me == passed {
		return false, nil
	}
	n, err := d.lookup(ctx, d.dir+claimKey)
	if err != nil {
		return false, err
	}
	value := n.value
	if value == "" {
		value, err = d.seize(ctx, me, "")
		if errors.Is(err, ErrGone) {
			return false, nil
		}
		if err != nil || value == "" {
			return err == nil, err
		}
	}
	_, owner, number, asker := split(value)
	if owner == me || owner == earlier {
		if asker == "" {
			return false, nil
		}
		return false, d.answer(ctx, value, owner, number)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if owner == d.claim || owner == d.earlier || d.claim == passed { // changed since we looked
		return false, nil
	}
	ch := d.cur
	ch.Lost = true
	d.deliverLocked(ch)
	return false, nil
}

// answer increments the number of our claim. value is the claim with the challenge.
func (d *Device) answer(ctx context.Context, value, me, number string) error {
	n, err := xenstore.ParseUint(number, 1<<62)
	if err != nil {
		n = 0
	}
	return d.c.Transact(ctx, func(tx xenstore.Tx) error {
		if now, err := tx.Read(d.dir + claimKey); err != nil || now != value {
			return err // another process wrote the node: the event of that write leads here again
		}
		return tx.Write(d.dir+claimKey, me+" "+strconv.FormatUint(n+1, 10))
	})
}

// unclaim removes the claim if we still hold it. A node that existed before the claim is
// emptied instead.
func (d *Device) unclaim(ctx context.Context) error {
	d.mu.Lock()
	me, earlier, lasting := d.claim, d.earlier, d.lasting
	d.mu.Unlock()
	if me == "" || me == passed {
		return nil
	}
	err := d.c.Transact(ctx, func(tx xenstore.Tx) error {
		value, err := tx.Read(d.dir + claimKey)
		if errors.Is(err, xenstore.ErrNotFound) || errors.Is(err, xenstore.ErrAccess) {
			return nil
		}
		if _, owner, _, _ := split(value); err != nil || owner != me && owner != earlier {
			return err
		}
		if lasting {
			return tx.Write(d.dir+claimKey, "")
		}
		return tx.Remove(d.dir + claimKey)
	})
	if err == nil {
		d.mu.Lock()
		d.claim = ""
		d.mu.Unlock()
	}
	return err
}
