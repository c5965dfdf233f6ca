package main

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/packet"
	"barevif/tools/vifrouter/mld"
)

// listening reports on the uplink's link which groups the router listens to, so that switches with MLD snooping
// pass on to it the solicitations for its addresses. The backend of the uplink is asked for no multicast filter, and
// needs no list of groups. Guests get no reports: the vif of each is a link without a switch, and the router gets
// all that comes from it.
//
// Queries are read where frames are moved. One costs a look at the clock, the lock, and the times of
// the few groups that there are; it allocates nothing. What is due is sent by the goroutine of run, at a bounded rate.
type listening struct {
	write func(frame []byte) // does not wait
	soon  chan struct{}      // holds one: something may be due earlier than run knows

	mu    sync.Mutex   // also held while frames are written, so that they leave in the order of their reports
	state mld.Listener // guarded by mu
}

func (l *listening) init(pl *plane) {
	l.write = func(frame []byte) { pl.write(uplinkPort, frame) }
	l.soon = make(chan struct{}, 1)
}

// up says that the uplink's link came up, or that the card, with that MAC, is at another link.
func (l *listening) up(mac pvnet.MAC) {
	l.mu.Lock()
	l.state.Up(time.Now(), mac)
	l.mu.Unlock()
	nudge(l.soon)
}

// down says that the link is down.
func (l *listening) down() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.Down()
}

// to makes the router listen to the groups of addrs alone. source is as for mld.Listener.Listen.
func (l *listening) to(source netip.Addr, addrs []netip.Addr) {
	l.mu.Lock()
	before := l.state.Next()
	l.state.Listen(time.Now(), source, addrs)
	changed := !l.state.Next().Equal(before)
	l.mu.Unlock()
	if changed {
		nudge(l.soon)
	}
}

// hear takes a query that came at the uplink. The core has checked where it comes from, and its checksum.
func (l *listening) hear(frame []byte, h *packet.Headers) {
	q, ok := mld.Parse(frame[h.L3:h.End])
	if !ok {
		return
	}
	l.mu.Lock()
	another := l.state.Hear(time.Now(), q)
	l.mu.Unlock()
	if another {
		nudge(l.soon)
	}
}

// now returns the state of the listener.
func (l *listening) now() mld.State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.State(time.Now())
}

// hurry sends the first reports that were not sent yet, and all else that is due.
func (l *listening) hurry() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.Hurry(time.Now())
	l.sendLocked()
}

func (l *listening) sendLocked() {
	for _, frame := range l.state.Reports(time.Now()) {
		l.write(frame)
	}
}

// run sends reports when it is time for them, until ctx ends.
func (l *listening) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.soon:
		case <-timer.C:
		}
		l.mu.Lock()
		l.sendLocked()
		next := l.state.Next()
		l.mu.Unlock()
		if !next.IsZero() {
			timer.Reset(max(time.Until(next), time.Millisecond))
		}
	}
}

// listenLocked makes the router listen to the groups of its addresses at the uplink, and of those of which
// duplicate address detection has begun.
func (d *daemon) listenLocked() {
	addrs, source := slices.Clone(d.auto.Listening), netip.IPv6Unspecified()
	for i := range d.applied.Ports {
		p := &d.applied.Ports[i]
		if p.ID != uplinkPort {
			continue
		}
		var own netip.Addr // the link-local address, as the core has it
		for _, a := range p.Addrs {
			switch {
			case a.Addr().Is4():
				continue
			case a.Addr().IsLinkLocalUnicast():
				own = a.Addr()
			case !own.IsValid():
				own = packet.LinkLocal(p.MAC)
			}
			addrs = append(addrs, a.Addr())
		}
		if own.IsValid() {
			addrs, source = append(addrs, own), own
		}
	}
	d.listens.to(source, addrs)
}

// listenFirst makes the router listen to the groups of addrs, at once and before their solicitations are sent:
// solicitations of other stations for the same addresses go to these groups (RFC 4862, section 5.4.2).
func (d *daemon) listenFirst(ctx context.Context, addrs []netip.Addr) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	d.auto.Listening = slices.DeleteFunc(addrs, func(a netip.Addr) bool { return overlapping6(d.cfg, netip.PrefixFrom(a, 64).Masked()) != "" })
	d.listenLocked()
	d.listens.hurry()
}
