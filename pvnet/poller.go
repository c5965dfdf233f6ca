package pvnet

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
)

// A PollerConfig holds the options of a [Poller]. The zero PollerConfig suits most
// programs.
type PollerConfig struct {
	// Wait is how [Poller.Wait] waits while nothing is ready, as [Config].Wait is for the
	// calls of one half: Adaptive and Busy look at the members that are not asleep. The
	// Config.Wait of the members has no effect.
	Wait WaitMode

	// LockedThread says that the goroutine that calls Wait is locked to its thread; see
	// [Config].LockedThreads.
	LockedThread bool
}

// A Poller tells one goroutine, which owns many halves of any number of devices and
// queues, which of them have work:
//
//	for {
//		ready, err := p.Wait()
//		if err != nil {
//			return err
//		}
//		for _, r := range ready {
//			n, err := r.RX.Poll(frames)
//			…
//		}
//	}
//
// A half without work costs nothing: the Poller does not look at it until its event
// comes. A half that had work is looked at in every turn, until it was empty for some
// turns or no half has work; then the Poller arms its event.
//
// Any goroutine may call Add, Remove, Wake, SetDeadline and Close. Wait has one caller at
// a time, the owner. Only the owner may use a member, with the calls that do not wait:
// Poll, PollInto, Release, Alloc, AllocSize and Send. A call that would have to wait
// returns [ErrPolled]. A violation by a member's peer ends only that member's device.
type Poller struct {
	group hypercall.Group
	mode  WaitMode

	until   atomic.Pointer[time.Time] // deadline of Wait
	woken   atomic.Bool               // Wake asked Wait to return
	closed  atomic.Bool               // set under mu
	hasNews atomic.Bool               // set under mu: news is not empty
	inside  atomic.Bool               // a goroutine is in Wait

	mu      sync.Mutex
	members []*member // guarded by mu; by slot; removed by forget, when the owner has dropped it too
	news    []*member // guarded by mu; members that were added, removed or marked since the last takeNews

	// Used by the owner only.
	byTag       []*member // members that the owner knows, by slot
	polled      []*member // members that the owner looks at
	held        []*member // members whose next frame waits for credit under a rate limit
	creditAt    time.Time // when the first of them gets some; zero: nobody knows
	result      []Ready   // the last result of Wait, the caller's until the next Wait
	turns       uint      // how many turns found work
	busy        bool      // the last turn found work
	next        int       // index in polled of the last look while nothing is ready
	interrupted bool      // mustLeave found a reason to end the looks, other than frames
	tags        [64]int
	spin        spinner
}

const (
	// emptyTurns is for how many turns the Poller looks at an empty half while others
	// have work: a look loads one cache line, an event takes system calls at both ends.
	emptyTurns = 16

	// eventTurns is how many turns with work there are between two checks for events of
	// sleeping halves. A check takes a system call.
	eventTurns = 8
)

// A Ready is a member of a [Poller] that may have work.
type Ready struct {
	RX    *RX   // nil: it is a sending half
	TX    *TX   // nil: it is a receiving half
	Value any   // the value given to Add
	Err   error // why it is no longer a member; nil: it is
}

// NewPoller makes a Poller for halves of devices of domain. [ErrUnimplemented] if the
// domain cannot wait for many event channels at once; other errors are the system's.
func NewPoller(domain hypercall.Domain, cfg PollerConfig) (*Poller, error) {
	d, ok := domain.(hypercall.GroupDomain)
	if !ok {
		return nil, fmt.Errorf("pvnet: a %T cannot wait for many event channels at once: %w", domain, ErrUnimplemented)
	}
	g, err := d.Group(cfg.LockedThread)
	if err != nil {
		return nil, fmt.Errorf("pvnet: poller: %w", err)
	}
	return &Poller{group: g, mode: cfg.Wait}, nil
}

// Add makes half, which came from [Device.OwnRX] or [Device.OwnTX], a member. Wait
// reports it with value. The link may be up or down.
//
// Wait reports a receiving half when frames have come. It reports a sending half when it
// is added, when its link comes up, and once there is room after a Send that returned
// [ErrFull] or an Alloc that returned 0, but not if only the caller can make that room by
// releasing frames.
//
// While its link is down a half stays a member, but is not reported; [Device.Links] tells
// when the link changes. When its device has ended, Wait reports the half once more, with
// the reason as Err; then it is no longer a member.
//
// If the two halves of a queue share an event channel ("feature-split-event-channels" is
// 0), they cannot be in different Pollers: Wait reports the second one with an Err, and
// it is no longer a member.
//
// Errors: net.ErrClosed after Close, [ErrPolled] if half is in a Poller,
// [ErrDisconnected].
func (p *Poller) Add(half Half, value any) error {
	h := half.base()
	if err := h.dev.endError(); err != nil {
		return err
	}
	if !h.owned.Load() {
		return errors.New("pvnet: a Poller takes a half that has an owner: see OwnRX and OwnTX")
	}
	m := &member{p: p, h: h, value: value}
	switch half := half.(type) {
	case *RX:
		m.rx = half
	case *TX:
		m.tx = half
	}
	p.mu.Lock()
	err := p.addLocked(m)
	p.mu.Unlock()
	if err == nil {
		m.mark()
	}
	return err
}

func (p *Poller) addLocked(m *member) error {
	if p.closed.Load() {
		return hypercall.ErrClosed
	}
	m.tag = slices.Index(p.members, nil)
	if m.tag < 0 {
		if m.tag = len(p.members); m.tag > hypercall.MaxTag {
			return fmt.Errorf("pvnet: a Poller has at most %d members", hypercall.MaxTag+1)
		}
		p.members = append(p.members, nil)
	}
	if !m.h.member.CompareAndSwap(nil, m) {
		return ErrPolled
	}
	p.members[m.tag] = m
	return nil
}

// Remove ends the membership of half: its calls may wait again, and it may be added to
// another Poller. If another goroutine is in Wait, half is still in use by the owner
// until that Wait has returned. If half is no member, Remove does nothing.
func (p *Poller) Remove(half Half) {
	h := half.base()
	m := h.member.Load()
	if m == nil || m.p != p || !h.member.CompareAndSwap(m, nil) {
		return
	}
	m.removed.Store(true)
	m.leave()
	m.mark() // the owner may still have it in its list
}

// Wake makes the present or else the next Wait, or Poll, return, even if nothing is ready.
func (p *Poller) Wake() {
	p.woken.Store(true)
	p.group.Wake()
}

// SetDeadline sets when Wait gives up, also one under way; the zero Time means never.
func (p *Poller) SetDeadline(t time.Time) {
	p.until.Store(&t)
	p.group.Wake()
}

func (p *Poller) deadline() time.Time {
	if t := p.until.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

// expired reports whether the deadline has passed. It reads the clock only if there is one.
func (p *Poller) expired() bool {
	t := p.deadline()
	return !t.IsZero() && !time.Now().Before(t)
}

// Close removes every member and ends Wait. It is idempotent and leaves the devices as
// they are.
func (p *Poller) Close() error {
	p.mu.Lock()
	if p.closed.Swap(true) {
		p.mu.Unlock()
		return nil
	}
	members := slices.Clone(p.members)
	p.mu.Unlock()
	for _, m := range members {
		if m != nil && m.h.member.CompareAndSwap(m, nil) {
			m.removed.Store(true)
			m.leave()
		}
	}
	return p.group.Close()
}

// Wait waits until members may have work, and lends the list of them until the next Wait.
// Each is listed once, so a caller that handles one batch of each is fair to all. A
// listed member may turn out to have no work. If the caller leaves frames in a member,
// the next Wait lists it again without waiting. A member that returned [ErrNoBuffers] is listed
// again once a frame of it has been released, by whichever goroutine.
//
// Errors: os.ErrDeadlineExceeded, net.ErrClosed after Close, [ErrBusy] if another
// goroutine is in Wait, [*UnknownError] once the domain itself is gone. After
// [Poller.Wake] the list may be empty. Wait does not allocate. It takes locks and makes
// system calls only to put members to sleep, to sleep itself, and every few turns to
// check for events of sleeping members.
func (p *Poller) Wait() ([]Ready, error) { return p.wait(false) }

// Poll is Wait that does not wait: the list is empty if no member has work. It looks for the events
// of sleeping members whenever no other has work, which takes a system call. The deadline is Wait's alone.
func (p *Poller) Poll() ([]Ready, error) { return p.wait(true) }

// wait is Wait, and, if it is not to wait, Poll.
func (p *Poller) wait(poll bool) ([]Ready, error) {
	if !p.inside.CompareAndSwap(false, true) {
		return nil, ErrBusy
	}
	defer p.inside.Store(false)
	clear(p.result)
	p.result = p.result[:0]
	for {
		if p.closed.Load() {
			return nil, hypercall.ErrClosed
		}
		if p.hasNews.Load() {
			p.takeNews()
		}
		if p.creditDue() {
			p.releaseHeld(time.Now())
		}
		p.turn(0)
		if len(p.result) > 0 {
			if p.turns++; p.turns%eventTurns == 0 {
				was := len(p.polled)
				if _, err := p.events(); err != nil {
					return nil, err
				}
				p.turn(was)
			}
			p.busy = true
			p.woken.Store(false)
			return p.result, nil
		}
		if p.busy = false; poll {
			return p.pollEvents()
		}
		if p.woken.Swap(false) {
			return p.result, nil
		}
		if p.expired() {
			return nil, hypercall.ErrDeadlineExceeded
		}
		if p.spinMembers() {
			continue
		}
		if p.sleepAll() {
			if err := p.sleep(); err != nil {
				return nil, err
			}
		}
	}
}

// pollEvents lists the members with work that were asleep.
func (p *Poller) pollEvents() ([]Ready, error) {
	p.woken.Store(false)
	from := len(p.polled)
	if _, err := p.events(); err != nil {
		return nil, err
	}
	p.turn(from)
	p.busy = len(p.result) > 0
	return p.result, nil
}

// takeNews handles the news: it lists members that were marked and forgets those that
// left.
func (p *Poller) takeNews() {
	p.mu.Lock()
	p.hasNews.Store(false)
	left := 0
	for _, m := range p.news {
		m.inNews = false
		if m.removed.Load() {
			p.news[left] = m
			left++
			continue
		}
		if !m.known {
			m.known = true
			p.byTag = slices.Grow(p.byTag, len(p.members)-len(p.byTag))[:len(p.members)]
			p.byTag[m.tag] = m
			p.polled = slices.Grow(p.polled, len(p.members)-len(p.polled))
			p.result = slices.Grow(p.result, len(p.members))
		}
		if m.tx != nil && !m.waits {
			m.waits, m.space = true, space{slots: 1}
		}
		p.startPolling(m)
	}
	gone := slices.Clone(p.news[:left])
	clear(p.news)
	p.news = p.news[:0]
	p.mu.Unlock()
	for _, m := range gone {
		p.forget(m)
	}
}

// forget frees the slot of a member that has left.
func (p *Poller) forget(m *member) {
	m.leave() // again: it may have fallen asleep since Remove
	if m.polled {
		m.polled = false
		p.polled = slices.DeleteFunc(p.polled, func(l *member) bool { return l == m })
	}
	if m.held {
		m.held = false
		p.held = slices.DeleteFunc(p.held, func(l *member) bool { return l == m })
	}
	if m.known && p.byTag[m.tag] == m {
		p.byTag[m.tag] = nil
	}
	p.mu.Lock()
	if p.members[m.tag] == m {
		p.members[m.tag] = nil
	}
	p.mu.Unlock()
}

// startPolling ends the sleep of m and has the owner look at it.
func (p *Poller) startPolling(m *member) {
	if m.wake() {
		m.slept = true
	}
	m.empty = 0
	if !m.polled {
		m.polled = true
		p.polled = append(p.polled, m)
	}
}

// turn looks at the polled members from index from on, and reports those with work.
func (p *Poller) turn(from int) {
	kept := from
	for _, m := range p.polled[from:] {
		if !p.visit(m) {
			m.polled = false
			continue
		}
		p.polled[kept] = m
		kept++
	}
	clear(p.polled[kept:])
	p.polled = p.polled[:kept]
}

// visit looks at m, reports it if it has work, and returns whether it stays polled.
func (p *Poller) visit(m *member) bool {
	if m.removed.Load() {
		return false
	}
	if m.rx != nil && m.h.hadWork { // the last turn found frames: there is no need to look
		m.h.hadWork, m.worked, m.empty = false, true, 0
		p.report(m, nil)
		return true
	}
	ready, err := m.look()
	switch {
	case err == ErrBusy: // another goroutine uses the half, which it must not
		return true
	case err == ErrLinkDown: // Device.bringUp marks m
		return false
	case err != nil:
		p.removeWith(m, err)
		return false
	case ready:
		m.worked, m.empty = true, 0
		p.report(m, nil)
		m.waits = false
		return m.rx != nil
	}
	if p.hold(m) {
		return false
	}
	if m.empty < emptyTurns || !p.busy {
		m.empty = min(m.empty+1, emptyTurns)
		return true // while no member has work, Wait decides: look or sleep
	}
	slept, err := m.sleep()
	if err != nil && err != ErrLinkDown {
		p.removeWith(m, err)
	}
	return !slept && err == nil
}

func (p *Poller) report(m *member, err error) {
	p.result = append(p.result, Ready{RX: m.rx, TX: m.tx, Value: m.value, Err: err})
}

// removeWith ends the membership of m and reports why.
func (p *Poller) removeWith(m *member, err error) {
	if m.h.member.CompareAndSwap(m, nil) {
		m.removed.Store(true)
		p.report(m, err)
		m.mark() // the next takeNews frees its slot
	}
}

// sleepAll puts all polled members to sleep, and reports whether all sleep now.
func (p *Poller) sleepAll() bool {
	all := true
	kept := 0
	for _, m := range p.polled {
		if p.hold(m) {
			m.polled = false
			continue
		}
		slept, err := m.sleep()
		if err != nil && err != ErrLinkDown && err != ErrBusy {
			p.removeWith(m, err)
			all = false
		}
		if err == ErrBusy {
			all = false
		}
		if slept || err != nil && err != ErrBusy {
			m.polled = false
			continue
		}
		all = false
		p.polled[kept] = m
		kept++
	}
	clear(p.polled[kept:])
	p.polled = p.polled[:kept]
	return all
}

// sleep waits for the events of sleeping members, for news, a wake, or the deadline.
func (p *Poller) sleep() error {
	var start time.Time
	measure := p.spin.measures() && p.creditAt.IsZero() // a wait for credit tells nothing about the peers
	if measure {
		start = time.Now()
	}
	n, err := p.group.Wait(p.tags[:], sooner(p.deadline(), p.creditAt))
	if measure {
		p.spin.ended(time.Since(start))
	}
	p.fired(n)
	if errors.Is(err, hypercall.ErrDeadlineExceeded) {
		return nil // the caller looks
	}
	return p.waitError(err)
}

// waitError returns the error of Wait after an error of the Group; nil if Wait goes on.
func (p *Poller) waitError(err error) error {
	if err == nil || p.closed.Load() {
		return nil // the caller looks
	}
	return &UnknownError{"wait for events", err} // the domain itself is gone, or its driver
}

// events starts to poll the members whose events have come, without waiting, and
// returns how many events there were.
func (p *Poller) events() (int, error) {
	n, err := p.group.Poll(p.tags[:])
	p.fired(n)
	return n, p.waitError(err)
}

// fired starts to poll the members that the first n tags stand for.
func (p *Poller) fired(n int) {
	for _, tag := range p.tags[:n] {
		m := p.byTag[tag]
		if m == nil || m.park == nil {
			continue // it has left
		}
		for _, m := range m.park.sleepersOf(p) {
			if m == nil || m.removed.Load() {
				continue
			}
			if m.tx != nil && !m.waits { // it waits for nothing: only a call of the owner can end its sleep
				m.park.markIdle(m)
				continue
			}
			m.event = true
			p.startPolling(m)
		}
	}
}

// spinMembers looks at the polled members for as long as the mode says, and reports
// whether there is something to do.
func (p *Poller) spinMembers() bool {
	if p.mode == Park {
		return false
	}
	p.interrupted = false
	if len(p.polled) == 0 {
		if p.mode == Busy {
			p.mustLeave()
			runtime.Gosched()
		}
		return p.mode == Busy
	}
	if p.spin.cost == 0 {
		p.spin.calibrate(p.mode, p)
	}
	return p.spin.spin(p, p, 1) || p.interrupted || p.mode == Busy
}

// ready looks at one polled member, the next each time, and reports whether it has
// work.
func (p *Poller) ready(int) bool {
	if p.next++; p.next >= len(p.polled) {
		p.next = 0
	}
	ready, err := p.polled[p.next].look()
	return ready || err != nil
}

// mustLeave reports whether anything but frames of listed members ends the looks: an event,
// news, Wake, Close or the deadline.
func (p *Poller) mustLeave() bool {
	n, err := p.events()
	p.interrupted = n > 0 || err != nil || p.hasNews.Load() || p.woken.Load() || p.closed.Load() || p.expired() || p.creditDue()
	return p.interrupted
}
