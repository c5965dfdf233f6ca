package pvnet

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/telemetry"
)

// A PollerConfig is what a [Poller] may be told. The zero PollerConfig suits most
// programs.
type PollerConfig struct {
	// Wait is what [Poller.Wait] does while nothing is ready, as [Config].Wait is for the
	// calls of one half: Adaptive and Busy look at the members that had work last. The
	// members' own Config.Wait does not matter.
	Wait WaitMode

	// LockedThread says that the goroutine that calls Wait is locked to its thread; see
	// [Config].LockedThreads.
	LockedThread bool
}

// A Poller says which of many halves have work, of any number of devices and queues, for
// one goroutine that owns them all:
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
// A half that has nothing to do costs nothing: nobody looks at it until its event comes. One
// that had work is looked at in turn, until it was found empty for some turns or there is
// nothing else to do; then its peer is asked for an event.
//
// Add, Remove, Wake, SetDeadline and Close may be called from any goroutine. Wait has one
// caller at a time, the owner, and only the owner may use a member, by the calls that do
// not wait: Poll, PollInto, Release, Alloc, AllocSize and Send. A call that would have to
// wait returns [ErrPolled]. What a member's peer does ends nothing but its device.
type Poller struct {
	group hypercall.Group
	mode  WaitMode

	until  atomic.Pointer[time.Time] // when Wait gives up
	woken  atomic.Bool               // Wait is to return
	closed atomic.Bool               // set under mu
	told   atomic.Bool               // set under mu: there are news
	inside atomic.Bool               // somebody is in Wait

	mu      sync.Mutex
	members []*member // guarded by mu; by slot, until the owner has forgotten it too
	news    []*member // guarded by mu; those the owner has to see to

	// The owner's alone.
	slots   []*member // those it knows, by slot
	list    []*member // those it looks at
	lent    []Ready   // what is ready, the caller's until the next Wait
	turns   uint      // in which there was work
	busy    bool      // there was in the last one
	at      int       // of list: who is looked at next while nothing is ready
	stirred bool      // while nothing was ready, something came up but for frames
	tags    [64]int
	spin    spinner
}

const (
	// emptyTurns is for how many turns a half that has nothing to do is looked at while
	// others have: a look is a load of one line, an event system calls at both ends.
	emptyTurns = 16

	// eventTurns is after how many turns in which there was work the events of halves that
	// nobody looks at are asked for, which takes a system call.
	eventTurns = 8
)

// A Ready is a member of a [Poller] that may have work.
type Ready struct {
	RX    *RX   // nil: it is a sending half
	TX    *TX   // nil: it is a receiving half
	Value any   // what Add was given
	Err   error // why it is no member any more; nil: it is
}

// A Half is an [*RX] or a [*TX].
type Half interface{ base() *half }

func (h *half) base() *half { return h }

// A member is a half in a Poller.
type member struct {
	p     *Poller
	h     *half
	rx    *RX // one of these two
	tx    *TX
	value any
	slot  int

	queued bool        // guarded by p.mu: among the news
	out    atomic.Bool // it was removed
	asleep atomic.Bool // its ring's event is asked for, and nobody looks at it

	// The owner's alone.
	known  bool
	listed bool
	fresh  bool    // it was asleep, and has not been looked at since
	event  bool    // an event ended that
	worked bool    // it had work since it was asleep
	wants  bool    // of a sending half: it lacks what need says
	empty  uint8   // turns in which it had nothing
	seq    uint32  // of its sleep
	taken  uint32  // the ring's index when it fell asleep
	need   need    // of a sending half
	park   *parker // where it last fell asleep
}

// NewPoller makes a Poller for halves of devices in domain. [ErrUnimplemented] if the
// domain cannot wait for many event channels at once.
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

// Add makes a half a member that was taken by [Device.OwnRX] or [Device.OwnTX]. Wait gives
// value with it. Whether the link is up does not matter.
//
// A receiving half is reported when frames have come. A sending half is reported when it
// is added, when its link comes up, and once there is room after a Send that returned
// [ErrFull] or an Alloc that gave none; not if that room has to come from frames that the
// caller holds itself.
//
// A member stays one while its link is down, and while the device connects again: it is
// not reported then, and [Device.Links] tells. When its device has ended it is reported
// once more, with the reason as Err, and is no member any more.
//
// Both halves of a queue whose peer has one event channel for both
// ("feature-split-event-channels" is 0) must be in the same Poller, if they are in any: one
// that cannot be waited for is reported with an Err, too.
//
// Errors: net.ErrClosed, [ErrPolled] if it is in a Poller, [ErrDisconnected].
func (p *Poller) Add(half Half, value any) error {
	h := half.base()
	if err := h.dev.over(); err != nil {
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
		return net.ErrClosed
	}
	m.slot = slices.Index(p.members, nil)
	if m.slot < 0 {
		if m.slot = len(p.members); m.slot > hypercall.MaxTag {
			return fmt.Errorf("pvnet: a Poller has at most %d members", hypercall.MaxTag+1)
		}
		p.members = append(p.members, nil)
	}
	if !m.h.member.CompareAndSwap(nil, m) {
		return ErrPolled
	}
	p.members[m.slot] = m
	return nil
}

// Remove takes a member out: its calls may wait again, and it may be added elsewhere. If
// another goroutine is in Wait, the half is still the owner's until that Wait has returned.
// It is no error if the half is no member.
func (p *Poller) Remove(half Half) {
	h := half.base()
	m := h.member.Load()
	if m == nil || m.p != p || !h.member.CompareAndSwap(m, nil) {
		return
	}
	m.out.Store(true)
	m.leave()
	m.mark() // the owner may have it in its list
}

// leave takes m out of where it waits. Its slot is not free yet.
func (m *member) leave() {
	if k := m.h.park.Load(); k != nil {
		k.unpoll(m)
	}
	m.rouse()
}

// mark has the owner see to m.
func (m *member) mark() {
	p := m.p
	p.mu.Lock()
	if !m.queued {
		m.queued = true
		p.news = append(p.news, m)
	}
	p.told.Store(true)
	p.mu.Unlock()
	p.group.Wake()
}

// marked has the owner see to h, if it is in a Poller.
func (h *half) marked() {
	if m := h.member.Load(); m != nil {
		m.mark()
	}
}

// Wake makes the present Wait, or else the next, return, with whatever is ready.
func (p *Poller) Wake() {
	p.woken.Store(true)
	p.group.Wake()
}

// SetDeadline is when Wait gives up; the zero Time is never. It holds for a Wait under way
// too.
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

// Close removes every member and ends Wait. It is idempotent. The devices stay.
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
			m.out.Store(true)
			m.leave()
		}
	}
	return p.group.Close()
}

// Wait waits until members may have work, and lends them until the next Wait: each once, so
// that a caller who gives each a batch of its time is fair to all. A member may turn out to
// have nothing. What is left over in it is reported again by the next Wait, without waiting;
// so is a member whose buffers the caller holds all ([ErrNoBuffers]).
//
// Errors: os.ErrDeadlineExceeded, net.ErrClosed after Close, [ErrBusy] if another goroutine
// is in Wait, [*UnknownError] once the domain itself is gone. After [Poller.Wake] there may be
// none ready. It does not allocate, and takes locks and makes system calls only to put
// members to sleep, to sleep, and every few turns to hear of those that do.
func (p *Poller) Wait() ([]Ready, error) {
	if !p.inside.CompareAndSwap(false, true) {
		return nil, ErrBusy
	}
	defer p.inside.Store(false)
	clear(p.lent)
	p.lent = p.lent[:0]
	for {
		if p.closed.Load() {
			return nil, net.ErrClosed
		}
		if p.told.Load() {
			p.catchUp()
		}
		p.turn(0)
		if len(p.lent) > 0 {
			if p.turns++; p.turns%eventTurns == 0 {
				was := len(p.list)
				if _, err := p.events(); err != nil {
					return nil, err
				}
				p.turn(was)
			}
			p.busy = true
			p.woken.Store(false)
			return p.lent, nil
		}
		p.busy = false
		if p.woken.Swap(false) {
			return p.lent, nil
		}
		if p.expired() {
			return nil, os.ErrDeadlineExceeded
		}
		if p.found() {
			continue
		}
		if p.doze() {
			if err := p.sleep(); err != nil {
				return nil, err
			}
		}
	}
}

// catchUp sees to the news.
func (p *Poller) catchUp() {
	p.mu.Lock()
	p.told.Store(false)
	left := 0
	for _, m := range p.news {
		m.queued = false
		if m.out.Load() {
			p.news[left] = m
			left++
			continue
		}
		if !m.known {
			m.known = true
			p.slots = slices.Grow(p.slots, len(p.members)-len(p.slots))[:len(p.members)]
			p.slots[m.slot] = m
			p.list = slices.Grow(p.list, len(p.members)-len(p.list))
			p.lent = slices.Grow(p.lent, len(p.members))
		}
		if m.tx != nil && !m.wants {
			m.wants, m.need = true, need{slots: 1}
		}
		p.enlist(m)
	}
	gone := slices.Clone(p.news[:left])
	clear(p.news)
	p.news = p.news[:0]
	p.mu.Unlock()
	for _, m := range gone {
		p.forget(m)
	}
}

// forget frees the slot of a member that is out.
func (p *Poller) forget(m *member) {
	m.leave() // anew, since it may have fallen asleep meanwhile
	if m.listed {
		m.listed = false
		p.list = slices.DeleteFunc(p.list, func(l *member) bool { return l == m })
	}
	if m.known && p.slots[m.slot] == m {
		p.slots[m.slot] = nil
	}
	p.mu.Lock()
	if p.members[m.slot] == m {
		p.members[m.slot] = nil
	}
	p.mu.Unlock()
}

// enlist has m looked at from now on.
func (p *Poller) enlist(m *member) {
	if m.rouse() {
		m.fresh = true
	}
	m.empty = 0
	if !m.listed {
		m.listed = true
		p.list = append(p.list, m)
	}
}

// rouse ends the sleep of m, and reports whether it slept.
func (m *member) rouse() bool {
	if !m.asleep.CompareAndSwap(true, false) {
		return false
	}
	m.h.parked.Add(1)
	return true
}

// turn looks at the members in the list from a place on, and reports those with work.
func (p *Poller) turn(from int) {
	kept := from
	for _, m := range p.list[from:] {
		if !p.see(m) {
			m.listed = false
			continue
		}
		p.list[kept] = m
		kept++
	}
	clear(p.list[kept:])
	p.list = p.list[:kept]
}

// see looks at m and reports whether it stays in the list.
func (p *Poller) see(m *member) bool {
	if m.out.Load() {
		return false
	}
	if m.rx != nil && m.h.worked { // the last turn found frames: there is no need to look
		m.h.worked, m.worked, m.empty = false, true, 0
		p.report(m, nil)
		return true
	}
	ready, err := m.look()
	switch {
	case err == ErrBusy: // somebody uses it who should not, and who finds out
		return true
	case err == ErrLinkDown: // who brings it up marks m
		return false
	case err != nil:
		p.expel(m, err)
		return false
	case ready:
		m.worked, m.empty = true, 0
		p.report(m, nil)
		m.wants = false
		return m.rx != nil
	}
	if m.empty < emptyTurns || !p.busy {
		m.empty = min(m.empty+1, emptyTurns)
		return true // while nobody has work, Wait says what happens
	}
	slept, err := m.doze()
	if err != nil && err != ErrLinkDown {
		p.expel(m, err)
	}
	return !slept && err == nil
}

func (p *Poller) report(m *member, err error) {
	p.lent = append(p.lent, Ready{RX: m.rx, TX: m.tx, Value: m.value, Err: err})
}

// expel reports why m is no member any more.
func (p *Poller) expel(m *member, err error) {
	if m.h.member.CompareAndSwap(m, nil) {
		m.out.Store(true)
		p.report(m, err)
		m.mark() // its slot is freed in the next turn
	}
}

// look reports whether m has work. Errors are those of a call of its half.
func (m *member) look() (ready bool, err error) {
	h := m.h
	if err = h.enter(); err != nil {
		return false, err
	}
	if m.fresh {
		err = m.awake()
	}
	if err == nil {
		if m.rx != nil {
			ready = m.rx.eng.ready(1)
		} else if m.wants {
			ready, err = m.tx.eng.room(m.need)
		}
	}
	h.gate.leave()
	return ready, h.dev.judge(err)
}

// awake takes in what there is to know of a sleep that ended. m is inside the gate.
func (m *member) awake() error {
	h := m.h
	m.fresh = false
	h.awake(m.seq)
	if m.event {
		h.count.Add(telemetry.Events, 1)
		if m.park.deserted() {
			h.dev.wakeLife()
		}
	}
	h.refresh()
	if h.rescue.CompareAndSwap(m.seq, 0) {
		h.count.Add(telemetry.RescuedWakeups, 1)
	}
	if m.tx != nil {
		return m.tx.eng.rested()
	}
	return nil
}

// doze asks m's peer for an event, and reports whether m may be left alone: not if there is
// work by now.
func (m *member) doze() (slept bool, err error) {
	h := m.h
	if err = h.enter(); err != nil {
		return false, err
	}
	defer h.gate.leave()
	if m.fresh {
		if err = m.awake(); err != nil {
			return false, h.dev.judge(err)
		}
	}
	var more bool
	var taken uint32
	if m.rx != nil {
		taken = m.rx.eng.consumed()
		if more = m.rx.eng.ready(1); !more {
			more, err = m.rx.eng.arm()
		}
	} else {
		if !m.wants || m.tx.eng.stuck(m.need) != nil {
			return true, nil // nobody but the owner can change that
		}
		more, err = m.tx.eng.arm(m.need)
	}
	if more || err != nil {
		return false, h.dev.judge(err)
	}
	worked := m.worked || m.park != h.park.Load() || taken != m.taken // frames that were dropped are work
	if m.event && !worked {
		h.count.Add(telemetry.EventsSpurious, 1)
	}
	m.event, m.worked, m.taken, m.park = false, false, taken, h.park.Load()
	h.recent, h.worked = 0, false
	h.count.Add(telemetry.Parks, 1)
	h.count.Flush()
	m.seq = h.parked.Add(1)
	m.asleep.Store(true)
	if err = m.park.poll(m, worked); err != nil {
		m.rouse()
		if m.out.Load() {
			return true, nil
		}
		return false, &UnknownError{"wait for the events of queue " + fmt.Sprint(h.queue), err}
	}
	return true, nil
}

// doze asks the peers of all members in the list for events, and reports whether none has
// work by now.
func (p *Poller) doze() bool {
	all := true
	kept := 0
	for _, m := range p.list {
		slept, err := m.doze()
		if err != nil && err != ErrLinkDown && err != ErrBusy {
			p.expel(m, err)
			all = false
		}
		if err == ErrBusy {
			all = false
		}
		if slept || err != nil && err != ErrBusy {
			m.listed = false
			continue
		}
		all = false
		p.list[kept] = m
		kept++
	}
	clear(p.list[kept:])
	p.list = p.list[:kept]
	return all
}

// sleep waits for events.
func (p *Poller) sleep() error {
	var start time.Time
	if p.spin.measures() {
		start = time.Now()
	}
	n, err := p.group.Wait(p.tags[:], p.deadline())
	if p.spin.measures() {
		p.spin.ended(time.Since(start))
	}
	p.fired(n)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil // the caller looks
	}
	return p.judge(err)
}

// judge is what Wait returns when the Group does not wait any more.
func (p *Poller) judge(err error) error {
	if err == nil || p.closed.Load() {
		return nil // the caller looks
	}
	return &UnknownError{"wait for events", err} // the domain itself is gone, or its driver
}

// events lists the members whose events have come, without waiting, and says how many.
func (p *Poller) events() (int, error) {
	n, err := p.group.Poll(p.tags[:])
	p.fired(n)
	return n, p.judge(err)
}

// fired lists the members that the first n tags tell of.
func (p *Poller) fired(n int) {
	for _, tag := range p.tags[:n] {
		m := p.slots[tag]
		if m == nil || m.park == nil {
			continue // it has left
		}
		for _, m := range m.park.inPoller(p) {
			if m == nil || m.out.Load() {
				continue
			}
			if m.tx != nil && !m.wants { // it sleeps for good
				m.park.spare(m)
				continue
			}
			m.event = true
			p.enlist(m)
		}
	}
}

// found looks at the members in the list for as long as the mode says, and reports whether
// there is anything to do.
func (p *Poller) found() bool {
	if p.mode == Park {
		return false
	}
	p.stirred = false
	if len(p.list) == 0 {
		if p.mode == Busy {
			p.leaving()
			runtime.Gosched()
		}
		return p.mode == Busy
	}
	if p.spin.cost == 0 {
		p.spin.calibrate(p.mode, p)
	}
	return p.spin.found(p, p, 1) || p.stirred || p.mode == Busy
}

// ready looks at the next member in the list, and reports whether there is something to do.
func (p *Poller) ready(int) bool {
	if p.at++; p.at >= len(p.list) {
		p.at = 0
	}
	ready, err := p.list[p.at].look()
	return ready || err != nil
}

// leaving looks for what ends a look but frames of those in the list.
func (p *Poller) leaving() bool {
	n, err := p.events()
	p.stirred = n > 0 || err != nil || p.told.Load() || p.woken.Load() || p.closed.Load() || p.expired()
	return p.stirred
}

// want says what a sending half lacks. The owner is inside the gate.
func (m *member) want(n need) {
	m.wants, m.need = true, n
	m.p.enlist(m)
}
