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

var (
	errLocalCopy = errors.New("xendev: copy with no grant at either end")
	errShortArea = errors.New("xendev: copy of more bytes than the local end holds")
)

// Copy runs ops in order, 256 to a system call. An operation whose grant would
// leave its page has [hypercall.BadCopyArg]; with one that has no grant at all, or
// too little local memory, nothing is run and the error says so.
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
		if err := checkOp(&ops[i]); err != nil {
			return err
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

func checkOp(op *hypercall.CopyOp) error {
	if op.Src.Local != nil && op.Dst.Local != nil {
		return errLocalCopy
	}
	if op.Src.Local != nil && uint64(len(op.Src.Local)) < uint64(op.Len) ||
		op.Dst.Local != nil && uint64(len(op.Dst.Local)) < uint64(op.Len) {
		return errShortArea
	}
	return nil
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
		if leavesPage(&op.Src, op.Len) || leavesPage(&op.Dst, op.Len) {
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

func leavesPage(a *hypercall.Area, n uint32) bool {
	return a.Local == nil && uint64(a.Offset)+uint64(n) > shm.PageSize
}

// end is one end of a segment.
func end(a *hypercall.Area) uint64 {
	if a.Local != nil {
		return localEnd(a.Local)
	}
	return uint64(a.Ref) | uint64(a.Offset)<<32 | uint64(a.Dom)<<48
}
