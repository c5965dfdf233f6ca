package pvnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"barevif/pvnet/netif"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// settings are the values in xenstore that may change while a connection lasts.
type settings struct {
	mtu       int  // in bytes
	noCarrier bool // frontend: the backend says that its network is not there
}

// Carrier reports whether the network behind the vif is there. For a frontend it is what
// the backend says in its key "carrier" (xen/include/public/io/netif.h); a backend that
// does not write the key, as Linux's netback, always has a carrier. For a backend it is
// what SetCarrier said.
//
// A frontend's link without carrier is down: a [LinkEvent] says so, and nothing is sent
// until it is back. The connection stays, and frames that still arrive are received.
func (d *Device) Carrier() bool { return !d.noCarrier.Load() }

// SetCarrier tells the frontend of a backend's device whether the network behind the vif
// is there, until the next call. The frontend may ignore it, as Linux's netfront does: so
// it changes nothing for frames that arrive, or are sent, here. It does not wait for
// xenstore: the device writes the key soon, and again for each new connection. It returns
// [ErrNotBackend] for a frontend's device, and [ErrDisconnected].
func (d *Device) SetCarrier(on bool) error {
	if err := d.backendOnly(); err != nil {
		return err
	}
	if d.noCarrier.Swap(!on) == on {
		d.wakeLifecycle()
	}
	return nil
}

// SetMTU changes the MTU of a backend's device to mtu bytes, 68 to 65535, because the
// network behind the vif has changed. Like SetCarrier it does not wait: soon the device
// writes it to its own directory, as the toolstack would, and to the frontend's, as Xen's
// hotplug scripts do, and a LinkEvent shows it. The frontend's key belongs to the
// backend's domain if libxl made the vif; else the frontend may not be told, which is
// logged. It returns [ErrNotBackend] for a frontend's device, [ErrDisconnected], and an
// error for an MTU that no vif has.
func (d *Device) SetMTU(mtu int) error {
	if err := d.backendOnly(); err != nil {
		return err
	}
	if mtu < minMTU || mtu > MaxFrame {
		return fmt.Errorf("pvnet: vif %s: MTU %d: a vif's is %d to %d", d.id, mtu, minMTU, MaxFrame)
	}
	d.askedMTU.Store(int32(mtu))
	d.wakeLifecycle()
	return nil
}

func (d *Device) backendOnly() error {
	if err := d.endError(); err != nil {
		return err
	}
	if d.role != xenbus.Backend {
		return ErrNotBackend
	}
	return nil
}

// noCarrierReason is the Reason of a LinkEvent.
const noCarrierReason = "the backend has no carrier"

// settings reads the frontend's. The guest's addresses, which concern no connection, are read
// by whoever follows them.
func (f *front) settings(ctx context.Context, xd *xenbus.Device) (settings, error) {
	f.d.readdress()
	var own, peer xenstore.Values
	var errOwn, errPeer error
	var reads sync.WaitGroup // in flight together: the link may have to wait for them
	reads.Go(func() { own, errOwn = xd.OwnValues(ctx, netif.KeyMTU) })
	reads.Go(func() { peer, errPeer = xd.PeerValues(ctx, netif.KeyCarrier) })
	reads.Wait()
	if errors.Is(errPeer, xenstore.ErrAccess) { // the backend's directory is gone: its state tells more
		peer, errPeer = nil, nil
	}
	if err := cmp.Or(errOwn, errPeer); err != nil {
		return settings{}, err
	}
	return settings{f.d.mtuOf(own, xd.Dir(), f.d.MTU()), !f.d.carrierOf(peer, xd)}, nil
}

// carrierOf returns what the backend says of its carrier in the values of its directory.
func (d *Device) carrierOf(peer xenstore.Values, xd *xenbus.Device) bool {
	on, err := peer.Bool(netif.KeyCarrier, true)
	dir, _ := xd.Peer()
	d.complain(dir, netif.KeyCarrier, peer, err, "the link counts as up")
	return on || err != nil
}

// ownSettings are the keys that settings of a backend are in, and one that tells whether
// the directory is still there.
var ownSettings = [...]string{netif.KeyMTU, netif.KeyRate, netif.KeyFrontend}

// settings reads the backend's. The rate limit, which concerns no connection, it puts in
// force.
func (b *back) settings(ctx context.Context, xd *xenbus.Device) (settings, error) {
	own, err := xd.OwnValues(ctx, ownSettings[:]...)
	if err != nil {
		return settings{}, err
	}
	b.setRate(own, xd.Dir())
	peer, err := xd.PeerValues(ctx, netif.KeyRequestMulticast)
	if err == nil && !b.adopted {
		dir, _ := xd.Peer()
		b.d.groups.on.Store(b.filterWanted(peer, dir))
	} else if err != nil && !errors.Is(err, xenstore.ErrAccess) { // the frontend's directory may be gone: its state tells more
		return settings{}, err
	}
	return settings{mtu: b.d.mtuOf(own, xd.Dir(), b.d.MTU())}, nil
}

// What a backend has written to its key "carrier".
const (
	carrierUnsaid = iota // there is no such key: the frontend assumes a carrier
	carrierOff
	carrierOn
)

// publish writes one setting that has changed since it was published, and reports
// whether there was one.
func (b *back) publish(ctx context.Context, xd *xenbus.Device) (more bool, err error) {
	d := b.d
	if off := d.noCarrier.Load(); off && b.carrier != carrierOff || !off && b.carrier == carrierOff {
		value, said := "1", carrierOn
		if off {
			value, said = "0", carrierOff
		}
		if err := xd.Publish(ctx, xenstore.Values{netif.KeyCarrier: value}); err != nil {
			return true, err
		}
		d.log.Info("the frontend is told of the carrier", "vif", d.id, "carrier", !off)
		b.carrier = said
		return true, nil
	}
	if mtu := d.askedMTU.Load(); mtu != 0 {
		if err := xd.Publish(ctx, xenstore.Values{netif.KeyMTU: fmt.Sprint(mtu)}); err != nil {
			return true, err
		}
		// Unless SetMTU was called again. The write comes back as a change of our settings.
		d.askedMTU.CompareAndSwap(mtu, 0)
		return true, nil
	}
	if mtu := d.MTU(); mtu != b.toldMTU {
		b.toldMTU = mtu
		ctx, cancel := context.WithTimeout(ctx, tellTimeout)
		defer cancel()
		if err := xd.WritePeer(ctx, netif.KeyMTU, fmt.Sprint(mtu)); err != nil && !errors.Is(err, xenbus.ErrGone) {
			dir, _ := xd.Peer()
			d.log.Warn("the frontend is not told of the MTU", "vif", d.id, "key", dir+"/"+netif.KeyMTU, "mtu", mtu, "err", err)
		}
		return true, nil
	}
	return false, nil
}

// tellTimeout bounds the transaction in the frontend's directory: the frontend can make
// it fail by changing the directory, and then it starts again.
const tellTimeout = time.Second

// followSettings keeps pace with settings that the toolstack, the peer or our user
// changed. It reports false if xenstore refuses, or if the settings change so fast that
// they have to wait.
func (l *lifecycle) followSettings(ch xenbus.Change) bool {
	if l.cause != nil || ch.Gone || ch.Lost {
		return true
	}
	for {
		ctx, cancel := l.storeContext()
		more, err := l.end.publish(ctx, l.xd)
		cancel()
		if err != nil {
			return l.settingsFailed(ch, err)
		}
		if !more {
			break
		}
	}
	if l.readSettings == ch.Settings || !l.settingsPace.until.IsZero() {
		return true
	}
	if l.conn == nil && l.d.role == xenbus.Frontend { // attach will read them
		return true
	}
	l.settingsPace.step(time.Now())
	ctx, cancel := l.storeContext()
	defer cancel()
	s, err := l.end.settings(ctx, l.xd)
	if err != nil {
		return l.settingsFailed(ch, err)
	}
	l.readSettings = ch.Settings
	l.apply(s)
	return l.followSettings(ch) // once more: a backend tells its frontend of the MTU
}

func (l *lifecycle) settingsFailed(ch xenbus.Change, err error) bool {
	if !errors.Is(err, xenbus.ErrGone) && !errors.Is(err, xenbus.ErrClaimed) {
		l.d.log.Warn("xenstore refused settings of the vif", "vif", l.d.id, "err", err)
	}
	l.retryLater(ch)
	return false
}

// apply makes s the settings of the device and of its connection, and announces what has
// changed.
func (l *lifecycle) apply(s settings) {
	d := l.d
	mtu := d.MTU() != s.mtu
	if mtu {
		d.log.Info("the vif has another MTU", "vif", d.id, "was", d.MTU(), "mtu", s.mtu)
		d.mtu.Store(int32(s.mtu))
	}
	carrier := l.conn != nil && l.conn.noCarrier != s.noCarrier
	if carrier {
		d.log.Info("the backend's carrier has changed", "vif", d.id, "carrier", !s.noCarrier)
		l.conn.noCarrier = s.noCarrier
	}
	switch {
	case !l.running:
	case carrier:
		if !d.setLink(l.conn, l.xd.Current().Own) {
			l.beginEnd(&UnknownError{"stop sending without a carrier", errors.New("a caller never left the device")})
		}
	case mtu:
		d.setStatus(l.xd.Current().Own, l.up())
		if l.up() {
			d.announce(linkUp, LinkEvent{Up: true})
		}
	}
}

// up reports whether frames may be sent.
func (l *lifecycle) up() bool { return l.running && !l.conn.noCarrier }

// setLink opens or shuts the sending halves of a connection whose receiving halves are
// open, as its carrier says, and announces the link. It reports false if a caller did not
// leave its half.
func (d *Device) setLink(c *conn, own xenbus.State) bool {
	if d.role == xenbus.Frontend {
		d.noCarrier.Store(c.noCarrier)
	}
	d.setStatus(own, !c.noCarrier) // before the event: a subscriber may look at the status
	if c.noCarrier {
		d.announce(linkDown, LinkEvent{Reason: noCarrierReason})
		if !d.shutSenders(c) {
			return false
		}
	} else {
		for i := range c.queues {
			d.tx[i].gate.open()
		}
		d.announce(linkUp, LinkEvent{Up: true})
	}
	for i := range c.queues {
		d.tx[i].markMember()
		d.rx[i].markMember()
	}
	return true
}

// shutSenders keeps callers out of the sending halves and waits until they have left.
func (d *Device) shutSenders(c *conn) bool {
	for i, q := range c.queues {
		d.tx[i].gate.shut(q.txPark.wake)
	}
	ok, end := true, time.Now().Add(d.callerTimeout)
	for i := range c.queues {
		ok = d.tx[i].gate.waitEmpty(end) && ok
	}
	if !ok {
		d.abandon(c)
	}
	return ok
}
