package emu

// note keeps the account of what the program holds: r was answered with a.
func (p *program) note(r *request, a *reply) {
	switch r.Op {
	case opKeepPages:
		p.held[a.ID] = heldPages
	case opShare:
		p.held[a.ID] = heldShare
	case opMap:
		p.held[a.ID] = heldMapping
	case opWaiter:
		p.held[a.ID] = heldWaiter
	case opAdoptShare:
		p.adopt(a.ID, heldShare)
	case opAdoptWaiter:
		p.adopt(a.ID, heldWaiter)
	case opForget:
		if p.more[r.ID] > 0 {
			p.more[r.ID]--
		} else {
			delete(p.held, r.ID)
		}
	case opStore:
		p.held[a.ID] = heldStore
	case opDropPages, opEndShare, opUnmap, opCloseWaiter, opCloseStore:
		delete(p.held, r.ID)
		delete(p.more, r.ID)
	}
}

// adopt notes that the program is one more holder of an object.
func (p *program) adopt(id uint64, kind kind) {
	if _, twice := p.held[id]; twice {
		p.more[id]++
		return
	}
	p.held[id] = kind
}
