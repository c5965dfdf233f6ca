package pvnet

import (
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/telemetry"
)

// batchOps bounds the grant copies of one batch.
const batchOps = 256

// A copyBatch holds the grant copies of a batch of frames, between a backend's pages and
// those of its frontend. One call of the hypervisor runs them all.
type copyBatch struct {
	dom  hypercall.Domain
	peer hypercall.DomID // the frontend's
	ops  [batchOps]hypercall.CopyOp
	nops int
	grantUser
}

// read copies from byte off of the frontend's page to dst: at once if the page is mapped,
// else with the batch.
func (b *copyBatch) read(ref hypercall.GrantRef, off uint16, dst []byte) {
	if src := b.table.bytes(ref, off, len(dst), hypercall.ReadOnly); src != nil {
		copy(dst, src)
	} else {
		b.addRead(ref, off, dst)
	}
}

// addRead adds a copy from byte off of the frontend's page to dst.
func (b *copyBatch) addRead(ref hypercall.GrantRef, off uint16, dst []byte) {
	o := &b.ops[b.nops]
	o.Dst.Local = dst
	o.Src.Dom, o.Src.Ref, o.Src.Offset = b.peer, ref, off      // Src.Local is nil: all copies of a batch have the same direction
	o.Len, o.Status = uint32(len(dst)), hypercall.GeneralError // until Copy says otherwise
	b.nops++
}

// write copies src to byte off of the frontend's page: at once if the page is mapped, else
// with the batch.
func (b *copyBatch) write(ref hypercall.GrantRef, off uint16, src []byte) {
	if dst := b.table.bytes(ref, off, len(src), hypercall.ReadWrite); dst != nil {
		copy(dst, src)
	} else {
		b.addWrite(ref, off, src)
	}
}

// addWrite adds a copy of src to byte off of the frontend's page.
func (b *copyBatch) addWrite(ref hypercall.GrantRef, off uint16, src []byte) {
	o := &b.ops[b.nops]
	o.Src.Local = src
	o.Dst.Dom, o.Dst.Ref, o.Dst.Offset = b.peer, ref, off      // Dst.Local is nil, as in addRead
	o.Len, o.Status = uint32(len(src)), hypercall.GeneralError // until Copy says otherwise
	b.nops++
}

// grantCopy runs the batch and counts it. Afterwards each copy has its status; if the call
// fails, all have failed.
func (b *copyBatch) grantCopy(count *telemetry.Block) {
	if b.nops == 0 {
		return
	}
	count.Add(telemetry.GrantBatches, 1)
	count.Add(telemetry.GrantOps, uint64(b.nops))
	if err := b.dom.Copy(b.ops[:b.nops]); err != nil {
		for i := range b.ops[:b.nops] {
			b.ops[i].Status = hypercall.GeneralError
		}
	}
}

// failed returns how many of n copies, beginning with first, have failed, and counts
// them.
func (b *copyBatch) failed(first, n int, count *telemetry.Block) (failed uint64) {
	for i := range b.ops[first : first+n] {
		if b.ops[first+i].Status != hypercall.OK {
			failed++
		}
	}
	if failed > 0 {
		count.Add(telemetry.GrantErrors, failed)
	}
	return failed
}

// maxFrameOps bounds the copies of one frame: its slots and our buffers have different
// boundaries, and each boundary starts a new copy.
const maxFrameOps = 2*maxTxSlots + maxFrameBuffers

// A batched says which copies and responses of a batch belong to a frame.
type batched struct {
	firstOp, ops, firstRsp, rsps int
	head                         [6]byte // of a frame to send: its destination address
	extras                       netif.Extras
	hashed                       bool // of a frame to send: one of the extras is its hash
}
