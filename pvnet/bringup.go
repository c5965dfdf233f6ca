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
		q.tx.bind(&tx.half)
		q.rx.bind(&rx.half)
		tx.ringRef, rx.ringRef = q.keys.txRing, q.keys.rxRing
		if d.role == telemetry.Backend {
			tx.ringRef, rx.ringRef = rx.ringRef, tx.ringRef
		}
		tx.park.Store(q.txPark)
		tx.drain.reset(c.timeouts)
		rx.park.Store(q.rxPark)
		tx.spin.calibrate(d.cfg.Wait, q.tx)
		rx.spin.calibrate(d.cfg.Wait, q.rx)
	}
	d.active.Store(int32(len(c.queues)))
	d.peerTakes.Store(uint32(c.feat.peerTakes))
	d.epoch.Add(1)
	d.stalled.Store(false)
	for i := range c.queues {
		d.rx[i].gate.open()
	}
	d.mu.Lock()
	d.budget, d.arenas = c.budget(), c.arenas
	d.peer, d.agreed = peer, c.features(d.cfg.LendRx, d.trusted)
	if d.steer.Load() != nil {
		d.agreed |= telemetry.FeatureHash
	}
	d.mu.Unlock()
	if c.ctrl != nil {
		c.ctrl.start()
	}
	d.setLink(c, own)
}

// quiesce shuts the gates and waits until callers have left. The connection keeps its
// memory. If a caller does not leave in time, its memory is never freed, and quiesce reports false.
func (d *Device) quiesce(c *conn, reason string) (ok bool) {
	d.stalled.Store(false)
	d.announce(linkDown, LinkEvent{Reason: reason})
	for i, q := range c.queues { // all callers are asked to leave before the wait for one
		d.tx[i].gate.shut(q.txPark.wake)
		d.rx[i].gate.shut(q.rxPark.wake)
	}
	if c.ctrl != nil {
		c.ctrl.leave()
	}
	ok, end := true, time.Now().Add(d.callerTimeout)
	for i := range c.queues {
		ok = d.tx[i].gate.waitEmpty(end) && ok
		ok = d.rx[i].gate.waitEmpty(end) && ok
	}
	if c.ctrl != nil {
		ok = c.ctrl.waitGone(end) && ok
	}
	if !ok {
		d.abandon(c)
		return false
	}
	d.countNoSlots(c)
	return true
}

// countNoSlots takes the slots of the rings out of the counters: nobody waits for them any
// more, and a ring that was full is not full while the vif is down. The gates are shut.
func (d *Device) countNoSlots(c *conn) {
	for i := range c.queues {
		for _, block := range []*telemetry.Block{d.tx[i].count, d.rx[i].count} {
			block.Set(telemetry.RingUsed, 0)
			block.Flush()
		}
	}
}

// abandon leaves the memory of the connection to a caller that is stuck in it.
func (d *Device) abandon(c *conn) {
	d.log.Error("a caller is stuck in the device; its memory is abandoned", "vif", d.id)
	c.undo = nil
}

// detach frees the rings, pages and ports of the connection. The gates are shut.
func (d *Device) detach(c *conn) {
	if c.undo != nil {
		d.unhook(c)
		c.undo.run()
		d.rx[0].count.Add(telemetry.PagesQuarantined, d.quarantined.Swap(0))
		d.rx[0].count.Add(telemetry.Violations, d.ctrlViolations.Swap(0))
		d.rx[0].count.Flush()
	}
	d.mu.Lock()
	d.budget, d.arenas = Budget{}, nil
	d.mu.Unlock()
}

// unhook takes the queues of the connection from the halves. The gates are shut.
func (d *Device) unhook(c *conn) {
	c.settle()
	d.countNoSlots(c)
	for i := range c.queues {
		d.tx[i].eng, d.rx[i].eng = nil, nil
	}
	c.queues = nil
}

// callerTimeout bounds the wait for a caller to leave. A caller inside the gate that was asked
// to leave waits for nothing but a CPU.
const callerTimeout = 10 * time.Second
