package pvnet

import (
	"barevif/hypercall"
	"barevif/pvnet/netif"
)

// sendMapped is the rest of sendPlain for a queue with mapped pages: each frame is copied into
// its page and answered at once. From the first frame on whose page is not mapped, sendMixed
// sends the batch.
func (e *backTX) sendMapped(frames []Frame) (n int) {
	t := tally{block: e.count}
	e.nops, e.nrsp = 0, 0
	var r netif.RxRequest
	for n < len(frames) {
		f, ours := &frames[n], false
		src := e.takeFrame(f, &ours)
		if src == nil {
			break
		}
		if n == 0 {
			e.begin()
		}
		e.ring.TakeTo(&r)
		t.plain(len(src), src)
		s := e.table.find(r.Ref)
		if s.mem == nil || !s.writable {
			e.ours[n] = ours
			return e.sendMixed(frames, n, src, r, &t)
		}
		copy(s.mem[:], src)
		e.ring.Put(plainResponse(r.ID, f))
		e.giveBack(f, ours)
		n++
	}
	if n > 0 {
		t.countCopied(0, e.ring.Unanswered(), e.private.Free())
	}
	return n
}

// sendMixed is sendMapped from frame n on, whose bytes are src and whose request is r: that
// page is not mapped. The responses come after the batch of copies, in order.
func (e *backTX) sendMixed(frames []Frame, n int, src []byte, r netif.RxRequest, t *tally) int {
	first := n // frame of rsp[0]
	for {
		p := &e.batched[e.nrsp]
		p.firstOp = e.nops
		e.write(r.Ref, 0, src)
		p.ops = e.nops - p.firstOp
		e.rsp[e.nrsp] = plainResponse(r.ID, &frames[n])
		e.nrsp++
		if n++; n == len(frames) {
			break
		}
		if src = e.takeFrame(&frames[n], &e.ours[n]); src == nil {
			break
		}
		e.ring.TakeTo(&r)
		t.plain(len(src), src)
	}
	e.grantCopy(e.count)
	uncopied := uint64(0)
	for i := range e.rsp[:e.nrsp] {
		if p := &e.batched[i]; p.ops > 0 && e.ops[p.firstOp].Status != hypercall.OK {
			uncopied += e.countFailed(&frames[first+i], &e.rsp[i], e.ops[p.firstOp].Len)
		}
		e.ring.Put(e.rsp[i])
		e.giveBack(&frames[first+i], e.ours[first+i])
	}
	t.countCopied(uncopied, e.ring.Unanswered(), e.private.Free())
	return n
}
