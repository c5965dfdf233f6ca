package pvnet

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"math"
	"strconv"
	"sync"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// A front is the frontend's part of a lifecycle.
type front struct {
	d            *Device
	generatedMAC MAC // the address made for a vif that has none; zero until it is needed
}

// identityKeys are the keys of our directory that say which card the vif is.
var identityKeys = []string{netif.KeyMAC, netif.KeyMTU, netif.KeyTrusted}

// identify takes MAC, MTU and "trusted", which the toolstack wrote before us, from the values of our
// directory. A vif that was unplugged and plugged again may be another card.
func (f *front) identify(ctx context.Context, xd *xenbus.Device, own xenstore.Values) error {
	mac, err := f.address(own, xd.Dir())
	if err != nil {
		// As in FreeBSD's netfront: some toolstacks write the address only to the
		// backend's directory.
		dir, _ := xd.Peer()
		peer, e := xd.PeerValues(ctx, netif.KeyMAC)
		switch {
		case errors.Is(e, xenstore.ErrAccess): // the frontend may have no permission to read it
		case e != nil:
			return e
		default:
			mac, err = f.address(peer, dir)
		}
	}
	if err != nil {
		if f.generatedMAC == (MAC{}) {
			rand.Read(f.generatedMAC[:])
			f.generatedMAC[0] = f.generatedMAC[0]&^1 | 2 // unicast, locally administered
		}
		mac = f.generatedMAC
		f.d.log.Warn("no MAC in xenstore, made one", "vif", f.d.id, "mac", mac)
	}
	trusted, err := own.Bool(netif.KeyTrusted, true)
	f.d.complain(xd.Dir(), netif.KeyTrusted, own, err, "the backend is not trusted")
	f.d.identify(mac, f.d.mtuOf(own, xd.Dir(), 1500), trusted && err == nil)
	return nil
}

// address returns the MAC in the values v of directory dir. It refuses what Linux's
// is_valid_ether_addr refuses: no card can have such an address, and no network would
// deliver to it.
func (f *front) address(v xenstore.Values, dir string) (MAC, error) {
	mac, err := v.MAC(netif.KeyMAC)
	if err == nil && !MAC(mac).station() {
		err = &xenstore.ValueError{Path: netif.KeyMAC, Value: v[netif.KeyMAC], Want: "the address of one station"}
	}
	if err != nil && v.Has(netif.KeyMAC) {
		f.d.log.Warn("unusable MAC in xenstore", "vif", f.d.id, "key", dir+"/"+netif.KeyMAC, "value", v[netif.KeyMAC], "err", err)
	}
	return mac, err
}

// withPeerReason adds to a WaitError why the backend does not connect, as far as xenstore tells.
func (f *front) withPeerReason(ctx context.Context, err error, xd *xenbus.Device) error {
	if _, waited := errors.AsType[*xenbus.WaitError](err); !waited {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, connectGrace/2)
	defer cancel()
	if why := xd.PeerReason(ctx); why != "" {
		return fmt.Errorf("%w; the backend says %q", err, why)
	}
	if xd.Current().Peer == xenbus.Closed {
		return fmt.Errorf("%w; the backend has closed and does not say why, as when its domain has met a quota of xenstore: look into its log", err)
	}
	return err
}

func (f *front) prepare(context.Context, *xenbus.Device) error { return nil }

// ended leaves no key behind that only some frontends write. Linux's netfront removes none
// of an earlier driver, and netback would refuse it for a control ring that is gone, or keep
// groups from it that it never asked to filter.
func (f *front) ended(ctx context.Context, xd *xenbus.Device, _, passed bool) {
	defer f.d.finish()
	if passed {
		return
	}
	there, err := xd.OwnKeys(ctx)
	if keys := netif.RareKeys(there); err == nil && len(keys) > 0 {
		err = xd.Publish(ctx, nil, keys...)
	}
	if err != nil { // the directory is gone, or somebody else's
		f.d.log.Debug("cannot remove the keys of the last connection", "vif", f.d.id, "err", err)
	}
}

// unchanged reports true: the rings are the frontend's own, and no backend replaces them.
func (f *front) unchanged(context.Context, *xenbus.Device, *conn) (bool, error) { return true, nil }

// vifKeys are what a frontend reads from xenstore before it makes a connection.
type vifKeys struct {
	own, back xenstore.Values // the values in our directory and in the backend's
	there     []string        // the names of all keys in our directory
	others    int             // how many more vifs of this domain may connect: their pages come from the same limit
}

// readKeys reads the vifKeys. It sends all requests to xenstore before it waits for an answer, because each
// wait delays the connection.
func (f *front) readKeys(ctx context.Context, xd *xenbus.Device) (s vifKeys, err error) {
	var errOwn, errBack, errThere, errOthers error
	var reads sync.WaitGroup
	reads.Go(func() { s.own, errOwn = xd.OwnValues(ctx, identityKeys...) })
	reads.Go(func() { s.back, errBack = xd.PeerValues(ctx, backKeys...) })
	reads.Go(func() { s.there, errThere = xd.OwnKeys(ctx) })
	reads.Go(func() { s.others, errOthers = xd.Unconnected(ctx) })
	reads.Wait()
	if errOthers != nil {
		f.d.log.Debug("cannot count the domain's other vifs", "vif", f.d.id, "err", errOthers)
	}
	return s, cmp.Or(errOwn, errBack, errThere)
}

// backKeys are the keys with which a backend offers features.
var backKeys = append([]string{netif.KeyFeatureRxCopy, netif.KeyFeatureSG,
	netif.KeyFeatureSplitChannels, netif.KeyMaxQueues, netif.KeyCarrier, netif.KeyFeatureCtrlRing,
	netif.KeyFeatureMulticastControl, netif.KeyFeatureDynamicMulticast}, offloadKeys[:]...)

// attach makes rings and pages to match the backend's offer, and the keys that tell it of them.
func (f *front) attach(ctx context.Context, xd *xenbus.Device, c *conn) error {
	d := f.d
	vif, err := f.readKeys(ctx, xd)
	if err != nil {
		return err
	}
	if err := f.identify(ctx, xd, vif.own); err != nil {
		return err
	}
	d.readdress() // this backend's directory may be another one
	back := vif.back
	// An empty node offers nothing: some toolstacks make such, so that a backend may write its
	// keys when its domain is at xenstored's quota (toolstack.Vif.Room).
	maps.DeleteFunc(back, func(_, value string) bool { return value == "" })
	if c.feat, err = f.agree(back, xd); err != nil {
		return err
	}
	c.noCarrier = !d.carrierOf(back, xd)
	if c.feat.untrusted = !d.Trusted(); c.feat.untrusted && d.cfg.LendRx {
		d.log.Info("the toolstack does not trust the backend: received frames are copied, not lent", "vif", d.id, "key", xd.Dir()+"/"+netif.KeyTrusted)
	}
	m := newSetup(d, xd, c)
	c.queues, err = m.frontQueues(c.feat, &d.cfg, vif.others, func(i int) (rx, tx *telemetry.Block) { return d.rx[i].count, d.tx[i].count })
	if err != nil {
		if errors.Is(err, hypercall.ErrNoGrants) {
			err = fmt.Errorf("%w%s", err, d.holders())
		}
		return err
	}
	if c.feat.queues = len(c.queues); d.cfg.auto {
		d.log.Info("queues", "vif", d.id, "queues", c.feat.queues, "processors", d.cfg.queues(), "backend", c.feat.offered,
			"pages", c.shared, "memory", c.budget().String())
	}
	f.attachCtrl(m, back, vif.others)
	c.keys, c.stale = f.connKeys(c), netif.StaleKeys(vif.there)
	if c.feat.multicast = f.agreeMulticast(back); c.feat.multicast {
		c.keys[netif.KeyRequestMulticast] = "1"
	}
	c.queues[0].tx.(*frontTX).listFirst(d)
	return nil
}

// connKeys returns the keys that tell the backend of a connection, but for multicast, which
// may change while it lasts. connKeys leaves out a key whose value a backend assumes if the key is missing,
// because the frontend waits for an answer of xenstore for each key that it writes.
func (f *front) connKeys(c *conn) xenstore.Values {
	keys := xenstore.Values{
		netif.KeyRequestRxCopy:   "1",
		netif.KeyFeatureRxNotify: "1",
		netif.KeyFeatureSG:       "1",
	}
	maps.Copy(keys, offloadValues(c.feat.offload))
	if c.feat.queues > 1 {
		keys[netif.KeyNumQueues] = strconv.Itoa(c.feat.queues)
	}
	if k, ok := c.ctrl.(*ctrlClient); ok {
		keys[netif.KeyCtrlRingRef] = strconv.FormatUint(uint64(k.keys.ring), 10)
		keys[netif.KeyEventChannelCtrl] = strconv.FormatUint(uint64(k.keys.port), 10)
	}
	for i, q := range c.queues {
		maps.Copy(keys, q.keys.values(queuePrefix(i, c.feat.queues)))
	}
	return keys
}

// attachCtrl makes a control ring, if the backend offers one and the connection has a use
// for it. Frames move without one, so a failure is no error of the
// connection. As in frontQueues, it leaves room for the other vifs.
func (f *front) attachCtrl(m *setup, back xenstore.Values, others int) {
	offered, _ := back.Bool(netif.KeyFeatureCtrlRing, false) // an unreadable value counts as no offer
	if !offered || m.c.feat.queues < 2 {
		f.d.noCtrlForHash(offered, m.c.feat.queues)
	}
	if !offered || m.c.feat.queues < 2 && !f.d.cfg.StaticGrants {
		return
	}
	mark, shared := len(m.c.undo), m.c.shared
	c, err := m.askCtrl(f.d)
	if err == nil && !m.canSpare(others*leastPlan.total()) {
		err = fmt.Errorf("too little would be left for other vifs: %w", hypercall.ErrNoGrants)
	}
	if err != nil {
		f.d.log.Warn("no control ring", "vif", f.d.id, "err", err)
		part := m.c.undo[mark:]
		m.c.undo, m.c.shared = m.c.undo[:mark], shared
		part.run()
		return
	}
	f.useCtrl(m.c, c, nil)
}

// useCtrl makes k the control ring of a connection. added says of which queues the pages were
// added as static grants, in an earlier process; nil: none.
func (f *front) useCtrl(c *conn, k *ctrlClient, added []bool) {
	c.ctrl = k
	k.queues = c.feat.queues
	if k.queues > 1 {
		k.whenUp = append(k.whenUp, func(ctx context.Context) { f.d.tellHash(ctx, k) })
	}
	for _, q := range c.queues {
		q.tx.(*frontTX).takesHash = true // its extra info is as old as the control ring
	}
	if f.d.cfg.StaticGrants || added != nil {
		if added == nil {
			added = make([]bool, len(c.queues))
		}
		k.static = &grantClient{d: f.d, c: c, list: k.args, listRef: k.ref, added: added}
		k.whenUp = append(k.whenUp, func(ctx context.Context) { k.static.tell(ctx, k.callWith) })
	}
}

// agree returns the features of the connection to come, from the values that the backend
// offers.
func (f *front) agree(back xenstore.Values, xd *xenbus.Device) (feat features, err error) {
	if ok, err := back.Bool(netif.KeyFeatureRxCopy, false); !ok {
		return feat, errors.Join(errors.New("the backend does not offer feature-rx-copy, the only way to receive"), err)
	}
	feat.frontSG = true
	feat.backSG, _ = back.Bool(netif.KeyFeatureSG, false) // an unreadable value counts as no offer
	feat.split, _ = back.Bool(netif.KeyFeatureSplitChannels, false)
	most, err := back.Uint(netif.KeyMaxQueues, math.MaxUint32, 1)
	if err == nil && most == 0 {
		err = &xenstore.ValueError{Path: netif.KeyMaxQueues, Value: "0", Want: "a number of queues"}
	}
	dir, _ := xd.Peer()
	f.d.complain(dir, netif.KeyMaxQueues, back, err, "one queue")
	if err != nil {
		most = 1
	}
	feat.queues = int(min(most, uint64(f.d.cfg.queues())))
	feat.offered = int(most)
	feat.offload, feat.peerTakes = f.d.cfg.Offload, offeredOffloads(back, feat.backSG)
	return feat, nil
}
