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
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// global is the only state of the package: every frontend of the process, so that a
// second Connect finds the first, and the slow tick that the devices of a domain share.
var global = struct {
	mu      sync.Mutex
	devices map[deviceKey]*entry // guarded by mu
	clocks  map[any]*clock       // guarded by mu; by hypercall.Domain, for domains with devices
}{devices: make(map[deviceKey]*entry), clocks: make(map[any]*clock)}

type deviceKey struct {
	domain hypercall.Domain
	id     string
}

// An entry is a device from the first call of Connect until all of it is freed.
type entry struct {
	cfg   Config
	ready chan struct{} // closed when dev or err is set
	gone  chan struct{} // closed when the entry has been removed from devices
	dev   *Device
	err   error
}

// failed reports whether the attempt is over and has failed.
func (e *entry) failed() bool {
	select {
	case <-e.ready:
		return e.err != nil
	default:
		return false
	}
}

// Connect returns the frontend of this domain's vif id ("0") once it is connected. It
// waits for the toolstack to finish the vif and for the backend to answer, until ctx
// ends. The error then names the states that it saw, or what xenstore refused last.
//
// A second Connect with the same domain and id returns the same device, and needs the
// same Config. One Disconnect ends the device for every caller.
//
// If id is no vif of the domain, the error lists its vifs ([xenbus.NoDeviceError]). A
// device that does not connect is closed before Connect returns. After ctx has ended,
// Connect waits at most one more second for that. If xenstore or the peer does not
// answer, the closing continues in the background, and a Connect that comes meanwhile
// waits for it.
func Connect(ctx context.Context, domain hypercall.Domain, id string, cfg Config) (*Device, error) {
	if err := cfg.check(domain); err != nil {
		return nil, fmt.Errorf("pvnet: connect vif %s: %w", id, err)
	}
	key := deviceKey{domain, id}
	for {
		global.mu.Lock()
		e, there := global.devices[key]
		if !there {
			e = &entry{cfg: cfg, ready: make(chan struct{}), gone: make(chan struct{})}
			global.devices[key] = e
		}
		global.mu.Unlock()
		if !there {
			e.dev, e.err = connect(ctx, domain, id, cfg, func() {
				global.mu.Lock()
				delete(global.devices, key)
				global.mu.Unlock()
				close(e.gone)
			})
			close(e.ready)
			return e.dev, e.err
		}
		failed := e.failed() // before this call began
		if !failed && !e.cfg.equal(cfg) {
			return nil, fmt.Errorf("pvnet: vif %s is connected with another Config", id)
		}
		select {
		case <-e.ready:
		case <-ctx.Done():
			return nil, fmt.Errorf("pvnet: connect vif %s: %w", id, context.Cause(ctx))
		}
		switch {
		case failed || errors.Is(e.err, context.Canceled) || errors.Is(e.err, context.DeadlineExceeded):
			// The other caller's context ended, or its attempt failed before this one
			// began: try again.
		case e.err != nil:
			return nil, e.err
		case !e.dev.leaving.Load() && e.dev.word.Load() != linkGone:
			return e.dev, nil
		}
		select {
		case <-e.gone:
		case <-ctx.Done():
			return nil, fmt.Errorf("pvnet: connect vif %s: %w", id, context.Cause(ctx))
		}
	}
}

// connect makes the device and connects it. forget runs once all of it is freed.
func connect(ctx context.Context, domain hypercall.Domain, id string, cfg Config, forget func()) (d *Device, err error) {
	begun := false
	defer func() {
		if err != nil {
			err = fmt.Errorf("pvnet: connect vif %s: %w", id, err)
		}
		if !begun {
			forget()
		}
	}()
	client, err := xenstore.Dial(ctx, domain.Store, xenstore.Config{Logger: cfg.Logger})
	if err != nil {
		return nil, err
	}
	xd, err := xenbus.OpenFrontend(ctx, client, "vif", id)
	if err != nil {
		client.Close()
		return nil, err
	}
	d = newDevice(id, telemetry.Frontend, domain, cfg)
	first := make(chan error, 1)
	begun = true
	f := &front{d: d}
	d.start(xd, xenbus.Frontend, f, first, func() {
		client.Close()
		forget()
	})
	select {
	case err = <-first:
		if err == nil {
			return d, nil
		}
		select {
		case <-d.done:
			return nil, err
		case <-ctx.Done():
		}
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectGrace)
	defer cancel()
	if err == nil {
		err = f.because(grace, d.late(xd, context.Cause(ctx)), xd)
		d.stop(err)
	}
	select {
	case <-d.done:
	case <-grace.Done():
	}
	return nil, err
}

// connectGrace is how long Connect waits, once its context has ended, for a device
// that did not connect to be closed.
const connectGrace = time.Second

// late returns the error of a Connect that gives up: why the device is not connected yet.
func (d *Device) late(xd *xenbus.Device, cause error) error {
	trouble := xd.Trouble()
	if step := d.trouble.Load(); step != nil {
		trouble = *step
	}
	if trouble != nil {
		return fmt.Errorf("%w; given up: %w", trouble, cause)
	}
	ch := xd.Current()
	return &xenbus.WaitError{Dir: xd.Dir(), Own: ch.Own, Seen: xd.Seen(), Err: cause}
}

// start starts the life goroutine. after runs at the very end of the device.
func (d *Device) start(xd *xenbus.Device, kind xenbus.Role, r role, first chan error, after func()) {
	ctx, stop := context.WithCancelCause(context.Background())
	d.stop = stop
	d.mirror(dom(xd))
	l := &life{d: d, xd: xd, role: r, kind: kind, first: first}
	l.whole, l.giveUp = context.WithCancel(context.Background())
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

// mirror shows the counters under the name of the vif, which changes if the peer is in
// another domain now.
func (d *Device) mirror(peer hypercall.DomID) {
	info := telemetry.Info{
		Role: d.role, Own: uint16(d.domain.ID()), Peer: uint16(peer), Queues: d.cfg.queues(),
	}
	if n, err := strconv.ParseUint(d.id, 10, 32); err == nil {
		info.Handle = uint32(n)
	}
	if d.named == info {
		return
	}
	if d.named != (telemetry.Info{}) {
		d.set.Close()
	}
	d.named = info
	d.set.Open(d.cfg.Counters, info)
}

// A front is the frontend's part of a life.
type front struct {
	d    *Device
	made MAC // the address made for a vif that has none; zero until it is needed
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
		if f.made == (MAC{}) {
			rand.Read(f.made[:])
			f.made[0] = f.made[0]&^1 | 2 // unicast, locally administered
		}
		mac = f.made
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

// mtuOf returns the MTU in the values of the vif's directory; 1500 if there is no usable
// one.
func (d *Device) mtuOf(own xenstore.Values) int {
	mtu, err := own.Uint(netif.KeyMTU, MaxFrame, 1500)
	if err != nil || mtu < 68 { // RFC 791: every link must carry 68 bytes
		d.log.Warn("no usable MTU in xenstore", "vif", d.id, "value", own[netif.KeyMTU], "err", err)
		return 1500
	}
	return int(mtu)
}

// because adds to a WaitError why the backend does not connect, as far as xenstore tells.
func (f *front) because(ctx context.Context, err error, xd *xenbus.Device) error {
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

func (f *front) prepare(context.Context, *xenbus.Device) error  { return nil }
func (f *front) finished(context.Context, *xenbus.Device, bool) { f.d.finish() }

// same reports true: the rings are the frontend's own, and no backend replaces them.
func (f *front) same(context.Context, *xenbus.Device, *conn) (bool, error) { return true, nil }

// attach makes rings and pages to match the backend's offer, and publishes them.
func (f *front) attach(ctx context.Context, xd *xenbus.Device, c *conn) error {
	d := f.d
	if err := f.identify(ctx, xd); err != nil {
		return err
	}
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
	feat.backSG, _ = back.Bool(netif.KeyFeatureSG, false) // an unreadable value counts as no offer
	feat.split, _ = back.Bool(netif.KeyFeatureSplitChannels, false)
	most, err := back.Uint(netif.KeyMaxQueues, 1<<16, 1)
	if err != nil || most < 1 {
		most = 1
	}
	feat.queues = int(min(most, uint64(d.cfg.queues())))

	feat.frontSG, feat.takes, feat.peer = true, d.cfg.Offload, offered(back, feat.backSG)
	c.feat = feat
	m := &pageMaker{dom: d.domain, peer: dom(xd), log: d.log, lost: &d.lost, c: c, lockedThreads: d.cfg.LockedThreads}
	keys := xenstore.Values{
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
	there, err := xd.OwnKeys(ctx)
	if err != nil {
		return err
	}
	// Only existing keys are removed, since each removal is a round trip.
	stale = slices.DeleteFunc(stale, func(key string) bool { return !slices.Contains(there, key) })
	for _, key := range there { // an earlier program may have published more queues
		if strings.HasPrefix(key, netif.KeyQueuePrefix) {
			stale = append(stale, key)
		}
	}
	c.queues, err = m.frontQueues(feat, &d.cfg, f.others(ctx, xd), func(i int) (rx, tx *telemetry.Block) { return d.rx[i].count, d.tx[i].count })
	if err != nil {
		if errors.Is(err, hypercall.ErrNoGrants) {
			err = fmt.Errorf("%w%s", err, d.holders())
		}
		return err
	}
	feat.queues = len(c.queues)
	c.feat.queues = feat.queues
	if back.Has(netif.KeyMaxQueues) {
		keys[netif.KeyNumQueues] = strconv.Itoa(feat.queues)
	}
	for i, q := range c.queues {
		prefix := ""
		if feat.queues > 1 {
			prefix = queuePrefix(i)
		}
		maps.Copy(keys, q.keys.values(prefix))
	}
	return xd.Publish(ctx, keys, stale...)
}

// others returns how many more vifs of this domain may connect: their pages come from the
// same limit.
func (f *front) others(ctx context.Context, xd *xenbus.Device) int {
	n, err := xd.Unconnected(ctx)
	if err != nil {
		f.d.log.Debug("cannot count the domain's other vifs", "vif", f.d.id, "err", err)
	}
	return n
}

// holders names the other vifs of this program that hold pages under the same limit, as
// the end of an error message.
func (d *Device) holders() string {
	var held []string
	global.mu.Lock()
	defer global.mu.Unlock()
	for key, e := range global.devices {
		if key.domain != d.domain || key.id == d.id {
			continue
		}
		select {
		case <-e.ready:
			if e.dev != nil && e.dev.Budget().SharedPages > 0 {
				held = append(held, fmt.Sprintf("vif %s holds %d pages", key.id, e.dev.Budget().SharedPages))
			}
		default:
		}
	}
	if held == nil {
		return ""
	}
	slices.Sort(held)
	return "; of this program, " + strings.Join(held, ", ") + ": fewer Config.Queues there leave more here"
}

// values returns the queue's xenstore keys, with prefix before each.
func (k queueKeys) values(prefix string) xenstore.Values {
	number := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	v := xenstore.Values{
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
