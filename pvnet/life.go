package pvnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/telemetry"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
)

// How long the life goroutine waits for the peer and for xenstore.
const (
	closePatience   = 4 * time.Second // for the peer to answer Closing, on Disconnect
	endPatience     = 6 * time.Second // for the whole end of a device, closePatience and storePatience included
	storePatience   = 5 * time.Second // for one xenstore operation
	connectPatience = time.Minute     // for the whole set-up of a connection, unless the device is to end
	retryFirst      = time.Second     // pause after a failed connect; doubles
	retryMost       = 30 * time.Second
)

// A role is the part of a life in which frontend and backend differ.
type role interface {
	// prepare publishes the features (backend).
	prepare(ctx context.Context, xd *xenbus.Device) error

	// attach reads and checks the keys that the peer published, and makes the connection.
	// On an error the caller runs the connection's undo list.
	attach(ctx context.Context, xd *xenbus.Device, c *conn) error

	// same reports whether the peer still publishes the rings and event channels that
	// connection c was made from.
	same(ctx context.Context, xd *xenbus.Device, c *conn) (bool, error)

	// finished runs after the device has ended, whether we or the toolstack ended it.
	// anew: there is a new directory in its place.
	finished(ctx context.Context, xd *xenbus.Device, anew bool)
}

// A life is the one goroutine that moves a device through its states. Only it writes our
// xenbus state and touches what connections hold. Halves see the connection through the
// link word and their gates, and report violations through a channel.
type life struct {
	d    *Device
	owed atomic.Bool // the slow tick asks the goroutine to do the beat

	// mu is held by the goroutine except while it waits, so that the slow tick can do the
	// beat in its place. It guards all fields below.
	mu   sync.Mutex
	xd   *xenbus.Device
	role role
	kind xenbus.Role

	stop     context.Context // ends when the device is to end
	whole    context.Context // context of every xenstore operation; ends endPatience after the device is to end
	giveUp   context.CancelFunc
	haste    sync.Once
	end      time.Time // when whole ends at the latest; set in haste
	conn     *conn
	attached uint32 // generation of conn, 0: none
	running  bool   // the gates are open
	joined   bool   // the peer has had its ends of all event channels at some time since resume
	alone    bool   // the peer has lost them since, but xenstore does not show it
	aloneAt  xenbus.State
	replaced bool   // the peer has made new rings: the reason for a suspend
	heard    uint64 // Change.PeerWrites for which conn was last verified

	leaving error     // why the device ends; nil: it does not
	force   time.Time // when to end without waiting for the peer any longer; set by leave

	refused *xenbus.Change // the change on which the last step failed
	retryAt time.Time
	pause   time.Duration
	pace    pace
	mending pace         // of repairs of our state after others wrote it
	of      uint32       // generation of the directory that pace is for; 0: none yet
	beats   int          // slow ticks since the link came up
	state   xenbus.State // last written, for the event log
	first   chan error   // gets the result of the first connect, once; then nil
	noted   string       // the reason, as in xenstore, why there is no connection

	suspects []suspect        // halves that may have missed an event
	recheck  <-chan time.Time // when to look at the suspects again
}

// run is the body of the goroutine. The end of stop makes it end the device. It closes
// d.done.
func (l *life) run(stop context.Context) {
	debug.SetPanicOnFault(true)
	l.stop = stop
	d := l.d
	defer close(d.done)
	defer l.giveUp()
	context.AfterFunc(stop, func() {
		if context.Cause(stop) != ErrHandover {
			l.hurry()
		}
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.tick()()
	for l.leaving != ErrHandover && !l.step() {
		var again <-chan time.Time
		if at := l.again(); !at.IsZero() {
			again = time.After(time.Until(at))
		}
		ended := stop.Done()
		if l.leaving != nil {
			ended = nil
		}
		recheck := l.recheck
		l.mu.Unlock()
		select {
		case _, open := <-l.xd.Changes():
			l.mu.Lock()
			if !open && l.leaving == nil {
				l.leave(&UnknownError{"watch the device", net.ErrClosed})
			}
			if !open {
				l.force = time.Now()
			}
		case v := <-d.fault:
			l.mu.Lock()
			l.violated(v)
		case <-ended:
			l.mu.Lock()
			l.leave(context.Cause(stop))
		case <-again:
			l.mu.Lock()
		case <-d.look:
			l.mu.Lock()
			if l.owed.Swap(false) {
				l.beat()
			}
		case <-recheck:
			l.mu.Lock()
			l.rescue()
		}
	}
	l.hurry()
	l.release()
	l.d.hush.catchUp(true)
	ctx, cancel := l.patiently()
	l.role.finished(ctx, l.xd, l.anew())
	cancel()
	if l.leaving == nil {
		l.leaving = ErrDisconnected
	}
	d.gone(l.leaving)
	l.tell(l.leaving)
}

// patiently returns the context for one xenstore operation.
func (l *life) patiently() (context.Context, context.CancelFunc) {
	return context.WithTimeout(l.whole, storePatience)
}

// hurry limits the time for the end of the device to endPatience. All xenstore operations
// share it, those under way included.
func (l *life) hurry() {
	l.haste.Do(func() {
		l.end = time.Now().Add(endPatience)
		t := time.AfterFunc(endPatience, l.giveUp)
		context.AfterFunc(l.whole, func() { t.Stop() })
	})
}

// atLength returns the context for the whole set-up of a connection. It ends when the
// device is to end, except on a handover, which waits so that nothing is left half done.
func (l *life) atLength() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(l.whole, connectPatience)
	unhook := context.AfterFunc(l.stop, func() {
		if context.Cause(l.stop) != ErrHandover {
			cancel()
		}
	})
	return ctx, func() {
		unhook()
		cancel()
	}
}

// tell reports the result of the first connect to Connect, once.
func (l *life) tell(err error) {
	if l.first != nil {
		l.first <- err
		l.first = nil
	}
}

// leave starts the end of the device.
func (l *life) leave(cause error) {
	if l.leaving != nil {
		return
	}
	if cause == nil {
		cause = ErrDisconnected
	}
	l.leaving = cause
	l.hurry()
	l.force = l.end.Add(closePatience - endPatience)
	l.tell(cause)
}

func (l *life) violated(v *PeerError) {
	if l.leaving != nil {
		return
	}
	l.d.set.Record(telemetry.EventViolation, telemetry.NoQueue, uint64(v.Slot), 0)
	l.d.log.Error("the peer broke the protocol; the device is closed",
		"vif", l.d.id, "peer", l.d.Peer(), "ring", v.Ring, "slot", v.Slot, "reason", v.Reason)
	l.leave(v)
}

// beat is the device's work on a slow tick: the heartbeat of the counters, and a search
// for halves that still wait although their event is due. A half that waits keeps waiting
// unless it must do something itself.
func (l *life) beat() {
	defer func() {
		if v := faulted(recover()); v != nil {
			l.d.judge(v)
		}
	}()
	l.d.set.Tick()
	l.d.hush.catchUp(false)
	known := l.suspects
	l.suspects = nil
	if !l.running {
		return
	}
	if l.beats++; l.beats > 5 {
		l.pause, l.pace = 0, pace{} // the connection has held: later failures start with short pauses
	}
	mirrored := l.d.cfg.Counters != nil
	for i, q := range l.conn.queues {
		for _, s := range []suspect{{half: &l.d.tx[i].half, eng: q.tx, park: q.txPark}, {half: &l.d.rx[i].half, eng: q.rx, park: q.rxPark}} {
			s.eng.sample()
			if s.seq = s.half.parked.Load(); s.seq%2 == 1 && s.eng.overdue() {
				l.suspects = append(l.suspects, s.since(known))
			}
			if mirrored {
				s.half.remind(dueHeal)
			}
		}
		if l.d.tx[i].parked.Load()%2 == 1 && q.tx.answered() {
			q.txPark.wake() // the peer may never give as many responses as the half waits for
		}
		l.d.tx[i].watch(q.tx, time.Now())
		l.d.judge(l.d.tx[i].settle(q.tx))
	}
	l.rescue()
}

// eventPatience is how long an event may be under way. A [hypercall.Waiter] delays the
// events of a peer whose last events brought no work, by up to a second: such an event is
// late because of us, not lost. And the peer publishes first and then notifies, and may
// be descheduled in between.
const eventPatience = time.Second + 20*time.Millisecond

// A suspect is a half that may have missed an event.
type suspect struct {
	half *half
	eng  engine
	park *parker
	seq  uint32    // number of its wait
	seen time.Time // when it was first suspected in this wait
}

// since returns s with the time seen of the beat before, if s was suspected then in the
// same wait.
func (s suspect) since(known []suspect) suspect {
	for _, k := range known {
		if k.half == s.half && k.seq == s.seq {
			return k
		}
	}
	s.seen = time.Now()
	return s
}

// rescue wakes the suspects that have waited longer than eventPatience. On a correct
// system there are none.
func (l *life) rescue() {
	defer func() {
		if v := faulted(recover()); v != nil {
			l.d.judge(v)
		}
	}()
	l.recheck = nil
	suspects := l.suspects
	l.suspects = nil
	for _, s := range suspects {
		if !l.running || s.half.parked.Load() != s.seq || !s.eng.overdue() {
			continue
		}
		if left := eventPatience - time.Since(s.seen); left > 0 {
			l.suspects = append(l.suspects, s)
			l.recheck = time.After(left)
			continue
		}
		s.half.rescue.Store(s.seq)
		l.d.set.Record(telemetry.EventRescued, s.half.queue, 0, 0)
		s.park.wake()
	}
}

// again returns when to look at the device even if nothing has changed; zero: never.
func (l *life) again() time.Time {
	if !l.force.IsZero() {
		return l.force
	}
	at := l.pace.until
	if l.refused != nil && (at.IsZero() || l.retryAt.Before(at)) {
		at = l.retryAt
	}
	if t := l.mending.until; !t.IsZero() && (at.IsZero() || t.Before(at)) {
		at = t
	}
	return at
}

// held reports whether nothing may be done now: a failed step is not tried again so soon,
// or the peer changes its state too fast. A peer cannot delay what the toolstack does,
// nor our own leaving.
func (l *life) held(ch xenbus.Change) bool {
	if l.leaving != nil {
		return false
	}
	now := time.Now()
	if !now.Before(l.pace.until) {
		l.pace.until = time.Time{}
	}
	if !now.Before(l.mending.until) {
		l.mending.until = time.Time{}
	}
	if l.refused != nil && !now.Before(l.retryAt) {
		l.refused = nil
	}
	paced := !l.pace.until.IsZero() && ch.Online && !ch.Gone && !ch.Lost
	ch.PeerWrites = 0
	return l.refused != nil && *l.refused == ch || paced
}

// anew reports whether the directory is no longer the one that this backend served.
func (l *life) anew() bool {
	return l.kind == xenbus.Backend && l.of != 0 && l.of != l.xd.Current().Generation
}

func (l *life) move() { l.pace.move(time.Now()) }

// step follows the handshake until it has to wait for a change. It reports true when the
// life is over.
func (l *life) step() (over bool) {
	for range 32 { // the handshake comes to rest after a few steps
		ch := l.xd.Current()
		if l.of != ch.Generation { // the toolstack made the directory anew; a peer cannot
			if l.anew() {
				return true // our vif is gone; another is in its place
			}
			l.of, l.pace, l.pause, l.refused = ch.Generation, pace{}, 0, nil
		}
		if l.held(ch) {
			return false
		}
		s := xenbus.Next(l.kind, xenbus.Facts{
			Change: ch, Attached: l.attached, Leaving: l.leaving != nil,
			Adopt: l.leaving == nil,
		})
		if l.leaving != nil && !time.Now().Before(l.force) {
			return l.cut(ch)
		}
		if stays := s.Do == xenbus.Run || s.Do == xenbus.Wait; stays && l.conn != nil && l.heard != ch.PeerWrites {
			if !l.verify(ch) {
				return false
			}
			continue
		}
		if l.deserted() {
			l.alone, l.aloneAt = true, ch.Peer
		} else if l.alone && (l.conn == nil || ch.Peer != l.aloneAt || l.conn.joined()) {
			l.alone, l.joined = false, false
		}
		if s.Do == xenbus.Run && l.alone {
			s.Do = xenbus.Wait // until the next peer writes its state, or opens its ports
		}
		switch s.Do {
		case xenbus.Run:
			l.resume()
		case xenbus.Finish:
			return true
		case xenbus.Release:
			l.release()
		case xenbus.Prepare:
			if !l.try("publish features", l.role.prepare) {
				return false
			}
			l.noted = "" // prepare removed the reason
		case xenbus.Connect:
			if !l.connect(ch) {
				return false
			}
			if l.conn == nil {
				continue // the connect failed, and the device leaves
			}
		default: // Wait, Drain
			l.suspend(ch)
		}
		if s.State != xenbus.Unknown {
			if !l.write(s.State) {
				return false
			}
			continue
		}
		if s.Do == xenbus.Release || s.Do == xenbus.Prepare {
			continue
		}
		if ch.Overwritten != "" && !ch.Lost && l.restore(ch) {
			continue
		}
		return false
	}
	return false
}

// cut ends a device whose peer or xenstore does not answer in time.
func (l *life) cut(ch xenbus.Change) bool {
	l.release()
	if !ch.Gone && !ch.Lost && ch.Own != xenbus.Closed {
		l.write(xenbus.Closed)
	}
	return true
}

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

// dom returns the peer's domain.
func dom(xd *xenbus.Device) hypercall.DomID {
	_, dom := xd.Peer()
	return dom
}
