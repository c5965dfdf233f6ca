package pvnet

import (
	"time"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/packet"
	"barevif/pvnet/ring"
	"barevif/telemetry"
)

// How many data slots a frame from the frontend may have. The protocol requires at least
// 18; Linux's netback accepts 19, answers 20 and 21 with ERROR, and treats 22 as an
// attack (drivers/net/xen-netback/netback.c: XEN_NETBK_LEGACY_SLOTS_MAX, fatal_skb_slots,
// both counted after the first).
const (
	maxTxSlots   = 19
	fatalTxSlots = 22
)

// A backRX receives what the frontend transmits. Requests on the tx ring name pages of
// the peer, which it copies to private buffers, many frames in one batch. It answers
// every request, in order and a whole frame at a time, so that another backend could
// continue where it stops.
type backRX struct {
	ring    *ring.Back[netif.TxRequest, netif.TxResponse]
	private *arena.Arena

	offload bool // this end offered to take GSO frames and partial checksums

	next     txPacket
	haveNext bool // next has been parsed, and not copied
	account  account
	lost     int64   // bytes of frames that were skipped, for the account
	groups   *groups // the frontend's multicast filter

	// One batch: its copies, its responses in ring order, and which of them belong to
	// which frame.
	bound
	peerLink
	pageWait
	copyBatch
	lender
	rsp     [256]netif.TxResponse
	nrsp    int
	batched [128]batched
	layout  packer
	got     [128]uint32 // private pages for the next frames; a stack array would be cleared on each call
	unfinished

	stopwatch
}

// A txPacket is the description of a frame by its requests, all of them taken and
// checked.
type txPacket struct {
	dataSlots int // data slots
	allSlots  int // all slots, extra infos included: how many responses are due
	total     uint32
	csum      Checksum
	seg       [maxTxSlots]netif.TxRequest
	extras    netif.Extras
	rsp       [fatalTxSlots + maxExtras]netif.TxResponse
}

// maxExtras is more extra infos than a frame can need; Linux keeps one of each type.
const maxExtras = 8

func (e *backRX) receive(frames []Frame, into bool) (n int, err error) {
	e.fed()
	e.nops, e.nrsp = 0, 0
	e.takeUp()
	e.answerReturned()
	if e.account.limited() && e.account.adopt() {
		return e.receiveLimited(frames, into)
	}
	if !e.haveNext {
		if n, err = e.receiveFast(frames, into); n > 0 || err != nil {
			return n, err
		}
	}
	return e.receiveAny(frames, into, false)
}

// receiveLimited is receive for a vif with a rate limit. What its credit covers in any
// case takes the shortest path.
func (e *backRX) receiveLimited(frames []Frame, into bool) (n int, err error) {
	const worthIt = 16 // frames: what is left over of a credit is one batch more, not one for each frame
	covered := int(min(e.account.credit/shm.PageSize, int64(len(frames))))
	e.lost = 0 // what was lost without a limit costs nothing
	if !e.haveNext && covered >= min(len(frames), worthIt) {
		n, err = e.receiveFast(frames[:covered], into)
		for i := range frames[:n] {
			e.account.credit -= int64(frames[i].total)
		}
		e.payLost()
		if n > 0 || err != nil {
			return n, err
		}
	}
	return e.receiveAny(frames, into, true)
}

// payLost makes the frames that were lost since it was last called cost their bytes, as in
// Linux's netback. There (drivers/net/xen-netback/netback.c, xenvif_tx_build_gops, read in 5.18)
// the order is: the size in the first request is held against the credit and taken from it;
// then the extra infos are taken and a multicast message is answered; then the slots are counted
// and the size and the page of the first are checked. So a multicast message and a frame that
// is wrong cost their bytes there too, and may wait for them first. Here what is wrong is
// answered at once and paid for afterwards: the credit may become negative, and the next frame
// then waits for as long as the wrong one would have. Over time a guest gets the same.
func (e *backRX) payLost() {
	e.account.credit -= e.lost
	e.lost = 0
}

// receiveAny is receive for frames of all kinds. With pay, they need credit: a frame that
// has to wait for it stays in next.
func (e *backRX) receiveAny(frames []Frame, into, pay bool) (n int, err error) {
	limit := min(len(frames), len(e.batched))
	for n < limit {
		if !e.haveNext {
			if e.haveNext, err = e.parse(pay); err != nil || !e.haveNext {
				break
			}
		}
		if e.nops+maxFrameOps > batchOps || pay && !e.account.covers(int64(e.next.total)) {
			break
		}
		f, lent := &frames[n], false
		switch {
		case into:
			err = f.reset(e.next.total)
		case e.lendNext(f):
			lent = true
		case !e.buildNext(f):
			e.starve(e.atHand()) // now: the counters look again, and collect what has come back since
			e.count.Add(telemetry.AllocFailed, 1)
			err = ErrNoBuffers
		}
		if err != nil {
			break
		}
		if n == 0 {
			e.begin()
		}
		if !into {
			e.built = frames[:n+1]
		}
		if lent {
			e.addLent(f, &e.batched[n])
		} else {
			e.addToBatch(f, &e.batched[n])
		}
		e.haveNext = false
		if pay {
			e.account.credit -= int64(e.next.total)
		}
		n++
	}
	if n > 0 && (n == limit || e.nops+maxFrameOps > batchOps) {
		e.count.Add(telemetry.PollsFull, 1)
	}
	n = e.copyBatched(frames, n, into)
	e.publish(0)
	if n > 0 && (err == ErrNoBuffers || err == ErrShortFrame || err == ErrStale) {
		err = nil
	}
	return n, err
}

// atHand counts the pages of its own that the frontend lends as missing: when they are back, they
// may be lent again.
func (e *backRX) atHand() int { return e.private.AtHand() - e.lentNow }

// stock returns how many pages are there, with those that others have released.
func (e *backRX) stock() int {
	e.private.Free()
	return e.atHand()
}

func (e *backRX) starving() bool {
	if !e.starved.Load() {
		return false
	}
	e.private.WakeOnReturn()
	e.wakeOnReturn()
	return !e.refilled(e.stock())
}

// bind also has releases of other goroutines wake the owner of h, once starving asks for that.
func (e *backRX) bind(h *half) {
	e.bound.bind(h)
	e.private.SetWake(h.wakeOwner)
}

// receiveFast is receive for frames of one slot without offloads.
func (e *backRX) receiveFast(frames []Frame, into bool) (n int, err error) {
	switch {
	case e.table == nil:
		return e.receivePlain(frames, into)
	case e.lends:
		return e.receiveLending(frames, into)
	}
	return e.receiveMapped(frames, into)
}

// receivePlain is receive for frames of one slot without offloads, in one pass and one
// batch of copies. It stops at the first frame that is something else or does not fit the
// caller's frame: it parses that frame from the request already taken, and leaves it in
// next for the general path.
func (e *backRX) receivePlain(frames []Frame, into bool) (n int, err error) {
	avail, err := e.ring.Poll()
	if err != nil {
		return 0, e.violation(err.Error())
	}
	limit := min(len(frames), len(e.batched))
	got := min(int(avail), limit)
	if !into {
		got = e.private.Get(e.got[:got])
		e.taken = got
	}
	var r netif.TxRequest
	for n < got {
		e.ring.TakeTo(&r)
		f, dst := &frames[n], []byte(nil)
		plain := r.Plain()
		if into && plain {
			dst = f.refill(r.Size)
			plain = dst != nil
		}
		if !plain {
			e.haveNext, err = e.parseFrom(r, avail-uint32(n)-1)
			break
		}
		if !into {
			off := min(headroom, shm.PageSize-r.Size)
			f.single(e.private.Buffer(e.got[n]), off, r.Size)
			dst = e.private.Bytes(e.got[n])[off : off+r.Size]
		}
		if r.Flags&netif.TxDataValidated != 0 {
			f.csum = ChecksumVerified
		}
		if n == 0 {
			e.begin()
		}
		e.addRead(r.Ref, r.Offset, dst)
		e.rsp[n] = netif.TxResponse{ID: r.ID}
		n++
		e.nrsp = n
	}
	if !into {
		e.private.Put(e.got[n:got]...)
		e.taken = n
	}
	if n == 0 && err == nil {
		return 0, nil
	}
	if n == limit {
		e.count.Add(telemetry.PollsFull, 1)
	}
	n = e.copyPlain(frames[:n], into)
	e.publish(0)
	return n, err
}

// copyPlain runs the batch, with one copy and one response per frame, and returns how
// many frames hold their bytes. It drops the others and answers them with ERROR.
func (e *backRX) copyPlain(frames []Frame, into bool) (good int) {
	e.grantCopy(e.count)
	t := tally{block: e.count}
	for i := range frames {
		o := &e.ops[i]
		if o.Status != hypercall.OK {
			e.count.Add(telemetry.GrantErrors, 1)
			e.count.Drop(telemetry.DropBadGref, 1)
			e.lost += int64(o.Len)
			e.rsp[i].Status = netif.Error
			if !into {
				e.private.Release(frames[i].buf)
				e.got[i] = released
			}
			continue
		}
		t.plain(int(o.Len), o.Dst.Local)
		if frames[i].csum == ChecksumVerified {
			t.verified++
		}
		if good != i {
			frames[good], frames[i] = frames[i], frames[good]
		}
		good++
	}
	t.countCopied(0, e.ring.Unanswered(), e.private.Free())
	return good
}

// buildNext makes f a frame for the next packet, whose pieces end where slots do if there are
// buffers enough for that.
func (e *backRX) buildNext(f *Frame) bool {
	p := &e.next
	if p.total <= shm.PageSize {
		return build(e.private, int(p.total), f)
	}
	e.layout.begin(p.total, maxFrameBuffers, shm.PageSize-headroom, packet.MaxHeaders)
	for i := range p.seg[:p.dataSlots] {
		e.layout.add(uint32(p.seg[i].Size))
	}
	return buildPacked(e.private, &e.layout, f)
}

// addToBatch adds the copies of the next packet into f to the batch, and its responses.
func (e *backRX) addToBatch(f *Frame, p *batched) {
	p.firstOp, p.firstRsp, p.extras = e.nops, e.nrsp, e.next.extras
	f.csum = e.next.csum
	if e.next.dataSlots == 1 && f.pieces <= 1 {
		r := &e.next.seg[0]
		e.read(r.Ref, r.Offset, f.Bytes())
	} else {
		i, done := 0, uint16(0)
		for dst := range f.Pieces() {
			for len(dst) > 0 && i < e.next.dataSlots {
				r := &e.next.seg[i]
				k := min(len(dst), int(r.Size-done))
				if k > 0 {
					e.read(r.Ref, r.Offset+done, dst[:k])
					dst, done = dst[k:], done+uint16(k)
				}
				if done == r.Size {
					i, done = i+1, 0
				}
			}
		}
	}
	e.nrsp += copy(e.rsp[e.nrsp:], e.next.rsp[:e.next.allSlots])
	p.ops, p.rsps = e.nops-p.firstOp, e.nrsp-p.firstRsp
}

// copyBatched runs the batch and returns how many of the n frames hold their bytes. It drops the
// others, and answers those whose copies failed with ERROR.
func (e *backRX) copyBatched(frames []Frame, n int, into bool) int {
	e.grantCopy(e.count)
	t := tally{block: e.count}
	good := 0
	for i := range n {
		f, p := &frames[i], &e.batched[i]
		reason := telemetry.DropBadGref
		ok := e.failed(p.firstOp, p.ops, e.count) == 0
		if !ok {
			markError(e.rsp[p.firstRsp : p.firstRsp+p.rsps])
		} else if f.csum != ChecksumUnknown || p.extras.Len() > 0 {
			if r := f.takeOffloads(&p.extras, e.offload, e.count); r != 0 {
				ok, reason = false, r // Linux answers such a frame with OKAY, too
				e.showDropped(f, r)
			}
		}
		if !ok {
			e.count.Drop(reason, 1)
			if !into {
				e.private.Release(f.buf)
			}
			continue
		}
		t.add(f, p.rsps, f.Bytes())
		frames[good], frames[i] = frames[i], frames[good]
		good++
	}
	t.countCopied(e.lentBytes, e.ring.Unanswered(), e.private.Free())
	e.lentBytes = 0
	return good
}

// publish publishes the responses of the batch, of which the first so many are in the ring
// already.
func (e *backRX) publish(put int) {
	e.count.Add(telemetry.Polls, 1)
	n := put + e.nrsp
	if e.lends && (e.owed() || e.lentNow > 0) {
		n = put + e.oweAll()
	} else {
		for i := range e.rsp[:e.nrsp] {
			e.ring.Put(e.rsp[i])
		}
	}
	e.nrsp = 0
	asked := e.ring.Publish()
	e.finish()
	e.fresh = e.to
	e.end(e.count)
	e.notify(asked, n)
}

// parse takes the requests of the next frame. It answers and skips a frame that is wrong;
// an error is final for the device. With pay, skipped frames cost credit, and it takes no more
// once there is none left.
func (e *backRX) parse(pay bool) (bool, error) {
	for {
		if pay {
			if e.payLost(); e.account.credit < 0 && !e.account.covers(0) {
				return false, nil
			}
		}
		avail, err := e.ring.Poll()
		if err != nil {
			return false, e.violation(err.Error())
		}
		if avail == 0 {
			return false, nil
		}
		if e.nrsp+fatalTxSlots+maxExtras > len(e.rsp) {
			return false, nil // rsp is nearly full: publish must run first
		}
		if ok, err := e.parseFrom(e.ring.Take(), avail-1); ok || err != nil {
			return ok, err
		}
	}
}

// parseFrom parses the frame that begins with the request first, already taken. At most
// avail slots follow. It reports false for a frame that is wrong, which it has answered.
func (e *backRX) parseFrom(first netif.TxRequest, avail uint32) (ok bool, err error) {
	reason, ok, err := e.parseOne(first, avail)
	if reason != 0 && err == nil {
		e.count.Drop(reason, 1)
	}
	if !ok {
		e.lost += int64(first.Size) // the whole frame's
	}
	return ok, err
}

// parseOne takes the other slots of the frame, at most avail. If ok is false, the frame's
// responses are in the batch, and a reason of 0 means that no frame was lost. It decides
// as Linux's xenvif_tx_build_gops does.
func (e *backRX) parseOne(first netif.TxRequest, avail uint32) (reason telemetry.Reason, ok bool, err error) {
	p := &e.next
	p.dataSlots, p.allSlots, p.csum, p.extras = 0, 0, ChecksumUnknown, netif.Extras{}

	p.answer(first.ID, netif.Okay)
	p.total = uint32(first.Size)
	if first.Flags&netif.TxCsumBlank != 0 {
		p.csum = ChecksumPartial
	} else if first.Flags&netif.TxDataValidated != 0 {
		p.csum = ChecksumVerified
	}
	if first.Flags&netif.TxExtraInfo != 0 {
		if avail, err = e.parseExtras(avail); err != nil {
			return 0, false, err
		}
	}
	if p.extras.Has(netif.ExtraMcastAdd) || p.extras.Has(netif.ExtraMcastDel) {
		// Such a request carries no frame, whatever its flags are.
		if e.groups.join(&p.extras) {
			e.nrsp += copy(e.rsp[e.nrsp:], p.rsp[:p.allSlots])
		} else {
			e.answerError()
		}
		return 0, false, nil
	}
	size, long, err := e.parseSlots(first, avail)
	switch {
	case err != nil:
		return 0, false, err
	case long:
		reason = telemetry.DropBadChain
	case p.extras.Has(netif.ExtraGSO) && !e.offload:
		reason = telemetry.DropBadGSO
	case size < MinFrame:
		reason = telemetry.DropTooShort
	case uint32(first.Offset)+size > shm.PageSize:
		return 0, false, e.violation("a slot crosses its page")
	}
	if reason != 0 {
		e.answerError()
		return reason, false, nil
	}
	first.Size = uint16(size)
	p.seg[0] = first
	return 0, true, nil
}

// parseExtras takes the extra infos behind the first request and returns how many of the
// avail slots are left.
func (e *backRX) parseExtras(avail uint32) (left uint32, err error) {
	p := &e.next
	for more := true; more; avail-- {
		if avail == 0 {
			return 0, e.violation("extra info is missing")
		}
		x := netif.ExtraOfTx(e.ring.Take())
		e.count.Add(telemetry.ExtraInfos, 1)
		if p.extras.Add(x) != nil {
			return 0, e.violation("malformed extra info")
		}
		if p.allSlots > maxExtras {
			return 0, e.violation("endless extra info")
		}
		p.answer(0, netif.Null)
		more = x.More()
	}
	return avail, nil
}

// parseSlots takes the further data slots of the frame, at most avail. It returns how many
// of the frame's bytes the first slot has, and whether the frame has too many slots or
// slots with more bytes than it.
func (e *backRX) parseSlots(first netif.TxRequest, avail uint32) (size uint32, wrong bool, err error) {
	p := &e.next
	size = uint32(first.Size) // the frame's total
	p.dataSlots = 1
	slots := 1
	for more := first.Flags&netif.TxMoreData != 0; more; slots++ {
		if avail == 0 {
			return 0, false, e.violation("the frame's slots are incomplete")
		}
		if slots+1 >= fatalTxSlots {
			return 0, false, e.violation("too many slots in a frame")
		}
		r := e.ring.Take()
		avail--
		if uint32(r.Offset)+uint32(r.Size) > shm.PageSize {
			return 0, false, e.violation("a slot crosses its page")
		}
		p.answer(r.ID, netif.Okay)
		if slots+1 > maxTxSlots {
			wrong = true
		} else {
			p.seg[p.dataSlots] = r
			p.dataSlots++
		}
		if uint32(r.Size) > size {
			wrong = true
		} else {
			size -= uint32(r.Size)
		}
		more = r.Flags&netif.TxMoreData != 0
	}
	return size, wrong, nil
}

// answerError adds the responses of the next packet to the batch, all of them ERROR but
// those to extra infos.
func (e *backRX) answerError() {
	p := &e.next
	markError(p.rsp[:p.allSlots])
	e.nrsp += copy(e.rsp[e.nrsp:], p.rsp[:p.allSlots])
}

// markError changes responses to ERROR, except those to extra infos.
func markError(rsp []netif.TxResponse) {
	for i := range rsp {
		if rsp[i].Status == netif.Okay {
			rsp[i].Status = netif.Error
		}
	}
}

func (p *txPacket) answer(id uint16, s netif.Status) {
	p.rsp[p.allSlots] = netif.TxResponse{ID: id, Status: s}
	p.allSlots++
}

func (e *backRX) violation(reason string) error { return e.fail(e.ring.Consumed(), reason) }

func (e *backRX) release(frames []Frame) error {
	if !e.lends {
		return releaseTo(e.private, frames)
	}
	err := e.releaseLent(frames)
	e.answerReturned()
	return err
}

func (e *backRX) arm() (bool, error) {
	e.wakeOnReturn()
	more, err := e.ring.Arm(1)
	if err != nil {
		return false, e.violation(err.Error())
	}
	return more, nil
}

func (e *backRX) ready(int) bool {
	if e.account.held.Load() {
		return e.account.over() || e.lentNow > 0 && e.returned()
	}
	if e.starved.Load() {
		return e.refilled(e.stock()) || e.lentNow > 0 && e.returned()
	}
	n, err := e.ring.Poll()
	return n > 0 || e.haveNext || err != nil || e.lentNow > 0 && e.returned()
}

func (e *backRX) consumed() uint32 { return e.ring.Consumed() }

func (e *backRX) heldUntil() (until time.Time, held bool) {
	held = e.account.held.Load()
	if held {
		e.wakeOnReturn() // pages that come back are answered meanwhile
	}
	return e.account.until, held
}

// overdue reports false while a frame waits for credit or a page: the owner has armed no event.
func (e *backRX) overdue() bool {
	return !e.account.held.Load() && !e.starved.Load() && e.ring.Overdue()
}

func (e *backRX) abort() {
	e.takeBack(e.got[:e.taken], e.private)
	e.unlendBatch()
}

// drain counts nothing: a frame that was parsed and not delivered has no response, so the
// frontend counts it, or the next backend takes it again.
func (e *backRX) drain(end time.Time) {
	e.haveNext = false
	e.awaitLent(end)
	e.account.leave()
}
