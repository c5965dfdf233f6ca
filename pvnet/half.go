package pvnet

import (
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"barevif/telemetry"
)

var errTimeout error = os.ErrDeadlineExceeded

// A gate lets one caller at a time into a half. With it the life goroutine keeps callers
// out and waits until the last one has left. It is not a lock: a caller never waits at
// it.
type gate struct {
	state  atomic.Uint32
	quiet  chan struct{} // one token: the caller that was inside when the gate was shut has left
	inside bool          // life goroutine only: a caller was inside when the gate was shut
}

const (
	gateOpen = iota
	gateBusy
	gateClosing // busy, and the caller has been asked to leave
	gateShut
	gateReading // a reader publishes the counters, for less than a microsecond
)

func (g *gate) init() {
	g.quiet = make(chan struct{}, 1)
	g.state.Store(gateShut)
}

// enter reports whether the caller is now inside.
func (g *gate) enter() bool { return g.state.CompareAndSwap(gateOpen, gateBusy) }

func (g *gate) leave() {
	if !g.state.CompareAndSwap(gateBusy, gateOpen) {
		g.state.Store(gateShut)
		g.quiet <- struct{}{}
	}
}

// abandon is leave for a caller that does not know whether it was inside, when no other
// caller could be.
func (g *gate) abandon() {
	if s := g.state.Load(); s == gateBusy || s == gateClosing {
		g.leave()
	}
}

// shut keeps callers out from now on. It calls nudge to wake a caller that is parked
// inside.
func (g *gate) shut(nudge func()) {
	for !g.inside {
		if g.state.CompareAndSwap(gateOpen, gateShut) || g.state.Load() == gateShut {
			return
		}
		g.inside = g.state.CompareAndSwap(gateBusy, gateClosing)
		runtime.Gosched()
	}
	nudge()
}

// empty waits, after shut, until no caller is inside. It reports false if one still is at
// end: that caller may never leave.
func (g *gate) empty(end time.Time) bool {
	if !g.inside {
		return true
	}
	t := time.NewTimer(time.Until(end))
	defer t.Stop()
	select {
	case <-g.quiet:
		g.inside = false
	case <-t.C:
		select {
		case <-g.quiet:
			g.inside = false
		default:
		}
	}
	return !g.inside
}

// open lets callers in again. The gate must be empty.
func (g *gate) open() { g.state.Store(gateOpen) }

// A half is one direction of one queue, without its ring: it lives as long as the Device,
// while rings come and go with connections.
type half struct {
	dev     *Device
	queue   int
	dir     direction
	gate    gate
	park    atomic.Pointer[parker]    // of the connection; stored by the life goroutine only
	until   atomic.Pointer[time.Time] // deadline of waiting calls
	owned   atomic.Bool               // handed to an owner by OwnTX or OwnRX
	ending  atomic.Bool               // Listen has been asked to end
	mu      sync.Mutex                // serialises the Device's own calls
	count   *telemetry.Block          // written by the caller inside the gate
	recent  int                       // frames counted since the last publish; inside the gate
	worked  bool                      // a frame or a slot moved since the last rest; inside the gate
	parked  atomic.Uint32             // number of the wait: odd while the owner waits, and never the same twice
	rescue  atomic.Uint32             // number of the wait that the watchdog ended
	due     atomic.Uint32             // what the slow tick asks the caller inside the gate to do: dueHeal, ...
	resting atomic.Uint32             // who may use the counters while the owner waits: lentOut, ...
	spin    spinner                   // of the connection; inside the gate
	member  atomic.Pointer[member]    // its membership in a Poller; nil: none
}

func (h *half) init(d *Device, queue int, dir direction, block *telemetry.Block) {
	h.dev, h.queue, h.dir, h.count = d, queue, dir, block
	h.gate.init()
}

// enter returns nil once the caller is inside the gate.
func (h *half) enter() error {
	if v := h.dev.broken.Load(); v != nil {
		return v
	}
	for !h.gate.enter() {
		switch h.gate.state.Load() {
		case gateBusy, gateClosing:
			return ErrBusy
		case gateReading: // lasts less than a microsecond
		default:
			if err := h.dev.stateOf(h); err != nil {
				return err
			}
		}
		runtime.Gosched() // the link is coming up
	}
	return nil
}

// flush publishes the counters if no caller is inside the gate. A caller that comes
// meanwhile spins instead of getting ErrBusy.
func (h *half) flush() {
	if h.gate.state.CompareAndSwap(gateOpen, gateReading) {
		h.count.Flush()
		h.gate.state.Store(gateOpen)
	}
}

// counted takes note of frames that moved and publishes the counters every 32 frames. The
// caller is inside the gate.
func (h *half) counted(frames int) {
	if frames == 0 {
		return
	}
	h.worked = true
	h.recent += frames
	if h.recent >= 32 {
		h.recent = 0
		h.count.Publish()
		h.refresh()
	}
}

// What the slow tick asks the caller inside the gate to do.
const (
	dueHeal  = 1 << iota // compare the counters with their mirror
	dueStall             // count a stall
)

// refresh does what the slow tick has asked for. The caller is inside the gate.
func (h *half) refresh() {
	if h.due.Load() != 0 {
		h.attend(h.due.Swap(0))
	}
}

func (h *half) attend(due uint32) {
	if due&dueStall != 0 {
		h.count.Add(telemetry.Stalls, 1)
		h.count.Publish()
	}
	if due&dueHeal != 0 {
		h.count.Refresh()
	}
}

// Who may use the counters of a half.
const (
	ownersOwn = iota // the owner, or the caller inside the gate
	lentOut          // the owner waits, and the slow tick may use them
	taken            // the slow tick uses them
)

// remind does what due says at once if no caller is inside the gate, or if the caller
// inside waits. Otherwise the caller inside does it. It wakes nobody.
func (h *half) remind(due uint32) {
	if h.gate.state.CompareAndSwap(gateOpen, gateReading) {
		h.attend(due)
		h.gate.state.Store(gateOpen)
		return
	}
	h.due.Or(due)
	if h.resting.CompareAndSwap(lentOut, taken) { // else the owner lends them later, and then looks at due
		h.refresh()
		h.resting.Store(lentOut)
	}
}

// lend lets the slow tick use the counters until reclaim.
func (h *half) lend() { h.resting.Store(lentOut) }

func (h *half) reclaim() {
	for !h.resting.CompareAndSwap(lentOut, ownersOwn) {
		runtime.Gosched() // the slow tick has them for a microsecond
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
	h.dev.nudge()
}

// interrupt ends the receive under way and every later one, until ending is cleared.
func (h *half) interrupt() {
	h.ending.Store(true)
	if p := h.park.Load(); p != nil {
		p.wake()
	}
	h.dev.nudge()
}

// errInterrupted is the error of a receive that interrupt ended.
var errInterrupted = errors.New("pvnet: interrupted")

// expired reports whether the deadline has passed. It reads the clock only if
// there is one.
func (h *half) expired() bool {
	t := h.deadline()
	return !t.IsZero() && !time.Now().Before(t)
}

// leaving reports whether a caller that spins inside the gate must leave, or give up.
func (h *half) leaving() bool {
	return h.gate.state.Load() != gateBusy || h.ending.Load() || h.expired()
}

// rest parks inside the gate until there may be something to do.
func (h *half) rest() error {
	if h.member.Load() != nil {
		return ErrPolled
	}
	p := h.park.Load()
	if p.answer(h.dir, h.worked) {
		h.count.Add(telemetry.EventsSpurious, 1)
	}
	h.recent, h.worked = 0, false
	h.count.Add(telemetry.Parks, 1)
	h.count.Flush()
	seq := h.parked.Add(1)
	var event bool
	var err error
	var start time.Time
	if h.spin.measures() {
		start = time.Now()
	}
	h.lend()
	if h.due.Load() == 0 { // from here on remind finds the counters lent
		event, err = p.wait(h.dir, h.deadline())
	}
	h.reclaim()
	h.parked.Add(1)
	if h.spin.measures() {
		h.spin.ended(time.Since(start))
	}
	if event {
		h.count.Add(telemetry.Events, 1)
		if p.deserted() {
			h.dev.wakeLife()
		}
	}
	if err == net.ErrClosed && h.gate.state.Load() == gateBusy {
		// Our own teardown shuts the gate before it closes the waiter. The gate is not
		// shut, so the domain itself is gone, and a retry would loop for ever.
		err = &UnknownError{"wait for an event", err}
	}
	h.refresh()
	if h.rescue.CompareAndSwap(seq, 0) {
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
	// watchdog calls it while the owner waits.
	overdue() bool

	// sample asks for the timing of one request, in engines where the time says something
	// about the peer or us. The slow tick calls it.
	sample()

	// drain counts the frames that are lost with the connection and puts every page back
	// into its arena. The gate is shut.
	drain()
}

// retry decides what a call does that found the gate shut with err. It waits while the
// link is down, and returns nil once the call may try again.
func (h *half) retry(err error) error {
	if err != ErrLinkDown {
		return err
	}
	return h.dev.awaitUp(h)
}
