package emu

import (
	"errors"
	"fmt"
	"sync/atomic"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// memory makes pages, on the heap or in memfds.
type memory interface {
	// private reserves zeroed pages. populate is that of [hypercall.NewReserved].
	private(pages int) (region, error)
	populate([]byte)

	// shared makes the pages of a share, not mapped in any address space yet.
	shared(pages int) (backing, error)

	// join maps parts of several shares into one run of addresses.
	join(parts []part, access hypercall.Access) (region, error)
}

// A backing is the pages of one share.
type backing interface {
	// view maps n pages from first on. The mapping survives close.
	view(first, n int, access hypercall.Access) (region, error)
	// reserve is a writable view of all n pages, each backed by memory from its first use
	// on.
	reserve(n int) (region, error)
	// dup returns another hold on the same pages.
	dup() (backing, error)
	close() error
}

// A region is memory mapped in our address space until free.
type region struct {
	shm.Memory
	free func() error
}

// A part is n pages of a share.
type part struct {
	backing
	first, n int
}

// tables makes the grant tables and event words of domains.
type tables interface {
	// open returns zeroed tables for one more domain; release takes them back.
	open() (guestTables, error)
	release(guestTables)
	close() error
}

// guestTables are the words of one domain that other domains read or write.
type guestTables struct {
	slot        int             // index of the tables, if those of all domains share memory
	incarnation uint64          // number of this life of the domain; not 0
	grants      []atomic.Uint64 // by ref; written by the machine only. Entry 0 holds the incarnation
	ports       []atomic.Uint32 // by port; written by every domain that may notify
}

// A grant entry holds the valid bit, the writable bit, the peer's domid and the serial
// number of the share. A ref names the same page as long as its share lives, so serial
// number and ref together name a page for ever.
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

// check returns Xen's answer (acquire_grant_for_copy and _set_status_v1 of
// xen/common/grant_table.c). A ref beyond the table is a bad grant reference. Any other
// mismatch is a general error: never granted, ended, granted to another domain, or
// read-only.
func check(table []atomic.Uint64, ref hypercall.GrantRef, dom hypercall.DomID, access hypercall.Access) (serial uint64, _ hypercall.Status) {
	if uint64(ref) >= uint64(len(table)) {
		return 0, hypercall.BadGntref
	}
	// A reserved ref is not valid either: entry 0 is a small number, the other entries
	// are 0.
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

// heapTables are tables for the domains of one process.
type heapTables struct{ grants, ports int }

func (t heapTables) open() (guestTables, error) {
	return guestTables{
		grants: make([]atomic.Uint64, t.grants),
		ports:  make([]atomic.Uint32, t.ports),
	}, nil
}

func (heapTables) release(guestTables) {}
func (heapTables) close() error        { return nil }
