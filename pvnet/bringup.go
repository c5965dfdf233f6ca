package pvnet

import (
	"time"

	"barevif/hypercall"
	"barevif/telemetry"
	"barevif/xenbus"
)

// bringUp gives the halves the engines of connection c, opens the gates and announces the
// link.
func (d *Device) bringUp(c *conn, peer hypercall.DomID, own xenbus.State) {
	for i, q := range c.queues {
		tx, rx := d.tx[i], d.rx[i]
		tx.eng, rx.eng = q.tx, q.rx
		tx.park.Store(q.txPark)
		rx.park.Store(q.rxPark)
		tx.spin.calibrate(d.cfg.Wait, q.tx)
		rx.spin.calibrate(d.cfg.Wait, q.rx)
	}
	d.active.Store(int32(len(c.queues)))
	d.peerTakes.Store(uint32(c.feat.peerTakes))
	d.epoch.Add(1)
	for i := range c.queues {
		d.tx[i].gate.open()
		d.rx[i].gate.open()
	}
	d.mu.Lock()
	d.budget, d.arenas = Budget{c.shared, c.private}, c.arenas
	d.peer, d.agreed = peer, c.features(d.cfg.LendRx, d.trusted)
	d.mu.Unlock()
	d.setStatus(own, true) // before the event: a subscriber may look at the status
	d.announce(linkUp, LinkEvent{Up: true})
	for i := range c.queues {
		d.tx[i].markMember()
		d.rx[i].markMember()
	}
}

// quiesce shuts the gates and waits until callers have left. The connection keeps its
// memory. If a caller does not leave in time, its memory is never freed, and quiesce reports false.
func (d *Device) quiesce(c *conn, reason string) (ok bool) {
	d.announce(linkDown, LinkEvent{Reason: reason})
	for i, q := range c.queues { // all callers are asked to leave before the wait for one
		d.tx[i].gate.shut(q.txPark.wake)
		d.rx[i].gate.shut(q.rxPark.wake)
	}
	ok, end := true, time.Now().Add(d.callerTimeout)
	for i := range c.queues {
		ok = d.tx[i].gate.waitEmpty(end) && ok
		ok = d.rx[i].gate.waitEmpty(end) && ok
	}
	if !ok {
		d.log.Error("a caller is stuck in the device; its memory is abandoned", "vif", d.id)
		c.undo = nil
	}
	return ok
}

// detach frees the rings, pages and ports of the connection. The gates are shut.
func (d *Device) detach(c *conn) {
	if c.undo != nil {
		drainAll(c.queues)
		for i := range c.queues {
			d.tx[i].count.Flush()
			d.rx[i].count.Flush()
			d.tx[i].eng, d.rx[i].eng = nil, nil
		}
		c.undo.run()
		d.rx[0].count.Add(telemetry.PagesQuarantined, d.quarantined.Swap(0))
		d.rx[0].count.Flush()
	}
	d.mu.Lock()
	d.budget, d.arenas = Budget{}, nil
	d.mu.Unlock()
}

// callerTimeout bounds the wait for a caller to leave. A caller inside the gate that was asked
// to leave waits for nothing but a CPU.
const callerTimeout = 10 * time.Second
