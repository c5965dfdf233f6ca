package pvnet

import (
	"barevif/hypercall"
	"barevif/telemetry"
)

// batchOps bounds the grant copies of one batch.
const batchOps = 256

// A copyBatch holds the grant copies between a backend's pages and those of its frontend,
// for a batch of frames: one call of the hypervisor runs them all.
type copyBatch struct {
	dom   hypercall.Domain
	domid hypercall.DomID // the frontend's
	count *telemetry.Block
	ops   [batchOps]hypercall.CopyOp
	nops  int
}

// from adds a copy to dst from the frontend's page, from byte off on.
func (b *copyBatch) from(ref hypercall.GrantRef, off uint16, dst []byte) {
	o := &b.ops[b.nops]
	o.Dst.Local = dst
	o.Src.Dom, o.Src.Ref, o.Src.Offset = b.domid, ref, off     // Local is nil: a batch goes one way
	o.Len, o.Status = uint32(len(dst)), hypercall.GeneralError // until Copy says otherwise
	b.nops++
}

// to adds a copy of src into the frontend's page, from byte off on.
func (b *copyBatch) to(ref hypercall.GrantRef, off uint16, src []byte) {
	o := &b.ops[b.nops]
	o.Src.Local = src
	o.Dst.Dom, o.Dst.Ref, o.Dst.Offset = b.domid, ref, off     // as in from
	o.Len, o.Status = uint32(len(src)), hypercall.GeneralError // until Copy says otherwise
	b.nops++
}

// grantCopy runs the batch: then each copy has its status, or all have failed.
func (b *copyBatch) grantCopy() {
	if b.nops == 0 {
		return
	}
	b.count.Add(telemetry.GrantBatches, 1)
	b.count.Add(telemetry.GrantOps, uint64(b.nops))
	if err := b.dom.Copy(b.ops[:b.nops]); err != nil {
		for i := range b.ops[:b.nops] {
			b.ops[i].Status = hypercall.GeneralError
		}
	}
}

// failed counts those of n copies, from the first on, that did not succeed, and adds them to
// the counter of the device.
func (b *copyBatch) failed(first, n int) (failed uint64) {
	for i := range b.ops[first : first+n] {
		if b.ops[first+i].Status != hypercall.OK {
			failed++
		}
	}
	if failed > 0 {
		b.count.Add(telemetry.GrantErrors, failed)
	}
	return failed
}
