package emu

import "barevif/hypercall"

// handOver answers the requests by which one process of a domain passes objects on to
// another.
func (s *server) handOver(r *request, refs []hypercall.GrantRef, a *answer) (err error) {
	g := s.g
	switch r.Op {
	case opOffer:
		ids := joinIDs(refs)
		if uint64(r.N) > uint64(len(ids)) || len(ids) > 2*maxOffered {
			return errOffered
		}
		for i, id := range ids {
			want := heldWaiter
			if i < int(r.N) {
				want = heldShare
			}
			if kind, held := s.p.held[id]; !held || kind != want {
				return errOffered
			}
		}
		a.ID, err = g.offer(s.p, ids[:r.N], ids[r.N:])
	case opWithdraw:
		g.withdrawOf(s.p, r.ID)
	case opAdoptShare:
		share, b, err := g.adoptShare(r.ID, int(r.N))
		if err != nil {
			return err
		}
		defer b.close()
		a.setGrants(share.grants)
		a.Peer = share.Peer
		return s.adopted(a, fdBacking(b))
	case opAdoptWaiter:
		w, err := g.adoptWaiter(r.ID, int(r.N))
		if err != nil {
			return err
		}
		a.ID = w.id
		for _, end := range w.ports {
			a.refs = append(a.refs, hypercall.GrantRef(end.ID), hypercall.GrantRef(end.Gen))
		}
		return s.adopted(a, func() (int, error) { return fdOf(w.bell.(*fdBell).file) })
	case opForget:
		if _, held := s.p.held[r.ID]; held {
			g.forget(r.ID)
		}
	}
	return err
}

func fdBacking(b backing) func() (int, error) {
	return func() (int, error) { return fdOf(b.(*fileBacking).file) }
}

// adopted adds the descriptor of the object a.ID to the answer. Without one the program does
// not hold the object.
func (s *server) adopted(a *answer, fd func() (int, error)) error {
	err := a.give(fd())
	if err != nil {
		s.g.forget(a.ID)
	}
	return err
}

// withdrawOf is withdraw by a program that has made the offer.
func (g *guest) withdrawOf(p *program, token uint64) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	if o := g.offers[token]; o != nil && o.by == p {
		delete(g.offers, token)
	}
}

// splitIDs and joinIDs pass ids in the refs of a request.
func splitIDs(ids ...uint64) (refs []hypercall.GrantRef) {
	for _, id := range ids {
		refs = append(refs, hypercall.GrantRef(id), hypercall.GrantRef(id>>32))
	}
	return refs
}

func joinIDs(refs []hypercall.GrantRef) (ids []uint64) {
	for ; len(refs) >= 2; refs = refs[2:] {
		ids = append(ids, uint64(refs[0])|uint64(refs[1])<<32)
	}
	return ids
}

func (r *remote) offer(_ *program, shares, waiters []uint64) (uint64, error) {
	refs := append(splitIDs(shares...), splitIDs(waiters...)...)
	res, err := r.call(&request{Op: opOffer, N: uint32(len(shares))}, refs)
	if err != nil {
		return 0, err
	}
	defer res.closeFDs()
	return res.ID, nil
}

func (r *remote) withdraw(token uint64) { r.tell(request{Op: opWithdraw, ID: token}) }

func (r *remote) adoptShare(token uint64, i int) (a adoptedShare, b backing, err error) {
	res, err := r.call(&request{Op: opAdoptShare, ID: token, N: uint32(i)}, nil)
	if err != nil {
		return a, nil, err
	}
	defer res.closeFDs()
	a = adoptedShare{grants{res.ID, res.Access, res.refs}, res.Peer}
	if b, err = r.takeShare(res); err != nil {
		r.forget(res.ID)
	}
	return a, b, err
}

func (r *remote) adoptWaiter(token uint64, i int) (a adoptedWaiter, err error) {
	res, err := r.call(&request{Op: opAdoptWaiter, ID: token, N: uint32(i)}, nil)
	if err != nil {
		return a, err
	}
	defer res.closeFDs()
	a.id = res.ID
	for refs := res.refs; len(refs) >= 2 && err == nil; refs = refs[2:] {
		var end channelEnd
		end, err = r.end(uint32(refs[0]), uint32(refs[1]))
		a.ports = append(a.ports, end)
	}
	if err == nil {
		var fd int
		if fd, err = res.takeFD(); err == nil {
			a.bell = openFDBell(fd)
		}
	}
	if err != nil {
		r.forget(res.ID)
	}
	return a, err
}

func (r *remote) forget(id uint64) { r.tell(request{Op: opForget, ID: id}) }

func (r *remote) forgetWaiter(id uint64, b bell) {
	r.forget(id)
	b.close()
}
