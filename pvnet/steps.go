package pvnet

import (
	"context"
	"errors"
	"fmt"
	"time"

	"barevif/hypercall"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

func (l *lifecycle) writeState(s xenbus.State) bool {
	l.countStep()
	ctx, cancel := l.storeContext()
	defer cancel()
	if err := l.xd.SetState(ctx, s); err != nil {
		l.stateFailed(s, err)
		return false
	}
	l.stateWritten(s)
	return true
}

// stateFailed ends the device or retries later, after xenstore has returned an error for our state. If
// the state may have been written all the same, the other end may use the rings: then the device
// does not end before the other end has closed, whatever xenstore refuses.
func (l *lifecycle) stateFailed(s xenbus.State, err error) {
	l.d.lastError.Store(&err)
	final := (errors.Is(err, xenstore.ErrAccess) || errors.Is(err, xenstore.ErrQuota)) && !errors.Is(err, xenstore.ErrUnanswered)
	switch {
	case errors.Is(err, xenbus.ErrGone), errors.Is(err, xenbus.ErrClaimed):
	case l.firstResult != nil && l.d.role == xenbus.Frontend && final:
		l.beginEnd(err) // Connect returns the error; there is nothing to close
		l.forceAt = time.Now()
		return
	case final && l.neverConnected():
	case errors.Is(err, hypercall.ErrClosed): // xenstore refused nothing: its connection has ended, and says so
	default:
		l.d.log.Warn("cannot write the state", "vif", l.d.id, "state", s, "err", err)
	}
	l.retryLater(l.xd.Current())
}

// stateWritten records our new state in the counters and in the event log.
func (l *lifecycle) stateWritten(s xenbus.State) {
	l.d.lastError.Store(nil)
	l.d.counters.Record(telemetry.EventState, telemetry.NoQueue, uint64(l.state), uint64(s))
	l.state = s
	l.d.setStatus(s, l.up())
}

// neverConnected reports whether the device ends without ever having been connected.
func (l *lifecycle) neverConnected() bool { return l.cause != nil && l.d.epoch.Load() == 0 }

// restore writes our state again after another domain overwrote it. Nothing else of ours
// has changed: frames keep moving, unless the peer has reacted to the wrong state. If
// someone overwrites it in a loop, restore is slowed down like a peer that never rests,
// but the peer's own changes are not.
func (l *lifecycle) restore(ch xenbus.Change) bool {
	now := time.Now()
	if now.Before(l.repairPace.until) {
		return false
	}
	l.repairPace.step(now)
	l.d.log.Warn("the state of the vif was changed by another domain or an operator, and is put right",
		"vif", l.d.id, "node", l.xd.Dir()+"/state", "found", ch.Overwritten, "written", ch.Own)
	ctx, cancel := l.storeContext()
	defer cancel()
	if err := l.xd.SetState(ctx, ch.Own); err != nil {
		if !errors.Is(err, xenbus.ErrGone) && !errors.Is(err, xenbus.ErrClaimed) && !errors.Is(err, hypercall.ErrClosed) {
			l.d.log.Warn("cannot write the state", "vif", l.d.id, "state", ch.Own, "err", err)
		}
		l.retryLater(l.xd.Current())
		return false
	}
	return true
}

// attempt runs a step that uses xenstore, and postpones it if it fails.
func (l *lifecycle) attempt(what string, f func(context.Context, *xenbus.Device) error) bool {
	l.countStep()
	ctx, cancel := l.setupContext()
	defer cancel()
	if err := f(ctx, l.xd); err != nil {
		if l.stopping.Err() != nil {
			return false // the device ends: the cause of stop says more
		}
		l.d.lastError.Store(&err)
		l.d.log.Warn("cannot "+what, "vif", l.d.id, "err", err)
		if l.d.role == xenbus.Backend && !errors.Is(err, context.DeadlineExceeded) {
			l.publishReason(err)
			if own := l.xd.Current().Own; own == xenbus.Initialising || own == xenbus.Unknown {
				l.writeState(xenbus.Closed) // the frontend sees the state even if there is no room for a reason
			}
		}
		l.retryLater(l.xd.Current())
		return false
	}
	l.d.lastError.Store(nil)
	return true
}

// connect makes the connection. A frontend writes its keys and its new state s in one
// transaction, and announced says that it did. A backend has no keys to write here, and leaves s
// to the caller. ok: the step continues, connected or about to end.
//
// If it stays unknown whether the keys were written, connect reports false and keeps the
// connection, which the backend may use: the lifecycle closes it in order.
func (l *lifecycle) connect(ch xenbus.Change, s xenbus.State) (ok, announced bool) {
	if l.conn != nil {
		return true, false
	}
	l.countStep()
	ctx, cancel := l.setupContext()
	defer cancel()
	c := new(conn)
	err := l.attach(ctx, c)
	announces := err == nil && c.keys != nil
	if err == nil {
		l.d.openMirror(dom(l.xd))
	}
	if announces {
		err = l.announce(ctx, c, s)
	}
	unknown := announces && errors.Is(err, xenstore.ErrUnanswered)
	if err == nil || unknown {
		c.keys, c.stale = nil, nil
		l.conn, l.connGeneration, l.verifiedWrites, l.readSettings, l.failedOn = c, ch.Generation, ch.PeerWrites, ch.Settings, nil
	}
	switch {
	case err == nil:
		l.d.lastError.Store(nil)
		return true, announces
	case unknown && l.stopping.Err() != nil: // the device ends: the cause of stop says more
		return false, false
	case unknown:
		l.stateFailed(s, err)
		return false, false
	}
	drainAll(c.queues)
	c.undo.run()
	if l.stopping.Err() != nil {
		return false, false // the device ends: the cause of stop says more
	}
	l.d.lastError.Store(&err)
	l.d.log.Warn("cannot connect", "vif", l.d.id, "err", err)
	l.publishReason(err)
	if !errors.Is(err, context.DeadlineExceeded) { // on a timeout of xenstore neither end is to blame
		if l.firstResult != nil && l.d.role == xenbus.Frontend {
			l.beginEnd(err)
			if announces && errors.Is(err, xenstore.ErrAccess) { // the state may not be written: it is tried once more
				l.forceAt = time.Now()
			}
			return true, false // and the next step closes
		}
		if l.d.role == xenbus.Backend {
			l.writeState(xenbus.Closing) // the frontend has to act next
		}
	}
	l.retryLater(l.xd.Current())
	return false, false
}

// announce writes a frontend's keys and state.
func (l *lifecycle) announce(ctx context.Context, c *conn, s xenbus.State) error {
	if err := l.xd.PublishState(ctx, s, c.keys, c.stale...); err != nil {
		return err
	}
	l.stateWritten(s)
	return nil
}

// verify releases a connection that the peer has replaced: between two looks at its state
// the peer may have closed, made new rings and connected again. It reports false if
// xenstore does not answer.
func (l *lifecycle) verify(ch xenbus.Change) bool {
	l.countStep()
	ctx, cancel := l.storeContext()
	defer cancel()
	same, err := l.end.unchanged(ctx, l.xd, l.conn)
	if err != nil {
		l.d.log.Warn("cannot read the other end's keys again", "vif", l.d.id, "err", err)
		l.retryLater(ch)
		return false
	}
	l.verifiedWrites = ch.PeerWrites
	if !same {
		l.ringsReplaced = true
		l.detach()
		l.ringsReplaced = false
	}
	return true
}

// publishReason writes to xenstore why there is no connection: for the administrator, and as a
// backend for the frontend's user. nil removes the reason.
func (l *lifecycle) publishReason(why error) {
	text := ""
	if why != nil {
		text = why.Error()
	}
	if text != "" && text == l.publishedReason {
		return
	}
	l.publishedReason = text
	ctx, cancel := l.storeContext()
	defer cancel()
	if why != nil && l.d.role == xenbus.Backend { // Tell comes first: the quota may leave room for one node only
		l.xd.Tell(ctx, why)
	}
	l.xd.Fail(ctx, why)
}

func (l *lifecycle) attach(ctx context.Context, c *conn) (err error) {
	defer func() {
		if v := faultError(recover()); v != nil {
			err = v
		}
	}()
	return l.end.attach(ctx, l.xd, c)
}

// retryLater makes the lifecycle try again when something changes, or after a pause that grows.
func (l *lifecycle) retryLater(ch xenbus.Change) {
	l.pause = max(retryFirst, min(2*l.pause, retryMost))
	ch.PeerWrites, ch.Settings = 0, 0 // the same state written again is no reason to try again
	l.failedOn, l.retryAt = &ch, time.Now().Add(l.pause)
}

// resume gives the connection to the halves and opens the gates, if they are shut.
func (l *lifecycle) resume() {
	if l.running {
		return
	}
	l.countStep()
	l.running, l.failedOn, l.ticks = true, nil, 0
	l.peerSeen = l.conn.peerPresent()
	_, dom := l.xd.Peer()
	if v := catchFault(func() { l.d.bringUp(l.conn, dom, l.xd.Current().Own) }); v != nil {
		l.d.callError(v)
		return
	}
	if n := l.d.epoch.Load(); n > 1 {
		l.d.counters.Record(telemetry.EventReconnect, telemetry.NoQueue, n, 0)
	}
	l.d.log.Info("link up", "vif", l.d.id, "peer", dom, "queues", len(l.conn.queues), "memory", l.d.Budget().String())
	if l.still != nil {
		l.still.log(l.d)
		l.still = nil
	}
	l.reportFirst(nil)
}

// quiesce shuts the gates and keeps the rings.
func (l *lifecycle) quiesce(ch xenbus.Change) {
	if !l.running {
		return
	}
	l.countStep()
	l.running = false
	reason := fmt.Sprintf("the other end is %v", ch.Peer)
	switch {
	case l.cause != nil:
		reason = l.cause.Error()
	case l.handingOver:
		reason = handoverReason
	case ch.Vanished:
		reason = "the other end is gone"
	case l.ringsReplaced:
		reason = "the other end has made new rings"
	case l.peerLost:
		reason = "the other end's program has ended without closing"
	}
	l.d.log.Info("link down", "vif", l.d.id, "reason", reason)
	l.d.setStatus(l.xd.Current().Own, false)
	if !l.d.quiesce(l.conn, reason) {
		l.beginEnd(&UnknownError{"shut the device", errors.New("a caller never left it")})
	}
}

// peerEnded reports whether the peer's program has ended while the link is up. The
// emulated machine shows that its ports are closed. On Xen only xenstore tells, so there
// it always reports false. Ports that are closed only for a moment are those of a backend that
// another takes over from.
func (l *lifecycle) peerEnded() bool {
	if !l.running || l.conn == nil || l.conn.peerPresent() {
		l.peerSeen = l.peerSeen || l.running && l.conn != nil
		l.absentSince = time.Time{}
		return false
	}
	if !l.peerSeen {
		return false
	}
	if l.absentSince.IsZero() {
		l.absentSince = time.Now()
	}
	return time.Since(l.absentSince) >= absentTime
}

// absentTime is how long the peer's ports are closed before its program counts as ended:
// a hand-over takes some milliseconds, on a busy machine a few tens.
const absentTime = 250 * time.Millisecond

// detach quiesces, and then frees what the connection holds.
func (l *lifecycle) detach() {
	if l.conn == nil {
		return
	}
	l.quiesce(l.xd.Current())
	l.d.detach(l.conn)
	l.conn, l.connGeneration = nil, 0
}
