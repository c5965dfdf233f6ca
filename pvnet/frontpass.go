package pvnet

import (
	"errors"
	"fmt"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/netif"
)

// A frontState is the content of TakenVif.State for a frontend. The rings, pages and event
// channels themselves are in Offer, and in the first Files files.
type frontState struct {
	Back  hypercall.DomID
	ID    string
	MAC   MAC
	Mark  string // see xenbus.Device.AdoptConnected
	Offer []byte // shares and waiters, in the order of parts
	Files int

	Features  frontFeatures
	Queues    []queueState
	Ctrl      *frontCtrlState // nil: there is no control ring
	Multicast multicastState
	HashKey   []byte // the random one; nil: none was needed yet
}

// frontFeatures are what was agreed on with the backend.
type frontFeatures struct {
	Split, SG, Offload, Multicast bool
	PeerTakes                     uint32
	Offered                       int
}

// A queueState says where the rings of a queue stand. Every request to send has its
// response, so all pages to send in are free.
type queueState struct {
	TxNext, RxNext, RxConsumed uint32
	Posted                     []byte       // by slot from RxConsumed on: the page that the backend may write
	Parsed                     *parsedState // nil: no frame waits for its receiver
}

// A parsedState is an rxPacket: a frame whose responses were taken, and which nobody has
// received yet.
type parsedState struct {
	Slots    int // all
	Checksum Checksum
	Segments []parsedSegment
	Extras   []parsedExtra
}

type parsedSegment struct {
	Page        byte
	Offset, Len uint16
}

type parsedExtra struct {
	Type byte
	Body []byte
}

// A frontCtrlState says where the control ring stands, which has no request in flight, and what
// the backend was told on it.
type frontCtrlState struct {
	Next   uint32
	LastID uint16
	Hash   *HashConfig // what the backend has; nil: not known, or none
	Static []bool      // by queue: the pages were added
}

// A multicastState is what the frontend wants of the backend's multicast filter, and what it
// has asked for.
type multicastState struct {
	Filtered, Asked, Offered, Dynamic bool
	Wanted                            []MAC
	All                               bool // Wanted counts for nothing
	Listed                            []MAC
}

// parts returns all that the connection shares with the backend: for each queue the pages to
// send in, the pages to receive into and the rings, and one waiter or two; then the control
// ring's.
func (c *conn) parts() (shares []*hypercall.Share, waiters []hypercall.Waiter) {
	for _, q := range c.queues {
		shares = append(shares, q.parts.txShare, q.parts.rxShare, q.parts.rings)
		waiters = append(waiters, q.parts.waiters...)
	}
	if k, ok := c.ctrl.(*ctrlClient); ok {
		shares, waiters = append(shares, k.pages), append(waiters, k.w)
	}
	return shares, waiters
}

// restPatience is how long a frontend waits for its backend's responses, and for frames in
// shared pages. Both take less than a millisecond, unless a rate limit or a stack holds them.
const restPatience = time.Second

// pass is the frontend's: what the application still has of received frames in shared pages
// comes back first.
func (f *front) pass(l *lifecycle, _ handoverTimes) (*passing, error) {
	dom, ok := f.d.domain.(hypercall.HandoverDomain)
	if !ok {
		return nil, fmt.Errorf("a %T passes no pages on: %w", f.d.domain, ErrUnimplemented)
	}
	c := l.conn
	if err := f.await(c.receiversBusy); err != nil {
		return nil, err
	}
	for _, q := range c.queues {
		q.rxPark.leaveGroup()
		q.txPark.leaveGroup()
	}
	offer, err := dom.Offer(c.parts())
	if err != nil {
		return nil, fmt.Errorf("pvnet: offer the pages of vif %s: %w", f.d.id, err)
	}
	s := f.state(l, c)
	s.Offer, s.Files = offer.State, len(offer.Files)
	state, err := marshalState(s)
	if err != nil {
		offer.Withdraw()
		return nil, err
	}
	return &passing{
		state: state, files: offer.Files,
		given: func() {
			offer.Give()
			c.given = true
			l.d.closeMirror() // the other process opens it
		},
		kept: func() {
			offer.Withdraw()
			if k, ok := c.ctrl.(*ctrlClient); ok {
				k.kept = true
			}
		},
	}, nil
}

// holdWrites waits until no Write of the device is in the middle of a frame, which would hold
// pages, and keeps further ones from beginning until release. A Write that waits for room
// is not waited for long.
func (d *Device) holdWrites() (release func()) {
	var held []*TX
	end := time.Now().Add(restPatience / 10)
	for _, tx := range d.tx {
		for !tx.mu.TryLock() {
			if time.Now().After(end) {
				tx = nil
				break
			}
			time.Sleep(20 * time.Microsecond)
		}
		if tx != nil {
			held = append(held, tx)
		}
	}
	return func() {
		for _, tx := range held {
			tx.mu.Unlock()
		}
	}
}

// rest waits until the backend has answered every frame that was sent, and no page of a
// frame to send is held. No further ones come. Meanwhile frames are received, since a
// backend may be unable to answer before it can send.
func (f *front) rest(l *lifecycle) error {
	d, c := f.d, l.conn
	d.announce(linkDown, LinkEvent{Reason: handoverReason})
	if !d.shutSenders(c) {
		l.beginEnd(&UnknownError{"stop sending for a handover", errors.New("a caller never left the device")})
		return l.cause
	}
	err := f.await(c.sendersBusy)
	if err != nil && !d.setLink(c, l.xd.Current().Own) {
		l.beginEnd(&UnknownError{"go on after a handover", err})
	}
	return err
}

// await waits until busy says nothing, as long as restPatience. The caller has what busy
// looks at to itself.
func (f *front) await(busy func() (string, error)) error {
	for end, pause := time.Now().Add(restPatience), 20*time.Microsecond; ; pause = min(2*pause, joinPause) {
		var why string
		var err error
		if v := catchFault(func() { why, err = busy() }); v != nil {
			err = v
		}
		switch {
		case err != nil:
			return f.d.callError(err)
		case why == "":
			return nil
		case time.Now().After(end):
			return fmt.Errorf("pvnet: vif %s is not handed over: after %v %s", f.d.id, restPatience, why)
		}
		time.Sleep(pause)
	}
}

// sendersBusy says what keeps the sending halves from being handed over; "": nothing. The
// error is the peer's violation.
func (c *conn) sendersBusy() (why string, err error) {
	for i, q := range c.queues {
		tx := q.tx.(*frontTX)
		if err := tx.reap(); err != nil {
			return "", err
		}
		if n := tx.ring.InFlight(); n > 0 {
			why = fmt.Sprintf("the backend has not answered %d requests of queue %d", n, i)
		} else if n := tx.shared.Len() - tx.shared.Free(); n > 0 {
			why = fmt.Sprintf("%d pages of frames to send in queue %d are held", n, i)
		}
	}
	return why, nil
}

// receiversBusy says what keeps the rest of the connection.
func (c *conn) receiversBusy() (why string, err error) {
	for i, q := range c.queues {
		rx := q.rx.(*frontRX)
		if n := rx.shared.Len() - rx.home(); n > 0 {
			why = fmt.Sprintf("%d pages of frames received in queue %d are held", n, i)
		}
	}
	if k, ok := c.ctrl.(*ctrlClient); ok && k.client.Waiting() {
		slot := k.client.Slot()
		if _, _, err := k.client.Answer(); err != nil {
			return "", k.violation(slot, err.Error())
		}
		why = "the backend has not answered a request on the control ring"
	}
	return why, nil
}

// home returns how many pages are not lent to anybody but the backend.
func (e *frontRX) home() int {
	n := e.shared.Free() + int(e.ring.Size()-e.ring.Free())
	if e.haveNext {
		n += e.next.dataSlots
	}
	return n
}

// letGo puts the pages back into the arena and does not touch the ring, which another process
// uses. No frame is lost.
func (e *frontRX) letGo() {
	for i := e.ring.Consumed(); i != e.ring.Next(); i++ {
		e.shared.Put(e.pageAt[i%e.ring.Size()])
	}
	if e.haveNext {
		for _, s := range e.next.seg[:e.next.dataSlots] {
			e.shared.Put(s.page)
		}
		e.haveNext = false
	}
}

// state describes a connection at rest.
func (f *front) state(l *lifecycle, c *conn) *frontState {
	s := &frontState{
		Back: dom(l.xd), ID: f.d.id, MAC: f.d.MAC(), Mark: l.xd.ClaimState().Mark,
		Features: frontFeatures{
			Split: c.feat.split, SG: c.feat.backSG, Offload: c.feat.offload,
			Multicast: c.feat.multicast, PeerTakes: uint32(c.feat.peerTakes), Offered: c.feat.offered,
		},
	}
	for _, q := range c.queues {
		s.Queues = append(s.Queues, q.state())
	}
	first := c.queues[0].tx.(*frontTX)
	s.Multicast = f.d.joins.state(first.listed)
	<-f.d.hash.turn // nobody waits for the backend: the control ring is at rest
	defer func() { f.d.hash.turn <- struct{}{} }()
	s.HashKey = f.d.hash.random
	if k, ok := c.ctrl.(*ctrlClient); ok {
		s.Ctrl = new(frontCtrlState)
		s.Ctrl.Next, s.Ctrl.LastID = k.client.At()
		if f.d.hash.told == k {
			s.Ctrl.Hash = f.d.hash.has
		}
		if k.static != nil {
			s.Ctrl.Static = k.static.added
		}
	}
	return s
}

func (q *connQueue) state() queueState {
	tx, rx := q.tx.(*frontTX), q.rx.(*frontRX)
	s := queueState{TxNext: tx.ring.Next(), RxNext: rx.ring.Next(), RxConsumed: rx.ring.Consumed()}
	for i := s.RxConsumed; i != s.RxNext; i++ {
		s.Posted = append(s.Posted, byte(rx.pageAt[i%rx.ring.Size()]))
	}
	if !rx.haveNext {
		return s
	}
	p := &rx.next
	s.Parsed = &parsedState{Slots: p.allSlots, Checksum: p.csum}
	for _, seg := range p.seg[:p.dataSlots] {
		s.Parsed.Segments = append(s.Parsed.Segments, parsedSegment{byte(seg.page), seg.off, seg.n})
	}
	for i := range p.extras.Len() {
		x := p.extras.At(i)
		s.Parsed.Extras = append(s.Parsed.Extras, parsedExtra{byte(x.Type), x.Body[:]})
	}
	return s
}

func (j *joins) state(listed []MAC) multicastState {
	want := j.wanted()
	return multicastState{
		Filtered: j.filter.Load(), Asked: j.asked.Load(), Offered: j.offered.Load(), Dynamic: j.dynamic.Load(),
		Wanted: want, All: want == nil, Listed: listed,
	}
}

// extra returns the extra info, if it is one that a frame may have.
func (p *parsedExtra) extra() (x netif.Extra, ok bool) {
	x.Type = netif.ExtraType(p.Type)
	return x, copy(x.Body[:], p.Body) == len(x.Body) && len(p.Body) == len(x.Body)
}
