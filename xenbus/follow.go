package xenbus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/xenstore"
)

// find waits for the keys that name the other end, and checks them.
func (d *Device) find(ctx context.Context) (end, error) {
	var (
		other *xenstore.Watch // on the peer's directory, once it is known
		where string
	)
	defer func() {
		if other != nil {
			other.Close()
		}
	}()
	var lacking []string
	for {
		peer, missing, err := d.resolve(ctx)
		if err != nil && ctx.Err() != nil && lacking != nil {
			err = &WaitError{Dir: d.dir, Missing: lacking, Err: context.Cause(ctx)}
		}
		if err != nil || len(missing) == 0 {
			return peer, err
		}
		lacking = missing
		if peer.dir != where {
			w, err := d.c.Watch(ctx, peer.dir)
			if err != nil {
				return end{}, err
			}
			if other != nil {
				other.Close()
			}
			other, where = w, peer.dir
		}
		var otherC <-chan struct{}
		if other != nil {
			otherC = other.C()
		}
		select {
		case _, open := <-d.own.C():
			if !open {
				return end{}, d.own.Err()
			}
		case _, open := <-otherC:
			if !open {
				return end{}, other.Err()
			}
		case <-ctx.Done():
			return end{}, &WaitError{Dir: d.dir, Missing: missing, Err: context.Cause(ctx)}
		}
	}
}

// resolve reads the directory and domain of the other end. While keys are missing it
// returns their names: the toolstack may have written the directory in part. peer is set
// as soon as its own keys are there, so that the caller can watch the peer's directory.
func (d *Device) resolve(ctx context.Context) (peer end, missing []string, err error) {
	peer, missing, err = d.resolveBy(ctx, d.c.ReadKeys)
	if err == nil && len(missing) == 0 || errors.Is(err, ErrGone) || ctx.Err() != nil {
		return peer, missing, err
	}
	// What is missing or does not fit together may be so only because the toolstack made the directory anew
	// between two of the reads: read it at one moment.
	return d.resolveBy(ctx, func(ctx context.Context, dir string, keys ...string) (v xenstore.Values, err error) {
		err = d.c.Transact(ctx, func(tx xenstore.Tx) error {
			v, err = tx.ReadKeys(dir, keys...)
			return err
		})
		return v, err
	})
}

func (d *Device) resolveBy(ctx context.Context, read func(ctx context.Context, dir string, keys ...string) (xenstore.Values, error)) (peer end, missing []string, err error) {
	dirKey, idKey := "backend", "backend-id"
	if d.role == Backend {
		dirKey, idKey = "frontend", "frontend-id"
	}
	keys := []string{dirKey, idKey, "state"}
	if d.role == Backend {
		keys = append(keys, "online")
	}
	v, err := read(ctx, d.dir, keys...)
	if errors.Is(err, xenstore.ErrAccess) {
		return end{}, nil, ErrGone
	}
	if err != nil {
		return end{}, nil, err
	}
	for _, key := range []string{dirKey, idKey, "state"} {
		if !v.Has(key) {
			missing = append(missing, key)
		}
	}
	if len(missing) > 0 {
		// Our directory may have gone, also between two of the reads.
		if _, err := d.c.Read(ctx, d.dir); errors.Is(err, xenstore.ErrNotFound) || errors.Is(err, xenstore.ErrAccess) {
			return end{}, nil, ErrGone
		}
		return end{}, missing, nil
	}
	dom, err := v.Uint(idKey, 1<<16-1, 0)
	if err != nil {
		return end{}, nil, d.locate(err)
	}
	peer = end{v[dirKey], hypercall.DomID(dom)}
	if d.role == Backend {
		missing, err = d.checkFrontend(ctx, peer, v["online"] == "0")
	} else {
		missing, err = d.checkBackend(ctx, peer)
	}
	return peer, missing, err
}

// checkBackend checks that our backend and backend-id agree, and that the backend's
// directory names us, as far as we may read it.
func (d *Device) checkBackend(ctx context.Context, peer end) (missing []string, err error) {
	rest, ok := strings.CutPrefix(peer.dir, fmt.Sprintf("/local/domain/%d/backend/", peer.dom))
	parts := strings.Split(rest, "/") // type, frontend domain, handle
	if !ok || !xenstore.ValidPath(peer.dir) || len(parts) != 3 {
		return nil, d.bad("backend", peer.dir, fmt.Sprintf("a backend directory of domain %d", peer.dom))
	}
	us, err := xenstore.ParseUint(parts[1], 1<<16-1)
	if err != nil {
		return nil, d.bad("backend", peer.dir, "a backend directory with a domain in it")
	}
	// Qubes OS does not let a guest read frontend-id.
	values, errs := d.c.ReadAll(ctx, peer.dir+"/frontend", peer.dir+"/frontend-id")
	switch err := errs[0]; {
	case errors.Is(err, xenstore.ErrAccess): // not readable for us: nothing to compare
		return nil, nil
	case errors.Is(err, xenstore.ErrNotFound):
		return []string{peer.dir + "/frontend"}, nil
	case err != nil:
		return nil, err
	case values[0] != fmt.Sprintf("/local/domain/%d/%s", us, d.dir):
		return nil, &xenstore.ValueError{Path: peer.dir + "/frontend", Value: xenstore.Clip(values[0]), Want: "our directory"}
	}
	switch err := errs[1]; {
	case errors.Is(err, xenstore.ErrAccess), errors.Is(err, xenstore.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, err
	case values[1] != fmt.Sprint(us):
		return nil, &xenstore.ValueError{Path: peer.dir + "/frontend-id", Value: xenstore.Clip(values[1]), Want: "our domain"}
	}
	return nil, nil
}

// checkFrontend checks our frontend and frontend-id against the path of our directory,
// and waits for the frontend to have a state. A frontend that the toolstack takes away may
// have lost its directory with its domain: its backend is opened without, so that it comes
// to Closed, for which the toolstack waits.
func (d *Device) checkFrontend(ctx context.Context, peer end, takenAway bool) (missing []string, err error) {
	if want := fmt.Sprintf("backend/%s/%d/%s", d.typ, peer.dom, d.id); d.dir != want {
		return nil, d.bad("frontend-id", fmt.Sprint(peer.dom), "the domain in our path")
	}
	rest, ok := strings.CutPrefix(peer.dir, fmt.Sprintf("/local/domain/%d/device/", peer.dom))
	if !ok || !xenstore.ValidPath(peer.dir) || strings.Count(rest, "/") != 1 {
		return nil, d.bad("frontend", peer.dir, fmt.Sprintf("a device directory of domain %d", peer.dom))
	}
	if takenAway {
		return nil, nil
	}
	_, err = d.c.Read(ctx, peer.dir+"/state")
	if errors.Is(err, xenstore.ErrNotFound) || errors.Is(err, xenstore.ErrAccess) {
		return []string{peer.dir + "/state"}, nil
	}
	return nil, err
}

func (d *Device) bad(key, value, want string) error {
	return &xenstore.ValueError{Path: d.dir + "/" + key, Value: xenstore.Clip(value), Want: want}
}

// locate makes the key in a ValueError a path below our directory.
func (d *Device) locate(err error) error {
	if e, ok := err.(*xenstore.ValueError); ok {
		e.Path = d.dir + "/" + e.Path
	}
	return err
}

// run reads nodes again after watch events, until Close or the end of the Client.
func (d *Device) run(ctx context.Context) {
	defer d.end()
	var (
		other  *xenstore.Watch // on the peer's state, or on its directory
		target target          // what other watches
		retry  <-chan time.Time
		stale  parts
		said   bool // the refused watch was logged
	)
	defer func() {
		if other != nil {
			other.Close()
		}
	}()
	for {
		var trouble error
		if stale.any() {
			left, err := d.refresh(ctx, stale)
			stale, retry = left, nil
			if err != nil {
				retry, trouble = time.After(retryPause), err
			}
		}
		if want := d.target(); want != target {
			w, err := d.c.Watch(ctx, want.path())
			if err != nil {
				retry, trouble = time.After(retryPause), err
				if errors.Is(err, xenstore.ErrQuota) { // the quota has room again when this domain ends another watch
					retry = time.After(time.Second)
					if !said {
						d.c.Logger().Warn("cannot watch the other end", "err", err)
					}
					said = true
				}
			} else {
				if other != nil {
					other.Close()
				}
				other, target = w, want
			}
		}
		d.mu.Lock()
		d.trouble = trouble
		d.mu.Unlock()
		var peerC <-chan struct{}
		if other != nil {
			peerC = other.C()
		}
		select {
		case <-ctx.Done():
			return
		case _, open := <-d.own.C():
			if !open {
				return
			}
			stale.add(d.touched())
		case _, open := <-peerC:
			if !open {
				return
			}
			stale.add(d.peerTouched(other, target))
		case <-d.reread:
			stale.claim, stale.state = true, true
		case <-retry:
		}
	}
}

// A target is what the watch on the other end is set on: its state, or its whole
// directory, if keys there are to be followed too.
type target struct {
	end
	whole bool
}

func (t target) path() string {
	if t.whole {
		return t.dir
	}
	return t.dir + "/state"
}

func (d *Device) target() target {
	d.mu.Lock()
	defer d.mu.Unlock()
	return target{d.peer, len(d.followPeer) > 0}
}

// peerTouched takes the pending events of the watch w on the other end as stale parts.
func (d *Device) peerTouched(w *xenstore.Watch, t target) (p parts) {
	paths, all := w.Paths()
	_, follow := d.follows()
	for _, path := range paths {
		key, below := strings.CutPrefix(path, t.dir+"/")
		p.peer = p.peer || !below || key == "state"
		p.settings = p.settings || !below || slices.Contains(follow, key)
	}
	p.peer, p.settings = p.peer || all, t.whole && (p.settings || all)
	if p.peer {
		d.written++
	}
	return p
}

// end closes Changes and the watch on our directory.
func (d *Device) end() {
	d.own.Close()
	d.mu.Lock()
	d.ended = true
	close(d.changes)
	d.mu.Unlock()
	close(d.done)
}

// parts names the parts of a device that have to be read again.
type parts struct {
	state     bool // own state, online, hotplug-status
	backend   bool // frontend: backend, backend-id
	claim     bool
	peer      bool
	recreated bool // our directory was made again
	settings  bool // keys of Follow: their owner reads them
}

func everything() parts {
	return parts{state: true, backend: true, claim: true, peer: true, settings: true}
}

func (p parts) any() bool { return p != parts{} }

func (p *parts) add(q parts) {
	*p = parts{p.state || q.state, p.backend || q.backend, p.claim || q.claim, p.peer || q.peer, p.recreated || q.recreated, p.settings || q.settings}
}

// skip drops the events of our directory that came before its first read.
func (d *Device) skip() {
	select {
	case <-d.own.C(): // a closed channel stays closed, and run sees it
	default:
	}
	d.own.Paths() // last: a later event fires the channel again, or the first read shows its effect
}

// touched takes the pending events of our directory as stale parts. It ignores the keys
// that we publish.
func (d *Device) touched() (p parts) {
	paths, all := d.own.Paths()
	if all {
		return everything()
	}
	follow, _ := d.follows()
	for _, path := range paths {
		key, ok := strings.CutPrefix(path, d.dir+"/")
		p.settings = p.settings || slices.Contains(follow, key)
		switch {
		case !ok:
			return everything()
		case key == "online":
			// This may be the last event about a frontend whose whole domain was removed.
			p.state, p.peer = true, true
		case key == "state" || key == "hotplug-status":
			p.state = true
		case key == "backend" || key == "backend-id":
			p.backend = true
		case "/"+key == claimKey:
			p.claim = true
		}
	}
	return p
}
