package pvnet

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/telemetry"
)

// A half is one direction of one queue, without its ring: it lives as long as the Device,
// while rings come and go with connections.
type half struct {
	dev         *Device
	queue       int
	dir         direction
	gate        gate
	park        atomic.Pointer[parker]    // of the connection; stored by the lifecycle goroutine only
	until       atomic.Pointer[time.Time] // deadline of waiting calls
	owned       atomic.Bool               // handed to an owner by OwnTX or OwnRX
	ending      atomic.Bool               // Listen has been asked to end
	mu          sync.Mutex                // serialises the Device's own calls
	count       *telemetry.Block          // written by the caller inside the gate
	unpublished int                       // frames counted since the last publish; inside the gate
	hadWork     bool                      // a frame or a slot moved since the last park; inside the gate
	waitSeq     atomic.Uint32             // number of the wait: odd while the owner waits, and never the same twice
	rescued     atomic.Uint32             // number of the wait that lifecycle.rescue ended
	requests    atomic.Uint32             // what others ask the caller inside the gate to do: requestHeal, ...
	counterUser atomic.Uint32             // who may use the counters while the owner waits: countersLent, ...
	spin        spinner                   // of the connection; inside the gate
	member      atomic.Pointer[member]    // its membership in a Poller; nil: none
	drain       drain                     // of a sending half
	task        atomic.Pointer[task]      // what a visitor asks the caller inside the gate to run; nil: nothing
	sending     []Frame                   // while a Tap listens, the batch that is being sent; inside the gate
	ringRef     hypercall.GrantRef        // of the connection's ring; written while the gate is shut
}

func (h *half) init(d *Device, queue int, dir direction, block *telemetry.Block) {
	h.dev, h.queue, h.dir, h.count = d, queue, dir, block
	h.gate.init()
}

// enter returns nil once the caller is inside the gate.
func (h *half) enter() error {
	if v := h.dev.violation.Load(); v != nil {
		return v
	}
	for !h.gate.enter() {
		switch h.gate.state.Load() {
		case gateBusy, gateClosing:
			return ErrBusy
		case gateBorrowed: // briefly
		default:
			if err := h.dev.linkErrorOf(h); err != nil {
				return err
			}
		}
		runtime.Gosched() // the gate has opened meanwhile, or is borrowed
	}
	return nil
}

// flush publishes the counters if no caller is inside the gate. A caller that comes
// meanwhile spins instead of getting ErrBusy.
func (h *half) flush() {
	if h.gate.state.CompareAndSwap(gateOpen, gateBorrowed) {
		h.count.Flush()
		h.gate.state.Store(gateOpen)
	}
}

// countMoved takes note of frames that moved and publishes the counters every 32 frames. The
// caller is inside the gate.
func (h *half) countMoved(frames int) {
	if frames == 0 {
		return
	}
	h.hadWork = true
	h.unpublished += frames
	if h.unpublished >= 32 {
		h.unpublished = 0
		h.count.Publish()
		h.serveRequests()
	}
}

// What the slow tick, or a visitor, asks the caller inside the gate to do.
const (
	requestHeal       = 1 << iota // compare the counters with their mirror
	requestStall                  // count a stall
	requestCarrierOff             // count that the carrier went off
	requestTask                   // run the task
	requestRate                   // show the rate limit
)

// serveRequests does what others have asked for. The caller is inside the gate.
func (h *half) serveRequests() {
	if h.requests.Load() != 0 {
		h.serve(h.requests.Swap(0))
	}
}

func (h *half) serve(due uint32) {
	if due&requestStall != 0 {
		h.count.Add(telemetry.Stalls, 1)
		h.count.Publish()
	}
	if due&requestCarrierOff != 0 {
		h.count.Add(telemetry.CarrierOff, 1)
		h.count.Publish()
	}
	if due&requestRate != 0 {
		h.count.Set(telemetry.RateLimit, h.dev.limiter.now().perSecond())
		h.count.Publish()
	}
	if due&requestHeal != 0 {
		h.count.Refresh()
	}
	if due&requestTask != 0 {
		h.do()
	}
}

// Who may use the counters of a half.
const (
	countersOwned    = iota // the owner uses them, or the caller inside the gate
	countersLent            // the owner waits: the slow tick, a visitor or Nudge may use them, and the engine
	countersBorrowed        // one of these does
)

// request does what due says at once if no caller is inside the gate, or if the caller
// inside waits. Otherwise the caller inside does it. It wakes nobody.
func (h *half) request(due uint32) {
	if h.gate.state.CompareAndSwap(gateOpen, gateBorrowed) {
		h.serve(due)
		h.gate.state.Store(gateOpen)
		return
	}
	h.requests.Or(due)
	if h.counterUser.CompareAndSwap(countersLent, countersBorrowed) { // else whoever uses them looks at due afterwards
		h.serveRequests()
		h.returnCounters()
	}
}

// returnCounters gives borrowed counters back to the half that waits, and serves the requests that came meanwhile.
func (h *half) returnCounters() {
	for {
		h.counterUser.Store(countersLent)
		if h.requests.Load() == 0 || !h.counterUser.CompareAndSwap(countersLent, countersBorrowed) {
			return
		}
		h.serveRequests()
	}
}

// lendCounters lets the slow tick and others use the counters until reclaimCounters.
func (h *half) lendCounters() { h.counterUser.Store(countersLent) }

func (h *half) reclaimCounters() {
	for !h.counterUser.CompareAndSwap(countersLent, countersOwned) {
		runtime.Gosched() // somebody has them for a microsecond
	}
}

func (h *half) deadline() time.Time {
	if t := h.until.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

// setDeadline sets the deadline and wakes a waiting call, which then waits for the new
// one.
func (h *half) setDeadline(t time.Time) {
	h.until.Store(&t)
	if p := h.park.Load(); p != nil {
		p.wake()
	}
	h.dev.notifyWaiters()
}

// interrupt ends the receive under way and every later one, until ending is cleared.
func (h *half) interrupt() {
	h.ending.Store(true)
	if p := h.park.Load(); p != nil {
		p.wake()
	}
	h.dev.notifyWaiters()
}

// expired reports whether the deadline has passed. It reads the clock only if
// there is one.
func (h *half) expired() bool {
	t := h.deadline()
	return !t.IsZero() && !time.Now().Before(t)
}

// mustLeave reports whether a caller that spins inside the gate must leave, or give up. It
// also does what was asked of the caller meanwhile, which may spin for long.
func (h *half) mustLeave() bool {
	h.serveRequests()
	return h.gate.state.Load() != gateBusy || h.ending.Load() || h.expired() || h.drain.hurried()
}

// parkUntilEvent parks inside the gate until there may be something to do.
func (h *half) parkUntilEvent() error { return h.parkUntil(h.deadline(), h.spin.measures()) }

// parkUntil parks inside the gate until something happens, or until end. measure says that
// the length of the wait tells something about the peer.
func (h *half) parkUntil(end time.Time, measure bool) error {
	if h.member.Load() != nil {
		return ErrPolled
	}
	p := h.park.Load()
	if p.report(h.dir, h.hadWork) {
		h.count.Add(telemetry.EventsSpurious, 1)
	}
	h.unpublished, h.hadWork = 0, false
	h.count.Add(telemetry.Parks, 1)
	h.count.Flush()
	seq := h.waitSeq.Add(1)
	var event bool
	var err error
	var start time.Time
	if measure {
		start = time.Now()
	}
	h.lendCounters()
	if h.requests.Load() == 0 { // from here on request finds the counters lent
		event, err = p.wait(h.dir, h.drain.until(end))
	}
	h.reclaimCounters()
	h.waitSeq.Add(1)
	if measure {
		h.spin.ended(time.Since(start))
	}
	if event {
		h.count.Add(telemetry.Events, 1)
		if p.peerClosed() {
			h.dev.wakeLifecycle()
		}
	}
	if err == hypercall.ErrClosed && h.gate.state.Load() == gateBusy {
		// Our own teardown shuts the gate before it closes the waiter. The gate is not
		// shut, so the domain itself is gone, and a retry would loop for ever.
		err = &UnknownError{"wait for an event", err}
	}
	h.serveRequests()
	if h.rescued.CompareAndSwap(seq, 0) {
		h.count.Add(telemetry.RescuedWakeups, 1)
	}
	return err
}

// An engine is what senders and receivers have in common.
type engine interface {
	// ready looks at the ring once and reports whether there is a frame, or room for need
	// slots.
	ready(need int) bool

	// overdue reports whether the ring has reached the event that arm asked for. The
	// slow tick and Nudge call it while the owner waits.
	overdue() bool

	// sample asks for the timing of one request, in engines where the time says something
	// about the peer or us. The slow tick calls it.
	sample()

	// drain counts the frames that are lost with the connection and puts every page back
	// into its arena. It waits until end at most for pages that users hold. The gate is shut.
	drain(end time.Time)

	// bind tells the engine which half it serves.
	bind(*half)

	// show describes the ring, and kick notifies the peer; see Device.Rings and
	// Device.Kick.
	show(*HalfState)
	kick()
}

// afterShutGate decides what a call does that found the gate shut with err. It waits while the
// link is down, and returns nil once the call may try again.
func (h *half) afterShutGate(err error) error {
	if err != ErrLinkDown {
		return err
	}
	return h.dev.awaitUp(h)
}

func (h *half) undelivered(n uint64) error {
	return h.withCounters(func(b *telemetry.Block) { b.Add(telemetry.Undelivered, n) })
}

// withCounters runs f on the counters inside the gate. The next publish shows the result.
func (h *half) withCounters(f func(*telemetry.Block)) error {
	if err := h.enter(); err != nil {
		return err
	}
	f(h.count)
	h.gate.leave()
	return nil
}

// direction tells the two halves of a queue apart.
type direction uint8

const (
	receive direction = iota
	transmit
)
