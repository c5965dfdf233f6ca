package pvnet

import (
	"errors"
	"fmt"
	"math"

	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/telemetry"
)

// A plan divides the pages that a frontend shares: each queue gets the same number.
type plan struct {
	queues int
	pages  int // for frames, in each direction
}

// perQueue is how many pages of the system's limit a queue takes: pages for frames, and
// rings.
func (p plan) perQueue() int { return 2*p.pages + 2 }

func (p plan) total() int { return p.queues * p.perQueue() }

func (p plan) String() string {
	if p.queues == 1 {
		return fmt.Sprintf("1 queue of %d pages", p.perQueue())
	}
	return fmt.Sprintf("%d queues of %d pages", p.queues, p.perQueue())
}

// next returns the plan to try when p does not fit: smaller queues first, then fewer.
func (p plan) next() (next plan, more bool) {
	if p.pages/2 >= pagesPerHalfMin {
		return plan{p.queues, p.pages / 2}, true
	}
	return plan{p.queues - 1, pagesPerHalf}, p.queues > 1
}

// leastPlan is the smallest plan.
var leastPlan = plan{1, pagesPerHalfMin}

// frontQueues makes the frontend's side of up to f.queues queues, all of one size. It
// leaves room for the least plan of each of the other vifs, unless it can get only the
// least plan itself. When a plan does not fit, it gives back all that the plan took
// before it tries a smaller one: so every queue gets the same, whichever was made first.
func (m *setup) frontQueues(f features, cfg *Config, others int, blocks func(i int) (rx, tx *telemetry.Block)) ([]connQueue, error) {
	asked := plan{f.queues, pagesPerHalf}
	var first, last error
	full := math.MaxInt // the smallest total that did not fit
	for p, more := asked, true; more; p, more = p.next() {
		if p.total() >= full {
			continue
		}
		queues, made, err := m.tryPlan(p, f, cfg, others*leastPlan.total(), blocks)
		if err == nil {
			if p != asked {
				m.log.Warn("less than asked for", "asked", asked.String(), "got", p.String(), "err", first)
			}
			return queues, nil
		}
		if first == nil {
			first = err
		}
		last = err
		if errors.Is(err, hypercall.ErrNoGrants) {
			full = p.total()
		} else { // pages were not the problem: try fewer queues
			p = plan{min(p.queues, max(made, 1)+1), pagesPerHalfMin}
		}
	}
	if others > 0 && errors.Is(last, hypercall.ErrNoGrants) {
		queues, _, err := m.tryPlan(leastPlan, f, cfg, 0, blocks)
		if err == nil {
			m.log.Warn("less than asked for, and too little is left for other vifs", "asked", asked.String(), "got", leastPlan.String(), "err", first)
			return queues, nil
		}
		last = err
	}
	return nil, fmt.Errorf("%v asked for, and not even %v is to be had: %w", asked, leastPlan, last)
}

// tryPlan makes all queues of p, provided that spare more pages could be shared after
// them. Otherwise it makes none and returns how many queues it had made before it failed.
func (m *setup) tryPlan(p plan, f features, cfg *Config, spare int, blocks func(i int) (rx, tx *telemetry.Block)) (queues []connQueue, made int, err error) {
	mark, shared, own, arenas := len(m.c.undo), m.c.shared, m.c.private, len(m.c.arenas)
	for i := range p.queues {
		rx, tx := blocks(i)
		q, err := m.frontQueue(p.pages, f, cfg, rx, tx)
		if err == nil {
			queues = append(queues, q)
			if i < p.queues-1 || m.canSpare(spare) {
				continue
			}
			err = fmt.Errorf("%d more pages for other vifs: %w", spare, hypercall.ErrNoGrants)
		} else {
			err = fmt.Errorf("queue %d: %w", i, err)
		}
		drainAll(queues)
		part := m.c.undo[mark:]
		m.c.undo, m.c.shared, m.c.private, m.c.arenas = m.c.undo[:mark], shared, own, m.c.arenas[:arenas]
		part.run()
		return nil, i, err
	}
	return queues, p.queues, nil
}

// canSpare reports whether that many more pages could be shared now.
func (m *setup) canSpare(pages int) bool {
	if pages == 0 {
		return true
	}
	s, err := m.dom.Share(m.peer, pages, hypercall.ReadOnly)
	if err == nil {
		m.end(s)
	}
	return !errors.Is(err, hypercall.ErrNoGrants)
}

// frontQueue makes the frontend's side of a queue: pages, rings, ports.
func (m *setup) frontQueue(pages int, f features, cfg *Config, rx, tx *telemetry.Block) (q connQueue, err error) {
	txPages, txRefs, err := m.share(pages, hypercall.ReadOnly)
	if err != nil {
		return q, err
	}
	rxPages, rxRefs, err := m.share(pages, hypercall.ReadWrite)
	if err != nil {
		return q, err
	}
	rings, err := m.dom.Share(m.peer, 2, hypercall.ReadWrite)
	if err != nil {
		return q, err
	}
	m.c.undo.add(func() { m.end(rings) })
	m.c.shared += 2

	pool, err := m.private(cfg.buffers())
	if err != nil {
		return q, err
	}
	unbound := func(w hypercall.Waiter) (hypercall.Port, error) { return w.Unbound(m.peer) }
	rxPort, err := m.port(&q.rxPark, unbound)
	if err != nil {
		return q, err
	}
	txPort := rxPort
	q.txPark = q.rxPark
	if f.split {
		if txPort, err = m.port(&q.txPark, unbound); err != nil {
			return q, err
		}
	}
	if n, ok := m.dom.(hypercall.EndNotifier); ok {
		if err := n.NotifyOnEnd(rings, txPort); err != nil {
			return q, err
		}
		m.c.undo.add(func() { n.NotifyOnEnd(rings, nil) })
	}
	q.keys = queueKeys{rings.Refs[0], rings.Refs[1], txPort.ID(), rxPort.ID()}
	q.tx = &frontTX{
		ring:   ring.NewFront[netif.TxRequest, netif.TxResponse](rings.Slice(0, 1), netif.TxStride),
		shared: txPages, refs: txRefs, scatter: f.backSG, peerTakes: f.peerTakes,
		state: make([]uint8, pages), peerLink: peerLink{"tx", txPort, tx},
	}
	r := &frontRX{
		ring:   ring.NewFront[netif.RxRequest, netif.RxResponse](rings.Slice(1, 1), netif.RxStride),
		shared: rxPages, refs: rxRefs, private: pool, lend: cfg.LendRx, offload: f.offload,
		peerLink: peerLink{"rx", rxPort, rx},
	}
	r.fill()
	r.ring.Publish() // the peer is notified once it has the port
	q.rx = r
	rx.Set(telemetry.RingSize, uint64(r.ring.Size()))
	tx.Set(telemetry.RingSize, uint64(r.ring.Size()))
	return q, nil
}
