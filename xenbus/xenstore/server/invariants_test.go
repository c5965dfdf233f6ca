package server

import (
	"fmt"
	"slices"
	"strings"

	"barevif/hypercall"
)

// Check recomputes the store's accounts and reports the first difference.
func (s *Store) Check() error {
	s.mu.Lock()
	defer s.mu.Unlock()

	type account struct{ nodes, watches, txs, memory, clients int }
	want := make(map[*domain]*account)
	of := func(d *domain) *account {
		if want[d] == nil {
			want[d] = new(account)
		}
		return want[d]
	}
	for _, d := range s.domains {
		of(d)
	}
	for path, n := range s.nodes {
		if !validPath(path) {
			return fmt.Errorf("node with invalid path %q", path)
		}
		owner := of(n.perms[0].dom)
		owner.nodes++
		owner.memory += n.size() + len(path)
		if owner := n.perms[0].dom; owner.dead {
			return fmt.Errorf("%s is owned by domain %d, which is dead", path, owner.id)
		}
		if n.childBytes != len(joinNUL(n.children)) {
			return fmt.Errorf("%s: childBytes %d for %q", path, n.childBytes, n.children)
		}
		if sorted := slices.Sorted(slices.Values(n.children)); len(slices.Compact(sorted)) != len(n.children) {
			return fmt.Errorf("%s lists a child twice: %q", path, n.children)
		}
		for _, name := range n.children {
			if s.nodes[join(path, name)] == nil {
				return fmt.Errorf("%s lists %q, which is no node", path, name)
			}
		}
		if path != "/" {
			if parent := s.nodes[parentOf(path)]; parent == nil || !slices.Contains(parent.children, baseOf(path)) {
				return fmt.Errorf("%s is not among its parent's children", path)
			}
		}
	}
	watched := make(map[string]int)
	open := 0
	for _, c := range s.clients {
		of(c.dom).clients++
		for _, w := range c.watches {
			watched[w.path]++
			of(c.dom).watches++
			of(c.dom).memory += len(w.path) + len(w.token)
		}
		for id, t := range c.txs {
			if t.id != id || len(t.order) != len(t.touched) {
				return fmt.Errorf("transaction %d is not itself", id)
			}
			open++
			of(c.dom).txs++
			of(c.dom).memory += t.memory
			memory := 0
			for _, a := range t.order {
				memory += touchedCost + len(a.path)
				if a.modified && a.now != nil {
					memory += a.now.size()
				}
			}
			if memory != t.memory {
				return fmt.Errorf("transaction holds %d bytes, charged %d", memory, t.memory)
			}
		}
		queued := 0
		for _, m := range c.out {
			queued += messageCost + len(m.payload)
		}
		if queued != c.queued {
			return fmt.Errorf("queue of %d bytes, charged %d", queued, c.queued)
		}
		if c.err == nil && len(c.waiting) > len(c.out) {
			return fmt.Errorf("%d events wait in a queue of %d", len(c.waiting), len(c.out))
		}
	}
	for d, a := range want {
		if got := (account{d.nodes, d.watches, d.txs, d.memory, d.clients}); got != *a {
			return fmt.Errorf("accounts of domain %d: %+v, want %+v", d.id, got, *a)
		}
	}
	if fmt.Sprint(s.watched) != fmt.Sprint(watched) || s.openTxs != open {
		return fmt.Errorf("watched %v, %d transactions; want %v, %d", s.watched, s.openTxs, watched, open)
	}
	return nil
}

// MemoryOf returns how many bytes the store holds for a domain.
func (s *Store) MemoryOf(dom hypercall.DomID) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.domains[dom].memory
}

// Dump returns all nodes with their values, for comparison.
func (s *Store) Dump() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var lines []string
	for path, n := range s.nodes {
		lines = append(lines, fmt.Sprintf("%s = %q", path, n.value))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// SkipTransactions makes every connection continue after transaction id.
func (s *Store) SkipTransactions(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.clients {
		c.lastTx = id
	}
}
