package pvnet

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

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

// identify reads MAC, MTU and "trusted", which the toolstack wrote before us. A vif that
// was unplugged and plugged again may be another card.
func (f *front) identify(ctx context.Context, xd *xenbus.Device) error {
	own, err := xd.OwnValues(ctx, netif.KeyMAC, netif.KeyMTU, netif.KeyTrusted)
	if err != nil {
		return err
	}
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
	f.d.identify(mac, f.d.mtuOf(own), trusted && err == nil)
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

func (f *front) ended(context.Context, *xenbus.Device, bool) { f.d.finish() }

// unchanged reports true: the rings are the frontend's own, and no backend replaces them.
func (f *front) unchanged(context.Context, *xenbus.Device, *conn) (bool, error) { return true, nil }

// attach makes rings and pages to match the backend's offer, and publishes them.
func (f *front) attach(ctx context.Context, xd *xenbus.Device, c *conn) error {
	d := f.d
	if err := f.identify(ctx, xd); err != nil {
		return err
	}
	back, err := xd.PeerValues(ctx, append([]string{netif.KeyFeatureRxCopy, netif.KeyFeatureSG,
		netif.KeyFeatureSplitChannels, netif.KeyMaxQueues}, offloadKeys[:]...)...)
	if err != nil {
		return err
	}
	if c.feat, err = f.agree(back); err != nil {
		return err
	}
	there, err := xd.OwnKeys(ctx)
	if err != nil {
		return err
	}
	m := newSetup(d, xd, c)
	c.queues, err = m.frontQueues(c.feat, &d.cfg, f.otherVifs(ctx, xd), func(i int) (rx, tx *telemetry.Block) { return d.rx[i].count, d.tx[i].count })
	if err != nil {
		if errors.Is(err, hypercall.ErrNoGrants) {
			err = fmt.Errorf("%w%s", err, d.holders())
		}
		return err
	}
	c.feat.queues = len(c.queues)
	keys := xenstore.Values{
		netif.KeyRequestRxCopy:   "1",
		netif.KeyFeatureRxNotify: "1",
		netif.KeyFeatureSG:       "1",
	}
	maps.Copy(keys, offloadValues(c.feat.offload))
	if back.Has(netif.KeyMaxQueues) {
		keys[netif.KeyNumQueues] = strconv.Itoa(c.feat.queues)
	}
	for i, q := range c.queues {
		maps.Copy(keys, q.keys.values(queuePrefix(i, c.feat.queues)))
	}
	return xd.Publish(ctx, keys, staleKeys(there)...)
}

// agree returns the features of the connection to come, from the values that the backend
// offers.
func (f *front) agree(back xenstore.Values) (feat features, err error) {
	if ok, err := back.Bool(netif.KeyFeatureRxCopy, false); !ok {
		return feat, errors.Join(errors.New("the backend does not offer feature-rx-copy, the only way to receive"), err)
	}
	feat.frontSG = true
	feat.backSG, _ = back.Bool(netif.KeyFeatureSG, false) // an unreadable value counts as no offer
	feat.split, _ = back.Bool(netif.KeyFeatureSplitChannels, false)
	most, err := back.Uint(netif.KeyMaxQueues, 1<<16, 1)
	if err != nil || most < 1 {
		most = 1
	}
	feat.queues = int(min(most, uint64(f.d.cfg.queues())))
	feat.offload, feat.peerTakes = f.d.cfg.Offload, offeredOffloads(back, feat.backSG)
	return feat, nil
}

// staleKeys returns which of the keys there were left by an earlier program or connection
// and must go before new ones are published. Each removal is a round trip, so keys that
// are missing are not among them.
func staleKeys(there []string) (stale []string) {
	old := []string{
		netif.KeyTxRingRef, netif.KeyRxRingRef, netif.KeyEventChannel, netif.KeyEventChannelTx,
		netif.KeyEventChannelRx, netif.KeyNumQueues, netif.KeyFeatureGSOTCPv4, netif.KeyFeatureGSOTCPv6,
		netif.KeyFeatureIPv6CsumOffload, netif.KeyRequestMulticast, netif.KeyCtrlRingRef,
		netif.KeyEventChannelCtrl, netif.KeyXDPHeadroom,
	}
	for _, key := range there { // an earlier program may have published more queues
		if slices.Contains(old, key) || strings.HasPrefix(key, netif.KeyQueuePrefix) {
			stale = append(stale, key)
		}
	}
	return stale
}

// otherVifs returns how many more vifs of this domain may connect: their pages come from the
// same limit.
func (f *front) otherVifs(ctx context.Context, xd *xenbus.Device) int {
	n, err := xd.Unconnected(ctx)
	if err != nil {
		f.d.log.Debug("cannot count the domain's other vifs", "vif", f.d.id, "err", err)
	}
	return n
}
