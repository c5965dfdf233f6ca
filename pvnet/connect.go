package pvnet

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/xenbus"
)

// devices is every frontend of the process, so that a second Connect finds the
// first. It is the only state the package has.
var devices = struct {
	mu  sync.Mutex
	all map[deviceKey]*entry // guarded by mu
}{all: make(map[deviceKey]*entry)}

type deviceKey struct {
	domain hypercall.Domain
	id     string
}

// An entry is a device from the first call of Connect on.
type entry struct {
	cfg   Config
	ready chan struct{} // closed when dev or err is set
	dev   *Device
	err   error
}

// Connect gives the frontend of this domain's vif id ("0"), connected. It waits
// for the toolstack to finish the vif and for the backend to answer, until ctx
// ends: the error then says which states were seen.
//
// A second Connect of one domain and id gives the same device, which one
// Disconnect ends for all. It must agree in its Config.
//
// For an id that is no vif the error names those there are
// ([xenbus.NoDeviceError]).
func Connect(ctx context.Context, domain hypercall.Domain, id string, cfg Config) (*Device, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("pvnet: connect vif %s: %w", id, err)
	}
	key := deviceKey{domain, id}
	for {
		devices.mu.Lock()
		e, there := devices.all[key]
		if !there {
			e = &entry{cfg: cfg, ready: make(chan struct{})}
			devices.all[key] = e
		}
		devices.mu.Unlock()
		if !there {
			e.dev, e.err = connect(ctx, domain, id, cfg, func() {
				devices.mu.Lock()
				if devices.all[key] == e {
					delete(devices.all, key)
				}
				devices.mu.Unlock()
			})
			close(e.ready)
			return e.dev, e.err
		}
		if !e.cfg.equal(cfg) {
			return nil, fmt.Errorf("pvnet: vif %s is connected with another Config", id)
		}
		select {
		case <-e.ready:
		case <-ctx.Done():
			return nil, fmt.Errorf("pvnet: connect vif %s: %w", id, context.Cause(ctx))
		}
		switch {
		case errors.Is(e.err, context.Canceled) || errors.Is(e.err, context.DeadlineExceeded):
			continue // the other caller's patience is not ours; its entry is gone
		case e.err != nil:
			return nil, e.err
		case !e.dev.leaving.Load() && e.dev.word.Load() != linkGone:
			return e.dev, nil
		}
		select {
		case <-e.dev.done: // its entry goes with it
		case <-ctx.Done():
			return nil, fmt.Errorf("pvnet: connect vif %s: %w", id, context.Cause(ctx))
		}
	}
}

// connect makes the device. forget runs when there is none, or none any more.
func connect(ctx context.Context, domain hypercall.Domain, id string, cfg Config, forget func()) (d *Device, err error) {
	defer func() {
		if err != nil {
			forget()
			err = fmt.Errorf("pvnet: connect vif %s: %w", id, err)
		}
	}()
	client, err := xenbus.Dial(ctx, domain.Store, xenbus.Config{Logger: cfg.Logger})
	if err != nil {
		return nil, err
	}
	xd, err := xenbus.OpenFrontend(ctx, client, "vif", id)
	if err != nil {
		client.Close()
		return nil, err
	}
	d = newDevice(id, telemetry.Frontend, domain, cfg)
	f := &front{d: d}
	if err := f.identify(ctx, xd); err != nil {
		xd.Close(ctx)
		client.Close()
		return nil, err
	}
	first := make(chan error, 1)
	d.start(xd, xenbus.Frontend, f, first, func() {
		client.Close()
		forget()
	})
	select {
	case err = <-first:
		if err != nil {
			<-d.done
		}
	case <-ctx.Done():
		ch := xd.Current()
		err = &xenbus.WaitError{Dir: xd.Dir(), Own: ch.Own, Seen: xd.Seen(), Err: context.Cause(ctx)}
		err = f.because(err, xd)
		d.stop(err)
		<-d.done
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

// start begins the device's life. after runs at its very end.
func (d *Device) start(xd *xenbus.Device, kind xenbus.Role, r role, first chan error, after func()) {
	ctx, stop := context.WithCancelCause(context.Background())
	d.stop = stop
	info := telemetry.Info{
		Role: d.role, Own: uint16(d.domain.ID()), Peer: uint16(dom(xd)), Queues: d.cfg.queues(),
	}
	if n, err := strconv.ParseUint(d.id, 10, 32); err == nil {
		info.Handle = uint32(n)
	}
	d.set.Open(d.cfg.Counters, info)
	l := &life{d: d, xd: xd, role: r, kind: kind, first: first}
	d.finish = func() {
		stop(nil)
		d.set.Close()
		ctx, cancel := l.patiently()
		xd.Close(ctx)
		cancel()
		after()
	}
	go l.run(ctx)
}

// A front is the frontend's part of a life.
type front struct{ d *Device }

// identify reads who the card is: what the toolstack wrote before us.
func (f *front) identify(ctx context.Context, xd *xenbus.Device) error {
	own, err := xd.OwnValues(ctx, netif.KeyMAC, netif.KeyMTU, netif.KeyTrusted)
	if err != nil {
		return err
	}
	mac, err := own.MAC(netif.KeyMAC)
	if err != nil {
		// As FreeBSD's netfront: some toolstacks leave it to the backend.
		var peer xenbus.Values
		if peer, err = xd.PeerValues(ctx, netif.KeyMAC); err == nil {
			mac, err = peer.MAC(netif.KeyMAC)
		}
		if err != nil {
			rand.Read(mac[:])
			mac[0] = mac[0]&^1 | 2 // unicast, locally administered
			f.d.log.Warn("no MAC in xenstore, made one", "vif", f.d.id, "mac", MAC(mac))
		}
	}
	mtu, err := own.Uint(netif.KeyMTU, MaxFrame, 1500)
	if err != nil || mtu < 68 { // RFC 791: what every link must carry
		f.d.log.Warn("no usable MTU in xenstore", "vif", f.d.id, "err", err)
		mtu = 1500
	}
	trusted, err := own.Bool(netif.KeyTrusted, true)
	f.d.mu.Lock()
	f.d.mac, f.d.trusted = mac, trusted && err == nil
	f.d.mu.Unlock()
	f.d.mtu.Store(int32(mtu))
	return nil
}

// because adds what the backend says of why it does not connect.
func (f *front) because(err error, xd *xenbus.Device) error {
	ctx, cancel := (*life)(nil).patiently()
	defer cancel()
	if why := xd.PeerReason(ctx); why != "" {
		return fmt.Errorf("%w; the backend says %q", err, why)
	}
	if xd.Current().Peer == xenbus.Closed {
		return fmt.Errorf("%w; the backend has closed and does not say why, as when its domain has met a quota of xenstore: look into its log", err)
	}
	return err
}

func (f *front) prepare(context.Context, *xenbus.Device) error  { return nil }
func (f *front) finished(context.Context, *xenbus.Device, bool) { f.d.finish() }

// attach makes rings and pages for what the backend offers, and publishes them.
func (f *front) attach(ctx context.Context, xd *xenbus.Device, c *conn) error {
	d := f.d
	back, err := xd.PeerValues(ctx, netif.KeyFeatureRxCopy, netif.KeyFeatureSG,
		netif.KeyFeatureSplitChannels, netif.KeyMaxQueues, netif.KeyFeatureNoCsumOffload,
		netif.KeyFeatureIPv6CsumOffload, netif.KeyFeatureGSOTCPv4, netif.KeyFeatureGSOTCPv6)
	if err != nil {
		return err
	}
	if ok, err := back.Bool(netif.KeyFeatureRxCopy, false); !ok {
		return errors.Join(errors.New("the backend does not offer feature-rx-copy, the only way to receive"), err)
	}
	var feat features
	feat.backSG, _ = back.Bool(netif.KeyFeatureSG, false) // what is garbage is not offered
	feat.split, _ = back.Bool(netif.KeyFeatureSplitChannels, false)
	most, err := back.Uint(netif.KeyMaxQueues, 1<<16, 1)
	if err != nil || most < 1 {
		most = 1
	}
	feat.queues = int(min(most, uint64(d.cfg.queues())))

	feat.frontSG, feat.takes, feat.peer = true, d.cfg.Offload, offered(back, feat.backSG)
	c.feat = feat
	m := &pageMaker{dom: d.domain, peer: dom(xd), log: d.log, lost: &d.lost, c: c}
	keys := xenbus.Values{
		netif.KeyRequestRxCopy:   "1",
		netif.KeyFeatureRxNotify: "1",
		netif.KeyFeatureSG:       "1",
	}
	maps.Copy(keys, offloadValues(feat.takes))
	stale := []string{
		netif.KeyTxRingRef, netif.KeyRxRingRef, netif.KeyEventChannel, netif.KeyEventChannelTx,
		netif.KeyEventChannelRx, netif.KeyNumQueues, netif.KeyFeatureGSOTCPv4, netif.KeyFeatureGSOTCPv6,
		netif.KeyFeatureIPv6CsumOffload, netif.KeyRequestMulticast, netif.KeyCtrlRingRef,
		netif.KeyEventChannelCtrl, netif.KeyXDPHeadroom,
	}
	for i := range d.cfg.queues() {
		stale = append(stale, netif.KeyQueuePrefix+strconv.Itoa(i))
	}
	if back.Has(netif.KeyMaxQueues) {
		keys[netif.KeyNumQueues] = strconv.Itoa(feat.queues)
	}
	for i := range feat.queues {
		q, err := m.frontQueue(feat, &d.cfg, d.rx[i].count, d.tx[i].count)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		c.queues = append(c.queues, q)
		prefix := ""
		if feat.queues > 1 {
			prefix = netif.KeyQueuePrefix + strconv.Itoa(i) + "/"
		}
		maps.Copy(keys, q.keys.values(prefix))
	}
	return xd.Publish(ctx, keys, stale...)
}

// values is how a queue's keys are written below prefix.
func (k queueKeys) values(prefix string) xenbus.Values {
	number := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	v := xenbus.Values{
		prefix + netif.KeyTxRingRef: number(uint32(k.txRing)),
		prefix + netif.KeyRxRingRef: number(uint32(k.rxRing)),
	}
	if k.txPort == k.rxPort {
		v[prefix+netif.KeyEventChannel] = number(uint32(k.txPort))
	} else {
		v[prefix+netif.KeyEventChannelTx] = number(uint32(k.txPort))
		v[prefix+netif.KeyEventChannelRx] = number(uint32(k.rxPort))
	}
	return v
}
