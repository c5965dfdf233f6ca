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

// A gate lets one caller at a time into a half, and lets the life goroutine keep
// callers out and wait until the last one has left. It is not a lock: a caller
// never waits at it.
type gate struct {
	state  atomic.Uint32
	quiet  chan struct{} // one token: the caller that was inside has left
	inside bool          // of the life goroutine only: somebody was, when it was shut
}

const (
	gateOpen = iota
	gateBusy
	gateClosing // busy, and the caller is asked to leave
	gateShut
	gateReading // a reader publishes the counters, for a moment
)

func (g *gate) init() {
	g.quiet = make(chan struct{}, 1)
	g.state.Store(gateShut)
}

// enter reports whether the caller is inside.
func (g *gate) enter() bool { return g.state.CompareAndSwap(gateOpen, gateBusy) }

func (g *gate) leave() {
	if !g.state.CompareAndSwap(gateBusy, gateOpen) {
		g.state.Store(gateShut)
		g.quiet <- struct{}{}
	}
}

// abandon is leave for a caller that does not know whether it was inside, if
// nobody else could be.
func (g *gate) abandon() {
	if s := g.state.Load(); s == gateBusy || s == gateClosing {
		g.leave()
	}
}

// shut keeps callers out from now on, and calls nudge to make one that is inside
// and parked look up.
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

// empty waits until nobody is inside any more, after shut. It reports false if that
// is not so by end: the caller inside may never leave.
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

// open lets callers in again. Only once it is empty.
func (g *gate) open() { g.state.Store(gateOpen) }

// A half is one direction of one queue, without its rings: it lives as long as
// the Device, while rings come and go with connections.
type half struct {
	dev     *Device
	queue   int
	dir     direction
	gate    gate
	park    atomic.Pointer[parker]    // of the connection; stored by the life goroutine
	until   atomic.Pointer[time.Time] // deadline for whatever waits
	owned   atomic.Bool               // taken out of the Device's hands
	ending  atomic.Bool               // Listen is to end
	mu      sync.Mutex                // serialises the Device's own calls
	count   *telemetry.Block          // written by whoever is inside the gate
	recent  int                       // frames counted since the last publish; inside the gate
	worked  bool                      // anything moved since the last rest; inside the gate
	parked  atomic.Uint32             // odd while the owner waits, and never the same twice
	rescue  atomic.Uint32             // the wait, by its number, that the watchdog ended
	roused  atomic.Pointer[rousing]   // the latest wait that the slow tick ended
	due     atomic.Uint32             // what the slow tick wants done inside the gate: dueHeal, ...
	resting atomic.Uint32             // whose the counters are while the owner waits
	sampled uint32                    // of the slow tick only: the wait in which it timed a wake-up last
	spin    spinner                   // of the connection; inside the gate
	member  atomic.Pointer[member]    // in a Poller; nil: in none
}

func (h *half) init(d *Device, queue int, dir direction, block *telemetry.Block) {
	h.dev, h.queue, h.dir, h.count = d, queue, dir, block
	h.gate.init()
}

// enter is nil once the caller is inside the gate.
func (h *half) enter() error {
	if v := h.dev.broken.Load(); v != nil {
		return v
	}
	for !h.gate.enter() {
		switch h.gate.state.Load() {
		case gateBusy, gateClosing:
			return ErrBusy
		case gateReading: // for less than a microsecond
		default:
			if err := h.dev.stateOf(h); err != nil {
				return err
			}
		}
		runtime.Gosched() // the link is coming up
	}
	return nil
}

// flush publishes the counters if nobody is inside the gate. Whoever comes
// meanwhile does not get ErrBusy.
func (h *half) flush() {
	if h.gate.state.CompareAndSwap(gateOpen, gateReading) {
		h.count.Flush()
		h.gate.state.Store(gateOpen)
	}
}

// counted shows the counters every 32 frames. The caller is inside the gate.
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

// What the slow tick wants done inside the gate.
const (
	dueHeal  = 1 << iota // compare the counters with their mirror
	dueStall             // count a stall
)

// refresh does what is due. The caller is inside the gate.
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

// Whose the counters of a half are.
const (
	ownersOwn = iota // they are the owner's, or open to who enters the gate
	lentOut          // the owner waits: the slow tick may take them
	taken            // the slow tick has them
)

// remind has something done: at once if nobody is inside the gate or who is waits,
// else by who is. It wakes nobody.
func (h *half) remind(due uint32) {
	if h.gate.state.CompareAndSwap(gateOpen, gateReading) {
		h.attend(due)
		h.gate.state.Store(gateOpen)
		return
	}
	h.due.Or(due)
	if h.resting.CompareAndSwap(lentOut, taken) { // else the owner looks before it lends them
		h.refresh()
		h.resting.Store(lentOut)
	}
}

// lend lets the slow tick at the counters until reclaim.
func (h *half) lend() { h.resting.Store(lentOut) }

func (h *half) reclaim() {
	for !h.resting.CompareAndSwap(lentOut, ownersOwn) {
		runtime.Gosched() // for a microsecond
	}
}

// heal has the counters compared with their mirror. A half whose owner waits not
// for the first time since then is woken for it, which is timed. One in a Poller is not:
// its owner waits for others too.
func (h *half) heal(p *parker) {
	seq := h.parked.Load()
	if seq%2 == 0 || seq == h.sampled || h.member.Load() != nil {
		h.remind(dueHeal)
		return
	}
	h.due.Or(dueHeal)
	h.rouse(p)
	h.sampled = seq + 2 // the one after this, unless there are events
}

// A rousing is when the slow tick ended a wait.
type rousing struct {
	wait uint32 // by its number
	at   time.Time
}

// rouse wakes the owner if it waits at p, and has it say how long that took.
func (h *half) rouse(p *parker) {
	if seq := h.parked.Load(); seq%2 == 1 {
		h.roused.Store(&rousing{seq, time.Now()})
	}
	p.wake()
}

// awake counts what it took to wake up, if the slow tick ended the wait.
func (h *half) awake(wait uint32) {
	r := h.roused.Load()
	if r == nil {
		return
	}
	h.roused.CompareAndSwap(r, nil)
	if r.wait == wait {
		h.count.Observe(telemetry.WakeupLatency, uint64(time.Since(r.at)))
	}
}

func (h *half) deadline() time.Time {
	if t := h.until.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

// setDeadline wakes whoever waits, so that it waits for the new one.
func (h *half) setDeadline(t time.Time) {
	h.until.Store(&t)
	if p := h.park.Load(); p != nil {
		p.wake()
	}
	h.dev.nudge()
}

// interrupt ends the receive under way, and any that follows, until ending is
// cleared.
func (h *half) interrupt() {
	h.ending.Store(true)
	if p := h.park.Load(); p != nil {
		p.wake()
	}
	h.dev.nudge()
}

// errInterrupted is what a receive returns that was interrupted.
var errInterrupted = errors.New("pvnet: interrupted")

// expired reports whether the deadline has passed. It reads the clock only if
// there is one.
func (h *half) expired() bool {
	t := h.deadline()
	return !t.IsZero() && !time.Now().Before(t)
}

// leaving reports whether a caller who looks inside the gate is to leave, or to give up.
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
	if h.due.Load() == 0 { // or remind finds them lent
		event, err = p.wait(h.dir, h.deadline())
	}
	h.reclaim()
	h.parked.Add(1)
	if h.spin.measures() {
		h.spin.ended(time.Since(start))
	}
	h.awake(seq)
	if event {
		h.count.Add(telemetry.Events, 1)
		if p.deserted() {
			h.dev.wakeLife()
		}
	}
	if err == net.ErrClosed && h.gate.state.Load() == gateBusy {
		// Our own teardown shuts the gate before it closes the waiter. So the
		// domain itself is gone, and waiting again would never end.
		err = &UnknownError{"wait for an event", err}
	}
	h.refresh()
	if h.rescue.CompareAndSwap(seq, 0) {
		h.count.Add(telemetry.RescuedWakeups, 1)
	}
	return err
}

// An engine is what a half's two kinds of engine have in common.
type engine interface {
	// ready looks at the ring once: is there a frame, or room for need slots?
	ready(need int) bool

	// overdue reports whether what arm asked for is there. The watchdog calls it
	// while the owner waits.
	overdue() bool

	// sample has a request timed, where that says something of the peer or of us.
	// The slow tick calls it.
	sample()

	// drain counts what the end of the connection loses, and takes every page
	// home. The gate is shut.
	drain()
}

// retry says what a call that found the gate shut does: nil if the link is back
// and it may try again, an error if not.
func (h *half) retry(err error) error {
	if err != ErrLinkDown {
		return err
	}
	return h.dev.awaitUp(h)
}
