//go:build linux

package xendev

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/anon"
)

// maxPages bounds one Share or Map. It is gntdev's own bound (its parameter limit).
const maxPages = 64 << 10

func checkPages(op string, n int) error {
	if n <= 0 || n > maxPages {
		return fmt.Errorf("xendev: %s of %d pages (1 to %d)", op, n, maxPages)
	}
	return nil
}

// Memory reserves zeroed pages that no other domain can access. With Config.LockMemory
// they are locked and backed by memory at once, which may need CAP_IPC_LOCK or a higher
// RLIMIT_MEMLOCK.
func (d *Domain) Memory(pages int) (*hypercall.Mapping, error) {
	if err := checkPages("memory", pages); err != nil {
		return nil, err
	}
	b, err := anon.Reserve(pages)
	if err != nil {
		return nil, fmt.Errorf("xendev: %d pages of memory: %w", pages, err)
	}
	if d.cfg.LockMemory {
		if err := unix.Mlock(b); err != nil {
			err = fmt.Errorf("xendev: lock %d pages (RLIMIT_MEMLOCK or CAP_IPC_LOCK): %w", pages, err)
			return nil, errors.Join(err, unix.Munmap(b))
		}
	}
	m, err := shm.New(b)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(b))
	}
	release := func() error { return unix.Munmap(b) }
	if d.cfg.LockMemory {
		return hypercall.NewMapping(m, release), nil
	}
	return hypercall.NewReserved(m, anon.Populate, release), nil
}

// Map maps pages that the peer granted, as one run: all or none. If one ref is the cause
// of a failure, the error is a [*hypercall.GrantError] with that ref; finding it takes up
// to one more map per ref.
//
// A domain that maps its own grants sees their pages only if it is a PV domain.
func (d *Domain) Map(peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) (*hypercall.Mapping, error) {
	if err := checkPages("map", len(refs)); err != nil {
		return nil, err
	}
	fd, err := d.gntdev.enter(&d.cfg)
	if err != nil {
		return nil, err
	}
	defer d.gntdev.leave()

	peer = d.other(peer)
	b, index, err := mapRefs(fd, peer, refs, access)
	if err != nil {
		if e := d.findBad(fd, peer, refs, access); e != nil {
			return nil, e
		}
		return nil, fmt.Errorf("xendev: map %d grants of domain %d: %w", len(refs), peer, err)
	}
	count := len(refs)
	release := func() error { return d.release(b, index, count) }
	m, err := shm.New(b)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(b), removeMap(fd, index, count))
	}
	return hypercall.NewMapping(m, release), nil
}

// mapRefs maps all of refs or none of them. The first map of a process takes every lock of its
// memory, which a pending signal interrupts (mm_take_all_locks in Linux's mm). gntdev
// counts that map as in use from then on, so mapRefs asks for another.
func mapRefs(fd int, peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) ([]byte, uint64, error) {
	prot := unix.PROT_READ
	if access == hypercall.ReadWrite {
		prot |= unix.PROT_WRITE
	}
	for {
		index, err := addMap(fd, peer, refs)
		if err != nil {
			return nil, 0, err
		}
		b, err := unix.Mmap(fd, int64(index), len(refs)*shm.PageSize, prot, unix.MAP_SHARED)
		if err == nil {
			return b, index, nil
		}
		if e := removeMap(fd, index, len(refs)); e != nil || err != unix.EINTR {
			return nil, 0, errors.Join(err, e)
		}
	}
}

// release unmaps the pages and removes the map from gntdev: in a domain that is not PV,
// munmap alone leaves the grants in use.
func (d *Domain) release(b []byte, index uint64, count int) error {
	if err := unix.Munmap(b); err != nil {
		return fmt.Errorf("xendev: unmap %d grants: %w", count, err)
	}
	fd, err := d.gntdev.enter(&d.cfg)
	if err != nil {
		return nil // Close of the node has removed the map
	}
	defer d.gntdev.leave()
	if err := removeMap(fd, index, count); err != nil {
		return fmt.Errorf("xendev: unmap %d grants: %w", count, err)
	}
	return nil
}

// findBad returns the error for the first ref that cannot be mapped, because the driver
// answers EINVAL to everything. A copy of one byte tells why. A ref that can be read but
// not mapped was refused for writing, for which Xen's status is general error.
func (d *Domain) findBad(fd int, peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) error {
	try := func(refs []hypercall.GrantRef) error {
		b, index, err := mapRefs(fd, peer, refs, access)
		if err != nil {
			return err
		}
		return errors.Join(unix.Munmap(b), removeMap(fd, index, len(refs)))
	}
	ref := firstBad(refs, func(part []hypercall.GrantRef) bool { return try(part) == nil })
	if !errors.Is(try([]hypercall.GrantRef{ref}), unix.EINVAL) {
		return nil // the ref is not the cause
	}
	e := &hypercall.GrantError{Op: "map", Dom: peer, Ref: ref, Status: hypercall.GeneralError}
	op := [1]hypercall.CopyOp{{
		Src: hypercall.Area{Ref: ref, Dom: peer},
		Dst: hypercall.Area{Local: make([]byte, 1)},
		Len: 1,
	}}
	if err := copyOps(fd, op[:]); err == nil && op[0].Status != hypercall.OK {
		e.Status = op[0].Status
	}
	return e
}

// firstBad returns the first of refs without which those before it would be good, where all of
// them together are not. It tries halves: refs are a peer's, who would have each tried.
func firstBad(refs []hypercall.GrantRef, good func([]hypercall.GrantRef) bool) hypercall.GrantRef {
	for len(refs) > 1 {
		if half := refs[:len(refs)/2]; good(half) {
			refs = refs[len(half):]
		} else {
			refs = half
		}
	}
	return refs[0]
}
