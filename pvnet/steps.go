package pvnet

import (
	"context"
	"errors"
	"fmt"
	"time"

	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

func (l *life) write(s xenbus.State) bool {
	l.move()
	ctx, cancel := l.patiently()
	defer cancel()
	if err := l.xd.SetState(ctx, s); err != nil {
		l.d.trouble.Store(&err)
		final := errors.Is(err, xenstore.ErrAccess) || errors.Is(err, xenstore.ErrQuota)
		switch {
		case errors.Is(err, xenbus.ErrGone), errors.Is(err, xenbus.ErrClaimed):
		case l.first != nil && l.kind == xenbus.Frontend && final:
			l.leave(err) // Connect returns the error; there is nothing to close
			l.force = time.Now()
			return false
		case final && l.unconnected():
		default:
			l.d.log.Warn("xenstore refused a state", "vif", l.d.id, "state", s, "err", err)
		}
		l.postpone(l.xd.Current())
		return false
	}
	l.d.trouble.Store(nil)
	l.d.set.Record(telemetry.EventState, telemetry.NoQueue, uint64(l.state), uint64(s))
	l.state = s
	l.d.setStatus(s, l.running)
	return true
}

// unconnected reports whether the device ends without ever having been connected.
func (l *life) unconnected() bool { return l.leaving != nil && l.d.epoch.Load() == 0 }

// restore writes our state again after another domain overwrote it. Nothing else of ours
// has changed: frames keep moving, unless the peer has reacted to the wrong state. If
// someone overwrites it in a loop, restore is slowed down like a peer that never rests,
// but the peer's own changes are not.
func (l *life) restore(ch xenbus.Change) bool {
	now := time.Now()
	if now.Before(l.mending.until) {
		return false
	}
	l.mending.move(now)
	l.d.log.Warn("the state of the vif was changed by another domain or an operator, and is put right",
		"vif", l.d.id, "node", l.xd.Dir()+"/state", "found", ch.Overwritten, "written", ch.Own)
	ctx, cancel := l.patiently()
	defer cancel()
	if err := l.xd.SetState(ctx, ch.Own); err != nil {
		if !errors.Is(err, xenbus.ErrGone) && !errors.Is(err, xenbus.ErrClaimed) {
			l.d.log.Warn("xenstore refused a state", "vif", l.d.id, "state", ch.Own, "err", err)
		}
		l.postpone(l.xd.Current())
		return false
	}
	return true
}

// try runs a step that uses xenstore, and postpones it if it fails.
func (l *life) try(what string, f func(context.Context, *xenbus.Device) error) bool {
	l.move()
	ctx, cancel := l.atLength()
	defer cancel()
	if err := f(ctx, l.xd); err != nil {
		if l.stop.Err() != nil {
			return false // the device ends: the cause of stop says more
		}
		l.d.trouble.Store(&err)
		l.d.log.Warn("cannot "+what, "vif", l.d.id, "err", err)
		if l.kind == xenbus.Backend && !errors.Is(err, context.DeadlineExceeded) {
			l.note(err)
			if own := l.xd.Current().Own; own == xenbus.Initialising || own == xenbus.Unknown {
				l.write(xenbus.Closed) // the frontend sees the state even if there is no room for a reason
			}
		}
		l.postpone(l.xd.Current())
		return false
	}
	l.d.trouble.Store(nil)
	return true
}

// connect makes the connection. It reports true if the step continues: connected, or
// leaving.
func (l *life) connect(ch xenbus.Change) bool {
	if l.conn != nil {
		return true
	}
	l.move()
	ctx, cancel := l.atLength()
	defer cancel()
	c := new(conn)
	err := l.attach(ctx, c)
	if err == nil {
		l.conn, l.attached, l.heard, l.refused = c, ch.Generation, ch.PeerWrites, nil
		l.d.trouble.Store(nil)
		l.d.mirror(dom(l.xd))
		l.note(nil)
		return true
	}
	for _, q := range c.queues { // the arenas wait for the posted pages
		q.tx.drain()
		q.rx.drain()
	}
	c.undo.run()
	if l.stop.Err() != nil {
		return false // the device ends: the cause of stop says more
	}
	l.d.trouble.Store(&err)
	l.d.log.Warn("cannot connect", "vif", l.d.id, "err", err)
	l.note(err)
	if !errors.Is(err, context.DeadlineExceeded) { // on a timeout of xenstore neither end is to blame
		if l.first != nil && l.kind == xenbus.Frontend {
			l.leave(err)
			return true // and the next step closes
		}
		if l.kind == xenbus.Backend {
			l.write(xenbus.Closing) // the frontend has to act next
		}
	}
	l.postpone(l.xd.Current())
	return false
}

// verify releases a connection that the peer has replaced: between two looks at its state
// the peer may have closed, made new rings and connected again. It reports false if
// xenstore does not answer.
func (l *life) verify(ch xenbus.Change) bool {
	l.move()
	ctx, cancel := l.patiently()
	defer cancel()
	same, err := l.role.same(ctx, l.xd, l.conn)
	if err != nil {
		l.d.log.Warn("cannot read the other end's keys again", "vif", l.d.id, "err", err)
		l.postpone(ch)
		return false
	}
	l.heard = ch.PeerWrites
	if !same {
		l.replaced = true
		l.release()
		l.replaced = false
	}
	return true
}

// note writes to xenstore why there is no connection: for the administrator, and as a
// backend for the frontend's user. nil removes the reason.
func (l *life) note(why error) {
	text := ""
	if why != nil {
		text = why.Error()
	}
	if text != "" && text == l.noted {
		return
	}
	l.noted = text
	ctx, cancel := l.patiently()
	defer cancel()
	if why != nil && l.kind == xenbus.Backend { // Tell comes first: the quota may leave room for one node only
		l.xd.Tell(ctx, why)
	}
	l.xd.Fail(ctx, why)
}

func (l *life) attach(ctx context.Context, c *conn) (err error) {
	defer func() {
		if v := faulted(recover()); v != nil {
			err = v
		}
	}()
	return l.role.attach(ctx, l.xd, c)
}

// postpone makes the life try again when something changes, or after a pause that grows.
func (l *life) postpone(ch xenbus.Change) {
	l.pause = max(retryFirst, min(2*l.pause, retryMost))
	ch.PeerWrites = 0 // the same state written again is no reason to try again
	l.refused, l.retryAt = &ch, time.Now().Add(l.pause)
}

// resume gives the connection to the halves and opens the gates, if they are shut.
func (l *life) resume() {
	if l.running {
		return
	}
	l.move()
	l.running, l.refused, l.beats = true, nil, 0
	l.joined = l.conn.joined()
	_, dom := l.xd.Peer()
	if v := trapped(func() { l.d.up(l.conn, dom, l.xd.Current().Own) }); v != nil {
		l.d.judge(v)
		return
	}
	if n := l.d.epoch.Load(); n > 1 {
		l.d.set.Record(telemetry.EventReconnect, telemetry.NoQueue, n, 0)
	}
	l.d.log.Info("link up", "vif", l.d.id, "peer", dom, "queues", len(l.conn.queues), "memory", l.d.Budget().String())
	l.tell(nil)
}

// suspend shuts the gates and keeps the rings.
func (l *life) suspend(ch xenbus.Change) {
	if !l.running {
		return
	}
	l.move()
	l.running = false
	reason := fmt.Sprintf("the other end is %v", ch.Peer)
	switch {
	case l.leaving != nil:
		reason = l.leaving.Error()
	case ch.Vanished:
		reason = "the other end is gone"
	case l.replaced:
		reason = "the other end has made new rings"
	case l.alone:
		reason = "the other end's program has ended without closing"
	}
	l.d.log.Info("link down", "vif", l.d.id, "reason", reason)
	l.d.setStatus(l.xd.Current().Own, false)
	if !l.d.down(l.conn, reason) {
		l.leave(&UnknownError{"shut the device", errors.New("a caller never left it")})
	}
}

// deserted reports whether the peer's program has ended while the link is up. The
// emulated machine shows that its ports are closed. On Xen only xenstore tells, so there
// it always reports false.
func (l *life) deserted() bool {
	if !l.running || l.conn == nil {
		return false
	}
	if l.conn.joined() {
		l.joined = true
		return false
	}
	return l.joined
}

// release suspends, and then frees what the connection holds.
func (l *life) release() {
	if l.conn == nil {
		return
	}
	l.suspend(l.xd.Current())
	l.d.drop(l.conn)
	l.conn, l.attached = nil, 0
}
