package emu

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/internal/backoff"
)

type waiter struct {
	d     *Domain
	hv    hypervisor // the record that its ports are opened in
	id    uint64
	bell  bell
	woken atomic.Bool
	seat  atomic.Pointer[seat] // place in a group, or nil; changed under the group's mu

	// One goroutine at a time is in Wait and uses masked. While the waiter is in a group,
	// the group's mu guards it.
	waiting atomic.Bool
	masked  backoff.Masked[*port]

	mu     sync.Mutex
	closed atomic.Bool             // set under mu
	given  atomic.Bool             // another process has the waiter now
	ports  atomic.Pointer[[]*port] // replaced under mu
}

func newWaiter(d *Domain, id uint64, b bell) *waiter {
	w := &waiter{d: d, hv: d.hv(), id: id, bell: b}
	w.ports.Store(new([]*port))
	return w
}

func (w *waiter) Unbound(peer hypercall.DomID) (hypercall.Port, error) {
	w.d.calls.unbound.Add(1)
	if err := w.d.failed(OpUnbound); err != nil {
		return nil, err
	}
	return w.open(func() (channelEnd, error) { return w.hv.unbound(w.id, peer) })
}

func (w *waiter) Bind(peer hypercall.DomID, remote hypercall.PortID) (hypercall.Port, error) {
	w.d.calls.bind.Add(1)
	if err := w.d.failed(OpBind); err != nil {
		return nil, err
	}
	return w.open(func() (channelEnd, error) { return w.hv.bind(w.id, peer, remote) })
}

func (w *waiter) open(ask func() (channelEnd, error)) (hypercall.Port, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed.Load() {
		return nil, hypercall.ErrClosed
	}
	end, err := ask()
	if errors.Is(err, hypercall.ErrNoPorts) {
		return nil, fmt.Errorf("%w: the limit of each domain is %d (emu.Config.Ports)", err, len(w.hv.own().ports)-1)
	}
	if err != nil {
		return nil, err
	}
	p := &port{w: w, id: end.ID, gen: end.Gen, word: &w.hv.own().ports[end.ID]}
	ports := append(slices.Clone(*w.ports.Load()), p)
	w.ports.Store(&ports)
	w.bell.ring() // a goroutine in Wait does not know the port yet, which may be pending
	return p, nil
}

func (w *waiter) Wake() {
	w.woken.Store(true)
	w.bell.ring()
}

// Nudge implements [hypercall.Nudger].
func (w *waiter) Nudge() { w.bell.nudge() }

func (w *waiter) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed.Swap(true) {
		return nil
	}
	if s := w.seat.Load(); s != nil {
		s.g.remove(w)
	}
	for _, p := range *w.ports.Load() {
		p.shut()
	}
	w.ports.Store(new([]*port))
	w.bell.ring()
	if w.given.Load() {
		w.d.hv().forgetWaiter(w.id, w.bell)
	} else {
		w.d.hv().closeWaiter(w.id)
		w.bell.close()
	}
	w.d.mu.Lock()
	delete(w.d.waiters, w)
	w.d.mu.Unlock()
	return nil
}

func (w *waiter) Wait(deadline time.Time, worked bool) error {
	w.d.calls.wait.Add(1)
	if w.waiting.Swap(true) {
		panic("emu: two goroutines wait on one Waiter")
	}
	defer w.waiting.Store(false)
	w.settle(worked)
	for {
		switch {
		case w.closed.Load() || w.d.dead.Load():
			return hypercall.ErrClosed
		case w.woken.Swap(false):
			return nil
		}
		if w.masked.Late() {
			w.unmaskDue(time.Now())
		}
		if w.collect() {
			return nil
		}
		if !deadline.IsZero() && !time.Now().Before(deadline) {
			return hypercall.ErrDeadlineExceeded
		}
		w.bell.park(w.masked.Next(deadline))
	}
}

// settle unmasks the ports of the last wake-up, or delays that.
func (w *waiter) settle(worked bool) {
	if len(w.masked.Fired()) == 0 && !w.masked.Late() {
		return
	}
	var now time.Time
	if !worked {
		now = time.Now()
	}
	w.d.gate.RLock()
	defer w.d.gate.RUnlock()
	if !w.d.dead.Load() {
		w.masked.Settle(worked, now, (*port).unmask)
	}
}

// unmaskDue unmasks the late ports that are due.
func (w *waiter) unmaskDue(now time.Time) {
	w.d.gate.RLock()
	defer w.d.gate.RUnlock()
	if !w.d.dead.Load() {
		w.masked.UnmaskDue(now, (*port).unmask)
	}
}

// collect takes the events of all ports, and reports whether there were any.
func (w *waiter) collect() (fired bool) {
	w.d.gate.RLock()
	defer w.d.gate.RUnlock()
	if w.d.dead.Load() {
		return false
	}
	for _, p := range *w.ports.Load() {
		if take(p.word, p.gen) {
			w.masked.Fire(p)
			fired = true
		}
	}
	return fired
}

type port struct {
	backoff.Port // guarded like the waiter's masked

	w    *waiter
	id   hypercall.PortID
	gen  uint32
	word *atomic.Uint32
	far  atomic.Pointer[farEnd] // the end that the last Notify reached

	mu     sync.Mutex
	closed atomic.Bool // set under mu, which also guards the replacement of far
}

func (p *port) ID() hypercall.PortID { return p.id }

// unmask lets the port fire again, unless it has been closed. The caller holds the gate.
func (p *port) unmask() { flag(p.word, p.gen, 0, portMasked) }

func (p *port) Close() error {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if p.closed.Load() {
		return nil
	}
	p.shut()
	ports := slices.Clone(*p.w.ports.Load())
	ports = slices.DeleteFunc(ports, func(q *port) bool { return q == p })
	p.w.ports.Store(&ports)
	if !p.w.given.Load() {
		p.w.hv.closePort(p.id, p.gen)
	}
	return nil
}

// shut makes the port unusable on this side. It is called once.
func (p *port) shut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed.Store(true)
	p.replaceFar(nil)
}

// Joined implements [hypercall.JoinedPort].
func (p *port) Joined() bool {
	d := p.w.d
	d.gate.RLock()
	defer d.gate.RUnlock()
	if d.dead.Load() || p.closed.Load() {
		return false
	}
	v := p.word.Load()
	return v>>portGen == p.gen && v&portBound != 0
}

func (p *port) Notify() error {
	d := p.w.d
	d.calls.notify.Add(1)
	if d.faults.Load() != nil {
		if f := d.fault(OpNotify); f != nil {
			return p.notifyBadly(f)
		}
	}
	return p.notify()
}

// notify asks the hypervisor for the far end only the first time and after the peer has
// changed.
func (p *port) notify() error {
	for try := 0; ; try++ {
		sent, err := p.send()
		if sent || err != nil || try == maxFetches {
			return err
		}
		if err := p.findFar(); err != nil {
			return err
		}
	}
}

// send fires the far end if it is known. It does nothing if the port is not bound.
func (p *port) send() (sent bool, err error) {
	d := p.w.d
	d.gate.RLock()
	defer d.gate.RUnlock()
	if d.dead.Load() {
		return false, errDead
	}
	if p.closed.Load() {
		return false, hypercall.ErrClosed
	}
	if p.word.Load()&portBound == 0 {
		return true, nil
	}
	far := p.far.Load()
	if far == nil {
		return false, nil
	}
	wake, stale := fire(far.word, far.gen)
	if wake {
		far.bell.ring()
	}
	return !stale, nil
}

// findFar asks the hypervisor for the present far end.
func (p *port) findFar() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed.Load() {
		return hypercall.ErrClosed
	}
	far, err := p.w.hv.farEnd(p.id, p.gen)
	if err != nil {
		return err
	}
	p.replaceFar(far)
	return nil
}

// replaceFar makes far the known far end, and frees the old one after every Notify under way has returned. If
// it freed the old one's bell before, a Notify could mark the event pending and then ring a closed bell: the
// waiter at the far end would sleep on.
func (p *port) replaceFar(far *farEnd) {
	if old := p.far.Swap(far); old != nil {
		p.w.d.quiesce()
		old.free()
	}
}

func (p *port) notifyBadly(f *Fault) error {
	switch {
	case f.Err != nil:
		return f.Err
	case f.Event == EventLost:
		return nil
	case f.Event == EventDelayed:
		time.AfterFunc(f.Delay, func() { _ = p.notify() })
		return nil
	case f.Event == EventDuplicated:
		time.AfterFunc(f.Delay, func() { _ = p.notify() })
	}
	return p.notify()
}
