package pvnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
// the vif is served again once the toolstack has made its directory again. Serve returns when ctx
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
	s := &server{presence: presence, client: client, domain: domain, cfg: cfg, accept: accept, serving: make(map[xenbus.BackendID]bool)}
	for {
		ev, err := s.next(ctx, backs)
		if err != nil {
			return err
		}
		id := ev.BackendID
		if ev.Vanished || s.serving[id] { // the vif's goroutine sees the event too
			continue
		}
		s.serving[id] = true
		wg.Go(func() {
			s.serveDir(inner, id)
			s.release(id)
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
	serving  map[xenbus.BackendID]bool // its goroutine runs, or is among released

	mu       sync.Mutex
	released []xenbus.BackendID // guarded by mu: vifs that their goroutines have left
	wake     func()             // guarded by mu: ends the backs.Next under way
}

// next waits for a directory that came or went. When a goroutine has left its vif, next
// makes backs report that vif again: it may have gone and come back meanwhile, and no
// event says so.
func (s *server) next(ctx context.Context, backs *xenbus.Backends) (xenbus.BackendEvent, error) {
	for {
		c, stop := context.WithCancel(ctx)
		s.mu.Lock()
		left := s.released
		s.released, s.wake = nil, stop
		s.mu.Unlock()
		for _, id := range left {
			delete(s.serving, id)
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

func (s *server) release(id xenbus.BackendID) {
	s.mu.Lock()
	s.released = append(s.released, id)
	wake := s.wake
	s.mu.Unlock()
	wake()
}

// serveDir serves one directory until it is removed or replaced, or ctx ends.
func (s *server) serveDir(ctx context.Context, id xenbus.BackendID) {
	log := slog.New(slog.DiscardHandler)
	if s.cfg.Logger != nil {
		log = s.cfg.Logger.With("frontend", id.String())
	}
	said := ""
	for pause := retryFirst; ctx.Err() == nil; pause = min(2*pause, retryMost) {
		xd, err := s.claim(ctx, id)
		if err == nil {
			if b := s.runDevice(ctx, id, xd); !b.replaced {
				s.awaitRemoval(ctx, xd.Dir(), b.removed)
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
		sleep(ctx, pause)
	}
}

// claim opens a directory and claims it. It fails if another process serves it.
func (s *server) claim(ctx context.Context, id xenbus.BackendID) (*xenbus.Device, error) {
	xd, err := xenbus.OpenBackend(ctx, s.client, s.cfg.Type, id.Front, id.ID)
	if err != nil {
		return nil, err
	}
	if err := xd.ClaimAs(ctx, s.presence, claimTimeout); err != nil {
		closing, cancel := context.WithTimeout(context.Background(), storeTimeout)
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

// runDevice runs one device until it ends, and accept with it.
func (s *server) runDevice(ctx context.Context, id xenbus.BackendID, xd *xenbus.Device) *back {
	d := newDevice(id.ID, telemetry.Backend, s.domain, s.cfg.Config)
	d.log = d.log.With("frontend", id.String())
	b := &back{d: d, cfg: &s.cfg}
	d.mu.Lock()
	d.peer = dom(xd) // accept may ask before there is a connection
	d.mu.Unlock()
	if err := b.identify(ctx, xd); err != nil { // attach tries again
		d.identify(backMAC, d.MTU(), true)
	}
	d.start(xd, b, nil, func() {})
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

// awaitRemoval waits, after a device has ended, until the toolstack has removed or remade its
// directory. The device left the state Closed there; away reports that the toolstack had
// already asked for the removal.
func (s *server) awaitRemoval(ctx context.Context, dir string, away bool) {
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
			sleep(ctx, retryFirst)
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

// sleep waits for a while, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// claimTimeout is how long another backend of this domain has to answer the challenge of
// its claim ([xenbus.Device.ClaimAs]).
const claimTimeout = time.Second
