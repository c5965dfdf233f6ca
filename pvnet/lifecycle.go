package pvnet

import (
	"context"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/telemetry"
	"barevif/xenbus"
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

// dom returns the peer's domain.
func dom(xd *xenbus.Device) hypercall.DomID {
	_, dom := xd.Peer()
	return dom
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
