package emu

import (
	"sync/atomic"
	"time"

	"barevif/hypercall"
)

// An Op is a call that a [Fault] can make fail.
type Op uint8

const (
	OpMemory Op = iota
	OpShare
	OpMap
	OpCopy      // a batch
	OpCopyGrant // one operation of a batch; K and Times count these over all batches
	OpWaiter
	OpUnbound
	OpBind
	OpNotify
	OpStore
	OpEnd     // Share.End: the grants do not end, and the pages are set aside
	OpRelease // Mapping.Release of another domain's pages: they stay mapped
)

// An EventFault is a fault of an event on its way.
type EventFault uint8

const (
	EventIntact EventFault = iota
	EventLost
	EventDelayed    // by Fault.Delay
	EventDuplicated // comes again after Fault.Delay
)

// A Fault makes calls of one domain fail.
type Fault struct {
	Dom   hypercall.DomID // for Machine.Fail
	Op    Op
	K     int // the first call to fail, counted from the call of Fail on; 0 and 1 mean the next
	Times int // how many calls fail; 0 means one, negative means all from K on

	// Err is the error of the call. A failed call has done nothing, except for OpEnd and
	// OpRelease: these have lost the memory, and the ledger still counts it. OpEnd
	// without Err returns hypercall.ErrInUse.
	Err error

	// Status is the result of an OpCopyGrant, or of the first ref of an OpMap without
	// Err.
	Status hypercall.Status

	Event EventFault // for an OpNotify without Err
	Delay time.Duration
}

type armedFault struct {
	Fault
	calls atomic.Int64
}

// Fail arms f in the domain f.Dom, which must be in this process. Several faults may be
// armed; if more than one hits a call, the first armed counts. lift disarms f.
func (m *Machine) Fail(f Fault) (lift func(), err error) {
	d, err := m.Domain(f.Dom)
	if err != nil {
		return nil, err
	}
	return d.Fail(f), nil
}

// Fail arms f in this domain; it ignores f.Dom.
func (d *Domain) Fail(f Fault) (lift func()) {
	a := &armedFault{Fault: f}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.setFaultsLocked(append(d.faultsLocked(), a))
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		var rest []*armedFault
		for _, b := range d.faultsLocked() {
			if b != a {
				rest = append(rest, b)
			}
		}
		d.setFaultsLocked(rest)
	}
}

func (d *Domain) faultsLocked() []*armedFault {
	if p := d.faults.Load(); p != nil {
		return append([]*armedFault(nil), *p...)
	}
	return nil
}

func (d *Domain) setFaultsLocked(s []*armedFault) {
	if len(s) == 0 {
		d.faults.Store(nil)
		return
	}
	d.faults.Store(&s)
}

// fault counts a call of op and returns the fault that hits it, or nil.
func (d *Domain) fault(op Op) *Fault {
	p := d.faults.Load()
	if p == nil {
		return nil
	}
	var hit *Fault
	for _, a := range *p {
		if a.Op != op {
			continue
		}
		n := a.calls.Add(1) - int64(max(a.K, 1)) // 0: the first call to fail
		if n >= 0 && (a.Times < 0 || n < int64(max(a.Times, 1))) && hit == nil {
			hit = &a.Fault
		}
	}
	return hit
}

// failed returns the error of the fault that hits this call of op, or nil.
func (d *Domain) failed(op Op) error {
	if f := d.fault(op); f != nil {
		return f.Err
	}
	return nil
}

// Calls counts the calls of a domain since it started.
type Calls struct {
	Memory, Share, Map            uint64
	Copy, CopyOps                 uint64 // batches, and operations in them
	Waiter, Unbound, Bind, Notify uint64
	Wait, Store, End, Release     uint64
}

type callCounters struct {
	memory, share, mapped          atomic.Uint64
	copies, copyOps                atomic.Uint64
	waiter, unbound, bind, notify  atomic.Uint64
	wait, store, endShare, release atomic.Uint64
}

// Calls returns a snapshot of the counters.
func (d *Domain) Calls() Calls {
	c := &d.calls
	return Calls{
		Memory: c.memory.Load(), Share: c.share.Load(), Map: c.mapped.Load(),
		Copy: c.copies.Load(), CopyOps: c.copyOps.Load(),
		Waiter: c.waiter.Load(), Unbound: c.unbound.Load(), Bind: c.bind.Load(), Notify: c.notify.Load(),
		Wait: c.wait.Load(), Store: c.store.Load(), End: c.endShare.Load(), Release: c.release.Load(),
	}
}
