package pvnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/ctrl"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/pvnet/toeplitz"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// TakeOver is [Connect], but it first asks the process of this domain that has the vif to
// hand it over: ask returns what [Device.HandOver] gave there, or nil if no process has the
// vif; back is the backend's domain. Package barevif/pvnet/handover has an ask. The backend
// notices nothing: frames in the rings are received here, and those that this process sends
// follow those of the other one.
//
// The connection has the queues and features that the other process agreed on. So cfg must
// allow as many queues, and Offload if that process had it. What the backend was told of
// multicast stays wanted until SetMulticast; the hash becomes that of cfg.
//
// With an error that ask returned, or about what it brought, the vif stays with the other
// process. If that one had no connection, or ask returned nil, TakeOver connects as Connect
// does.
func TakeOver(ctx context.Context, domain hypercall.Domain, id string, cfg Config, ask func(ctx context.Context, back hypercall.DomID, id string) (*TakenVif, error)) (*Device, error) {
	return connectWith(ctx, domain, id, cfg, ask)
}

// A frontSuccessor takes one frontend over.
type frontSuccessor struct {
	f  *front
	xd *xenbus.Device

	state   frontState
	adopted *hypercall.Adopted
	refs    []hypercall.GrantRef // of all shares
}

// take returns a connection that has another process as its maker; nil if the vif is to be
// connected in the usual way.
func (h *frontSuccessor) take(ctx context.Context, ask askFunc) (*conn, error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // adopt reads the rings
	d := h.f.d
	own, cannot := h.xd.OwnValues(ctx, identityKeys...)
	if cannot == nil {
		cannot = h.f.identify(ctx, h.xd, own)
	}
	in, err := ask(ctx, dom(h.xd), d.id)
	if in == nil {
		return nil, err
	}
	if in.State == nil {
		closeAll(in.Files) // a device without a connection does without them
		return nil, in.Accept()
	}
	c := new(conn)
	if err = cannot; err == nil {
		err = h.adopt(ctx, in, c)
	}
	if err != nil {
		in.Refuse(err)
	} else {
		err = in.Accept()
	}
	if err == nil {
		err = h.xd.AdoptConnected(h.state.Mark) // parse has checked it
	}
	if err != nil {
		h.drop(c)
		closeAll(in.Files)
		return nil, err
	}
	closeAll(in.Files[:h.state.Files])
	d.mu.Lock()
	d.takenFiles = in.Files[h.state.Files:]
	d.mu.Unlock()
	h.begin(c)
	return c, nil
}

// takeOver gives the lifecycle of f a connection that another process has made, if ask brings
// one.
func (l *lifecycle) takeOver(ctx context.Context, f *front, ask askFunc) error {
	seen := l.xd.Current()
	h := frontSuccessor{f: f, xd: l.xd}
	c, err := h.take(ctx, ask)
	if c == nil {
		return err
	}
	l.state, l.mirrorLate = xenbus.Connected, true
	l.conn, l.connGeneration, l.verifiedWrites = c, seen.Generation, seen.PeerWrites
	return nil
}

// drop lets go of a connection that stays with the other process.
func (h *frontSuccessor) drop(c *conn) {
	c.given = true
	c.settle()
	if h.adopted != nil {
		h.adopted.Drop()
	}
	c.undo.run()
}

// begin does what the other process must not see before it has given the connection up.
func (h *frontSuccessor) begin(c *conn) {
	d, s := h.f.d, &h.state
	if h.f.generatedMAC != (MAC{}) && s.MAC.station() {
		h.f.generatedMAC = s.MAC
		d.identify(s.MAC, d.MTU(), d.Trusted())
	}
	d.joins.adopt(&s.Multicast)
	d.hash.random = s.HashKey
	if k, ok := c.ctrl.(*ctrlClient); ok {
		d.hash.told, d.hash.has, k.kept = k, s.Ctrl.Hash, true
	}
	for _, q := range c.queues {
		rx := q.rx.(*frontRX)
		if v := catchFault(func() {
			rx.fill() // pages that were lent there
			rx.notify(rx.ring.Publish(), 0)
		}); v != nil {
			d.callError(v)
		}
	}
}

// adopt checks what came, and makes the connection of it. The other process can still go on.
func (h *frontSuccessor) adopt(ctx context.Context, in *TakenVif, c *conn) (err error) {
	defer func() {
		if v := faultError(recover()); v != nil {
			err = v
		}
	}()
	d, s := h.f.d, &h.state
	dom, ok := d.domain.(hypercall.HandoverDomain)
	if !ok {
		return fmt.Errorf("a %T takes no pages over: %w", d.domain, ErrUnimplemented)
	}
	if err := h.parse(in); err != nil {
		return err
	}
	h.adopted, err = dom.Adopt(s.Offer, in.Files[:s.Files], h.onThread())
	if err != nil {
		return fmt.Errorf("pvnet: adopt the pages of vif %s: %w", d.id, err)
	}
	if err := h.checkParts(); err != nil {
		return err
	}
	m := newSetup(d, h.xd, c)
	c.feat = h.features()
	for i := range s.Queues {
		q, err := h.queue(m, i)
		if err != nil {
			return fmt.Errorf("pvnet: queue %d of a vif that is handed over: %w", i, err)
		}
		c.queues = append(c.queues, q)
	}
	if s.Ctrl != nil {
		if err := h.ctrl(m, c); err != nil {
			return fmt.Errorf("pvnet: the control ring of a vif that is handed over: %w", err)
		}
	}
	return h.checkKeys(ctx, c)
}

// parse checks the state itself.
func (h *frontSuccessor) parse(in *TakenVif) error {
	d, s := h.f.d, &h.state
	if err := unmarshalState(in.State, s); err != nil {
		return err
	}
	switch {
	case s.ID != d.id || s.Back != dom(h.xd):
		return fmt.Errorf("pvnet: the state is of vif %s with backend %d", xenstore.Clip(s.ID), s.Back)
	case !onlyConnected(h.xd.Current()):
		return errors.New("pvnet: the vif is not connected any more")
	case s.Files < 0 || s.Files > len(in.Files):
		return fmt.Errorf("pvnet: a state with %d files, %d came", s.Files, len(in.Files))
	case len(s.Queues) == 0 || s.Features.Offered < 0:
		return errors.New("pvnet: a state without queues")
	case len(s.Queues) > len(d.tx):
		return fmt.Errorf("pvnet: the vif has %d queues, Config.Queues allows %d", len(s.Queues), len(d.tx))
	case s.Features.Offload && !d.cfg.Offload:
		return errors.New("pvnet: the backend was told that frames with offloads are taken, and this process has no Config.Offload")
	case s.Features.PeerTakes > uint32(takesCsum4|takesCsum6|takesGSO4|takesGSO6):
		return fmt.Errorf("pvnet: a backend that takes offloads %#x", s.Features.PeerTakes)
	case len(s.HashKey) != 0 && len(s.HashKey) != toeplitz.MaxKey:
		return fmt.Errorf("pvnet: a hash key of %d bytes", len(s.HashKey))
	}
	if k := s.Ctrl; k != nil {
		if k.Static != nil && len(k.Static) != len(s.Queues) {
			return fmt.Errorf("pvnet: static grants of %d queues, there are %d", len(k.Static), len(s.Queues))
		}
		if err := k.Hash.check(); err != nil {
			return fmt.Errorf("pvnet: %w", err)
		}
	}
	if err := s.Multicast.check(); err != nil {
		return err
	}
	return xenbus.CheckMark(s.Mark)
}

func (s *multicastState) check() error {
	for _, list := range [][]MAC{s.Wanted, s.Listed} {
		if len(list) > maxGroups {
			return fmt.Errorf("pvnet: %d multicast groups, a backend takes %d", len(list), maxGroups)
		}
		for i, mac := range list {
			if mac[0]&1 == 0 || mac == broadcast || slices.Contains(list[:i], mac) {
				return fmt.Errorf("pvnet: %v is no multicast group, or there twice", mac)
			}
		}
	}
	return nil
}

func (j *joins) adopt(s *multicastState) {
	j.mu.Lock()
	if j.want = slices.Clone(s.Wanted); s.All {
		j.want = nil
	} else if j.want == nil {
		j.want = []MAC{}
	}
	j.mu.Unlock()
	j.filter.Store(s.Filtered)
	j.asked.Store(s.Asked)
	j.offered.Store(s.Offered)
	j.dynamic.Store(s.Dynamic)
}

// waiters returns how many waiters a queue has.
func (h *frontSuccessor) waiters() int {
	if h.state.Features.Split {
		return 2
	}
	return 1
}

// onThread says which waiters block a thread: those of the queues, with LockedThreads.
func (h *frontSuccessor) onThread() []bool {
	return slices.Repeat([]bool{h.f.d.cfg.LockedThreads}, h.waiters()*len(h.state.Queues))
}

func (h *frontSuccessor) features() features {
	s := &h.state.Features
	return features{
		queues: len(h.state.Queues), split: s.Split, frontSG: true, backSG: s.SG, offload: s.Offload,
		peerTakes: offloads(s.PeerTakes), offered: s.Offered,
		untrusted: !h.f.d.Trusted(), multicast: s.Multicast,
	}
}

// checkParts checks that the shares and waiters are those of a frontend's connection.
func (h *frontSuccessor) checkParts() error {
	s, a := &h.state, h.adopted
	shares, waiters := 3*len(s.Queues), h.waiters()*len(s.Queues)
	if s.Ctrl != nil {
		shares, waiters = shares+1, waiters+1
	}
	if len(a.Shares) != shares || len(a.Waiters) != waiters {
		return fmt.Errorf("pvnet: %d shares and %d event channels, expected %d and %d", len(a.Shares), len(a.Waiters), shares, waiters)
	}
	for i, share := range a.Shares {
		access, least, most := hypercall.ReadWrite, 2, 2 // rings, and the control ring
		if i < 3*len(s.Queues) && i%3 < 2 {
			least, most = 1, pagesPerHalf
			if i%3 == 0 {
				access = hypercall.ReadOnly
			}
		}
		if share.Peer != s.Back || share.Access != access || share.Pages() < least || share.Pages() > most {
			return fmt.Errorf("pvnet: share %d has %d %v pages for domain %d", i, share.Pages(), share.Access, share.Peer)
		}
		h.refs = append(h.refs, share.Refs...)
	}
	for i, w := range a.Waiters {
		if len(w.Ports) != 1 {
			return fmt.Errorf("pvnet: waiter %d has %d event channels", i, len(w.Ports))
		}
	}
	slices.Sort(h.refs)
	if n := len(h.refs); n != len(slices.Compact(h.refs)) {
		return errors.New("pvnet: a grant is there twice")
	}
	return nil
}

// adoptPark makes the parker of an adopted waiter.
func (m *setup) adoptPark(w hypercall.AdoptedWaiter) (*parker, hypercall.Port) {
	m.c.undo.add(func() { w.Waiter.Close() })
	p := newParker(w.Waiter)
	p.port, _ = w.Ports[0].(hypercall.JoinedPort)
	return p, w.Ports[0]
}

// queue makes queue i of the connection.
func (h *frontSuccessor) queue(m *setup, i int) (q connQueue, err error) {
	d, s, a := h.f.d, &h.state.Queues[i], h.adopted
	p := &frontParts{txShare: a.Shares[3*i], rxShare: a.Shares[3*i+1], rings: a.Shares[3*i+2]}
	p.tx, p.rx = m.arenaOf(p.txShare), m.arenaOf(p.rxShare)
	m.own(p.rings)
	n := h.waiters()
	q.rxPark, p.rxPort = m.adoptPark(a.Waiters[n*i])
	q.txPark, p.txPort = q.rxPark, p.rxPort
	if n == 2 {
		q.txPark, p.txPort = m.adoptPark(a.Waiters[n*i+1])
	}
	tx, rx, err := m.frontEngines(&q, p, m.c.feat, &d.cfg, d.rx[i].count, d.tx[i].count)
	if err != nil {
		return q, err
	}
	if tx.ring, err = ring.ResumeFront[netif.TxRequest, netif.TxResponse](p.rings.Slice(0, 1), netif.TxStride, s.TxNext, s.TxNext); err != nil {
		return q, fmt.Errorf("tx: %w", err)
	}
	if rx.ring, err = ring.ResumeFront[netif.RxRequest, netif.RxResponse](p.rings.Slice(1, 1), netif.RxStride, s.RxNext, s.RxConsumed); err != nil {
		return q, fmt.Errorf("rx: %w", err)
	}
	if err := rx.resume(s); err != nil {
		return q, err
	}
	tx.takesHash = h.state.Ctrl != nil
	if i == 0 {
		tx.refuse, tx.listed = d.refused, slices.Clone(h.state.Multicast.Listed)
	}
	q.use(tx, rx)
	return q, nil
}

// resume takes the pages that the backend has, and a frame that was parsed, from the state.
// After an error all pages are in the arena.
func (e *frontRX) resume(s *queueState) error {
	e.next = rxPacket{}
	taken := make([]bool, e.shared.Len())
	take := func(page byte) bool {
		if int(page) >= len(taken) || taken[page] {
			return false
		}
		taken[page] = true
		return true
	}
	if n := s.RxNext - s.RxConsumed; uint64(n) != uint64(len(s.Posted)) {
		return fmt.Errorf("%d pages are posted in %d slots", len(s.Posted), n)
	}
	for i, page := range s.Posted {
		if !take(page) {
			return fmt.Errorf("page %d is posted, and not there or there twice", page)
		}
		e.pageAt[(s.RxConsumed+uint32(i))%e.ring.Size()] = uint32(page)
	}
	if p := s.Parsed; p != nil {
		if err := e.next.parse(p, take); err != nil {
			return err
		}
		e.haveNext = true
	}
	var all [pagesPerHalf]uint32
	n := e.shared.Get(all[:e.shared.Len()])
	for _, page := range all[:n] {
		if !taken[page] {
			e.shared.Put(page)
		}
	}
	return nil
}

// parse fills p from the state. take takes a page, if it is free.
func (p *rxPacket) parse(s *parsedState, take func(byte) bool) error {
	bad := errors.New("a frame that was parsed cannot be")
	if n := len(s.Segments); n > maxRxSlots || s.Slots < n || s.Slots > pagesPerHalf || s.Checksum > ChecksumPartial {
		return bad
	}
	*p = rxPacket{dataSlots: len(s.Segments), allSlots: s.Slots, csum: s.Checksum}
	for i, seg := range s.Segments {
		if !take(seg.Page) || uint32(seg.Offset)+uint32(seg.Len) > shm.PageSize {
			return bad
		}
		p.seg[i] = rxSegment{uint32(seg.Page), seg.Offset, seg.Len}
		p.total += uint32(seg.Len)
	}
	for i := range s.Extras {
		x, ok := s.Extras[i].extra()
		if !ok || p.extras.Add(x) != nil {
			return bad
		}
	}
	if p.total < MinFrame || p.total > MaxFrame {
		return bad
	}
	return nil
}

// ctrl makes the connection's control ring.
func (h *frontSuccessor) ctrl(m *setup, c *conn) error {
	d, s, a := h.f.d, h.state.Ctrl, h.adopted
	pages, w := a.Shares[len(a.Shares)-1], a.Waiters[len(a.Waiters)-1]
	m.own(pages)
	m.c.undo.add(func() { w.Waiter.Close() })
	client, err := ctrl.ResumeClient(pages.Slice(0, 1), s.Next, s.LastID)
	if err != nil {
		return err
	}
	k := newCtrlClient(d, pages, client)
	k.w, k.port = w.Waiter, w.Ports[0]
	k.keys = ctrlKeys{pages.Refs[0], k.port.ID()}
	h.f.useCtrl(c, k, s.Static)
	return nil
}

// checkKeys checks that the frontend has published the rings and event channels that came.
func (h *frontSuccessor) checkKeys(ctx context.Context, c *conn) error {
	want := h.f.connKeys(c)
	for _, key := range []string{netif.KeyNumQueues, netif.KeyCtrlRingRef} {
		if _, ours := want[key]; !ours {
			want[key] = "" // it must not be there
		}
	}
	keys := slices.Collect(maps.Keys(want))
	there, err := h.xd.OwnValues(ctx, keys...)
	if err != nil {
		return err
	}
	if c.feat.queues == 1 && there[netif.KeyNumQueues] == "1" { // says what is assumed without it
		there[netif.KeyNumQueues] = ""
	}
	for key, v := range want {
		if there[key] != v {
			return fmt.Errorf("pvnet: the vif has %s = %q, what is handed over has %q", key, xenstore.Clip(there[key]), v)
		}
	}
	return nil
}
