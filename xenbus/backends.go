package xenbus

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"barevif/hypercall"
	"barevif/xenbus/xenstore"
)

// A BackendID names a device that this domain serves, among those of one type.
type BackendID struct {
	Front hypercall.DomID
	ID    string
}

func (b BackendID) String() string { return fmt.Sprintf("%d/%s", b.Front, b.ID) }

// A BackendEvent says that a backend directory appeared or vanished.
type BackendEvent struct {
	BackendID
	Vanished bool
}

// Backends watches for devices this domain is to serve: directories
// backend/<type>/<frontend domain>/<id>. It is for one goroutine.
type Backends struct {
	c       *xenstore.Client
	dir     string
	w       *xenstore.Watch
	known   map[BackendID]bool
	pending []BackendEvent
	rescan  map[string]bool // frontend domains to list again
	all     bool            // list everything again
}

// WatchBackends watches for devices of type typ. Next first reports the devices that exist
// already. The caller closes the Backends. The error is a [*xenstore.ValueError] if typ cannot be
// a type, or that of [xenstore.Client.WatchTree].
func WatchBackends(ctx context.Context, c *xenstore.Client, typ string) (*Backends, error) {
	dir := "backend/" + typ
	if !xenstore.ValidName(typ) {
		return nil, &xenstore.ValueError{Value: xenstore.Clip(typ), Want: "a device type"}
	}
	w, err := c.WatchTree(ctx, dir) // covers the watches that the Devices set on their own directories
	if err != nil {
		return nil, err
	}
	return &Backends{c: c, dir: dir, w: w, all: true,
		known: make(map[BackendID]bool), rescan: make(map[string]bool)}, nil
}

// Next waits for a directory to appear or vanish. It fails with the cause of ctx when ctx
// ends, and with net.ErrClosed when the Client or b is closed. A directory that is
// removed and made again at once may go unreported: its [Device] then has a new
// Generation.
func (b *Backends) Next(ctx context.Context) (BackendEvent, error) {
	for len(b.pending) == 0 {
		if !b.all && len(b.rescan) == 0 {
			select {
			case _, open := <-b.w.C():
				if !open {
					return BackendEvent{}, fmt.Errorf("watch %s: %w", b.dir, b.w.Err())
				}
				b.note()
			case <-ctx.Done():
				return BackendEvent{}, fmt.Errorf("watch %s: %w", b.dir, context.Cause(ctx))
			}
		}
		if err := b.scan(ctx); err != nil {
			return BackendEvent{}, err
		}
	}
	ev := b.pending[0]
	b.pending = b.pending[1:]
	return ev, nil
}

// Forget makes Next report the device as new, if its directory exists.
func (b *Backends) Forget(id BackendID) {
	delete(b.known, id)
	b.rescan[fmt.Sprint(id.Front)] = true
}

// Close ends the watch. It returns nil.
func (b *Backends) Close() error { return b.w.Close() }

// note marks the frontends that the watch events name. It skips events inside a known
// device's directory: the Device watches those itself.
func (b *Backends) note() {
	paths, all := b.w.Paths()
	b.all = b.all || all
	for _, path := range paths {
		rest, ok := strings.CutPrefix(path, b.dir+"/")
		if !ok {
			b.all = true
			continue
		}
		dom, rest, _ := strings.Cut(rest, "/")
		id, _, inside := strings.Cut(rest, "/")
		front, err := xenstore.ParseUint(dom, 1<<16-1)
		if err != nil || inside && b.known[BackendID{hypercall.DomID(front), id}] {
			continue
		}
		b.rescan[dom] = true
	}
}

// scan lists the marked directories again. One that cannot be listed stays marked.
func (b *Backends) scan(ctx context.Context) error {
	if b.all {
		doms, err := b.c.Directory(ctx, b.dir)
		if err != nil && !errors.Is(err, xenstore.ErrNotFound) && !errors.Is(err, xenstore.ErrAccess) {
			return err
		}
		for _, dom := range doms {
			b.rescan[dom] = true
		}
		for id := range b.known {
			b.rescan[fmt.Sprint(id.Front)] = true
		}
		b.all = false
	}
	for dom := range b.rescan {
		front, err := xenstore.ParseUint(dom, 1<<16-1)
		if err != nil {
			delete(b.rescan, dom)
			continue
		}
		ids, err := list(ctx, b.c, b.dir+"/"+dom)
		if err != nil {
			return err
		}
		delete(b.rescan, dom)
		b.compare(hypercall.DomID(front), ids)
	}
	return nil
}

// compare queues events for the difference between ids and the known devices of front.
func (b *Backends) compare(front hypercall.DomID, ids []string) {
	there := make(map[string]bool, len(ids))
	for _, id := range ids {
		there[id] = true
		if key := (BackendID{front, id}); !b.known[key] {
			b.known[key] = true
			b.pending = append(b.pending, BackendEvent{BackendID: key})
		}
	}
	for key := range b.known {
		if key.Front == front && !there[key.ID] {
			delete(b.known, key)
			b.pending = append(b.pending, BackendEvent{BackendID: key, Vanished: true})
		}
	}
}
