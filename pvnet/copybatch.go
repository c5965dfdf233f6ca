package pvnet

import (
	"barevif/hypercall"
	"barevif/telemetry"
)

// batchOps bounds the grant copies of one batch.
const batchOps = 256

// A copyBatch holds the grant copies of a batch of frames, between a backend's pages and
// those of its frontend. One call of the hypervisor runs them all.
type copyBatch struct {
	dom   hypercall.Domain
	domid hypercall.DomID // the frontend's
	ops   [batchOps]hypercall.CopyOp
	nops  int
}

// from adds a copy from byte off of the frontend's page to dst.
func (b *copyBatch) from(ref hypercall.GrantRef, off uint16, dst []byte) {
	o := &b.ops[b.nops]
	o.Dst.Local = dst
	o.Src.Dom, o.Src.Ref, o.Src.Offset = b.domid, ref, off     // Src.Local is nil: all copies of a batch have the same direction
	o.Len, o.Status = uint32(len(dst)), hypercall.GeneralError // until Copy says otherwise
	b.nops++
}

// to adds a copy of src to byte off of the frontend's page.
func (b *copyBatch) to(ref hypercall.GrantRef, off uint16, src []byte) {
	o := &b.ops[b.nops]
	o.Src.Local = src
	o.Dst.Dom, o.Dst.Ref, o.Dst.Offset = b.domid, ref, off     // Dst.Local is nil, as in from
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
