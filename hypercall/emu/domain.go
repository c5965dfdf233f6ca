package emu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"
	"sync/atomic"

	"barevif/hypercall"
)

var (
	errNoPages  = errors.New("emu: not a positive number of pages")
	errNoWaiter = errors.New("emu: no such waiter")
)

// A Domain is one domain of a [Machine] or [Host]. Any goroutine may call its methods.
// Once the domain is destroyed they fail with net.ErrClosed.
type Domain struct {
	now    atomic.Pointer[identity] // replaced by Machine.Resume
	memory memory
	sys    system
	calls  callCounters
	faults atomic.Pointer[[]*armedFault] // replaced under mu

	// gate is held for reading during access to memory that is not the caller's: tables,
	// event words and pages of other domains. Locking it waits for these accesses.
	gate sync.RWMutex
	dead atomic.Bool // set once; the tables go after gate was locked once more
	done chan struct{}

	views atomic.Pointer[map[hypercall.DomID]*view] // replaced under mu
	last  atomic.Pointer[view]                      // the view that Copy used last; nil after gate was locked

	mu      sync.Mutex
	waiters map[*waiter]struct{} // guarded by mu
	groups  map[*group]struct{}  // guarded by mu
}

var (
	_ hypercall.HandoverDomain = (*Domain)(nil)
	_ hypercall.GroupDomain    = (*Domain)(nil)
)

// An identity is the number of a domain and its record in the machine. [Machine.Resume] replaces it.
type identity struct {
	id hypercall.DomID
	hv hypervisor
}

func (d *Domain) hv() hypervisor { return d.now.Load().hv }

func newDomain(id hypercall.DomID, hv hypervisor, mem memory, sys system) *Domain {
	d := &Domain{
		memory:  mem,
		sys:     sys,
		done:    make(chan struct{}),
		waiters: make(map[*waiter]struct{}),
		groups:  make(map[*group]struct{}),
	}
	d.now.Store(&identity{id, hv})
	d.views.Store(&map[hypercall.DomID]*view{})
	return d
}

// ID returns the domain's number.
func (d *Domain) ID() hypercall.DomID { return d.now.Load().id }

// Destroy ends the domain, as [Machine.Destroy] does. It is idempotent.
func (d *Domain) Destroy() {
	for hv := d.hv(); ; hv = d.hv() {
		if hv.leave(); d.hv() == hv { // else it was resumed meanwhile, and goes on
			break
		}
	}
	<-d.done
}

// Done returns a channel that is closed when the domain has ended, for whatever reason.
func (d *Domain) Done() <-chan struct{} { return d.done }

// die handles the end of the domain. It is called once.
func (d *Domain) die() {
	d.dead.Store(true)
	d.mu.Lock()
	waiters, groups := d.waiters, maps.Clone(d.groups)
	d.waiters = nil
	d.mu.Unlock()
	for w := range waiters {
		w.bell.ring()
	}
	for g := range groups {
		g.Wake()
	}
	d.forgetPeers()
	close(d.done)
}

// forgetPeers unmaps the pages of other domains that Copy has used, and drops their views.
func (d *Domain) forgetPeers() {
	d.mu.Lock()
	views := *d.views.Swap(&map[hypercall.DomID]*view{})
	d.mu.Unlock()
	d.quiesce()
	for _, v := range views {
		v.free()
	}
}

// quiesce returns when no goroutine uses what it reached before the call.
func (d *Domain) quiesce() {
	d.gate.Lock() // goroutines that were inside have left
	d.last.Store(nil)
	d.gate.Unlock()
}

// Memory returns private pages.
func (d *Domain) Memory(pages int) (*hypercall.Mapping, error) {
	d.calls.memory.Add(1)
	if err := d.failed(OpMemory); err != nil {
		return nil, err
	}
	if pages <= 0 {
		return nil, errNoPages
	}
	id, err := d.hv().keepPages(pages)
	if err != nil {
		return nil, err
	}
	r, err := d.memory.private(pages)
	if err != nil {
		d.hv().dropPages(id)
		return nil, err
	}
	return hypercall.NewReserved(r.Memory, d.memory.populate, func() error {
		d.hv().dropPages(id)
		return r.free()
	}), nil
}

// Share returns pages that are granted to peer.
func (d *Domain) Share(peer hypercall.DomID, pages int, access hypercall.Access) (*hypercall.Share, error) {
	d.calls.share.Add(1)
	if err := d.failed(OpShare); err != nil {
		return nil, err
	}
	var s grants
	var b backing
	err := d.again(func(hv hypervisor) (err error) { s, b, err = hv.share(peer, pages, access); return err })
	if errors.Is(err, hypercall.ErrNoGrants) {
		return nil, fmt.Errorf("share %d pages: %w: the limit of each domain is %d (emu.Config.Grants)",
			pages, err, (len(d.hv().own().grants)-reservedRefs)/2)
	}
	if err != nil {
		return nil, err
	}
	defer b.close()
	r, err := b.reserve(pages)
	if err != nil {
		return nil, errors.Join(err, d.hv().endShare(s.Serial, false))
	}
	return d.newShare(s, peer, r), nil
}

func (d *Domain) newShare(s grants, peer hypercall.DomID, r region) *hypercall.Share {
	o := &ownedShare{d: d, id: s.Serial}
	share := hypercall.NewShare(r.Memory, peer, s.Access, s.Refs, func() error {
		if o.given.Load() {
			d.hv().forget(s.Serial)
			return r.free()
		}
		d.calls.endShare.Add(1)
		f := d.fault(OpEnd)
		err := d.hv().endShare(s.Serial, f != nil)
		if f != nil && f.Err != nil {
			err = f.Err
		}
		return errors.Join(err, r.free())
	})
	share.SetOwned(o)
	return share
}

// Map maps pages that peer granted.
func (d *Domain) Map(peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) (*hypercall.Mapping, error) {
	d.calls.mapped.Add(1)
	if len(refs) == 0 {
		return nil, errNoPages
	}
	if f := d.fault(OpMap); f != nil {
		if f.Err != nil {
			return nil, f.Err
		}
		return nil, &hypercall.GrantError{Op: "map", Dom: peer, Ref: refs[0], Status: f.Status}
	}
	var m mapped
	err := d.again(func(hv hypervisor) (err error) { m, err = hv.mapGrants(peer, refs, access); return err })
	if err != nil {
		return nil, err
	}
	r, err := d.assemble(peer, m.Runs, access)
	if err != nil {
		return nil, errors.Join(err, d.hv().unmapGrants(m.ID))
	}
	return hypercall.NewMapping(r.Memory, func() error {
		d.calls.release.Add(1)
		err := d.failed(OpRelease)
		if err == nil {
			err = d.hv().unmapGrants(m.ID)
		}
		return errors.Join(err, r.free())
	}), nil
}

// assemble makes one region of runs. The machine has mapped them already, so their grants
// cannot end.
func (d *Domain) assemble(peer hypercall.DomID, runs []run, access hypercall.Access) (region, error) {
	held := make(map[uint64]backing)
	defer func() {
		for _, b := range held {
			b.close()
		}
	}()
	parts := make([]part, len(runs))
	for i, r := range runs {
		if held[r.Serial] == nil {
			_, b, err := d.hv().attach(peer, r.Ref)
			if err != nil {
				return region{}, err
			}
			held[r.Serial] = b
		}
		parts[i] = part{held[r.Serial], int(r.First), int(r.N)}
	}
	return d.memory.join(parts, access)
}

// Waiter makes a Waiter.
func (d *Domain) Waiter() (hypercall.Waiter, error) {
	return d.waiter(func() (uint64, bell, error) { return d.hv().newWaiter(false) })
}

// ThreadWaiter makes a Waiter for a goroutine that is locked to its thread; see
// [hypercall.ThreadDomain]. It needs Linux.
func (d *Domain) ThreadWaiter() (hypercall.Waiter, error) {
	return d.waiter(func() (uint64, bell, error) {
		id, b, err := d.hv().newWaiter(true)
		if err != nil {
			return 0, nil, err
		}
		onThread, err := newThreadBell(b)
		if err != nil {
			d.hv().closeWaiter(id)
			b.close()
			return 0, nil, err
		}
		return id, onThread, nil
	})
}

func (d *Domain) waiter(make func() (uint64, bell, error)) (hypercall.Waiter, error) {
	d.calls.waiter.Add(1)
	if err := d.failed(OpWaiter); err != nil {
		return nil, err
	}
	id, b, err := make()
	if err != nil {
		return nil, err
	}
	w := newWaiter(d, id, b)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.waiters != nil { // else the domain is dead, and every call on w says so
		d.waiters[w] = struct{}{}
	}
	return w, nil
}

// Store opens a connection to the machine's xenstore.
func (d *Domain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	d.calls.store.Add(1)
	if err := d.failed(OpStore); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var id uint64
	var conn io.ReadWriteCloser
	err := d.again(func(hv hypervisor) (err error) { id, conn, err = hv.store(); return err })
	if err != nil {
		return nil, err
	}
	return &storeConn{ReadWriteCloser: conn, closed: func() { d.hv().closeStore(id) }}, nil
}

// A storeConn tells the machine when its domain has closed it.
type storeConn struct {
	io.ReadWriteCloser
	once   sync.Once
	closed func()
}

// Pipeline implements [barevif/xenbus.Pipeliner]. It is small enough for xenstored to go
// on reading.
func (c *storeConn) Pipeline() int { return 16 }

func (c *storeConn) Close() error {
	err := c.ReadWriteCloser.Close()
	c.once.Do(c.closed)
	return err
}
