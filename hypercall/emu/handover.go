package emu

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"barevif/hypercall"
)

// errOffered is returned for a share or waiter of which there is an offer already.
var errOffered = errors.New("emu: a share or waiter is offered already, or not ours")

// An offer lists the shares and waiters that one process of a domain lets another adopt, each once. The machine
// keeps it under a random number, so that only a process that was told of it can adopt.
type offer struct {
	by      *program // nil: a domain of the machine's process
	shares  []uint64
	waiters []uint64
	taken   map[uint64]bool // by id
}

// An adoptedShare is a share as its next holder sees it.
type adoptedShare struct {
	grants
	Peer hypercall.DomID
}

// An adoptedWaiter is a waiter as its next holder sees it.
type adoptedWaiter struct {
	id    uint64
	bell  bell
	ports []channelEnd
}

// offer lists objects of the guest that another process may adopt. The caller has checked
// that they are by's.
func (g *guest) offer(by *program, shares, waiters []uint64) (token uint64, err error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	if g.dead {
		return 0, errDead
	}
	all := slices.Concat(shares, waiters)
	if len(all) == 0 {
		return 0, errOffered
	}
	seen := make(map[uint64]bool)
	for i, id := range all {
		there := g.waiters[id] != nil
		if i < len(shares) {
			s := g.shares[id]
			there = s != nil && !s.given
		}
		if !there || seen[id] || g.offeredLocked(id) {
			return 0, errOffered
		}
		seen[id] = true
	}
	var b [8]byte
	for token == 0 || g.offers[token] != nil {
		rand.Read(b[:])
		token = binary.NativeEndian.Uint64(b[:])
	}
	g.offers[token] = &offer{by, slices.Clone(shares), slices.Clone(waiters), make(map[uint64]bool)}
	return token, nil
}

func (g *guest) offeredLocked(id uint64) bool {
	for _, o := range g.offers {
		if slices.Contains(o.shares, id) || slices.Contains(o.waiters, id) {
			return true
		}
	}
	return false
}

// withdraw ends an offer. A process that has adopted a share or waiter keeps it.
func (g *guest) withdraw(token uint64) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	delete(g.offers, token)
}

// takeLocked returns object i of a list of the offer, and makes the caller a further holder
// of it.
func (g *guest) takeLocked(token uint64, list func(*offer) []uint64, i int) (uint64, error) {
	o := g.offers[token]
	if g.dead || o == nil {
		return 0, hypercall.ErrNoOffer
	}
	ids := list(o)
	if i < 0 || i >= len(ids) || o.taken[ids[i]] {
		return 0, hypercall.ErrNoOffer
	}
	return ids[i], nil
}

func (g *guest) adoptShare(token uint64, i int) (a adoptedShare, b backing, err error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	id, err := g.takeLocked(token, func(o *offer) []uint64 { return o.shares }, i)
	if err != nil {
		return a, nil, err
	}
	s := g.shares[id]
	if s == nil || s.given {
		return a, nil, hypercall.ErrNoOffer
	}
	if b, err = s.pages.dup(); err != nil {
		return a, nil, err
	}
	g.offers[token].taken[id] = true
	g.holders[id]++
	return adoptedShare{s.grants, s.peer}, b, nil
}

func (g *guest) adoptWaiter(token uint64, i int) (a adoptedWaiter, err error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	id, err := g.takeLocked(token, func(o *offer) []uint64 { return o.waiters }, i)
	if err != nil {
		return a, err
	}
	a = adoptedWaiter{id: id, bell: g.waiters[id]}
	if a.bell == nil {
		return a, hypercall.ErrNoOffer
	}
	for port, c := range g.channels {
		if c.open && c.waiter == id {
			a.ports = append(a.ports, channelEnd{hypercall.PortID(port), c.gen})
		}
	}
	g.offers[token].taken[id] = true
	g.holders[id]++
	return a, nil
}

// otherHoldsLocked takes one holder of an object away, and reports whether it has another.
func (g *guest) otherHoldsLocked(id uint64) bool {
	n := g.holders[id]
	if n <= 1 {
		delete(g.holders, id)
	} else {
		g.holders[id] = n - 1
	}
	return n > 0
}

// forget lets go of an object for one of its holders, the last of which ends it.
func (g *guest) forget(id uint64) {
	g.m.mu.Lock()
	held := g.otherHoldsLocked(id)
	share := g.shares[id] != nil
	g.m.mu.Unlock()
	switch {
	case held:
	case share:
		_ = g.endShare(id, false) // pages in use are set aside
	default:
		g.closeWaiter(id)
	}
}

func (g *guest) forgetWaiter(id uint64, b bell) {
	g.forget(id)
	b.letGo() // the machine rings the same bell
}

// An ownedShare is what the domain knows of a [hypercall.Share] of it.
type ownedShare struct {
	d     *Domain
	id    uint64
	given atomic.Bool // another process has it now
}

// offerState is the State of an Offer.
type offerState struct {
	token           uint64
	shares, waiters uint32
}

func (s offerState) encode() []byte {
	b := binary.LittleEndian.AppendUint64(nil, s.token)
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(b, s.shares), s.waiters)
}

// maxOffered bounds each list of an offer.
const maxOffered = 1024

func decodeOffer(b []byte) (s offerState, err error) {
	if len(b) != 16 {
		return s, fmt.Errorf("emu: an offer of %d bytes, not 16", len(b))
	}
	s = offerState{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])}
	if s.shares+s.waiters == 0 || s.shares > maxOffered || s.waiters > maxOffered {
		return s, fmt.Errorf("emu: an offer of %d shares and %d waiters, at most %d", s.shares, s.waiters, maxOffered)
	}
	return s, nil
}

// Offer implements [hypercall.HandoverDomain].
func (d *Domain) Offer(shares []*hypercall.Share, waiters []hypercall.Waiter) (*hypercall.Offer, error) {
	var owned []*ownedShare
	var ours []*waiter
	var ids [2][]uint64
	for _, s := range shares {
		o, ok := s.Owned().(*ownedShare)
		if !ok || o.d != d || o.given.Load() {
			return nil, errOffered
		}
		owned, ids[0] = append(owned, o), append(ids[0], o.id)
	}
	for _, hw := range waiters {
		w, ok := hw.(*waiter)
		if !ok || w.d != d || w.given.Load() || w.closed.Load() || w.seat.Load() != nil {
			return nil, errOffered
		}
		ours, ids[1] = append(ours, w), append(ids[1], w.id)
	}
	if max(len(owned), len(ours)) > maxOffered {
		return nil, fmt.Errorf("emu: %d shares and %d waiters, at most %d", len(owned), len(ours), maxOffered)
	}
	token, err := d.hv().offer(nil, ids[0], ids[1])
	if err != nil {
		return nil, err
	}
	for _, w := range ours {
		w.settle(true) // the next process does not know which ports are masked
	}
	state := offerState{token, uint32(len(owned)), uint32(len(ours))}
	give := func() {
		for _, o := range owned {
			o.given.Store(true)
		}
		for _, w := range ours {
			w.given.Store(true)
		}
		d.hv().withdraw(token)
	}
	return hypercall.NewOffer(state.encode(), nil, give, func() { d.hv().withdraw(token) }), nil
}

// Adopt implements [hypercall.HandoverDomain].
func (d *Domain) Adopt(state []byte, files []hypercall.File, onThread []bool) (*hypercall.Adopted, error) {
	s, err := decodeOffer(state)
	if err == nil && len(files) > 0 {
		err = fmt.Errorf("emu: an offer with %d files, not 0", len(files))
	}
	if err != nil {
		return nil, err
	}
	var drops []func()
	drop := func() {
		for _, f := range slices.Backward(drops) {
			f()
		}
	}
	var shares []*hypercall.Share
	var waiters []hypercall.AdoptedWaiter
	for i := range int(s.shares) {
		share, dropShare, err := d.adoptShare(s.token, i)
		if err != nil {
			drop()
			return nil, err
		}
		shares, drops = append(shares, share), append(drops, dropShare)
	}
	for i := range int(s.waiters) {
		w, err := d.adoptWaiter(s.token, i, i < len(onThread) && onThread[i])
		if err != nil {
			drop()
			return nil, err
		}
		aw := hypercall.AdoptedWaiter{Waiter: w}
		for _, p := range *w.ports.Load() {
			aw.Ports = append(aw.Ports, p)
		}
		waiters = append(waiters, aw)
		drops = append(drops, func() {
			w.given.Store(true)
			w.Close()
		})
	}
	return hypercall.NewAdopted(shares, waiters, drop), nil
}

func (d *Domain) adoptShare(token uint64, i int) (*hypercall.Share, func(), error) {
	a, b, err := d.hv().adoptShare(token, i)
	if err != nil {
		return nil, nil, err
	}
	defer b.close()
	r, err := b.reserve(len(a.Refs))
	if err != nil {
		d.hv().forget(a.Serial)
		return nil, nil, err
	}
	s := d.newShare(a.grants, a.Peer, r)
	o := s.Owned().(*ownedShare)
	return s, func() {
		o.given.Store(true)
		s.End()
	}, nil
}

func (d *Domain) adoptWaiter(token uint64, i int, onThread bool) (*waiter, error) {
	a, err := d.hv().adoptWaiter(token, i)
	if err != nil {
		return nil, err
	}
	if onThread {
		b, err := newThreadBell(a.bell)
		if err != nil {
			d.hv().forgetWaiter(a.id, a.bell)
			return nil, err
		}
		a.bell = b
	}
	w := newWaiter(d, a.id, a.bell)
	var ports []*port
	for _, end := range a.ports {
		ports = append(ports, &port{w: w, id: end.ID, gen: end.Gen, word: &w.hv.own().ports[end.ID]})
	}
	w.ports.Store(&ports)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.waiters != nil {
		d.waiters[w] = struct{}{}
	}
	return w, nil
}
