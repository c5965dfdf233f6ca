package pvnet

import (
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"barevif/arena"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/telemetry"
	"barevif/xenbus"
)

// A conn is what one connection holds: rings, pages, ports. The Device outlives
// it.
type conn struct {
	queues []connQueue
	undo   undo
	feat   features
	shared int // pages granted to the peer
	own    int // private pages
}

// joined reports whether the peer has its end of every event channel, as far as
// that can be known.
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
	txPark, rxPark *parker // one for both if they share a channel
	keys           queueKeys
}

// offered is what the other end's values say it takes. What is garbage is not
// offered, and long frames, whose checksum is partial, are only where chains and
// such checksums are: so Linux's netdev_fix_features has it.
func offered(v xenbus.Values, scatter bool) (o offers) {
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

// offloadValues is how this end says what it takes.
func offloadValues(takes bool) xenbus.Values {
	if !takes {
		return xenbus.Values{netif.KeyFeatureNoCsumOffload: "1"}
	}
	return xenbus.Values{
		netif.KeyFeatureNoCsumOffload:   "0",
		netif.KeyFeatureIPv6CsumOffload: "1",
		netif.KeyFeatureGSOTCPv4:        "1",
		netif.KeyFeatureGSOTCPv6:        "1",
	}
}

// queueKeys is what the frontend publishes of a queue.
type queueKeys struct {
	txRing, rxRing hypercall.GrantRef
	txPort, rxPort hypercall.PortID // equal: one channel for both
}

// features is what both ends agreed on for a connection.
type features struct {
	queues  int
	split   bool // an event channel for each direction
	frontSG bool // the frontend takes frames of several slots
	backSG  bool // the backend does
	takes   bool // this end takes frames with offloads: Config.Offload
	peer    offers
}

// agreed is what counters show of the features.
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

// An undo is a list of steps that give back what was taken. It runs backwards,
// once, from whatever point was reached.
type undo []func()

func (u *undo) add(f func()) { *u = append(*u, f) }

func (u *undo) run() {
	for i := len(*u) - 1; i >= 0; i-- {
		(*u)[i]()
	}
	*u = nil
}

// Pages a frontend's queue shares in each direction: one for every slot, or, where
// the system grants no more, fewer.
const (
	pagesPerHalf    = 256
	pagesPerHalfMin = 32
)

// privatePages is how many private pages a queue has to receive into by default:
// a ring's worth in the user's hands and another on the way.
const privatePages = 512

// A pageMaker is the part of a connection's set-up both ends need.
type pageMaker struct {
	dom  hypercall.Domain
	peer hypercall.DomID
	log  *slog.Logger
	lost *atomic.Uint64 // pages that did not come back
	c    *conn
}

func (m *pageMaker) private(pages int) (*arena.Arena, error) {
	mem, err := m.dom.Memory(pages)
	if err != nil {
		return nil, fmt.Errorf("%d private pages: %w", pages, err)
	}
	a := arena.New(mem.Memory, 4096)
	m.c.undo.add(func() { a.Retire(func() { mem.Release() }) })
	m.c.own += pages
	return a, nil
}

// share grants pages that are divided into buffers.
func (m *pageMaker) share(pages int, access hypercall.Access) (*arena.Arena, []hypercall.GrantRef, error) {
	s, err := m.dom.Share(m.peer, pages, access)
	if err != nil {
		return nil, nil, err
	}
	a := arena.New(s.Memory, 4096)
	m.c.undo.add(func() { a.Retire(func() { m.end(s) }) })
	m.c.shared += pages
	return a, s.Refs, nil
}

// end ends a share. What the peer keeps mapped is never used again.
func (m *pageMaker) end(s *hypercall.Share) {
	pages := s.Pages()
	if err := s.End(); err != nil {
		m.lost.Add(uint64(pages))
		m.log.Warn("pages quarantined", "pages", pages, "peer", m.peer, "err", err)
	}
}

// port opens an event channel on a waiter of its own, at which p waits.
func (m *pageMaker) port(p **parker, open func(hypercall.Waiter) (hypercall.Port, error)) (hypercall.Port, error) {
	w, err := m.dom.Waiter()
	if err != nil {
		return nil, err
	}
	m.c.undo.add(func() { w.Close() })
	*p = newParker(w)
	port, err := open(w)
	(*p).port, _ = port.(hypercall.JoinedPort)
	return port, err
}

// frontQueue makes the frontend's side of a queue: pages, rings, ports.
func (m *pageMaker) frontQueue(f features, cfg *Config, rx, tx *telemetry.Block) (q connQueue, err error) {
	pages := pagesPerHalf
	var txPages, rxPages *arena.Arena
	var txRefs, rxRefs []hypercall.GrantRef
	for {
		mark, before := len(m.c.undo), m.c.shared
		txPages, txRefs, err = m.share(pages, hypercall.ReadOnly)
		if err == nil {
			rxPages, rxRefs, err = m.share(pages, hypercall.ReadWrite)
		}
		if err == nil {
			break
		}
		part := m.c.undo[mark:]
		m.c.undo, m.c.shared = m.c.undo[:mark], before
		part.run()
		if !errors.Is(err, hypercall.ErrNoGrants) || pages/2 < pagesPerHalfMin {
			return q, fmt.Errorf("a queue needs 2 pages for rings and 2 x %d for frames: %w", pages, err)
		}
		pages /= 2
	}
	rings, err := m.dom.Share(m.peer, 2, hypercall.ReadWrite)
	if err != nil {
		return q, fmt.Errorf("the 2 ring pages of a queue: %w", err)
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

// backQueue makes the backend's side of a queue whose frontend published k.
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
	q.rx = &backRX{ring: txRing, pool: pool, dom: m.dom, peer: m.peer, port: txPort, count: rx, offload: f.takes}
	q.tx = &backTX{ring: rxRing, bufs: bufs, dom: m.dom, domid: m.peer, port: rxPort, scatter: f.frontSG, peer: f.peer, count: tx}
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
