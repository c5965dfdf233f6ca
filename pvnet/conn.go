package pvnet

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync/atomic"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/telemetry"
	"barevif/xenbus/xenstore"
)

// A conn holds what belongs to one connection: rings, pages, ports. The Device outlives
// it.
type conn struct {
	queues []connQueue
	undo   undo
	feat   features
	made   xenstore.Values // backend: the frontend's keys that it was made from
	shared int             // pages granted to the peer
	own    int             // private pages
	arenas []*arena.Arena  // the arenas of the private pages; the other private pages are rings
}

// joined reports whether the peer has its end of every event channel, as far as that can
// be known.
func (c *conn) joined() bool {
	for _, q := range c.queues {
		if q.txPark.deserted() || q.rxPark.deserted() {
			return false
		}
	}
	return true
}

// A connQueue is one queue of a connection.
type connQueue struct {
	tx             sender
	rx             receiver
	txPark, rxPark *parker // the same one if both halves share an event channel
	keys           queueKeys
}

// offered returns the offloads that the other end offers in its xenstore values. An
// unreadable value counts as no offer. GSO frames have several slots and a partial
// checksum, so GSO counts as offered only if the other end takes both, as in Linux's
// netdev_fix_features.
func offered(v xenstore.Values, scatter bool) (o offers) {
	says := func(key string) bool {
		on, err := v.Bool(key, false)
		return on && err == nil
	}
	if denied, err := v.Bool(netif.KeyFeatureNoCsumOffload, false); !denied && err == nil {
		o |= takesCsum4
	}
	if says(netif.KeyFeatureIPv6CsumOffload) {
		o |= takesCsum6
	}
	if scatter && o&takesCsum4 != 0 && says(netif.KeyFeatureGSOTCPv4) {
		o |= takesGSO4
	}
	if scatter && o&takesCsum6 != 0 && says(netif.KeyFeatureGSOTCPv6) {
		o |= takesGSO6
	}
	return o
}

// offloadValues returns the xenstore values with which this end offers its offloads.
func offloadValues(takes bool) xenstore.Values {
	if !takes {
		return xenstore.Values{netif.KeyFeatureNoCsumOffload: "1"}
	}
	return xenstore.Values{
		netif.KeyFeatureNoCsumOffload:   "0",
		netif.KeyFeatureIPv6CsumOffload: "1",
		netif.KeyFeatureGSOTCPv4:        "1",
		netif.KeyFeatureGSOTCPv6:        "1",
	}
}

// queueKeys are the grefs and ports that the frontend publishes for one queue.
type queueKeys struct {
	txRing, rxRing hypercall.GrantRef
	txPort, rxPort hypercall.PortID // equal: both directions share an event channel
}

// features are what both ends agreed on for a connection.
type features struct {
	queues  int
	split   bool // an event channel for each direction
	frontSG bool // the frontend takes frames of several slots
	backSG  bool // the backend takes frames of several slots
	takes   bool // this end takes frames with offloads: Config.Offload
	peer    offers
}

// agreed returns the features as the counters show them.
func (c *conn) agreed(lend, trusted bool) telemetry.Feature {
	f := telemetry.FeatureRxCopy
	for _, has := range []struct {
		it  bool
		bit telemetry.Feature
	}{
		{c.feat.frontSG && c.feat.backSG, telemetry.FeatureScatter},
		{c.feat.split, telemetry.FeatureSplitEvents},
		{lend, telemetry.FeatureLendRx},
		{trusted, telemetry.FeatureTrusted},
		{c.feat.peer&takesCsum4 != 0, telemetry.FeatureCsum},
		{c.feat.peer&takesCsum6 != 0, telemetry.FeatureCsum6},
		{c.feat.peer&takesGSO4 != 0, telemetry.FeatureGSO4},
		{c.feat.peer&takesGSO6 != 0, telemetry.FeatureGSO6},
	} {
		if has.it {
			f |= has.bit
		}
	}
	return f
}

// An undo is a list of steps, each of which gives back one resource. It runs backwards,
// once, from whatever point the set-up reached.
type undo []func()

func (u *undo) add(f func()) { *u = append(*u, f) }

func (u *undo) run() {
	for i := len(*u) - 1; i >= 0; i-- {
		(*u)[i]()
	}
	*u = nil
}

// How many pages a frontend's queue shares in each direction: one for every slot, or
// fewer where the system limits the grants. All queues get the same number.
const (
	pagesPerHalf    = 256
	pagesPerHalfMin = 32
)

// privatePages is how many private pages a queue receives into by default: one ring's
// worth in the user's hands and another in flight.
const privatePages = 512

// A pageMaker does the part of a connection's set-up that both ends need.
type pageMaker struct {
	dom  hypercall.Domain
	peer hypercall.DomID
	log  *slog.Logger
	lost *atomic.Uint64 // pages that the peer did not give back
	c    *conn

	lockedThreads bool // Config.LockedThreads: waiters block a thread
}

func (m *pageMaker) private(pages int) (*arena.Arena, error) {
	mem, err := m.dom.Memory(pages)
	if err != nil {
		return nil, fmt.Errorf("%d private pages: %w", pages, err)
	}
	a := arena.NewReserved(mem.Memory, shm.PageSize, mem.Populate)
	m.c.arenas = append(m.c.arenas, a)
	m.c.undo.add(func() { a.Retire(func() { mem.Release() }) })
	m.c.own += pages
	return a, nil
}

// share grants pages to the peer and makes an arena of them.
func (m *pageMaker) share(pages int, access hypercall.Access) (*arena.Arena, []hypercall.GrantRef, error) {
	s, err := m.dom.Share(m.peer, pages, access)
	if err != nil {
		return nil, nil, err
	}
	a := arena.New(s.Memory, shm.PageSize)
	if access == hypercall.ReadOnly { // the peer reads no page before a frame was sent in it, so memory can come late
		a = arena.NewReserved(s.Memory, shm.PageSize, func(first, n int) {
			for i := range n {
				s.Page(first + i)[0] = 0
			}
		})
	}
	m.c.undo.add(func() { a.Retire(func() { m.end(s) }) })
	m.c.shared += pages
	return a, s.Refs, nil
}

// end ends a share. Pages that the peer keeps mapped are quarantined: they are never used
// again.
func (m *pageMaker) end(s *hypercall.Share) {
	pages := s.Pages()
	if err := s.End(); err != nil {
		m.lost.Add(uint64(pages))
		m.log.Warn("pages quarantined", "pages", pages, "peer", m.peer, "err", err)
	}
}

func (m *pageMaker) waiter() (hypercall.Waiter, error) {
	if d, ok := m.dom.(hypercall.ThreadDomain); ok && m.lockedThreads {
		return d.ThreadWaiter()
	}
	return m.dom.Waiter()
}

// port opens an event channel on a waiter of its own and makes the parker p for it.
func (m *pageMaker) port(p **parker, open func(hypercall.Waiter) (hypercall.Port, error)) (hypercall.Port, error) {
	w, err := m.waiter()
	if err != nil {
		return nil, err
	}
	m.c.undo.add(func() { w.Close() })
	*p = newParker(w)
	port, err := open(w)
	(*p).port, _ = port.(hypercall.JoinedPort)
	return port, err
}

// A plan divides the pages that a frontend shares: each queue gets the same number.
type plan struct {
	queues int
	pages  int // for frames, in each direction
}

// perQueue is how many pages of the system's limit a queue takes: pages for frames, and
// rings.
func (p plan) perQueue() int { return 2*p.pages + 2 }
func (p plan) total() int    { return p.queues * p.perQueue() }

func (p plan) String() string {
	if p.queues == 1 {
		return fmt.Sprintf("1 queue of %d pages", p.perQueue())
	}
	return fmt.Sprintf("%d queues of %d pages", p.queues, p.perQueue())
}

// next returns the plan to try when p does not fit: smaller queues first, then fewer.
func (p plan) next() (next plan, more bool) {
	if p.pages/2 >= pagesPerHalfMin {
		return plan{p.queues, p.pages / 2}, true
	}
	return plan{p.queues - 1, pagesPerHalf}, p.queues > 1
}

// leastPlan is the smallest plan.
var leastPlan = plan{1, pagesPerHalfMin}

// frontQueues makes the frontend's side of up to f.queues queues, all of one size. It
// leaves room for the least plan of each of the other vifs, unless it can get only the
// least plan itself. When a plan does not fit, it gives back all that the plan took
// before it tries a smaller one: so every queue gets the same, whichever was made first.
func (m *pageMaker) frontQueues(f features, cfg *Config, others int, blocks func(i int) (rx, tx *telemetry.Block)) ([]connQueue, error) {
	asked := plan{f.queues, pagesPerHalf}
	var first, last error
	full := math.MaxInt // the smallest total that did not fit
	for p, more := asked, true; more; p, more = p.next() {
		if p.total() >= full {
			continue
		}
		queues, made, err := m.tryPlan(p, f, cfg, others*leastPlan.total(), blocks)
		if err == nil {
			if p != asked {
				m.log.Warn("less than asked for", "asked", asked.String(), "got", p.String(), "err", first)
			}
			return queues, nil
		}
		if first == nil {
			first = err
		}
		last = err
		if errors.Is(err, hypercall.ErrNoGrants) {
			full = p.total()
		} else { // pages were not the problem: try fewer queues
			p = plan{min(p.queues, max(made, 1)+1), pagesPerHalfMin}
		}
	}
	if others > 0 && errors.Is(last, hypercall.ErrNoGrants) {
		queues, _, err := m.tryPlan(leastPlan, f, cfg, 0, blocks)
		if err == nil {
			m.log.Warn("less than asked for, and too little is left for other vifs", "asked", asked.String(), "got", leastPlan.String(), "err", first)
			return queues, nil
		}
		last = err
	}
	return nil, fmt.Errorf("%v asked for, and not even %v is to be had: %w", asked, leastPlan, last)
}

// tryPlan makes all queues of p, provided that spare more pages could be shared after
// them. Otherwise it makes none and returns how many queues it had made before it failed.
func (m *pageMaker) tryPlan(p plan, f features, cfg *Config, spare int, blocks func(i int) (rx, tx *telemetry.Block)) (queues []connQueue, made int, err error) {
	mark, shared, own, arenas := len(m.c.undo), m.c.shared, m.c.own, len(m.c.arenas)
	for i := range p.queues {
		rx, tx := blocks(i)
		q, err := m.frontQueue(p.pages, f, cfg, rx, tx)
		if err == nil {
			queues = append(queues, q)
			if i < p.queues-1 || m.sparable(spare) {
				continue
			}
			err = fmt.Errorf("%d more pages for other vifs: %w", spare, hypercall.ErrNoGrants)
		} else {
			err = fmt.Errorf("queue %d: %w", i, err)
		}
		for _, q := range queues { // else the arenas wait for the posted pages
			q.tx.drain()
			q.rx.drain()
		}
		part := m.c.undo[mark:]
		m.c.undo, m.c.shared, m.c.own, m.c.arenas = m.c.undo[:mark], shared, own, m.c.arenas[:arenas]
		part.run()
		return nil, i, err
	}
	return queues, p.queues, nil
}

// sparable reports whether that many more pages could be shared now.
func (m *pageMaker) sparable(pages int) bool {
	if pages == 0 {
		return true
	}
	s, err := m.dom.Share(m.peer, pages, hypercall.ReadOnly)
	if err == nil {
		m.end(s)
	}
	return !errors.Is(err, hypercall.ErrNoGrants)
}

// frontQueue makes the frontend's side of a queue: pages, rings, ports.
func (m *pageMaker) frontQueue(pages int, f features, cfg *Config, rx, tx *telemetry.Block) (q connQueue, err error) {
	txPages, txRefs, err := m.share(pages, hypercall.ReadOnly)
	if err != nil {
		return q, err
	}
	rxPages, rxRefs, err := m.share(pages, hypercall.ReadWrite)
	if err != nil {
		return q, err
	}
	rings, err := m.dom.Share(m.peer, 2, hypercall.ReadWrite)
	if err != nil {
		return q, err
	}
	m.c.undo.add(func() { m.end(rings) })
	m.c.shared += 2

	private := cfg.Buffers
	if private == 0 {
		private = privatePages
	}
	pool, err := m.private(private)
	if err != nil {
		return q, err
	}
	unbound := func(w hypercall.Waiter) (hypercall.Port, error) { return w.Unbound(m.peer) }
	rxPort, err := m.port(&q.rxPark, unbound)
	if err != nil {
		return q, err
	}
	txPort := rxPort
	q.txPark = q.rxPark
	if f.split {
		if txPort, err = m.port(&q.txPark, unbound); err != nil {
			return q, err
		}
	}
	if n, ok := m.dom.(hypercall.EndNotifier); ok {
		if err := n.NotifyOnEnd(rings, txPort); err != nil {
			return q, err
		}
		m.c.undo.add(func() { n.NotifyOnEnd(rings, nil) })
	}
	q.keys = queueKeys{rings.Refs[0], rings.Refs[1], txPort.ID(), rxPort.ID()}
	q.tx = &frontTX{
		ring: ring.NewFront[netif.TxRequest, netif.TxResponse](rings.Slice(0, 1), netif.TxStride),
		bufs: txPages, refs: txRefs, port: txPort, scatter: f.backSG, peer: f.peer,
		state: make([]uint8, pages), count: tx,
	}
	r := &frontRX{
		ring:  ring.NewFront[netif.RxRequest, netif.RxResponse](rings.Slice(1, 1), netif.RxStride),
		pages: rxPages, refs: rxRefs, pool: pool, lend: cfg.LendRx, port: rxPort, count: rx, offload: f.takes,
	}
	r.fill()
	r.ring.Publish() // the peer is notified once it has the port
	q.rx = r
	rx.Set(telemetry.RingSize, uint64(r.ring.Size()))
	tx.Set(telemetry.RingSize, uint64(r.ring.Size()))
	return q, nil
}

// backQueue makes the backend's side of a queue from the keys k that its frontend
// published.
func (m *pageMaker) backQueue(f features, k queueKeys, cfg *Config, rx, tx *telemetry.Block) (q connQueue, err error) {
	if k.txRing == k.rxRing {
		return q, fmt.Errorf("both rings are grant %d", k.txRing)
	}
	txPage, err := m.ringPage("tx", k.txRing)
	if err != nil {
		return q, err
	}
	rxPage, err := m.ringPage("rx", k.rxRing)
	if err != nil {
		return q, err
	}
	private := cfg.Buffers
	if private == 0 {
		private = privatePages
	}
	pool, err := m.private(private)
	if err != nil {
		return q, err
	}
	bufs, err := m.private(pagesPerHalf)
	if err != nil {
		return q, err
	}
	txRing, err := ring.AttachBack[netif.TxRequest, netif.TxResponse](txPage.Memory, netif.TxStride)
	if err != nil {
		return q, &PeerError{Ring: "tx", Reason: err.Error()}
	}
	rxRing, err := ring.AttachBack[netif.RxRequest, netif.RxResponse](rxPage.Memory, netif.RxStride)
	if err != nil {
		return q, &PeerError{Ring: "rx", Reason: err.Error()}
	}
	bind := func(id hypercall.PortID) func(hypercall.Waiter) (hypercall.Port, error) {
		return func(w hypercall.Waiter) (hypercall.Port, error) {
			p, err := w.Bind(m.peer, id)
			if err != nil {
				err = fmt.Errorf("event channel %d of domain %d: %w", id, m.peer, err)
			}
			return p, err
		}
	}
	// Our receiving half waits for the tx ring's channel.
	txPort, err := m.port(&q.rxPark, bind(k.txPort))
	if err != nil {
		return q, err
	}
	rxPort := txPort
	q.txPark = q.rxPark
	if k.txPort != k.rxPort {
		if rxPort, err = m.port(&q.txPark, bind(k.rxPort)); err != nil {
			return q, err
		}
	}
	q.keys = k
	q.rx = &backRX{ring: txRing, pool: pool, port: txPort, offload: f.takes,
		copyBatch: copyBatch{dom: m.dom, domid: m.peer, count: rx}}
	q.tx = &backTX{ring: rxRing, bufs: bufs, port: rxPort, scatter: f.frontSG, peer: f.peer,
		copyBatch: copyBatch{dom: m.dom, domid: m.peer, count: tx}}
	rx.Set(telemetry.RingSize, uint64(txRing.Size()))
	tx.Set(telemetry.RingSize, uint64(rxRing.Size()))
	return q, nil
}

func (m *pageMaker) ringPage(name string, ref hypercall.GrantRef) (*hypercall.Mapping, error) {
	p, err := m.dom.Map(m.peer, []hypercall.GrantRef{ref}, hypercall.ReadWrite)
	if err != nil {
		return nil, fmt.Errorf("%s ring: %w", name, err)
	}
	m.c.undo.add(func() { p.Release() })
	m.c.own++
	return p, nil
}
