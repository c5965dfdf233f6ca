package pvnet

import (
	"context"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/xenbus"
)

// How long the lifecycle goroutine waits for the peer and for xenstore.
const (
	closeTimeout = 4 * time.Second // for the peer to answer Closing, on Disconnect
	endTimeout   = 6 * time.Second // for the whole end of a device, closeTimeout and storeTimeout included
	storeTimeout = 5 * time.Second // for one xenstore operation
	setupTimeout = time.Minute     // for the whole set-up of a connection, unless the device is to end
	retryFirst   = time.Second     // pause after a failed connect; doubles
	retryMost    = 30 * time.Second
)

// A end is the part of a lifecycle in which frontend and backend differ.
type end interface {
	// prepare publishes the features (backend).
	prepare(ctx context.Context, xd *xenbus.Device) error

	// attach reads and checks the keys that the peer published, and makes the connection. The
	// frontend's attach puts its own keys into the connection, and the caller publishes them. On
	// an error the caller runs the connection's undo list.
	attach(ctx context.Context, xd *xenbus.Device, c *conn) error

	// unchanged reports whether the peer still publishes the rings and event channels that
	// connection c was made from.
	unchanged(ctx context.Context, xd *xenbus.Device, c *conn) (bool, error)

	// settings reads the settings of the connection.
	settings(ctx context.Context, xd *xenbus.Device) (settings, error)

	// publish writes a setting that the device's user has changed (backend). It reports
	// false if there is none.
	publish(ctx context.Context, xd *xenbus.Device) (more bool, err error)

	// rest waits, while frames are still received, until nothing that was sent is on its way.
	// After an error the link is as before.
	rest(*lifecycle) error

	// pass makes the connection, which is at rest, ready for another process. After an
	// error it is as before.
	pass(*lifecycle, handoverTimes) (*passing, error)

	// ended runs after the device has ended, whether we or the toolstack ended it.
	// replaced: there is a new directory in its place; passed: another process goes on with
	// the connection.
	ended(ctx context.Context, xd *xenbus.Device, replaced, passed bool)
}

// A lifecycle is the one goroutine that moves a device through its states. Only it writes
// our xenbus state, and makes and frees connections; the slow tick does one tick's work in
// its place while it sleeps. Halves see the connection through Device.link and their gates,
// and report violations through a channel.
type lifecycle struct {
	d       *Device
	tickDue atomic.Bool // the slow tick asks the goroutine to do its work of this tick

	// mu is held by the goroutine except while it waits, so that the slow tick can do the
	// tick's work in its place. It guards the fields below.
	mu  sync.Mutex
	xd  *xenbus.Device
	end end

	stopping       context.Context // ends when the device is to end
	storeCtx       context.Context // context of every xenstore operation; ends endTimeout after the device is to end
	abandonStore   context.CancelFunc
	deadlineOnce   sync.Once
	endBy          time.Time // when storeCtx ends at the latest; set by limitEnd
	conn           *conn
	connGeneration uint32      // generation of conn, 0: none
	handingOver    bool        // another process is about to take the vif over: why the link goes down
	still          *standstill // the vif was taken over and has not moved a frame yet; nil: neither
	mirrorLate     bool        // openMirror is due, at the first slow tick of a link that is up
	running        bool        // the gates are open
	peerSeen       bool        // the peer has had its ends of all event channels at some time since resume
	absentSince    time.Time   // since when the peer's ports are closed, as far as we looked; zero: they are not
	peerLost       bool        // the peer has lost them since, but xenstore does not show it
	lostAt         xenbus.State
	ringsReplaced  bool   // the peer has made new rings: why the link goes down
	verifiedWrites uint64 // Change.PeerWrites for which conn was last verified
	readSettings   uint64 // Change.Settings for which the settings were last read

	cause   error     // why the device ends; nil: it does not
	forceAt time.Time // when to end without waiting for the peer any longer; set by beginEnd

	failedOn        *xenbus.Change // the change on which the last step failed
	retryAt         time.Time
	pause           time.Duration
	pace            pace
	repairPace      pace         // of repairs of our state after others wrote it
	settingsPace    pace         // of settings that change
	generation      uint32       // generation of the directory that pace is for; 0: none yet
	ticks           int          // slow ticks since the link came up
	state           xenbus.State // last written, for the event log
	firstResult     chan error   // gets the result of the first connect, once; then nil
	publishedReason string       // the reason, as in xenstore, why there is no connection
	reasonDue       bool         // the reason has to be removed, once the link is up: frames do not wait for that
	told            *verdict     // backend: the verdict that is in xenstore; nil: none yet

	carrierOffAt time.Time // when the carrier went off; meaningful while Device.stalled

	suspects  []suspect        // halves that may have missed an event
	recheckAt <-chan time.Time // when to look at the suspects again
}

// run is the body of the goroutine. The end of stop makes it end the device. It closes
// d.done.
func (l *lifecycle) run(stop context.Context) {
	debug.SetPanicOnFault(true)
	l.stopping = stop
	d := l.d
	defer close(d.done)
	defer l.abandonStore()
	context.AfterFunc(stop, func() {
		if context.Cause(stop) != ErrHandover {
			l.limitEnd()
		}
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.startTicks()()
	for l.cause != ErrHandover && !l.step() {
		var again <-chan time.Time
		if at := l.retryTime(); !at.IsZero() {
			again = time.After(time.Until(at))
		}
		ended := stop.Done()
		if l.cause != nil {
			ended = nil
		}
		recheck := l.recheckAt
		l.mu.Unlock()
		select {
		case _, open := <-l.xd.Changes():
			l.mu.Lock()
			if !open && l.cause == nil {
				l.beginEnd(&UnknownError{"watch the device", hypercall.ErrClosed})
			}
			if !open {
				l.forceAt = time.Now()
			}
		case v := <-d.violations:
			l.mu.Lock()
			l.peerViolated(v)
		case <-ended:
			l.mu.Lock()
			l.beginEnd(context.Cause(stop))
		case <-again:
			l.mu.Lock()
		case <-d.wake:
			l.mu.Lock()
			if l.tickDue.Swap(false) {
				l.tick()
			}
			l.showLate()
		case <-recheck:
			l.mu.Lock()
			l.rescue()
		case r := <-d.handOvers:
			l.mu.Lock()
			r.err <- l.handOver(r)
		}
	}
	l.limitEnd()
	l.detach()
	l.d.logs.CatchUp(true)
	ctx, cancel := l.storeContext()
	l.end.ended(ctx, l.xd, l.dirReplaced(), l.cause == ErrHandover)
	cancel()
	if l.cause == nil {
		l.cause = ErrDisconnected
	}
	d.finishWith(l.cause)
	l.reportFirst(l.cause)
}

// storeContext returns the context for one xenstore operation.
func (l *lifecycle) storeContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(l.storeCtx, storeTimeout)
}

// limitEnd limits the time for the end of the device to endTimeout. All xenstore operations
// share it, those under way included.
func (l *lifecycle) limitEnd() {
	l.deadlineOnce.Do(func() {
		l.endBy = time.Now().Add(endTimeout)
		t := time.AfterFunc(endTimeout, l.abandonStore)
		context.AfterFunc(l.storeCtx, func() { t.Stop() })
	})
}

// setupContext returns the context for the whole set-up of a connection. It ends when the
// device is to end, except on a handover, which waits so that nothing is left half done.
func (l *lifecycle) setupContext() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(l.storeCtx, setupTimeout)
	unhook := context.AfterFunc(l.stopping, func() {
		if context.Cause(l.stopping) != ErrHandover {
			cancel()
		}
	})
	return ctx, func() {
		unhook()
		cancel()
	}
}

// reportFirst reports the result of the first connect to Connect, once.
func (l *lifecycle) reportFirst(err error) {
	if l.firstResult != nil {
		l.firstResult <- err
		l.firstResult = nil
	}
}

// beginEnd starts the end of the device.
func (l *lifecycle) beginEnd(cause error) {
	if l.cause != nil {
		return
	}
	if cause == nil {
		cause = ErrDisconnected
	}
	l.cause = cause
	l.limitEnd()
	l.forceAt = l.endBy.Add(closeTimeout - endTimeout)
	l.reportFirst(cause)
}

func (l *lifecycle) peerViolated(v *PeerError) {
	if l.cause != nil {
		return
	}
	l.d.counters.Record(telemetry.EventViolation, telemetry.NoQueue, uint64(v.Slot), 0)
	l.d.log.Error("the peer broke the protocol; the device is closed",
		"vif", l.d.id, "peer", l.d.Peer(), "ring", v.Ring, "slot", v.Slot, "reason", v.Reason)
	l.beginEnd(v)
}

// retryTime returns when to look at the device even if nothing has changed; zero: never.
func (l *lifecycle) retryTime() time.Time {
	if !l.forceAt.IsZero() {
		return l.forceAt
	}
	at := l.pace.until
	if l.failedOn != nil && (at.IsZero() || l.retryAt.Before(at)) {
		at = l.retryAt
	}
	for _, t := range []time.Time{l.repairPace.until, l.settingsPace.until} {
		if !t.IsZero() && (at.IsZero() || t.Before(at)) {
			at = t
		}
	}
	if t := l.absentSince; !t.IsZero() && (at.IsZero() || t.Add(absentTime).Before(at)) {
		at = t.Add(absentTime)
	}
	return at
}

// onHold reports whether nothing may be done now: a failed step is not tried again so soon,
// or the peer changes its state too fast. Without a directory there is nothing to try
// again, only to let go. A peer cannot delay what the toolstack does,
// nor the end of the device.
func (l *lifecycle) onHold(ch xenbus.Change) bool {
	if l.cause != nil {
		return false
	}
	now := time.Now()
	if !now.Before(l.pace.until) {
		l.pace.until = time.Time{}
	}
	if !now.Before(l.repairPace.until) {
		l.repairPace.until = time.Time{}
	}
	if !now.Before(l.settingsPace.until) {
		l.settingsPace.until = time.Time{}
	}
	if l.failedOn != nil && !now.Before(l.retryAt) {
		l.failedOn = nil
	}
	paced := !l.pace.until.IsZero() && ch.Online && !ch.Gone && !ch.Lost
	ch.PeerWrites, ch.Settings = 0, 0
	return l.failedOn != nil && *l.failedOn == ch && !ch.Gone || paced
}

// dirReplaced reports whether the directory is no longer the one that this backend served.
func (l *lifecycle) dirReplaced() bool {
	return l.d.role == xenbus.Backend && l.generation != 0 && l.generation != l.xd.Current().Generation
}

func (l *lifecycle) countStep() { l.pace.step(time.Now()) }

// An outcome says how a lifecycle goes on after a step.
type outcome uint8

const (
	proceed   outcome = iota // look at the state again
	awaitNews                // until something changes, or retryTime
	over
)

// step follows the handshake until it has to wait for a change. It reports true when the
// lifecycle is over.
func (l *lifecycle) step() bool {
	for range 32 { // the handshake comes to rest after a few steps
		ch := l.xd.Current()
		if l.generation != ch.Generation { // the toolstack made a new directory; a peer cannot
			if l.dirReplaced() {
				return true // our vif is gone; another is in its place
			}
			l.generation, l.pace, l.pause, l.failedOn = ch.Generation, pace{}, 0, nil
		}
		if l.onHold(ch) {
			return false
		}
		if l.cause != nil && !time.Now().Before(l.forceAt) {
			l.endNow(ch)
			return true
		}
		// A vif that was taken over moves frames before we look at xenstore again.
		standsStill := l.still != nil && l.conn != nil && l.cause == nil && onlyConnected(ch)
		if !standsStill && !l.followSettings(ch) {
			return false
		}
		if v := l.d.verdict.Load(); l.told != nil && v != l.told && l.cause == nil && !ch.Gone && !ch.Lost && !l.publishVerdict(v) {
			return false
		}
		facts := ch
		if v := l.told; v != nil && v.why != "" { // whatever a script says
			facts.Hotplug = false
		}
		s := xenbus.Next(l.d.role, xenbus.Facts{
			Change: facts, Attached: l.connGeneration, Leaving: l.cause != nil,
			Adopt: l.cause == nil,
		})
		next := proceed
		if stays := s.Do == xenbus.Run || s.Do == xenbus.Wait; stays && l.conn != nil && l.verifiedWrites != ch.PeerWrites && !standsStill {
			if !l.verify(ch) {
				next = awaitNews
			}
		} else {
			next = l.do(s, ch)
		}
		if standsStill && l.still == nil && next == awaitNews {
			next = proceed
		}
		if next != proceed {
			return next == over
		}
	}
	return false
}

// do does one step of the handshake and writes its state.
func (l *lifecycle) do(s xenbus.Step, ch xenbus.Change) outcome {
	l.watchPeer(ch)
	if s.Do == xenbus.Run && l.peerLost {
		s.Do = xenbus.Wait // until the next peer writes its state, or opens its ports
	}
	then, announced := awaitNews, false
	switch s.Do {
	case xenbus.Run:
		l.resume()
		if l.reasonDue {
			l.reasonDue = false
			l.publishReason(nil)
		}
	case xenbus.Finish:
		return over
	case xenbus.Release:
		l.detach()
		then = proceed
	case xenbus.Prepare:
		v := l.d.verdict.Load()
		if v == nil && l.d.own != nil { // Offer or Refuse wakes us
			return awaitNews
		}
		if !l.attempt("publish features", l.end.prepare) {
			return awaitNews
		}
		l.told = v
		l.publishedReason = "" // prepare removed the reason
		then = proceed
	case xenbus.Connect:
		var ok bool
		if ok, announced = l.connect(ch, s.State); !ok {
			return awaitNews
		}
		if l.conn == nil {
			return proceed // the connect failed, and the device ends
		}
		l.reasonDue = true
	default: // Wait, Drain
		l.quiesce(ch)
	}
	written := announced || s.State != xenbus.Unknown && l.writeState(s.State)
	switch {
	case written:
		return proceed
	case s.State != xenbus.Unknown:
		return awaitNews
	case then == awaitNews && ch.Overwritten != "" && !ch.Lost && l.restore(ch):
		return proceed
	}
	return then
}

// watchPeer notices that the peer's program has ended without closing, and that another
// has taken its place.
func (l *lifecycle) watchPeer(ch xenbus.Change) {
	if l.peerEnded() {
		l.peerLost, l.lostAt = true, ch.Peer
	} else if l.peerLost && (l.conn == nil || ch.Peer != l.lostAt || l.conn.peerPresent()) {
		l.peerLost, l.peerSeen = false, false
	}
}

// endNow ends a device whose peer or xenstore does not answer in time.
func (l *lifecycle) endNow(ch xenbus.Change) {
	l.detach()
	if !ch.Gone && !ch.Lost && ch.Own != xenbus.Closed {
		l.writeState(xenbus.Closed)
	}
}

// showLate opens the mirror of a vif that was taken over. Meanwhile frames pass: a store may
// take hundreds of milliseconds for it, as that in package bpf does on a slow processor. And
// the process that had the vif has closed its mirror by now, which has the same name.
func (l *lifecycle) showLate() {
	if l.ticks > 0 {
		l.showNow()
	}
}

// showNow is showLate for a vif that another process is about to take over: the mirror is opened
// while frames pass, and not while that process waits for the link to come to rest.
func (l *lifecycle) showNow() {
	if l.mirrorLate && l.running {
		l.mirrorLate = false
		l.d.openMirror(dom(l.xd))
	}
}

// dom returns the peer's domain.
func dom(xd *xenbus.Device) hypercall.DomID {
	_, dom := xd.Peer()
	return dom
}

// start starts the lifecycle goroutine. after runs at the very end of the device.
func (d *Device) start(xd *xenbus.Device, r end, first chan error, after func()) {
	d.startWith(&lifecycle{d: d, xd: xd, end: r, firstResult: first}, after)
}

// startWith is start for a lifecycle that may have a connection already.
func (d *Device) startWith(l *lifecycle, after func()) {
	xd := l.xd
	ctx, stop := context.WithCancelCause(context.Background())
	d.stop = stop
	if !l.mirrorLate {
		d.openMirror(dom(xd))
	}
	if d.role == xenbus.Frontend {
		xd.Follow([]string{netif.KeyMTU}, []string{netif.KeyCarrier, netif.KeyIP})
	} else {
		xd.Follow([]string{netif.KeyMTU, netif.KeyRate}, []string{netif.KeyRequestMulticast})
	}
	l.readSettings = xd.Current().Settings
	if l.conn != nil && d.role == xenbus.Frontend { // of another process: they are read again
		l.readSettings--
	}
	l.storeCtx, l.abandonStore = context.WithCancel(context.Background())
	d.finish = func() {
		stop(nil)
		d.closeMirror()
		ctx, cancel := l.storeContext()
		xd.Close(ctx)
		cancel()
		after()
	}
	go l.run(ctx)
}
