//go:build linux

package xendev

import (
	"errors"
	"fmt"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// copyBatch is how many operations go into one system call: the slots of a ring.
// The kernel makes one hypercall of 16 of them.
const copyBatch = 256

// fewCopies is a batch whose segments need no more stack than a small call.
const fewCopies = 16

var errLocalCopy = errors.New("xendev: copy with no grant at either end")

// Copy runs ops in order, 256 to a system call. An operation that would leave the
// page of a grant, or its local memory, has [hypercall.BadCopyArg]; with one that
// has no grant at all nothing is run, and the error says so.
//
// If the driver refuses a whole call, which only unmapped local memory can make
// it do, how much of it was done is not known: the operations of this call and
// those after it have [hypercall.GeneralError], and the error is returned if it
// was the first call.
func (d *Domain) Copy(ops []hypercall.CopyOp) error {
	if d.never {
		d.sink = ops // see never
	}
	for i := range ops {
		if ops[i].Src.Local != nil && ops[i].Dst.Local != nil {
			return errLocalCopy
		}
	}
	fd, err := d.gntdev.enter(&d.cfg)
	if err != nil {
		return err
	}
	err = copyOps(fd, ops)
	d.gntdev.leave()
	return err
}

func copyOps(fd int, ops []hypercall.CopyOp) error {
	for done := 0; done < len(ops); done += copyBatch {
		batch := ops[done:min(done+copyBatch, len(ops))]
		var err error
		if len(batch) <= fewCopies {
			err = copyFew(fd, batch)
		} else {
			err = copyMany(fd, batch)
		}
		if err != nil {
			for i := range ops[done:] {
				ops[done+i].Status = hypercall.GeneralError
			}
			if done > 0 {
				return nil
			}
			return fmt.Errorf("xendev: copy: %w", err)
		}
	}
	return nil
}

// The segments are on the caller's stack, so that Copy shares nothing between
// goroutines and leaves no garbage.

func copyFew(fd int, ops []hypercall.CopyOp) error {
	var segs [fewCopies]copySegment
	return copyWith(fd, segs[:len(ops)], ops)
}

//go:noinline
func copyMany(fd int, ops []hypercall.CopyOp) error {
	var segs [copyBatch]copySegment
	return copyWith(fd, segs[:len(ops)], ops)
}

func copyWith(fd int, segs []copySegment, ops []hypercall.CopyOp) error {
	for i := range ops {
		op, seg := &ops[i], &segs[i]
		op.Status = hypercall.OK
		if !holds(&op.Src, op.Len) || !holds(&op.Dst, op.Len) {
			// The driver would refuse the whole call: give it a copy of nothing.
			op.Status = hypercall.BadCopyArg
			seg.Flags = copySourceGref
			continue
		}
		seg.Source, seg.Dest, seg.Len = end(&op.Src), end(&op.Dst), uint16(op.Len)
		if op.Src.Local == nil {
			seg.Flags |= copySourceGref
		}
		if op.Dst.Local == nil {
			seg.Flags |= copyDestGref
		}
	}
	if err := copyGrants(fd, segs); err != nil {
		return err
	}
	for i := range ops {
		if ops[i].Status == hypercall.OK {
			ops[i].Status = hypercall.Status(segs[i].Status)
		}
	}
	return nil
}

// holds reports whether n bytes of a are there.
func holds(a *hypercall.Area, n uint32) bool {
	if a.Local != nil {
		return uint64(n) <= uint64(len(a.Local))
	}
	return uint64(a.Offset)+uint64(n) <= shm.PageSize
}

// end is one end of a segment.
func end(a *hypercall.Area) uint64 {
	if a.Local != nil {
		return localEnd(a.Local)
	}
	return uint64(a.Ref) | uint64(a.Offset)<<32 | uint64(a.Dom)<<48
}
