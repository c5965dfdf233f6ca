//go:build linux

package xendev

import (
	"errors"
	"fmt"

	"barevif/arena/shm"
	"barevif/hypercall"
)

// copyBatch is how many operations go into one system call: the slots of a ring. The
// kernel makes one hypercall for each 16 of them.
const copyBatch = 256

// fewCopies is the size of a batch whose segments need little stack.
const fewCopies = 16

var errLocalCopy = errors.New("xendev: copy with no grant at either end")

// Copy runs ops in order, 256 per system call. An operation that would leave the page of
// a grant, or its local memory, gets [hypercall.BadCopyArg]. If an operation has no grant
// at either end, none is run and Copy returns an error.
//
// Copy keeps its processor (the P) from other goroutines until Xen has copied. Where the
// toolstack pages out the memory of a guest (xenpaging), a page of it may take 33 s.
//
// Only unmapped local memory can make the driver refuse a whole call. It is then unknown
// how much of the call was done: its operations and all later ones get
// [hypercall.GeneralError], and Copy returns the error if it was the first call.
func (d *Domain) Copy(ops []hypercall.CopyOp) error {
	if d.never {
		d.sink = ops // see Domain.never
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

// The segments are on the caller's stack, so that Copy shares nothing between goroutines
// and does not allocate.

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
			// The driver would refuse the whole call: pass it a copy of no bytes instead.
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

// holds reports whether a has n bytes.
func holds(a *hypercall.Area, n uint32) bool {
	if a.Local != nil {
		return uint64(n) <= uint64(len(a.Local))
	}
	return uint64(a.Offset)+uint64(n) <= shm.PageSize
}

// end returns one end of a segment.
func end(a *hypercall.Area) uint64 {
	if a.Local != nil {
		return localEnd(a.Local)
	}
	return uint64(a.Ref) | uint64(a.Offset)<<32 | uint64(a.Dom)<<48
}
