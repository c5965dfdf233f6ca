package pvnet

import (
	"cmp"
	"time"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/telemetry"
)

// maxRxSlots is how many data slots a frame from the backend may have. Linux's netfront
// allows MAX_SKB_FRAGS + 1 = 18, and one more if the first is short enough to be copied
// (drivers/net/xen-netfront.c). A lower limit would gain nothing.
const maxRxSlots = 19

// A frontRX receives on the rx ring. It keeps every slot posted with a page that the peer
// may write, copies arriving frames to private buffers and posts the pages again at once.
type frontRX struct {
	ring    *ring.Front[netif.RxRequest, netif.RxResponse]
	shared  *arena.Arena         // the shared pages
	refs    []hypercall.GrantRef // by page
	pageAt  [256]uint32          // by slot: the page that is posted there
	private *arena.Arena         // private buffers
	got     [64]uint32           // private buffers for the next frames; a stack array would be cleared on each call
	unfinished
	cut  bool // a fault has cut a call short: a page that it moved may be neither posted nor free
	lend bool

	bound
	peerLink
	pageWait

	offload bool // this end offered to take GSO frames and partial checksums

	next     rxPacket
	haveNext bool // next has been parsed, and not delivered
}

// An rxPacket describes a frame in shared pages, after all of its responses were taken
// and checked.
type rxPacket struct {
	dataSlots int // data slots
	allSlots  int // all slots, extra infos included
	total     uint32
	csum      Checksum
	extras    netif.Extras
	seg       [maxRxSlots]rxSegment
}

type rxSegment struct {
	page   uint32
	off, n uint16
}

// post gives a page to the peer in the next slot. The id is the slot's number, as Linux's
// netback and the Windows drivers expect.
func (e *frontRX) post(page uint32) {
	slot := e.ring.Next() % e.ring.Size()
	e.pageAt[slot] = page
	e.ring.Put(netif.RxRequest{ID: uint16(slot), Ref: e.refs[page]})
}

// fill posts free pages until the ring is full.
func (e *frontRX) fill() {
	var page [1]uint32
	for e.ring.Free() > 0 && e.shared.Get(page[:]) == 1 {
		e.post(page[0])
	}
}

func (e *frontRX) receive(frames []Frame, into bool) (n int, err error) {
	e.fed()
	t := tally{block: e.count}
	if e.lend {
		e.fill()
	}
	if !e.haveNext && (into || !e.lend) {
		n, err = e.receivePlain(frames, into, &t)
	}
	for n < len(frames) && err == nil {
		if !e.haveNext {
			if e.haveNext, err = e.parse(); err != nil || !e.haveNext {
				break
			}
		}
		good := false
		if good, err = e.deliver(frames, n, into, &t); good {
			n++
		}
	}
	if n > 0 && n == len(frames) {
		e.count.Add(telemetry.PollsFull, 1)
	}
	e.publish()
	e.finish()
	t.count(e.ring.Size()-e.ring.Free(), e.private.Free())
	if n > 0 && (err == ErrNoBuffers || err == ErrShortFrame) {
		err = nil
	}
	return n, err
}

// atHand returns how many pages are there for the next frame, but for those that others have
// released since receive looked.
func (e *frontRX) atHand() int {
	n := e.private.AtHand()
	if e.lend {
		n += e.shared.AtHand() // as more of them are home, they may be lent again
	}
	return n
}

// stock returns how many pages are there, with those that others have released.
func (e *frontRX) stock() int {
	e.private.Free()
	if e.lend {
		e.shared.Free()
	}
	return e.atHand()
}

func (e *frontRX) starving() bool {
	if !e.starved.Load() {
		return false
	}
	e.private.WakeOnReturn()
	if e.lend {
		e.shared.WakeOnReturn()
	}
	return !e.refilled(e.stock())
}

// bind also has releases of other goroutines wake the owner of h, once starving asks for that.
func (e *frontRX) bind(h *half) {
	e.bound.bind(h)
	e.private.SetWake(h.wakeOwner)
	e.shared.SetWake(h.wakeOwner)
}

// deliver makes frames[n] the next packet. It reports false for a packet that it drops, and
// returns an error, with the packet still to come, if the frame has no room for it or there
// is no buffer.
func (e *frontRX) deliver(frames []Frame, n int, into bool, t *tally) (good bool, err error) {
	f := &frames[n]
	switch {
	case into:
		if err := f.reset(e.next.total); err != nil {
			return false, err
		}
	case e.lend && e.mayLend():
		e.lendTo(f)
		e.built = frames[:n+1]
		t.add(f, e.next.allSlots, f.Bytes())
		e.haveNext = false
		return true, nil
	case !build(e.private, int(e.next.total), f):
		e.starve(e.atHand()) // now: the counters look again, and collect what has come back since
		e.count.Add(telemetry.AllocFailed, 1)
		return false, ErrNoBuffers
	}
	if !into {
		e.built = frames[:n+1]
	}
	e.copyTo(f)
	e.haveNext = false
	if f.csum != ChecksumUnknown || e.next.extras.Len() > 0 {
		if reason := f.takeOffloads(&e.next.extras, e.offload, e.count); reason != 0 {
			e.count.Drop(reason, 1)
			e.showDropped(f, reason)
			if !into {
				e.private.Release(f.buf)
			}
			return false, nil
		}
	}
	t.add(f, e.next.allSlots, f.Bytes())
	return true, nil
}

// receivePlain receives frames of one slot without offloads, in one pass. It stops at the
// first frame that is something else or does not fit the caller's frame, and parses that
// frame from the response already taken.
func (e *frontRX) receivePlain(frames []Frame, into bool, t *tally) (n int, err error) {
	avail, err := e.ring.Poll()
	if err != nil {
		return 0, nil // the general path meets the error again and returns it
	}
	got := min(int(avail), len(frames), len(e.got))
	if !into {
		got = e.private.Get(e.got[:got])
		e.taken = got
	}
	var r netif.RxResponse
	for n < got {
		slot := e.ring.Consumed() % e.ring.Size()
		e.ring.TakeTo(&r)
		size, f, dst := uint16(r.Status), &frames[n], []byte(nil)
		plain := r.Plain()
		if into && plain {
			dst = f.refill(size)
			plain = dst != nil
		}
		if !plain {
			e.haveNext, err = e.parseFrom(r, slot, avail-uint32(n)-1)
			break
		}
		if !into {
			off := min(headroom, shm.PageSize-size)
			f.single(e.private.Buffer(e.got[n]), off, size)
			dst = e.private.Bytes(e.got[n])[off : off+size]
		}
		page := e.pageAt[slot%uint32(len(e.pageAt))]
		copy(dst, e.shared.Bytes(page)[r.Offset:])
		e.post(page)
		if r.Flags&netif.RxDataValidated != 0 {
			f.csum = ChecksumVerified
			t.verified++
		}
		t.plain(int(size), dst)
		n++
	}
	if !into {
		e.private.Put(e.got[n:got]...)
		e.taken = n
	}
	t.settle()
	e.count.Add(telemetry.CopiedBytes, t.bytes)
	return n, err
}

func (e *frontRX) abort() {
	e.takeBack(e.got[:e.taken], e.private, e.shared)
	if e.haveNext { // some of its pages may be posted again already
		e.haveNext = false
		e.count.Drop(telemetry.DropDisconnected, 1)
	}
	e.cut = true
}

func (e *frontRX) publish() {
	e.count.Add(telemetry.Polls, 1)
	e.notify(e.ring.Publish(), 0) // posting pages spares no notification worth counting
}

// parse takes the responses of the next frame. It drops a frame that is wrong, posts its
// pages again, and tries the next one.
func (e *frontRX) parse() (bool, error) {
	for {
		avail, err := e.ring.Poll()
		if err != nil {
			return false, e.violation(err.Error())
		}
		if avail == 0 {
			return false, nil
		}
		slot := e.ring.Consumed() % e.ring.Size()
		if ok, err := e.parseFrom(e.ring.Take(), slot, avail-1); ok || err != nil {
			return ok, err
		}
	}
}

// parseFrom parses the frame that begins with the response first, already taken from
// slot. At most avail slots follow. It drops a frame that is wrong and reports false.
func (e *frontRX) parseFrom(first netif.RxResponse, slot, avail uint32) (bool, error) {
	reason, ok := e.parseOne(first, slot, avail)
	if !ok {
		e.showNext(reason)
		e.repost()
		e.count.Drop(reason, 1)
	}
	return ok, nil
}

// parseOne takes the other slots of the frame, at most avail. If ok is false, the caller
// has to post the pages in next again. A frame that is wrong in several ways counts for
// the first.
func (e *frontRX) parseOne(r netif.RxResponse, slot, avail uint32) (reason telemetry.Reason, ok bool) {
	p := &e.next
	p.dataSlots, p.allSlots, p.total, p.csum, p.extras = 0, 0, 0, ChecksumUnknown, netif.Extras{}
	if r.Flags&netif.RxCsumBlank != 0 {
		p.csum = ChecksumPartial
	} else if r.Flags&netif.RxDataValidated != 0 {
		p.csum = ChecksumVerified
	}
	reason = e.addSlot(r, slot)
	if r.Flags&netif.RxExtraInfo != 0 {
		var why telemetry.Reason
		why, avail = e.parseExtras(avail)
		reason = cmp.Or(reason, why)
	}
	for r.Flags&netif.RxMoreData != 0 {
		if avail == 0 {
			reason = cmp.Or(reason, telemetry.DropBadChain)
			break
		}
		slot = e.ring.Consumed() % e.ring.Size()
		r = e.ring.Take()
		avail--
		reason = cmp.Or(reason, e.addSlot(r, slot))
	}
	switch {
	case reason != 0:
	case p.total < MinFrame:
		reason = telemetry.DropTooShort
	case p.total > MaxFrame:
		reason = telemetry.DropTooLong
	}
	return reason, reason == 0
}

// parseExtras takes the extra infos behind the first response, at most avail, and posts
// their pages again. It returns how many slots are left, and why the frame must be
// dropped, or 0.
func (e *frontRX) parseExtras(avail uint32) (reason telemetry.Reason, left uint32) {
	for more := true; more; avail-- {
		if avail == 0 {
			return cmp.Or(reason, telemetry.DropBadExtra), 0
		}
		slot := e.ring.Consumed() % e.ring.Size()
		x := netif.ExtraOfRx(e.ring.Take())
		e.next.allSlots++
		e.post(e.pageAt[slot]) // an extra info uses no page
		e.count.Add(telemetry.ExtraInfos, 1)
		if e.next.extras.Add(x) != nil {
			reason = cmp.Or(reason, telemetry.DropBadExtra)
		} else if x.Type == netif.ExtraGSO && !e.offload {
			reason = cmp.Or(reason, telemetry.DropBadGSO) // this end did not offer GSO
		}
		more = x.More()
	}
	return reason, avail
}

// addSlot adds a response, taken from slot, to the next packet, with the part of its page
// that has bytes of the frame. It returns why the frame must be dropped, or 0.
func (e *frontRX) addSlot(r netif.RxResponse, slot uint32) (reason telemetry.Reason) {
	p, page := &e.next, e.pageAt[slot]
	p.allSlots++
	if p.dataSlots >= maxRxSlots {
		e.post(page)
		return telemetry.DropBadChain
	}
	s := rxSegment{page: page}
	switch {
	case r.Status < 0:
		reason = telemetry.DropBackendError
	case uint32(r.Offset)+uint32(r.Status) > shm.PageSize:
		reason = telemetry.DropBadOffset
	default:
		s.off, s.n = r.Offset, uint16(r.Status)
	}
	p.seg[p.dataSlots] = s
	p.dataSlots++
	p.total += uint32(s.n)
	return reason
}

// copyTo copies the next packet to f, which has the same length, and posts the packet's
// pages again.
func (e *frontRX) copyTo(f *Frame) {
	f.csum = e.next.csum
	if e.next.dataSlots == 1 && f.pieces <= 1 {
		s := e.next.seg[0]
		copy(f.Bytes(), e.shared.Bytes(s.page)[s.off:s.off+s.n])
		e.post(s.page)
	} else {
		var srcs [maxRxSlots][]byte
		for i, s := range e.next.seg[:e.next.dataSlots] {
			srcs[i] = e.shared.Bytes(s.page)[s.off : s.off+s.n]
		}
		f.CopyFrom(srcs[:e.next.dataSlots]...)
		e.repost()
	}
	e.count.Add(telemetry.CopiedBytes, uint64(e.next.total))
}

// repost posts the pages of the next packet again.
func (e *frontRX) repost() {
	for _, s := range e.next.seg[:e.next.dataSlots] {
		e.post(s.page)
	}
}

// mayLend reports whether half the ring stays posted if the next packet's pages are lent.
// A packet with offloads is copied, since we parse its headers and the peer could still
// write a lent page; so is one whose first piece is shorter than an Ethernet header.
func (e *frontRX) mayLend() bool {
	home := int(e.ring.Size()-e.ring.Free()) + e.shared.Free()
	return home >= e.shared.Len()/2 && e.next.csum != ChecksumPartial && !e.next.extras.Has(netif.ExtraGSO) &&
		e.next.seg[0].n >= MinFrame
}

// lendTo makes f a frame in the shared pages themselves.
func (e *frontRX) lendTo(f *Frame) {
	p := &e.next
	for i := 1; i < p.dataSlots; i++ {
		e.shared.Link(p.seg[i-1].page, p.seg[i].page, p.seg[i].off, p.seg[i].n)
	}
	s := p.seg[0]
	*f = Frame{
		buf: e.shared.Buffer(s.page), total: p.total, csum: p.csum,
		off: s.off, n: s.n, pieces: uint8(p.dataSlots),
	}
	if f.takeHash(p.extras.Of(netif.ExtraHash)) {
		e.count.Add(telemetry.HashedPackets, 1)
	}
	e.count.Add(telemetry.LentPackets, 1)
}

func (e *frontRX) violation(reason string) error { return e.fail(e.ring.Consumed(), reason) }

func (e *frontRX) release(frames []Frame) (err error) {
	if !e.lend {
		return releaseTo(e.private, frames)
	}
	for i := range frames { // some are lent pages, some copies
		a := e.private
		if frames[i].buf.Of(e.shared) {
			a = e.shared
		}
		if r := releaseTo(a, frames[i:i+1]); r != nil {
			err = r
		}
	}
	return err
}

func (e *frontRX) arm() (bool, error) {
	more, err := e.ring.Arm(1)
	if err != nil {
		return false, e.violation(err.Error())
	}
	return more, nil
}

func (e *frontRX) ready(int) bool {
	if e.starved.Load() {
		return e.refilled(e.stock())
	}
	n, err := e.ring.Poll()
	return n > 0 || e.haveNext || err != nil
}

func (e *frontRX) consumed() uint32 { return e.ring.Consumed() }

func (e *frontRX) heldUntil() (until time.Time, held bool) { return until, false }

func (e *frontRX) overdue() bool { return !e.starved.Load() && e.ring.Overdue() }

// sample does nothing: a posted page gets its response when a frame arrives, so the time
// would only show how idle the link was.
func (e *frontRX) sample() {}

// dropUndelivered counts the frames that the backend sent and nobody received. The receiving end
// accounts for every response in the ring.
func (e *frontRX) dropUndelivered() {
	for {
		if !e.haveNext {
			if e.haveNext, _ = e.parse(); !e.haveNext { // a violation no longer matters
				return
			}
		}
		e.haveNext = false
		e.showNext(telemetry.DropDisconnected)
		e.repost()
		e.count.Drop(telemetry.DropDisconnected, 1)
	}
}

func (e *frontRX) drain(time.Time) {
	if catchFault(e.dropUndelivered) != nil { // the connection is over: a fault on the ring no longer matters
		e.cut = true
	}
	for i := e.ring.Consumed(); i != e.ring.Next(); i++ {
		e.shared.Put(e.pageAt[i%e.ring.Size()])
	}
	if e.cut && !e.lend {
		e.collect()
	}
}

// collect puts the pages into the arena that are not there. Nobody else has any: the
// ring has none any more, and none was lent.
func (e *frontRX) collect() {
	var free [pagesPerHalf]uint32
	var there [pagesPerHalf]bool
	n := e.shared.Get(free[:e.shared.Len()])
	for _, page := range free[:n] {
		there[page] = true
	}
	e.shared.Put(free[:n]...)
	for page := range uint32(e.shared.Len()) {
		if !there[page] {
			e.shared.Put(page)
		}
	}
}
