package emu

import (
	"sync/atomic"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// A view is what this domain knows of another: its grant table, which each operation
// reads again, and the pages that Copy has used so far.
type view struct {
	dom         hypercall.DomID
	incarnation uint64
	grants      []atomic.Uint64
	pages       []atomic.Pointer[page] // by ref; a page is valid for its serial only
	attached    map[uint64]attached    // by serial; guarded by Domain.mu
}

type page struct {
	serial uint64
	b      []byte
}

// An attached is a whole share that is mapped in our address space for Copy. It does not
// count as mapped: Copy stops using it when the grant ends.
type attached struct {
	refs []hypercall.GrantRef
	free func() error
}

// alive reports whether the domain has not changed since the view was made.
func (v *view) alive() bool { return v.grants[0].Load() == v.incarnation }

// free unmaps all attached shares. No Copy may still reach the view.
func (v *view) free() {
	for serial, a := range v.attached {
		delete(v.attached, serial)
		a.free()
	}
}

// Copy runs ops. For its first use of a share in another process it asks the host for the
// share. After that it only reads the grant table and copies bytes. It does not check the
// grants of an operation with Len 0, as Linux's gntdev does not.
func (d *Domain) Copy(ops []hypercall.CopyOp) error {
	d.calls.copies.Add(1)
	d.calls.copyOps.Add(uint64(len(ops)))
	for i := range ops {
		if ops[i].Src.Local != nil && ops[i].Dst.Local != nil {
			return ErrLocalCopy
		}
	}
	if err := d.failed(OpCopy); err != nil {
		return err
	}
	for try := 0; len(ops) > 0; {
		n, miss, err := d.copySome(ops)
		if err != nil {
			return err
		}
		if ops = ops[n:]; miss == nil {
			continue
		}
		if n > 0 {
			try = 0
		}
		try++
		if st := d.fetch(miss); st != hypercall.OK || try > maxFetches {
			if st == hypercall.OK { // the grant was ended and made again, over and over
				st = hypercall.TryAgain
			}
			ops[0].Status = st
			ops, try = ops[1:], 0
		}
	}
	return nil
}

// maxFetches bounds the attempts for one operation: the pages of both its ends, and both
// views, may be new.
const maxFetches = 8

// copySome runs ops until one needs a page that was never used.
func (d *Domain) copySome(ops []hypercall.CopyOp) (n int, miss *hypercall.Area, err error) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if d.dead.Load() {
		return 0, nil, errDead
	}
	faults := d.faults.Load() != nil
	for i := range ops {
		op := &ops[i]
		if op.Len == 0 {
			op.Status = hypercall.OK
			continue
		}
		src, st := op.Src.Local, hypercall.OK
		if src == nil {
			if src, st = d.reach(&op.Src, op.Len, hypercall.ReadOnly); st == untouched {
				return i, &op.Src, nil
			}
		} else if uint64(op.Len) > uint64(len(src)) {
			st = hypercall.BadCopyArg
		}
		dst := op.Dst.Local
		switch {
		case st != hypercall.OK:
		case dst == nil:
			if dst, st = d.reach(&op.Dst, op.Len, hypercall.ReadWrite); st == untouched {
				return i, &op.Dst, nil
			}
		case uint64(op.Len) > uint64(len(dst)):
			st = hypercall.BadCopyArg
		}
		if faults {
			if f := d.fault(OpCopyGrant); f != nil && st == hypercall.OK {
				st = f.Status
			}
		}
		if op.Status = st; st == hypercall.OK {
			copy(dst[:op.Len], src[:op.Len])
		}
	}
	return len(ops), nil, nil
}

// untouched stands for a page that was never used before. It is no status of Xen's.
const untouched hypercall.Status = 1

// reach returns the n bytes of a grant, if the grant permits it. It reads the grant table
// each time, so that a page is not used after its grant has ended.
func (d *Domain) reach(a *hypercall.Area, n uint32, access hypercall.Access) ([]byte, hypercall.Status) {
	end := uint64(a.Offset) + uint64(n)
	if end > shm.PageSize {
		return nil, hypercall.BadCopyArg
	}
	v := d.last.Load()
	if v == nil || v.dom != a.Dom {
		if v = (*d.views.Load())[d.peer(a.Dom)]; v != nil {
			d.last.Store(v)
		}
	}
	if v == nil || !v.alive() {
		return nil, untouched
	}
	serial, st := check(v.grants, a.Ref, d.ID(), access)
	if st != hypercall.OK {
		return nil, st
	}
	p := v.pages[a.Ref].Load()
	if p == nil || p.serial != serial {
		return nil, untouched
	}
	return p.b[a.Offset:end:end], hypercall.OK
}

func (d *Domain) peer(id hypercall.DomID) hypercall.DomID {
	if id == hypercall.DomSelf {
		return d.ID()
	}
	return id
}

// fetch makes the page of a reachable. [hypercall.OK] means: try again.
func (d *Domain) fetch(a *hypercall.Area) hypercall.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead.Load() {
		return hypercall.GeneralError
	}
	dom := d.peer(a.Dom)
	v := (*d.views.Load())[dom]
	if v == nil || !v.alive() {
		return d.lookupLocked(dom)
	}
	s, b, err := d.hv().attach(dom, a.Ref)
	if err != nil {
		return hypercall.OK // the grant ended meanwhile: the retry reads its status from the table
	}
	defer b.close()
	d.sweepLocked(v)
	if _, again := v.attached[s.Serial]; again {
		return hypercall.OK
	}
	r, err := b.view(0, len(s.Refs), s.Access)
	if err != nil {
		return hypercall.NoSpace
	}
	v.attached[s.Serial] = attached{s.Refs, r.free}
	pages := make([]page, len(s.Refs)) // at once: they are used and let go of together
	for i, ref := range s.Refs {
		pages[i] = page{s.Serial, r.Page(i)}
		v.pages[ref].Store(&pages[i])
	}
	return hypercall.OK
}

// lookupLocked replaces the view of dom, and removes it if dom does not exist.
func (d *Domain) lookupLocked(dom hypercall.DomID) hypercall.Status {
	views := make(map[hypercall.DomID]*view)
	var stale []*view
	for id, v := range *d.views.Load() {
		if v.alive() {
			views[id] = v
		} else {
			stale = append(stale, v)
		}
	}
	t, err := d.hv().lookup(dom)
	if err == nil {
		views[dom] = &view{
			dom:         dom,
			incarnation: t.incarnation,
			grants:      t.grants,
			pages:       make([]atomic.Pointer[page], len(t.grants)),
			attached:    make(map[uint64]attached),
		}
	}
	d.views.Store(&views)
	d.quiesce()
	for _, v := range stale {
		v.free()
	}
	if err != nil {
		return hypercall.BadDomain
	}
	return hypercall.OK
}

// sweepLocked unmaps the shares of v that have ended.
func (d *Domain) sweepLocked(v *view) {
	var stale []attached
	for serial, a := range v.attached {
		if v.granted(serial, a.refs) {
			continue
		}
		for _, ref := range a.refs {
			if p := v.pages[ref].Load(); p != nil && p.serial == serial {
				v.pages[ref].Store(nil)
			}
		}
		delete(v.attached, serial)
		stale = append(stale, a)
	}
	if stale == nil {
		return
	}
	d.quiesce()
	for _, a := range stale {
		a.free()
	}
}

// granted reports whether any of refs still belongs to the share.
func (v *view) granted(serial uint64, refs []hypercall.GrantRef) bool {
	for _, ref := range refs {
		if e := v.grants[ref].Load(); e&entryValid != 0 && e&entrySerial == serial {
			return true
		}
	}
	return false
}
