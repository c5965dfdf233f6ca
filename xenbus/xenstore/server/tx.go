package server

import "slices"

// A transaction is a private copy of the nodes it touched. It can be committed if
// none of them, not even one it only looked for in vain, has changed since.
type transaction struct {
	id      uint32
	order   []*touched
	touched map[string]*touched
	created bool
	failed  bool
	memory  int // charged to the domain until the end
}

type touched struct {
	path     string
	gen      uint64 // when first touched; 0: there was no such node
	before   []perm // likewise; nil
	now      *node  // as the transaction sees it; nil: no such node
	modified bool
	fire     bool // there is an event to send at the commit
	exact    bool // only to watches of this very path
}

// touchedCost is what C xenstored's copy of a node costs beside the node, roughly.
const touchedCost = 128

func (t *transaction) load(r *request, path string) (*node, error) {
	if a := t.touched[path]; a != nil {
		return a.now, nil
	}
	n := r.s.nodes[path]
	if !r.dom.privileged {
		if len(t.order) >= r.s.cfg.Quota.TransactionNodes {
			return nil, r.fail(ENOSPC)
		}
		if r.dom.memory+touchedCost+len(path) > r.s.cfg.Quota.Memory {
			return nil, r.fail(ENOMEM)
		}
	}
	a := &touched{path: path, gen: n.generation(), now: n}
	if n != nil {
		a.before = n.perms
		clipped := *n
		clipped.children = slices.Clip(n.children)
		a.now = &clipped
	}
	t.order = append(t.order, a)
	t.touched[path] = a
	t.charge(r.dom, touchedCost+len(path))
	return a.now, nil
}

func (t *transaction) charge(d *domain, bytes int) {
	t.memory += bytes
	d.memory += bytes
}

func (t *transaction) save(d *domain, path string, n *node) {
	t.charge(d, -t.charged(path))
	if n != nil {
		t.charge(d, n.size())
	}
	a := t.touched[path] // there: nothing is written that was not loaded first
	a.now, a.modified = n, true
}

// charged is what the domain pays for the node at path beside its place in the
// transaction: nodes that were only read are shared.
func (t *transaction) charged(path string) int {
	if a := t.touched[path]; a.modified && a.now != nil {
		return a.now.size()
	}
	return 0
}

// fire notes an event for the commit. One for all watches at and above the path
// replaces an exact one, not the other way round.
func (t *transaction) fire(path string, exact bool) {
	a := t.touched[path]
	a.exact = exact && (a.exact || !a.fire)
	a.fire = true
}

func (r *request) start() (*transaction, error) {
	if r.tx != nil {
		return nil, EBUSY
	}
	// "more than" as in do_transaction_start: one more than the quota says.
	if !r.dom.privileged && r.dom.txs > r.s.cfg.Quota.Transactions {
		return nil, ENOSPC
	}
	for {
		r.c.lastTx++
		if r.c.lastTx != 0 && r.c.txs[r.c.lastTx] == nil {
			break
		}
	}
	t := &transaction{id: r.c.lastTx, touched: make(map[string]*touched)}
	r.c.txs[t.id] = t
	r.dom.txs++
	r.s.openTxs++
	return t, nil
}

// end forgets the transaction, committed or not.
func (c *client) endTxLocked(t *transaction) {
	t.charge(c.dom, -t.memory)
	c.dom.txs--
	c.s.openTxs--
	delete(c.txs, t.id)
}

// commit makes the transaction's nodes everybody's, or none of them.
func (r *request) commit(t *transaction) error {
	if t.failed {
		return ENOMEM
	}
	if t.created && !r.dom.privileged {
		if err := r.checkOwners(t); err != nil {
			return err
		}
	}
	for _, a := range t.order {
		if r.s.nodes[a.path].generation() != a.gen {
			r.s.stats.Conflicts++
			return EAGAIN
		}
		// An owner can have died since SET_PERMS named it here.
		if a.modified && a.now != nil && a.now.perms[0].dom.dead {
			r.s.stats.Conflicts++
			return EAGAIN
		}
	}
	for _, a := range t.order {
		if a.modified {
			if a.now != nil {
				r.s.gen++
				a.now.gen = r.s.gen
			}
			r.s.putLocked(a.path, a.now)
		}
	}
	r.tx = nil
	for _, a := range t.order {
		if a.fire {
			r.fire(a.path, a.now, a.before, a.exact)
		}
	}
	return nil
}

func (r *request) checkOwners(t *transaction) error {
	change := make(map[*domain]int)
	for _, a := range t.order {
		if !a.modified {
			continue
		}
		if a.before != nil {
			change[a.before[0].dom]--
		}
		if a.now != nil {
			change[a.now.perms[0].dom]++
		}
	}
	for d, n := range change {
		if !d.privileged && d.nodes+n >= r.s.cfg.Quota.Nodes {
			return ENOSPC
		}
	}
	return nil
}
