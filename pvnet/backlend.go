package pvnet

import (
	"slices"
	"time"

	"barevif/pvnet/netif"
	"barevif/telemetry"
)

// A lender is the part of a backRX that lends the frontend's mapped pages to its user
// ([Config].LendRx). A lent page is the frontend's again with the response to its request.
// Responses are in the order of the requests, so that another backend could continue: the
// responses behind that of a lent page wait with it.
type lender struct {
	lends    bool                     // the user wants pages lent
	most     int                      // pages lent at a time; 0: no more are lent
	waiting  [netif.TxRingSize]answer // a FIFO of responses
	from     uint32                   // free-running index of the oldest one
	to       uint32                   // and behind the newest
	lentNow  int                      // pages
	over     bool                     // the connection is over: no response waits any longer
	lentRuns []*pageRun               // those with lent pages, also of tables that were left behind
	back     [netif.TxRingSize]uint32 // pages that came back; a stack array would be cleared on each call

	of         [256]lentPage // by response of the batch: the page that it waits for; cleared with the batch
	fresh      uint32        // index in waiting of the first response of the batch
	lentFrames uint64        // of a batch of plain frames
	lentBytes  uint64        // of the frames of the batch that are lent
}

// An answer is a response that waits until a page is back.
type answer struct {
	rsp netif.TxResponse
	lentPage
}

// A lentPage names a page of a run; its run is nil if there is none to wait for.
type lentPage struct {
	run  *pageRun
	page uint32
}

// owed reports whether responses wait.
func (l *lender) owed() bool { return l.from != l.to }

// lend takes note that a page is lent.
func (l *lender) lend(r *pageRun, page uint32) {
	if r.nlent == 0 {
		l.lentRuns = append(l.lentRuns, r)
	}
	r.lent[page] = true
	r.nlent++
	l.lentNow++
}

// lendMin is the least size of a frame, in bytes, that is lent: a shorter one is copied in
// less time than a page is lent and taken back.
const lendMin = 512

// mayLend reports whether a page can be lent: nobody has it yet, as when the frontend keeps
// two buffers in one page, and at most half the ring is lent at a time.
func (l *lender) mayLend(r *pageRun, page uint32, more int) bool {
	return l.lentNow+more <= l.most && !r.lent[page]
}

// owe puts a response behind those that wait.
func (l *lender) owe(r netif.TxResponse, p lentPage) {
	l.waiting[l.to%uint32(len(l.waiting))] = answer{r, p}
	l.to++
}

// oweAll puts the batch's responses behind those that wait, and then puts into the ring
// those that need not wait. It returns how many.
func (e *backRX) oweAll() (put int) {
	e.fresh = e.to
	for i := range e.rsp[:e.nrsp] {
		e.owe(e.rsp[i], e.of[i])
		e.of[i] = lentPage{}
	}
	return e.settle()
}

// settle puts the responses into the ring whose pages, and all before them, are back. It
// returns how many.
func (e *backRX) settle() (put int) {
	if e.lentNow > 0 {
		e.collect()
	}
	for e.owed() {
		a := &e.waiting[e.from%uint32(len(e.waiting))]
		if a.run != nil && a.run.lent[a.page] && !e.over {
			break
		}
		e.ring.Put(a.rsp)
		a.run = nil
		e.from++
		put++
	}
	return put
}

// collect takes back the pages that users have released.
func (l *lender) collect() {
	for i := len(l.lentRuns) - 1; i >= 0; i-- {
		r := l.lentRuns[i]
		n := r.arena.Get(l.back[:])
		for _, page := range l.back[:n] {
			r.lent[page] = false
		}
		r.nlent -= n
		l.lentNow -= n
		if r.nlent == 0 {
			l.lentRuns = slices.Delete(l.lentRuns, i, i+1)
		}
	}
}

// returned reports whether another goroutine has released a lent page.
func (l *lender) returned() bool {
	for _, r := range l.lentRuns {
		if r.arena.Returned() {
			return true
		}
	}
	return false
}

// answerReturned answers the requests whose pages are back.
func (e *backRX) answerReturned() {
	if !e.owed() {
		return
	}
	if n := e.settle(); n > 0 {
		e.notify(e.ring.Publish(), n)
	}
}

// wakeOnReturn makes the next release by another goroutine wake the owner, who is about to
// wait: the frontend may be waiting for the response.
func (e *backRX) wakeOnReturn() {
	if e.lentNow == 0 {
		return
	}
	for _, r := range e.lentRuns {
		r.arena.WakeOnReturn()
	}
	e.answerReturned()
}

// releaseLent is releaseTo for frames of which some are lent pages and some copies.
func (e *backRX) releaseLent(frames []Frame) (err error) {
	for len(frames) > 0 {
		a := e.private
		if frames[0].buf.ReadOnly() {
			for _, r := range e.lentRuns {
				if frames[0].buf.Of(r.arena) {
					a = r.arena
					break
				}
			}
		}
		n := 1
		for n < len(frames) && frames[n].buf.Of(a) {
			n++
		}
		if r := releaseTo(a, frames[:n]); r != nil {
			err = r
		}
		frames = frames[n:]
	}
	return err
}

// lendNext makes f the next packet in the frontend's own pages, if they are mapped, all in
// one run, and may be lent. A packet with offloads is copied, since we parse its headers
// and the frontend could still write the page; so is one whose first piece is shorter
// than an Ethernet header.
func (e *backRX) lendNext(f *Frame) bool {
	p := &e.next
	if !e.lends || e.table == nil || p.csum == ChecksumPartial || p.extras.Len() > 0 || p.total < lendMin || p.seg[0].Size < MinFrame {
		return false
	}
	head := e.table.find(p.seg[0].Ref)
	if head.mem == nil {
		return false
	}
	run, first := e.table.runs[head.run], uint32(head.page)
	of := e.of[e.nrsp : e.nrsp+p.dataSlots]
	for i := range of {
		s := e.table.find(p.seg[i].Ref)
		page := uint32(s.page)
		if s.mem == nil || s.run != head.run || !e.mayLend(run, page, p.dataSlots-i) {
			for _, o := range of[:i] {
				e.unlend(run, o.page)
			}
			clear(of) // the responses of a frame that is copied wait for no page
			return false
		}
		e.lend(run, page)
		of[i] = lentPage{run, page}
	}
	for i := 1; i < len(of); i++ {
		run.arena.Link(of[i-1].page, of[i].page, p.seg[i].Offset, p.seg[i].Size)
	}
	*f = Frame{
		buf: run.arena.Buffer(first), total: p.total, csum: p.csum,
		off: p.seg[0].Offset, n: p.seg[0].Size, pieces: uint8(p.dataSlots),
	}
	return true
}

// unlend takes back what lend has noted, before anybody has the page.
func (l *lender) unlend(r *pageRun, page uint32) {
	r.lent[page] = false
	r.nlent--
	l.lentNow--
	if r.nlent == 0 {
		l.lentRuns = l.lentRuns[:len(l.lentRuns)-1] // lend has put it there
	}
}

// unlendBatch takes back the pages of a batch that its caller will never see.
func (e *backRX) unlendBatch() {
	for i := range e.of {
		e.takeBackLent(&e.of[i])
	}
	for i := e.fresh; i != e.to; i++ {
		e.takeBackLent(&e.waiting[i%uint32(len(e.waiting))].lentPage)
	}
}

// takeBackLent ends the loan of the page that p names, if it names one: the caller never got the
// frame in that page. It clears p.
func (l *lender) takeBackLent(p *lentPage) {
	r := p.run
	if r == nil {
		return
	}
	r.arena.Take(r.arena.Buffer(p.page)) // makes the handle in the caller's frame stale
	r.lent[p.page] = false
	r.nlent--
	l.lentNow--
	if r.nlent == 0 {
		l.lentRuns = slices.DeleteFunc(l.lentRuns, func(o *pageRun) bool { return o == r })
	}
	*p = lentPage{}
}

// lentOutside returns how many pages are lent that t does not hold.
func (l *lender) lentOutside(t *grantTable) (n int) {
	for _, r := range l.lentRuns {
		if t == nil || !slices.Contains(t.runs, r) {
			n += r.nlent
		}
	}
	return n
}

// addLent adds the responses of the next packet, which was lent, to the batch.
func (e *backRX) addLent(f *Frame, p *batched) {
	p.firstOp, p.ops, p.firstRsp, p.extras = e.nops, 0, e.nrsp, netif.Extras{}
	e.nrsp += copy(e.rsp[e.nrsp:], e.next.rsp[:e.next.allSlots])
	p.rsps = e.nrsp - p.firstRsp
	e.lentBytes += uint64(f.total)
	e.count.Add(telemetry.LentPackets, 1)
}

// lentTimeout is how long the end of a connection waits for frames that users hold in the
// frontend's pages. The frontend waits no longer than [closeTimeout] for us.
const lentTimeout = 2 * time.Second

// awaitLent waits until users have released the lent frames, until end at most, and answers
// their requests. A frame that is held for longer is answered too, since it was received, and
// keeps its page mapped: the frontend sets the page aside.
func (e *backRX) awaitLent(end time.Time) {
	for ; e.owed(); time.Sleep(time.Millisecond) {
		e.over = !time.Now().Before(end)
		if catchFault(e.answerReturned) != nil {
			return
		}
	}
}
