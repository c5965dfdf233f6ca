package pvnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"

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
}

// backMAC is the address that Linux's netback gives its interfaces: no bridge takes it
// for its own address.
var backMAC = MAC{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}

// identify reads the vif's MTU, for each connection.
func (b *back) identify(ctx context.Context, xd *xenbus.Device) error {
	own, err := xd.OwnValues(ctx, netif.KeyMTU)
	if err != nil {
		return err
	}
	b.d.identify(backMAC, b.d.mtuOf(own), true)
	return nil
}

// prepare publishes our features.
func (b *back) prepare(ctx context.Context, xd *xenbus.Device) error {
	keys := xenstore.Values{
		netif.KeyFeatureRxCopy:        "1",
		netif.KeyFeatureSG:            "1",
		netif.KeyFeatureSplitChannels: "1",
	}
	// Each key is a node, and xenstored allows the domain 1000 of them. So a feature that
	// we do not have is a missing key, not a key with the value 0.
	gone := []string{xenbus.KeyReason, netif.KeyFeatureRxFlip, netif.KeyFeatureMulticastControl, netif.KeyFeatureCtrlRing}
	if n := b.cfg.queues(); n > 1 {
		keys[netif.KeyMaxQueues] = strconv.Itoa(n)
	} else {
		gone = append(gone, netif.KeyMaxQueues)
	}
	offload := offloadValues(b.cfg.Offload)
	for _, key := range offloadKeys {
		if offload[key] == "1" {
			keys[key] = "1"
		} else {
			gone = append(gone, key)
		}
	}
	if b.cfg.Hotplug {
		keys[netif.KeyHotplugStatus] = netif.HotplugConnected
	}
	return xd.Publish(ctx, keys, gone...)
}

// frontendKeys reads all keys that a connection is made from. It reads the rings of the
// requested queues only, since each key is a round trip.
func (b *back) frontendKeys(ctx context.Context, xd *xenbus.Device) (xenstore.Values, error) {
	keys := append([]string{netif.KeyRequestRxCopy, netif.KeyFeatureSG, netif.KeyNumQueues}, offloadKeys[:]...)
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
	c.frontKeys = v
	if ok, err := v.Bool(netif.KeyRequestRxCopy, false); !ok {
		return errors.Join(errors.New("the frontend does not ask for rx-copy, the only way to send to it"), err)
	}
	var feat features
	feat.frontSG, _ = v.Bool(netif.KeyFeatureSG, false) // an unreadable value counts as no offer
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
	feat.queues, feat.backSG = len(keys), true
	feat.split = keys[0].txPort != keys[0].rxPort
	c.feat = feat
	m := newSetup(b.d, xd, c)
	for i, k := range keys {
		q, err := m.backQueue(feat, k, &b.d.cfg, b.d.rx[i].count, b.d.tx[i].count)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		c.queues = append(c.queues, q)
	}
	return nil
}

// ended removes the directory of a vif that is gone for good, if the config says so.
func (b *back) ended(ctx context.Context, xd *xenbus.Device, replaced bool) {
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

// backQueue makes the backend's side of a queue from the keys k that its frontend
// published.
func (m *setup) backQueue(f features, k queueKeys, cfg *Config, rx, tx *telemetry.Block) (q connQueue, err error) {
	txPage, err := m.ringPage("tx", k.txRing)
	if err != nil {
		return q, err
	}
	rxPage, err := m.ringPage("rx", k.rxRing)
	if err != nil {
		return q, err
	}
	pool, err := m.private(cfg.buffers())
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
	q.rx = &backRX{ring: txRing, private: pool, offload: f.offload,
		peerLink: peerLink{"tx", txPort, rx}, copyBatch: copyBatch{dom: m.dom, peer: m.peer}}
	q.tx = &backTX{ring: rxRing, private: bufs, scatter: f.frontSG, peerTakes: f.peerTakes,
		peerLink: peerLink{"rx", rxPort, tx}, copyBatch: copyBatch{dom: m.dom, peer: m.peer}}
	rx.Set(telemetry.RingSize, uint64(txRing.Size()))
	tx.Set(telemetry.RingSize, uint64(rxRing.Size()))
	return q, nil
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
