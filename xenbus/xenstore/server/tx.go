package server

import "slices"

// A transaction holds private copies of the nodes it touched. It can be committed if none
// of these nodes has changed since; a node that it looked for and did not find counts
// too.
type transaction struct {
	id      uint32
	order   []*touched
	touched map[string]*touched
	created bool
	failed  bool
	memory  int // bytes charged to the domain until the transaction ends
}

type touched struct {
	path     string
	gen      uint64 // generation when first touched; 0: the node did not exist
	before   []perm // permissions when first touched; nil: the node did not exist
	now      *node  // the node as the transaction sees it; nil: no such node
	modified bool
	fire     bool // the commit has to send an event
	exact    bool // send it to watches of this very path only
}

// touchedCost is roughly the overhead of C xenstored's copy of a node, in bytes.
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
	a := t.touched[path] // never nil: a transaction loads a node before it writes it
	a.now, a.modified = n, true
}

// charged returns the bytes that the domain pays for the node at path, besides
// touchedCost. A node that was only read is shared and costs nothing.
func (t *transaction) charged(path string) int {
	if a := t.touched[path]; a.modified && a.now != nil {
		return a.now.size()
	}
	return 0
}

// fire notes an event for the commit. An event for all watches at and above path replaces
// an exact one, not the other way round.
func (t *transaction) fire(path string, exact bool) {
	a := t.touched[path]
	a.exact = exact && (a.exact || !a.fire)
	a.fire = true
}

func (r *request) start() (*transaction, error) {
	if r.tx != nil {
		return nil, EBUSY
	}
	// "more than" as in do_transaction_start: the domain gets one more than its quota.
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

// endTxLocked drops the transaction, committed or not.
func (c *client) endTxLocked(t *transaction) {
	t.charge(c.dom, -t.memory)
	c.dom.txs--
	c.s.openTxs--
	delete(c.txs, t.id)
}

// commit puts the transaction's nodes into the tree: all of them or none.
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
		// An owner may have died since SET_PERMS named it in this transaction.
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
