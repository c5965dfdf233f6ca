//go:build linux

package xendev

import (
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
)

// A life of a domain ends when it is suspended and resumed in a new one: restored from a
// file, or migrated. Xen has then closed every event channel and ended every grant. Linux
// thaws the program without telling it, and forgets which interrupt belongs to which port
// (xen_irq_resume of drivers/xen/events/events_base.c). Its evtchn driver does not: the
// ports stay in its list for the open file, and where it takes one out, it finds no
// interrupt for the number and stops with BUG_ON(irq < 0) in evtchn_unbind_from_user. That
// is so on EVTCHN_UNBIND, on the last close of the file, and at the end of the process,
// which then cannot be reaped. It was seen on 6.1.192, and the source
// after 6.6, which has EVTCHN_BIND_STATIC, reads the same.
// If another port has the number by then, the driver closes that one instead.
//
// So before a port is opened or closed, the life finds out whether it has ended. A port of
// an earlier life is dead: no call for it reaches the driver again. The driver is made to
// forget it (see forget), so that the process can end.
//
// A suspension that is only a checkpoint ("xl save -c") leaves everything as it was.
type life struct {
	mu      sync.Mutex           // taken before any waiter's; held while a port is opened or closed
	probe   *probe               // guarded by mu; nil: no waiter has a port, or there is no probe
	waiters map[*waiter]struct{} // guarded by mu; those that have opened a port in this life
	late    time.Duration        // probeLate; tests have more patience
	fresh   time.Duration        // probeSoon: how old an answer may be that is shared; tests have more patience
	slow    answer               // guarded by mu
}

// An answer is one that a probe gave late.
type answer struct {
	asked time.Time // zero: there was none
	came  time.Time
}

// answered reports whether the late answer is as good as that of another probe for a caller of
// begin that came at that time. The holder of mu calls it.
func (l *life) answered(caller time.Time) bool {
	return caller.Before(l.slow.asked) && time.Since(l.slow.came) < l.fresh
}

// begin locks the life and ends it if the domain was resumed since. With end, nothing
// but another suspension meanwhile can kill a port between begin and end: a window of
// microseconds that the kernel leaves no way to close.
//
// While a probe is silent nobody can know whether a port is alive, so all callers, of all
// devices, have to wait. But they wait once: those that came before a probe was sent whose event
// took long share its answer, instead of sending a probe each, one after the other. The window
// is then probeSoon at most.
func (d *Domain) begin() {
	came := time.Now()
	d.life.mu.Lock()
	l := &d.life
	if l.probe == nil || l.answered(came) {
		return
	}
	asked := time.Now()
	switch {
	case !d.alive(l.probe):
		d.resumed()
	case time.Since(asked) >= probeSoon:
		l.slow = answer{asked, time.Now()}
	}
}

func (d *Domain) end() { d.life.mu.Unlock() }

// enter adds a waiter that is about to open a port. The caller is between begin and end.
func (d *Domain) enter(w *waiter) {
	l := &d.life
	if l.waiters == nil {
		l.waiters = make(map[*waiter]struct{})
	}
	if len(l.waiters) == 0 && d.ID() != 0 { // the control domain is never suspended
		// Without a probe, where Xen's policy denies a domain a channel to itself, every
		// port counts as alive.
		l.probe, _ = d.newProbe()
	}
	l.waiters[w] = struct{}{}
}

// leave removes a waiter whose ports are closed. The caller is between begin and end.
func (d *Domain) leave(w *waiter) {
	l := &d.life
	if _, in := l.waiters[w]; !in {
		return
	}
	delete(l.waiters, w)
	if len(l.waiters) == 0 && l.probe != nil {
		unix.Close(l.probe.fd)
		l.probe = nil
	}
}

// A probe is an event channel from the domain to itself. As long as an event passes
// through it, no port that was opened after it has died.
type probe struct {
	fd       int
	from, to hypercall.PortID // a notify on from fires to
	id       hypercall.DomID  // ours, when the life began
}

func (d *Domain) newProbe() (*probe, error) {
	fd, err := d.descriptor()
	if err != nil {
		return nil, err
	}
	p := &probe{fd: fd}
	if p.to, err = d.evtchn.bindUnbound(fd, hypercall.DomSelf); err == nil {
		p.from, err = d.evtchn.bindPeer(fd, hypercall.DomSelf, p.to)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	d.learnID()
	p.id = d.ID()
	return p, nil
}

// learnID asks xenstore for our number. What is known remains if it does not answer.
func (d *Domain) learnID() {
	if id, err := d.evtchn.ownID(d.cfg); err == nil {
		d.id.Store(uint32(id))
	}
}

// How long an event to ourselves may take. It takes microseconds, or as long as Xen does not
// run the processor that takes it. After probeSoon xenstore is asked too: another domid is a
// proof that the life has ended, the same one is none, since a migration may find it free.
const (
	probeSoon = 20 * time.Millisecond
	probeLate = 2 * time.Second
)

// alive sends an event through the probe. Its ports may be dead: the driver then makes a
// hypercall for a number that is free, or another port's, whose peer sees one event too
// many.
func (d *Domain) alive(p *probe) bool {
	if err := d.evtchn.notify(p.fd, p.from); err != nil {
		return true // not what a resume looks like
	}
	if p.fired(probeSoon) {
		return true
	}
	if id, err := d.evtchn.ownID(d.cfg); err == nil && id != p.id {
		return false
	}
	return p.fired(d.life.late)
}

// fired waits for the event, and lets the port fire again.
func (p *probe) fired(limit time.Duration) bool {
	for end := time.Now().Add(limit); readable(p.fd, time.Until(end)); {
		var buf [2 * portBytes]byte
		n, err := readNow(uintptr(p.fd), buf[:])
		if err != nil || n < portBytes {
			return true // as above
		}
		for b := buf[:n]; len(b) >= portBytes; b = b[portBytes:] {
			// from fires once, when it is bound.
			if number := b[:portBytes]; hypercall.PortID(binary.NativeEndian.Uint32(number)) == p.to {
				_, _ = writeNow(uintptr(p.fd), number) // what it does not unmask, the next probe misses
				return true
			}
		}
	}
	return false
}

// resumed ends the life: the domain was resumed in a new one.
func (d *Domain) resumed() {
	l := &d.life
	dead := []*deadFile{{fd: l.probe.fd, ports: []hypercall.PortID{l.probe.from, l.probe.to}}}
	for w := range l.waiters {
		w.dead.Store(true)
		// The driver names the interrupts, which it cannot free any more, with a string
		// that it frees with the file. So the file stays open as long as the process.
		fd, err := duplicate(w.file)
		if err != nil {
			d.unclosed = append(d.unclosed, w.file)
			continue
		}
		dead = append(dead, &deadFile{fd: fd, ports: slices.Collect(maps.Keys(w.bound))})
	}
	l.waiters, l.probe, l.slow = nil, nil, answer{}
	d.forget(dead)
	d.learnID()
}

// A deadFile is an open file of the driver whose ports are all dead.
type deadFile struct {
	fd    int
	ports []hypercall.PortID
	empty bool // the driver has forgotten the ports
}

// forgetTries bounds the ports that forget opens: as many as the two-level ABI has.
const forgetTries = 4096

// forget makes the driver drop the dead ports from its lists. It has no call for that. But
// when Xen gives an open file a port whose number is in the file's list already, which
// happens only after a resume, the driver refuses it with EEXIST and empties the list
// (evtchn_bind_to_user calls del_evtchn for a node that add_evtchn did not add). Xen gives
// the lowest free number, so a scratch file takes numbers until a dead one comes, gives it
// back, and the dead file takes it.
//
// A number that is in use again never comes. The driver then still has the file's list, and
// stops with a BUG when the process ends. This is why a life's end comes before the first
// new port.
func (d *Domain) forget(dead []*deadFile) {
	owner := make(map[hypercall.PortID]*deadFile)
	var last hypercall.PortID
	for _, f := range dead {
		for _, id := range f.ports {
			owner[id] = f
			last = max(last, id)
		}
	}
	scratch, err := d.descriptor()
	if err != nil {
		return
	}
	defer unix.Close(scratch)
	for range forgetTries {
		id, err := d.evtchn.bindUnbound(scratch, hypercall.DomSelf)
		if err != nil || id > last {
			return
		}
		f := owner[id]
		if f == nil || f.empty {
			continue // scratch keeps the number, so that the next one is higher
		}
		if d.evtchn.unbind(scratch, id) != nil {
			return
		}
		switch other, err := d.evtchn.bindUnbound(f.fd, hypercall.DomSelf); {
		case errors.Is(err, unix.EEXIST):
			f.empty = d.evtchn.notify(f.fd, id) == unix.ENOTCONN
			if !f.empty { // this kernel keeps the list
				return
			}
		case err != nil:
			return
		default: // somebody else took the number meanwhile
			if d.evtchn.unbind(f.fd, other) != nil {
				return
			}
		}
	}
}
