package pvnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
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
	Config // for every device

	// Type is the backend type: the directories served are backend/<Type>/... . "" means
	// "vif". Linux's netback does not bind to vifs of any other type.
	Type string

	// Hotplug makes the backend write hotplug-status itself, for a toolstack without a
	// hotplug script. Otherwise the backend does not go to Connected before somebody has
	// written "connected".
	Hotplug bool

	// Hold keeps each vif in state Initialising, so that neither its frontend nor the
	// toolstack goes on, until accept has called [Device.Offer] or [Device.Refuse]: until
	// the network behind the vif is there. Offer and Refuse then take the place of Hotplug.
	Hold bool

	// Select says which vifs are served, by the number of the frontend's domain and the vif's
	// id. Serve does not touch those for which it returns false: another process may serve them.
	// It is asked in one goroutine, and again when such a vif is made anew. nil: all are.
	Select func(front hypercall.DomID, id string) bool

	// Remove makes the backend remove a vif's directory once the vif is gone for good, also if
	// its device ended before.
	// The toolstack does that in dom0; in a driver domain nobody else does.
	Remove bool

	// DrainTimeout is how long frames wait for a frontend that takes none, in calls that
	// wait for room: SendWait, Write, Writev and WriteBatch. Then they are dropped and
	// counted as [telemetry.DropGuestStalled], and the call returns as if they were sent.
	// Once the frontend has taken nothing for that long, such calls drop at once what finds
	// no room, so that a frontend that has stopped delays its sender once. The time is
	// kept to two seconds. 0 means 10 s, as in Linux's netback; a negative time means that
	// calls wait for ever. At least 1 ms and at most a day.
	//
	// A frontend that does not write feature-rx-notify gets 30 ms at most, as from netback.
	DrainTimeout time.Duration

	// StallTimeout is how long a frontend may take nothing, although there were frames for
	// it, before the carrier goes off: [LinkEvent].Stalled. It is on again when the frontend
	// takes frames. A link.Joint passes the carrier on to its TAP, whose kernel then drops
	// frames early. 0 means 60 s, as in Linux's netback; a negative time means never. At
	// least 1 s and at most a day. For a frontend that does not write feature-rx-notify the
	// carrier stays on, as netback's does.
	StallTimeout time.Duration

	// TakeOver asks the process that serves vif id of domain front now to hand it over.
	// It returns nil if no process does. Serve calls it once for each directory, before it
	// tries to claim the vif, and not again after it failed; package
	// barevif/pvnet/handover has one. nil: Serve only claims vifs that nobody serves.
	TakeOver func(ctx context.Context, front hypercall.DomID, id string) (*TakenVif, error)

	// MayTake is called before TakeOver, with what the toolstack wrote about the vif. An error
	// says why the vif is not to be taken over: TakeOver is not called, and the process that
	// serves the vif goes on with it until it ends. Then Serve claims the vif as any other, and
	// accept decides about it. It must not block, and may be called for several vifs at once. nil:
	// TakeOver is called for each.
	MayTake func(front hypercall.DomID, id string, says Toolstack) error
}

// Serve runs the backend of every vif whose directory is under our type, now or later.
// For each vif it makes a Device and calls accept with it, on a goroutine of its own. The
// link comes up when the frontend connects, and again when the frontend comes back. The
// device ends when the toolstack removes the vif.
//
// A guest sends no faster than the toolstack's key "rate" of its vif says: so many bytes
// every so many microseconds, as xl's option rate writes it. The limit holds for the vif,
// over all its queues and connections, and follows the key while the link is up. Frames
// that have to wait for it stay in the guest's ring. What Linux's netback does with a burst,
// or with a frame longer than its credit, Serve does too; but netback gives each queue the
// whole rate. A value that cannot be read is logged, and leaves the limit as it was.
//
// Serve does not touch a vif that another process serves, and tries to claim it again, at
// first often, in the end twice a minute. If a device ended before its vif was removed,
// the vif is served again once the toolstack has made its directory again. Until then Serve sees
// to it that its state is Closed: Disconnect may have ended before xenstore took that. Serve returns when ctx
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
	if err := errors.Join(cfg.check(domain), cfg.checkTimeouts()); err != nil {
		return err
	}
	cfg.Config = cfg.Config.resolve()
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
		if cfg.Select != nil && !cfg.Select(id.Front, id.ID) {
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
	mappings atomic.Int64              // for static grants: how many mappings all vifs have

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
	if s.takeOver(ctx, id, log) {
		return
	}
	said := ""
	for pause := retryFirst; ctx.Err() == nil; pause = min(2*pause, retryMost) {
		xd, err := s.claim(ctx, id)
		if err == nil {
			s.afterwards(ctx, xd, s.runDevice(ctx, id, xd))
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

// afterwards waits, once device b has ended, until its vif may be served again.
func (s *server) afterwards(ctx context.Context, xd *xenbus.Device, b *back) {
	b.d.mu.Lock()
	reclaim := b.d.reclaim
	b.d.mu.Unlock()
	switch {
	case reclaim != nil:
		select {
		case <-reclaim:
		case <-ctx.Done():
		}
	case !b.replaced:
		s.awaitRemoval(ctx, xd, b.removed)
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
	b := s.newBack(ctx, id, xd)
	b.d.start(xd, b, nil, func() {})
	s.await(ctx, b)
	return b
}

// newBack makes a device that has not started.
func (s *server) newBack(ctx context.Context, id xenbus.BackendID, xd *xenbus.Device) *back {
	d := newDevice(id.ID, telemetry.Backend, s.domain, s.cfg.Config)
	d.log = d.log.With("frontend", id.String())
	b := &back{d: d, cfg: &s.cfg, mappings: &s.mappings}
	d.own = xd.OwnValues
	if !s.cfg.Hold {
		d.verdict.Store(&verdict{script: !s.cfg.Hotplug})
	}
	d.mu.Lock()
	d.peer = dom(xd) // accept may ask before there is a connection
	d.mu.Unlock()
	if err := b.identify(ctx, xd); err != nil { // attach tries again
		d.identify(backMAC, d.MTU(), true)
	}
	b.toldMTU = d.MTU() // the toolstack writes it to both directories
	return b
}

// await runs accept with a device that has started, until both have ended.
func (s *server) await(ctx context.Context, b *back) {
	d := b.d
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
}

// awaitRemoval waits, after device xd has ended, until the toolstack has removed or remade its
// directory. away reports that the toolstack had already asked for the removal.
//
// The device left the state Closed there, unless xenstore took longer for it than Disconnect
// may. Then awaitRemoval writes it, since nobody else would: the frontend and the toolstack wait
// for that state. The same holds for what the toolstack asks for later.
func (s *server) awaitRemoval(ctx context.Context, xd *xenbus.Device, away bool) {
	w, err := s.client.Watch(ctx, xd.Dir())
	if err != nil {
		return
	}
	defer w.Close()
	ours := true                           // no other process has served the vif since
	pause, next := retryFirst, time.Time{} // when to try again to close the vif
	for {
		state, online, err := s.stateOf(ctx, xd.Dir())
		var retry <-chan time.Time
		switch {
		case errors.Is(err, xenstore.ErrNotFound), errors.Is(err, xenstore.ErrAccess):
			return
		case err == nil && (state == xenbus.Initialising || away && online):
			return
		case err != nil && ctx.Err() == nil:
			sleep(ctx, retryFirst)
			continue
		case err != nil:
			return
		case state == xenbus.Closed && (online || !s.cfg.Remove):
			ours = false
		case online && !ours:
		case time.Now().Before(next):
			retry = time.After(time.Until(next))
		default:
			err := s.close(ctx, xd, !online && s.cfg.Remove)
			if errors.Is(err, xenbus.ErrClaimed) {
				ours = false
			}
			if err != nil {
				next = time.Now().Add(pause)
				pause = min(2*pause, retryMost)
			}
			continue
		}
		select {
		case _, open := <-w.C():
			if !open {
				return
			}
		case <-retry:
		case <-ctx.Done():
			return
		}
	}
}

// stateOf reads our state in a backend's directory, and whether the toolstack wants the vif.
func (s *server) stateOf(ctx context.Context, dir string) (state xenbus.State, online bool, err error) {
	text, err := s.client.Read(ctx, dir+"/"+netif.KeyState)
	if err != nil {
		return 0, false, err
	}
	wanted, err := s.client.Read(ctx, dir+"/"+netif.KeyOnline)
	if errors.Is(err, xenstore.ErrNotFound) {
		wanted, err = "1", nil
	}
	n, _ := xenstore.ParseUint(text, uint64(xenbus.Reconfigured)) // what is no state is Unknown
	return xenbus.State(n), wanted != "0", err
}

// close does for the vif of a device that has ended what the device had no time for: it writes the
// state Closed, and with remove it removes the directory.
func (s *server) close(ctx context.Context, xd *xenbus.Device, remove bool) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := xd.ClaimAs(ctx, s.presence, claimTimeout); err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.Background(), storeTimeout)
		defer cancel()
		xd.Close(closing)
	}()
	if err := xd.SetState(ctx, xenbus.Closed); err != nil || !remove {
		return err
	}
	return xd.Remove(ctx)
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
