package pvnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// A ServeConfig holds the options of a backend. The zero ServeConfig suits a driver
// domain whose toolstack runs hotplug scripts.
type ServeConfig struct {
	Config // for every device; LendRx has no effect

	// Type is the backend type: the directories served are backend/<Type>/... . "" means
	// "vif". Linux's netback does not bind to vifs of any other type.
	Type string

	// Hotplug makes the backend write hotplug-status itself, for a toolstack without a
	// hotplug script. Otherwise the backend does not go to Connected before somebody has
	// written "connected".
	Hotplug bool

	// Remove makes the backend remove a vif's directory once the vif is gone for good.
	// The toolstack does that in dom0; in a driver domain nobody else does.
	Remove bool
}

// Serve runs the backend of every vif whose directory is under our type, now or later.
// For each vif it makes a Device and calls accept with it, on a goroutine of its own. The
// link comes up when the frontend connects, and again when the frontend comes back. The
// device ends when the toolstack removes the vif.
//
// Serve does not touch a vif that another process serves, and tries to claim it again, at
// first often, in the end twice a minute. If a device ended before its vif was removed,
// the vif is served again once the toolstack has made it anew. Serve returns when ctx
// ends, with the cause of ctx, after every device has disconnected, all at the same time
// and each as [Device.Disconnect] does, and after every accept has returned.
func Serve(ctx context.Context, domain hypercall.Domain, cfg ServeConfig, accept func(*Device)) error {
	err := serve(ctx, domain, cfg, accept)
	if ctx.Err() != nil { // the cause matters more than what it interrupted
		err = context.Cause(ctx)
	}
	return fmt.Errorf("pvnet: serve: %w", err)
}

func serve(ctx context.Context, domain hypercall.Domain, cfg ServeConfig, accept func(*Device)) error {
	if cfg.Type == "" {
		cfg.Type = "vif"
	}
	if err := cfg.check(domain); err != nil {
		return err
	}
	store := xenstore.Config{Logger: cfg.Logger}
	if domain.ID() != 0 { // only domain 0 has no quota and may read everything
		store.Watches = watchesEach
	}
	client, err := xenstore.Dial(ctx, domain.Store, store)
	if err != nil {
		return err
	}
	defer client.Close()
	backs, err := xenbus.WatchBackends(ctx, client, cfg.Type)
	if err != nil {
		return err
	}
	defer backs.Close()

	presence, err := xenbus.NewPresence(domain)
	if err != nil && cfg.Logger != nil { // without a presence, the next backend waits longer for our claim
		cfg.Logger.Warn("no event channel to show that this backend lives", "err", err)
	}
	defer presence.Close() // after every claim has been given back

	var wg sync.WaitGroup
	defer wg.Wait()
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(ErrDisconnected)
	s := &server{presence: presence, client: client, domain: domain, cfg: cfg, accept: accept, busy: make(map[xenbus.BackendID]bool)}
	for {
		ev, err := s.next(ctx, backs)
		if err != nil {
			return err
		}
		id := ev.BackendID
		if ev.Vanished || s.busy[id] { // the vif's goroutine sees the event too
			continue
		}
		s.busy[id] = true
		wg.Go(func() {
			s.keep(inner, id)
			s.leave(id)
		})
	}
}

// watchesEach is how many frontends a backend watches with a watch each: a quarter of the
// watches that xenstored allows its domain, which has other users of them too.
const watchesEach = 32

// A server serves directories, each on a goroutine of its own. A failure of one vif does
// not affect the others.
type server struct {
	client   *xenstore.Client
	presence *xenbus.Presence // nil: none
	domain   hypercall.Domain
	cfg      ServeConfig
	accept   func(*Device)
	busy     map[xenbus.BackendID]bool // a goroutine serves it, or has left it

	mu   sync.Mutex
	left []xenbus.BackendID // guarded by mu: vifs that their goroutines have left
	wake func()             // guarded by mu: ends the backs.Next under way
}

// next waits for a directory that came or went. When a goroutine has left its vif, next
// makes backs report that vif again: it may have gone and come back meanwhile, and no
// event says so.
func (s *server) next(ctx context.Context, backs *xenbus.Backends) (xenbus.BackendEvent, error) {
	for {
		c, stop := context.WithCancel(ctx)
		s.mu.Lock()
		left := s.left
		s.left, s.wake = nil, stop
		s.mu.Unlock()
		for _, id := range left {
			delete(s.busy, id)
			backs.Forget(id)
		}
		ev, err := backs.Next(c)
		woken := c.Err() != nil
		stop()
		if err == nil || !woken || ctx.Err() != nil {
			return ev, err
		}
	}
}

func (s *server) leave(id xenbus.BackendID) {
	s.mu.Lock()
	s.left = append(s.left, id)
	wake := s.wake
	s.mu.Unlock()
	wake()
}

// keep serves one directory until it is removed or made anew, or ctx ends.
func (s *server) keep(ctx context.Context, id xenbus.BackendID) {
	log := slog.New(slog.DiscardHandler)
	if s.cfg.Logger != nil {
		log = s.cfg.Logger.With("frontend", id.String())
	}
	said := ""
	for pause := retryFirst; ctx.Err() == nil; pause = min(2*pause, retryMost) {
		xd, err := s.claim(ctx, id)
		if err == nil {
			if b := s.serve(ctx, id, xd); !b.again {
				s.outlast(ctx, xd.Dir(), b.away)
			}
			return
		}
		none, ok := errors.AsType[*xenbus.NoDeviceError](err)
		if ok && !slices.Contains(none.Have, id.ID) || errors.Is(err, xenbus.ErrGone) {
			return
		}
		if ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			log.Warn("cannot serve a vif", "err", err)
		}
		rest(ctx, pause)
	}
}

// claim opens a directory and claims it. It fails if another process serves it.
func (s *server) claim(ctx context.Context, id xenbus.BackendID) (*xenbus.Device, error) {
	xd, err := xenbus.OpenBackend(ctx, s.client, s.cfg.Type, id.Front, id.ID)
	if err != nil {
		return nil, err
	}
	if err := xd.ClaimAs(ctx, s.presence, claimPatience); err != nil {
		closing, cancel := context.WithTimeout(context.Background(), storePatience)
		defer cancel()
		if own := xd.Current().Own; errors.Is(err, xenstore.ErrQuota) && (own == xenbus.Initialising || own == xenbus.Unknown) {
			// Nobody else serves the vif: there was no claim, and the quota has no room
			// for ours. The state tells the frontend that it waits in vain, even if the
			// quota leaves no room for a reason.
			xd.Tell(closing, err)
			xd.SetState(closing, xenbus.Closed)
		}
		xd.Close(closing)
		return nil, err
	}
	return xd, nil
}

// serve runs one device until it ends, and accept with it.
func (s *server) serve(ctx context.Context, id xenbus.BackendID, xd *xenbus.Device) *back {
	d := newDevice(id.ID, telemetry.Backend, s.domain, s.cfg.Config)
	d.log = d.log.With("frontend", id.String())
	b := &back{d: d, cfg: &s.cfg}
	d.mu.Lock()
	d.peer = dom(xd) // accept may ask before there is a connection
	d.mu.Unlock()
	if err := b.identify(ctx, xd); err != nil { // attach tries again
		d.identify(backMAC, d.MTU(), true)
	}
	d.start(xd, xenbus.Backend, b, nil, func() {})
	stop := context.AfterFunc(ctx, func() {
		cause := context.Cause(ctx)
		if cause != ErrHandover && cause != ErrDisconnected {
			cause = &endedError{cause}
		}
		d.stop(cause)
	})
	s.accept(d)
	<-d.done
	stop()
	return b
}

// outlast waits, after a device has ended, until the toolstack has removed or remade its
// directory. The device left the state Closed there; away reports that the toolstack had
// already asked for the removal.
func (s *server) outlast(ctx context.Context, dir string, away bool) {
	w, err := s.client.Watch(ctx, dir)
	if err != nil {
		return
	}
	defer w.Close()
	for {
		state, err := s.client.Read(ctx, dir+"/"+netif.KeyState)
		online := "0"
		if err == nil && away {
			online, err = s.client.Read(ctx, dir+"/"+netif.KeyOnline)
		}
		switch {
		case errors.Is(err, xenstore.ErrNotFound), errors.Is(err, xenstore.ErrAccess):
			return
		case err == nil && (state == strconv.Itoa(int(xenbus.Initialising)) || online != "0"):
			return
		case err != nil && ctx.Err() == nil:
			rest(ctx, retryFirst)
			continue
		}
		select {
		case _, open := <-w.C():
			if !open {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// rest waits for a while, or until ctx ends.
func rest(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// claimPatience is how long another backend of this domain may take to answer that it
// lives. The challenge asks for nothing else.
const claimPatience = time.Second

// A back is the backend's part of a life.
type back struct {
	d   *Device
	cfg *ServeConfig

	// Set at the end of the life.
	again bool // the toolstack has made another directory in its place
	away  bool // the toolstack removed the vif, or asked for it
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
	for _, key := range []string{netif.KeyFeatureNoCsumOffload, netif.KeyFeatureIPv6CsumOffload,
		netif.KeyFeatureGSOTCPv4, netif.KeyFeatureGSOTCPv6} {
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

// published reads all keys that a connection is made from. It reads the rings of the
// requested queues only, since each key is a round trip.
func (b *back) published(ctx context.Context, xd *xenbus.Device) (xenstore.Values, error) {
	keys := []string{netif.KeyFeatureNoCsumOffload, netif.KeyFeatureIPv6CsumOffload,
		netif.KeyFeatureGSOTCPv4, netif.KeyFeatureGSOTCPv6, netif.KeyRequestRxCopy, netif.KeyFeatureSG, netif.KeyNumQueues}
	prefixes := []string{""}
	asked, err := xd.PeerValues(ctx, netif.KeyNumQueues)
	if err != nil {
		return nil, err
	}
	if n, err := asked.Uint(netif.KeyNumQueues, uint64(b.cfg.queues()), 1); err == nil && n > 1 {
		prefixes = nil
		for i := range int(n) {
			prefixes = append(prefixes, queuePrefix(i))
		}
	}
	for _, prefix := range prefixes {
		keys = append(keys, prefix+netif.KeyTxRingRef, prefix+netif.KeyRxRingRef,
			prefix+netif.KeyEventChannel, prefix+netif.KeyEventChannelTx, prefix+netif.KeyEventChannelRx)
	}
	return xd.PeerValues(ctx, keys...)
}

func (b *back) same(ctx context.Context, xd *xenbus.Device, c *conn) (bool, error) {
	v, err := b.published(ctx, xd)
	if errors.Is(err, xenstore.ErrAccess) { // the frontend's directory is no longer ours to read
		return false, nil
	}
	return maps.Equal(v, c.made), err
}

// queuePrefix returns the directory of queue i's xenstore keys, for a vif with several
// queues.
func queuePrefix(i int) string { return netif.KeyQueuePrefix + strconv.Itoa(i) + "/" }

// attach maps the rings that the frontend published, after it has checked every value.
func (b *back) attach(ctx context.Context, xd *xenbus.Device, c *conn) error {
	if err := b.identify(ctx, xd); err != nil {
		return err
	}
	v, err := b.published(ctx, xd)
	if err != nil {
		return err
	}
	c.made = v
	if ok, err := v.Bool(netif.KeyRequestRxCopy, false); !ok {
		return errors.Join(errors.New("the frontend does not ask for rx-copy, the only way to send to it"), err)
	}
	var feat features
	feat.frontSG, _ = v.Bool(netif.KeyFeatureSG, false) // an unreadable value counts as no offer
	feat.takes, feat.peer = b.cfg.Offload, offered(v, feat.frontSG)
	n, err := v.Uint(netif.KeyNumQueues, uint64(b.cfg.queues()), 1)
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("the frontend asks for 0 queues")
	}
	feat.queues = int(n)
	keys := make([]queueKeys, feat.queues)
	refs, ports := make(map[hypercall.GrantRef]bool), make(map[hypercall.PortID]int)
	for i := range keys {
		prefix := ""
		if feat.queues > 1 {
			prefix = queuePrefix(i)
		}
		k, err := parseKeys(v, prefix)
		if err != nil {
			return err
		}
		for _, ref := range []hypercall.GrantRef{k.txRing, k.rxRing} {
			if refs[ref] {
				return fmt.Errorf("grant %d is said to be two rings", ref)
			}
			refs[ref] = true
		}
		for _, port := range []hypercall.PortID{k.txPort, k.rxPort} {
			if q, used := ports[port]; used && q != i {
				return fmt.Errorf("event channel %d is said to be of two queues", port)
			}
			ports[port] = i
		}
		keys[i] = k
		feat.split = k.txPort != k.rxPort
	}
	feat.backSG = true
	c.feat = feat
	m := &pageMaker{dom: b.d.domain, peer: dom(xd), log: b.d.log, lost: &b.d.lost, c: c, lockedThreads: b.d.cfg.LockedThreads}
	for i, k := range keys {
		q, err := m.backQueue(feat, k, &b.d.cfg, b.d.rx[i].count, b.d.tx[i].count)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		c.queues = append(c.queues, q)
	}
	return nil
}

// parseKeys reads the keys of one queue: two event channels, or one for both directions.
func parseKeys(v xenstore.Values, prefix string) (k queueKeys, err error) {
	number := func(key string) uint32 {
		n, e := v.Uint(prefix+key, 1<<32-1, 0)
		if e == nil && n == 0 { // no gref and no port is ever 0
			e = fmt.Errorf("%s%s is missing", prefix, key)
		}
		if e != nil && err == nil {
			err = e
		}
		return uint32(n)
	}
	k.txRing = hypercall.GrantRef(number(netif.KeyTxRingRef))
	k.rxRing = hypercall.GrantRef(number(netif.KeyRxRingRef))
	if v.Has(prefix + netif.KeyEventChannelTx) {
		k.txPort = hypercall.PortID(number(netif.KeyEventChannelTx))
		k.rxPort = hypercall.PortID(number(netif.KeyEventChannelRx))
	} else {
		k.txPort = hypercall.PortID(number(netif.KeyEventChannel))
		k.rxPort = k.txPort
	}
	return k, err
}

// finished removes the directory of a vif that is gone for good, if the config says so.
func (b *back) finished(ctx context.Context, xd *xenbus.Device, anew bool) {
	ch := xd.Current()
	b.again, b.away = anew || ch.Lost, ch.Gone || !ch.Online
	if away := anew || ch.Gone || ch.Vanished || !ch.Online; away && !ch.Lost {
		if b.cfg.Remove && !anew && !ch.Gone {
			if err := xd.Remove(ctx); err != nil {
				b.d.log.Warn("cannot remove the vif's directory", "err", err)
			}
		}
		xd.Fail(ctx, nil) // removes the error node: the vif no longer fails to connect
	}
	b.d.finish()
}
