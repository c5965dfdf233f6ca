package pvnet

import (
	"errors"
	"fmt"
	"math"

	"barevif/arena"
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

// next returns the plan to try when p does not fit: smaller queues first, then fewer. With
// auto it is fewer first: the number was nobody's wish, and full queues lose less.
func (p plan) next(auto bool) (next plan, more bool) {
	if auto && p.queues > 1 {
		return plan{p.queues - 1, p.pages}, true
	}
	if p.pages/2 >= pagesPerHalfMin {
		return plan{p.queues, p.pages / 2}, true
	}
	return plan{p.queues - 1, pagesPerHalf}, p.queues > 1
}

// leastPlan is the smallest plan.
var leastPlan = plan{1, pagesPerHalfMin}

// spare returns how many pages p leaves for each other vif: those of the least plan, or with
// auto, for which p is not yet as small as it may be, those of a full queue.
func (p plan) spare(auto bool) int {
	if auto && p.queues > 1 {
		return plan{1, pagesPerHalf}.total()
	}
	return leastPlan.total()
}

// frontQueues makes the frontend's side of up to f.queues queues, all of one size. It
// leaves room for each of the other vifs, unless it can get only the least plan itself. When a plan does not fit, it gives back all that the plan took
// before it tries a smaller one: so every queue gets the same, whichever was made first.
func (m *setup) frontQueues(f features, cfg *Config, others int, blocks func(i int) (rx, tx *telemetry.Block)) ([]connQueue, error) {
	asked := plan{f.queues, pagesPerHalf}
	var first, last error
	full := math.MaxInt // the smallest number of pages that did not fit
	for p, more := asked, true; more; p, more = p.next(cfg.auto) {
		spare := others * p.spare(cfg.auto)
		if p.total()+spare >= full {
			continue
		}
		queues, made, err := m.tryPlan(p, f, cfg, spare, blocks)
		if err == nil {
			if p != asked && (!cfg.auto || p.pages < pagesPerHalf) {
				m.log.Warn("less than asked for", "asked", asked.String(), "got", p.String(), "err", first)
			}
			return queues, nil
		}
		if first == nil {
			first = err
		}
		last = err
		switch {
		case errors.Is(err, hypercall.ErrNoGrants):
			full = p.total() + spare
		case cfg.auto && p.queues > 1:
			p.queues = min(p.queues, max(made, 1)+1)
		default: // pages were not the problem: try fewer queues
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

// frontParts are what a frontend's queue shares with its backend. Another process of the
// domain can take them over.
type frontParts struct {
	txShare, rxShare, rings *hypercall.Share
	tx, rx                  *arena.Arena // of the shares
	waiters                 []hypercall.Waiter
	rxPort, txPort          hypercall.Port // the same one if the directions share an event channel
}

// frontQueue makes the frontend's side of a queue: pages, rings, ports.
func (m *setup) frontQueue(pages int, f features, cfg *Config, rx, tx *telemetry.Block) (q connQueue, err error) {
	p := new(frontParts)
	if p.txShare, p.tx, err = m.share(pages, hypercall.ReadOnly); err != nil {
		return q, err
	}
	if p.rxShare, p.rx, err = m.share(pages, hypercall.ReadWrite); err != nil {
		return q, err
	}
	if p.rings, err = m.dom.Share(m.peer, 2, hypercall.ReadWrite); err != nil {
		return q, err
	}
	m.own(p.rings)
	unbound := func(w hypercall.Waiter) (hypercall.Port, error) { return w.Unbound(m.peer) }
	if p.rxPort, err = m.port(&q.rxPark, unbound); err != nil {
		return q, err
	}
	p.txPort, q.txPark = p.rxPort, q.rxPark
	if f.split {
		if p.txPort, err = m.port(&q.txPark, unbound); err != nil {
			return q, err
		}
	}
	t, r, err := m.frontEngines(&q, p, f, cfg, rx, tx)
	if err != nil {
		return q, err
	}
	t.ring = ring.NewFront[netif.TxRequest, netif.TxResponse](p.rings.Slice(0, 1), netif.TxStride)
	r.ring = ring.NewFront[netif.RxRequest, netif.RxResponse](p.rings.Slice(1, 1), netif.RxStride)
	r.fill()
	r.ring.Publish() // the peer is notified once it has the port
	q.use(t, r)
	return q, nil
}

// frontEngines makes the engines of a queue with these parts, without their rings.
func (m *setup) frontEngines(q *connQueue, p *frontParts, f features, cfg *Config, rx, tx *telemetry.Block) (*frontTX, *frontRX, error) {
	pool, err := m.private(cfg.buffers())
	if err != nil {
		return nil, nil, err
	}
	p.waiters = []hypercall.Waiter{q.rxPark.w}
	if q.txPark != q.rxPark {
		p.waiters = append(p.waiters, q.txPark.w)
	}
	q.parts = p
	q.keys = queueKeys{p.rings.Refs[0], p.rings.Refs[1], p.txPort.ID(), p.rxPort.ID()}
	return &frontTX{
			shared: p.tx, refs: p.txShare.Refs, scatter: f.backSG, peerTakes: f.peerTakes,
			state: make([]uint8, p.txShare.Pages()), peerLink: peerLink{"tx", p.txPort, tx},
		}, &frontRX{
			shared: p.rx, refs: p.rxShare.Refs, private: pool, lend: cfg.LendRx && !f.untrusted, offload: f.offload,
			peerLink: peerLink{"rx", p.rxPort, rx},
		}, nil
}

// use makes the engines those of the queue.
func (q *connQueue) use(t *frontTX, r *frontRX) {
	q.tx, q.rx = t, r
	t.count.Set(telemetry.RingSize, uint64(t.ring.Size()))
	r.count.Set(telemetry.RingSize, uint64(r.ring.Size()))
}
