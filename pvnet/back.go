package pvnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync/atomic"

	"barevif/arena"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// A back is the backend's part of a lifecycle.
type back struct {
	d   *Device
	cfg *ServeConfig

	// Set at the end of the life.
	replaced bool // the toolstack has made another directory in its place
	removed  bool // the toolstack removed the vif, or asked for it

	hash *hashServer // what the frontend has set, also in earlier connections; nil: nothing

	carrier int  // what the key says: carrierUnsaid, ...
	resumes bool // the connection is made again of the same rings, and the frontend has not noticed
	adopted bool // the connection was made by another process, to which the frontend told its multicast list
	toldMTU int  // the MTU in the frontend's directory, as far as we know

	// Of a connection that goes on: by queue, the static grants that the frontend has told
	// of, for the next attachCtrl; nil: none.
	grants [][]netif.GrefEntry

	mappings *atomic.Int64 // for static grants, of all vifs of our Serve
}

// backMAC is the address that Linux's netback gives its interfaces: no bridge takes it
// for its own address.
var backMAC = MAC{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}

// identify reads the vif's MTU and its rate limit, for each connection.
func (b *back) identify(ctx context.Context, xd *xenbus.Device) error {
	own, err := xd.OwnValues(ctx, ownSettings[:]...)
	if err != nil {
		return err
	}
	b.setRate(own, xd.Dir())
	b.d.identify(backMAC, b.d.mtuOf(own, xd.Dir(), 1500), true)
	return nil
}

// prepare publishes our features.
func (b *back) prepare(ctx context.Context, xd *xenbus.Device) error {
	keys, gone := b.offers()
	gone = b.d.verdict.Load().publish(nil, keys, gone)
	carrier := carrierUnsaid
	if b.d.noCarrier.Load() {
		carrier, keys[netif.KeyCarrier] = carrierOff, "0"
	} else {
		gone = append(gone, netif.KeyCarrier)
	}
	if err := xd.Publish(ctx, keys, gone...); err != nil {
		return err
	}
	b.carrier = carrier
	return nil
}

// offers returns the keys of our features, and those of the features that we do not offer.
func (b *back) offers() (keys xenstore.Values, gone []string) {
	keys = xenstore.Values{
		netif.KeyFeatureRxCopy:        "1",
		netif.KeyFeatureSG:            "1",
		netif.KeyFeatureSplitChannels: "1",

		netif.KeyFeatureMulticastControl: "1",
		netif.KeyFeatureDynamicMulticast: "1",
	}
	// Each key is a node, and xenstored allows the domain 1000 of them. So a feature that
	// we do not have is a missing key, not a key with the value 0. Another backend, such as
	// Linux's netback, may have served the vif before us and left its own.
	gone = []string{xenbus.KeyReason, netif.KeyFeatureRxFlip, netif.KeyFeatureXDPHeadroom,
		netif.KeyFeatureGSOTCPv4Prefix, netif.KeyFeatureGSOTCPv6Prefix}
	if b.servesCtrl() {
		keys[netif.KeyFeatureCtrlRing] = "1"
	} else {
		gone = append(gone, netif.KeyFeatureCtrlRing)
	}
	if n := b.cfg.queues(); n > 1 {
		keys[netif.KeyMaxQueues] = strconv.Itoa(n)
	} else {
		gone = append(gone, netif.KeyMaxQueues)
	}
	offload := offloadValues(b.cfg.Offload)
	for _, key := range offloadKeys {
		if offload.Has(key) {
			keys[key] = offload[key]
		} else {
			gone = append(gone, key)
		}
	}
	return keys, gone
}

// servesCtrl reports whether there is something for which a frontend needs the control
// ring.
func (b *back) servesCtrl() bool { return b.cfg.queues() > 1 || b.cfg.StaticGrants }

// frontendKeys reads all keys that a connection is made from. It reads the rings of the
// requested queues only, since each key is a request to xenstored.
func (b *back) frontendKeys(ctx context.Context, xd *xenbus.Device) (xenstore.Values, error) {
	keys := append([]string{netif.KeyRequestRxCopy, netif.KeyFeatureRxNotify, netif.KeyFeatureSG, netif.KeyNumQueues}, offloadKeys[:]...)
	if b.servesCtrl() {
		keys = append(keys, netif.KeyCtrlRingRef, netif.KeyEventChannelCtrl)
	}
	asked, err := xd.PeerValues(ctx, netif.KeyNumQueues)
	if err != nil {
		return nil, err
	}
	queues := 1
	if n, err := asked.Uint(netif.KeyNumQueues, uint64(b.cfg.queues()), 1); err == nil && n > 1 {
		queues = int(n)
	}
	for i := range queues {
		prefix := queuePrefix(i, queues)
		keys = append(keys, prefix+netif.KeyTxRingRef, prefix+netif.KeyRxRingRef,
			prefix+netif.KeyEventChannel, prefix+netif.KeyEventChannelTx, prefix+netif.KeyEventChannelRx)
	}
	return xd.PeerValues(ctx, keys...)
}

func (b *back) unchanged(ctx context.Context, xd *xenbus.Device, c *conn) (bool, error) {
	v, err := b.frontendKeys(ctx, xd)
	if errors.Is(err, xenstore.ErrAccess) { // the frontend's directory is no longer ours to read
		return false, nil
	}
	return maps.Equal(v, c.frontKeys), err
}

// attach maps the rings that the frontend published, after it has checked every value.
func (b *back) attach(ctx context.Context, xd *xenbus.Device, c *conn) error {
	if err := b.identify(ctx, xd); err != nil {
		return err
	}
	v, err := b.frontendKeys(ctx, xd)
	if err != nil {
		return err
	}
	if err := b.attachTo(ctx, v, xd, c); err != nil {
		return err
	}
	return b.bind(xd, c)
}

// bind binds the event channels of connection c, and attaches the control ring.
func (b *back) bind(xd *xenbus.Device, c *conn) error {
	m := newSetup(b.d, xd, c)
	for i := range c.queues {
		if err := m.bindQueue(&c.queues[i]); err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
	}
	if c.ctrlKeys != nil {
		return b.attachCtrl(m, *c.ctrlKeys)
	}
	return nil
}

// attachTo maps the rings that the frontend's keys v name, after it has checked every
// value. It binds no event channel yet.
func (b *back) attachTo(ctx context.Context, v xenstore.Values, xd *xenbus.Device, c *conn) error {
	if err := b.mapTo(ctx, v, xd, c); err != nil {
		return err
	}
	return b.attachRings(xd, c)
}

// mapTo is the part of attachTo that reads and writes no ring: another backend may still
// serve them.
func (b *back) mapTo(ctx context.Context, v xenstore.Values, xd *xenbus.Device, c *conn) error {
	c.frontKeys = v
	if ok, err := v.Bool(netif.KeyRequestRxCopy, false); !ok {
		return errors.Join(errors.New("the frontend does not ask for rx-copy, the only way to send to it"), err)
	}
	var feat features
	feat.frontSG, _ = v.Bool(netif.KeyFeatureSG, false) // an unreadable value counts as no offer
	notifies, _ := v.Bool(netif.KeyFeatureRxNotify, false)
	c.timeouts = b.cfg.timeouts(notifies)
	feat.offload, feat.peerTakes = b.cfg.Offload, offeredOffloads(v, feat.frontSG)
	n, err := v.Uint(netif.KeyNumQueues, uint64(b.cfg.queues()), 1)
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("the frontend asks for 0 queues")
	}
	keys, err := parseQueues(v, int(n))
	if err != nil {
		return err
	}
	ck, asksCtrl, err := parseCtrl(v, keys)
	if err != nil {
		return err
	}
	feat.queues, feat.backSG = len(keys), true
	feat.split = keys[0].txPort != keys[0].rxPort
	c.feat = feat
	if c.feat.multicast, err = b.readFilter(ctx, xd); err != nil {
		return err
	}
	m := newSetup(b.d, xd, c)
	for i, k := range keys {
		q, err := m.mapQueue(k, &b.d.cfg)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		c.mapped = append(c.mapped, q)
	}
	if asksCtrl {
		c.ctrlKeys = &ck
		c.ctrlPage, err = m.ringPage("ctrl", ck.ring)
	}
	return err
}

// attachRings makes the engines of the rings that mapTo has mapped: they begin where the
// rings are now.
func (b *back) attachRings(xd *xenbus.Device, c *conn) error {
	m := newSetup(b.d, xd, c)
	if c.feat.queues > 1 { // Linux's netback hashes nothing for a single queue
		m.steer = &b.d.steer
	}
	for i := range c.mapped {
		q, err := m.backQueue(c.feat, &c.mapped[i], &b.d.cfg, b.d.rx[i].count, b.d.tx[i].count)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		c.queues = append(c.queues, q)
	}
	b.d.rx[0].count.Set(telemetry.RateLimit, b.d.limiter.now().perSecond())
	if c.ctrlKeys == nil {
		b.forgetHash()
	}
	return nil
}

// forgetHash forgets what the frontend has set, for a connection without a control ring: its
// frontend cannot have asked for a hash. Linux's netback would go on hashing.
func (b *back) forgetHash() {
	b.hash = nil
	b.d.setSteering(nil)
}

// attachCtrl attaches the frontend's control ring. If there is no event channel left for it,
// the vif is served all the same: what the frontend asks then has no answer.
func (b *back) attachCtrl(m *setup, k ctrlKeys) error {
	mark, private := len(m.c.undo), m.c.private
	s, err := m.serveCtrl(b.d, m.c.ctrlPage, k)
	switch {
	case err == nil:
		m.c.ctrl = s
		if b.hash == nil {
			b.hash = new(hashServer)
		}
		b.hash.connect(b.d, m.c.feat.queues)
		b.hash.serve(s.server, m.dom, m.peer)
		b.serveGrants(m, s)
	case errors.Is(err, hypercall.ErrNoPorts):
		b.forgetHash()
		b.d.log.Warn("the control ring is not served", "vif", b.d.id, "err", err)
		part := m.c.undo[mark:]
		m.c.undo, m.c.private = m.c.undo[:mark], private
		part.run()
	default:
		return err
	}
	return nil
}

// ended removes the directory of a vif that is gone for good, if the config says so.
func (b *back) ended(ctx context.Context, xd *xenbus.Device, replaced, _ bool) {
	ch := xd.Current()
	b.replaced, b.removed = replaced || ch.Lost, ch.Gone || !ch.Online
	if away := replaced || ch.Gone || ch.Vanished || !ch.Online; away && !ch.Lost {
		if b.cfg.Remove && !replaced && !ch.Gone {
			if err := xd.Remove(ctx); err != nil {
				b.d.log.Warn("cannot remove the vif's directory", "err", err)
			}
		}
		xd.Fail(ctx, nil) // removes the error node: the vif no longer fails to connect
	}
	b.d.finish()
}

// A mappedQueue is the memory of the backend's side of a queue, and where its halves wait.
type mappedQueue struct {
	keys           queueKeys
	tx, rx         *hypercall.Mapping // the rings
	pool, bufs     *arena.Arena
	txPark, rxPark *parker // the same one if both halves share an event channel
}

// mapQueue makes what a queue needs, from the keys k that its frontend published, who sees
// nothing of it.
func (m *setup) mapQueue(k queueKeys, cfg *Config) (q mappedQueue, err error) {
	q.keys = k
	if q.tx, err = m.ringPage("tx", k.txRing); err != nil {
		return q, err
	}
	if q.rx, err = m.ringPage("rx", k.rxRing); err != nil {
		return q, err
	}
	if q.pool, err = m.private(cfg.buffers()); err != nil {
		return q, err
	}
	if q.bufs, err = m.private(pagesPerHalf); err != nil {
		return q, err
	}
	if q.rxPark, err = m.parker(); err != nil {
		return q, err
	}
	q.txPark = q.rxPark
	if k.txPort != k.rxPort {
		q.txPark, err = m.parker()
	}
	return q, err
}

// backQueue makes the backend's side of a queue, without its event channels.
func (m *setup) backQueue(f features, p *mappedQueue, cfg *Config, rx, tx *telemetry.Block) (q connQueue, err error) {
	txRing, err := ring.AttachBack[netif.TxRequest, netif.TxResponse](p.tx.Memory, netif.TxStride)
	if err != nil {
		return q, &PeerError{Ring: "tx", Reason: err.Error()}
	}
	rxRing, err := ring.AttachBack[netif.RxRequest, netif.RxResponse](p.rx.Memory, netif.RxStride)
	if err != nil {
		return q, &PeerError{Ring: "rx", Reason: err.Error()}
	}
	q.keys, q.txPark, q.rxPark = p.keys, p.txPark, p.rxPark
	r := &backRX{ring: txRing, private: p.pool, offload: f.offload, lender: lender{lends: cfg.LendRx, most: netif.TxRingSize / 2},
		peerLink: peerLink{"tx", nil, rx}, copyBatch: copyBatch{dom: m.dom, peer: m.peer}}
	r.account.join(m.limiter, rx)
	r.groups = m.groups
	q.rx = r
	q.tx = &backTX{ring: rxRing, private: p.bufs, scatter: f.frontSG, peerTakes: f.peerTakes, groups: m.groups, steer: m.steer,
		peerLink: peerLink{"rx", nil, tx}, copyBatch: copyBatch{dom: m.dom, peer: m.peer}}
	rx.Set(telemetry.RingSize, uint64(txRing.Size()))
	tx.Set(telemetry.RingSize, uint64(rxRing.Size()))
	return q, nil
}

// bindQueue binds the event channels of a queue that backQueue has made. Until then nothing of
// it is visible to the frontend.
func (m *setup) bindQueue(q *connQueue) error {
	k := q.keys
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
	txPort, err := q.rxPark.open(bind(k.txPort))
	if err != nil {
		return err
	}
	rxPort := txPort
	if k.txPort != k.rxPort {
		if rxPort, err = q.txPark.open(bind(k.rxPort)); err != nil {
			return err
		}
	}
	q.rx.(*backRX).port, q.tx.(*backTX).port = txPort, rxPort
	return nil
}

func (m *setup) ringPage(name string, ref hypercall.GrantRef) (*hypercall.Mapping, error) {
	p, err := m.dom.Map(m.peer, []hypercall.GrantRef{ref}, hypercall.ReadWrite)
	if err != nil {
		return nil, fmt.Errorf("%s ring: %w", name, err)
	}
	m.c.undo.add(func() { p.Release() })
	m.c.private++
	return p, nil
}
