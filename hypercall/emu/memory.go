package emu

import (
	"errors"
	"fmt"
	"sync/atomic"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// memory is where pages come from: the heap or memfds.
type memory interface {
	// private reserves zeroed pages. populate is that of [hypercall.NewReserved].
	private(pages int) (region, error)
	populate([]byte)

	// shared gives the pages of a share, not yet in anyone's address space.
	shared(pages int) (backing, error)

	// join puts parts of several shares into one run of addresses.
	join(parts []part, access hypercall.Access) (region, error)
}

// backing is the pages of one share.
type backing interface {
	// view makes n pages from first on addressable. They stay so after close.
	view(first, n int, access hypercall.Access) (region, error)
	// reserve is view of all n pages, writable, each in memory from its first use on.
	reserve(n int) (region, error)
	// dup gives another hold on the same pages.
	dup() (backing, error)
	close() error
}

// A region is memory in our address space until free.
type region struct {
	shm.Memory
	free func() error
}

// A part is n pages of a share.
type part struct {
	backing
	first, n int
}

// tables is where the grant tables and event words of domains live.
type tables interface {
	// open gives zeroed tables for one more domain, and close takes them back.
	open() (guestTables, error)
	release(guestTables)
	close() error
}

// guestTables are the words of one domain that other domains look at.
type guestTables struct {
	slot        int             // which of the shared tables, if they are shared
	incarnation uint64          // of the domain; not 0
	grants      []atomic.Uint64 // by ref; written by the machine only. 0: incarnation
	ports       []atomic.Uint32 // by port; written by everyone who may notify
}

// A grant entry is valid, writable, the peer's domid, and the serial number of the
// share. A ref is one and the same page for as long as its share lives, so that
// the serial number and the ref name a page for ever.
const (
	entryValid    = 1 << 63
	entryWritable = 1 << 62
	entryPeer     = 46 // shift
	entrySerial   = 1<<entryPeer - 1
)

func newEntry(peer hypercall.DomID, access hypercall.Access, serial uint64) uint64 {
	e := entryValid | uint64(peer)<<entryPeer | serial
	if access == hypercall.ReadWrite {
		e |= entryWritable
	}
	return e
}

// check is what Xen answers (acquire_grant_for_copy and _set_status_v1 of
// xen/common/grant_table.c): a ref beyond the table is bad, and whatever else is
// wrong, never granted, ended, another domain's, read-only, is a general error.
func check(table []atomic.Uint64, ref hypercall.GrantRef, dom hypercall.DomID, access hypercall.Access) (serial uint64, _ hypercall.Status) {
	if uint64(ref) >= uint64(len(table)) {
		return 0, hypercall.BadGntref
	}
	// A reserved ref is not valid either: entry 0 is a small number, the rest are 0.
	e := table[ref].Load()
	if e&entryValid == 0 || hypercall.DomID(e>>entryPeer) != dom ||
		access == hypercall.ReadWrite && e&entryWritable == 0 {
		return 0, hypercall.GeneralError
	}
	return e & entrySerial, hypercall.OK
}

type heapMemory struct{}

func (heapMemory) private(pages int) (region, error) { return region{shm.Heap(pages), noFree}, nil }
func (heapMemory) populate(b []byte)                 { clear(b) }

func (heapMemory) shared(pages int) (backing, error) {
	m := shm.Heap(pages)
	clear(m.Bytes())
	return heapBacking{m}, nil
}

func (heapMemory) join(parts []part, access hypercall.Access) (region, error) {
	if len(parts) != 1 {
		return region{}, fmt.Errorf(
			"emu: heap pages that are not consecutive pages of one share cannot be mapped together; use Config.Mapped: %w",
			errors.ErrUnsupported)
	}
	return parts[0].view(parts[0].first, parts[0].n, access)
}

type heapBacking struct{ m shm.Memory }

func (b heapBacking) view(first, n int, _ hypercall.Access) (region, error) {
	return region{b.m.Slice(first, n), noFree}, nil
}

func (b heapBacking) reserve(n int) (region, error) { return b.view(0, n, hypercall.ReadWrite) }

func (b heapBacking) dup() (backing, error) { return b, nil }
func (heapBacking) close() error            { return nil }

func noFree() error { return nil }

// heapTables are of one process.
type heapTables struct{ grants, ports int }

func (t heapTables) open() (guestTables, error) {
	return guestTables{
		grants: make([]atomic.Uint64, t.grants),
		ports:  make([]atomic.Uint32, t.ports),
	}, nil
}

func (heapTables) release(guestTables) {}
func (heapTables) close() error        { return nil }
