package emu

import "barevif/hypercall"

func (g *guest) share(peer hypercall.DomID, pages int, access hypercall.Access) (grants, backing, error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	switch {
	case g.dead:
		return grants{}, nil, errDead
	case pages <= 0:
		return grants{}, nil, errNoPages
	case g.granted+pages > g.m.cfg.Grants || pages > len(g.free):
		return grants{}, nil, hypercall.ErrNoGrants
	}
	b, err := g.m.memory.shared(pages)
	if err != nil {
		return grants{}, nil, err
	}
	hold, err := b.dup()
	if err != nil {
		b.close()
		return grants{}, nil, err
	}
	s := &share{
		grants: grants{
			Serial: g.m.next(),
			Access: access,
			Refs:   make([]hypercall.GrantRef, pages),
		},
		owner:  g,
		peer:   g.peerID(peer),
		pages:  b,
		aside:  &g.quarantined,
		mapped: make([]int, pages),
		ended:  make([]bool, pages),
	}
	for i := range s.Refs {
		ref := g.free[len(g.free)-1]
		g.free = g.free[:len(g.free)-1]
		s.Refs[i] = ref
		g.granter[ref] = granter{s, i}
		g.grants[ref].Store(newEntry(s.peer, access, s.Serial))
	}
	g.shares[s.Serial] = s
	g.granted += pages
	return s.grants, hold, nil
}

func (g *guest) endShare(id uint64, refuse bool) error {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	s := g.shares[id]
	if s == nil || s.given {
		return nil
	}
	delete(g.holders, id)
	s.stuck = refuse
	if s.giveUpLocked() {
		return hypercall.ErrInUse
	}
	return nil
}

// giveUpLocked ends every grant of s that is not in use and sets the other pages aside.
func (s *share) giveUpLocked() (inUse bool) {
	g := s.owner
	if !s.given {
		s.given = true
		g.granted -= len(s.Refs)
		*s.aside += len(s.Refs)
	}
	for i := range s.Refs {
		s.endPageLocked(i)
	}
	return g.shares[s.Serial] != nil
}

// endPageLocked frees page i of a share that was given up, unless the page is mapped. The
// grant of a page in use stays as it was: Xen cannot revoke it.
func (s *share) endPageLocked(i int) {
	g := s.owner
	if !s.given || s.ended[i] || s.stuck || s.mapped[i] > 0 {
		return
	}
	s.ended[i] = true
	*s.aside--
	if ref := s.Refs[i]; !g.dead { // else the table may belong to another domain now
		g.grants[ref].Store(0)
		g.granter[ref] = granter{}
		g.free = append(g.free, ref)
	}
	for _, ended := range s.ended {
		if !ended {
			return
		}
	}
	delete(g.shares, s.Serial)
	s.pages.close()
}

func (g *guest) mapGrants(peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) (mapped, error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	p, err := g.peerLocked(peer)
	if err != nil {
		return mapped{}, err
	}
	if len(refs) == 0 {
		return mapped{}, errNoPages
	}
	out := mapped{ID: g.m.next()}
	held := make([]mappedBy, len(refs))
	for i, ref := range refs {
		if _, st := check(p.grants, ref, g.id, access); st != hypercall.OK {
			return mapped{}, &hypercall.GrantError{Op: "map", Dom: peer, Ref: ref, Status: st}
		}
		held[i] = p.granter[ref]
		if n := len(out.Runs); n > 0 {
			last := &out.Runs[n-1]
			if last.Serial == held[i].Serial && int(last.First+last.N) == held[i].page {
				last.N++
				continue
			}
		}
		out.Runs = append(out.Runs, run{held[i].Serial, ref, uint32(held[i].page), 1})
	}
	for _, h := range held {
		h.share.mapped[h.page]++
	}
	g.maps[out.ID] = held
	g.mapped += len(held)
	return out, nil
}

func (g *guest) unmapGrants(id uint64) error {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	g.unmapLocked(id)
	return nil
}

func (g *guest) unmapLocked(id uint64) {
	held := g.maps[id]
	delete(g.maps, id)
	g.mapped -= len(held)
	for _, h := range held {
		h.share.mapped[h.page]--
		h.share.endPageLocked(h.page)
	}
}

func (g *guest) attach(peer hypercall.DomID, ref hypercall.GrantRef) (grants, backing, error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	p, err := g.peerLocked(peer)
	if err != nil {
		return grants{}, nil, err
	}
	if _, st := check(p.grants, ref, g.id, hypercall.ReadOnly); st != hypercall.OK {
		return grants{}, nil, &hypercall.GrantError{Op: "copy", Dom: peer, Ref: ref, Status: st}
	}
	s := p.granter[ref].share
	b, err := s.pages.dup()
	return s.grants, b, err
}
