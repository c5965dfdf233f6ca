package domaintest

import (
	"errors"
	"slices"
	"testing"
	"time"

	"barevif/hypercall"
)

// A Trio is two processes of one domain, which may be one, and the domain that is their peer.
type Trio struct {
	Old, New hypercall.HandoverDomain

	// Peer maps the shares of Old and binds its ports; nil: no peer is at hand, and tests
	// only check that New reads the bytes that Old has written.
	Peer  hypercall.Domain
	NoMap bool // Peer has events only

	// EndOld ends the process of Old as a kill does; nil: it has none of its own.
	EndOld func()

	// Stray is an open file that no Offer has made. It stays open.
	Stray hypercall.File
}

// RunHandover checks that shares and event channels pass from one process of a domain to
// another while the peer uses them. mk is called for each test.
func RunHandover(t *testing.T, mk func(testing.TB) Trio) {
	for _, c := range []struct {
		name string
		f    func(*testing.T, Trio)
	}{
		{"SharesAndChannelsGoOn", sharesAndChannelsGoOn},
		{"OnThread", adoptedOnThread},
		{"WithdrawnOfferIsNone", withdrawnOfferIsNone},
		{"DroppedStaysWithItsOwner", droppedStaysWithItsOwner},
		{"OwnerEnds", ownerEnds},
		{"NonsenseIsRefused", nonsenseIsRefused},
		{"OnlyOwnObjectsAreOffered", onlyOwnObjectsAreOffered},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, mk(t)) })
	}
}

// A possession holds the objects that domain Old offers: two shares, and two waiters with a port each, which the peer has bound.
type possession struct {
	Trio
	shares  []*hypercall.Share
	waiters []hypercall.Waiter
	ports   []hypercall.Port
	far     []hypercall.Port   // the peer's; nil without one
	farW    []hypercall.Waiter // of far
}

func possess(t testing.TB, d Trio) *possession {
	t.Helper()
	return possessWith(t, d, func() hypercall.Waiter { return waiter(t, d.Old) })
}

// possessWith is possess with Waiters of another kind.
func possessWith(t testing.TB, d Trio, newWaiter func() hypercall.Waiter) *possession {
	t.Helper()
	p := &possession{Trio: d}
	id := d.Old.ID()
	if d.Peer != nil {
		id = d.Peer.ID()
	}
	for i, access := range []hypercall.Access{hypercall.ReadOnly, hypercall.ReadWrite} {
		s := share(t, d.Old, id, 3+i, access)
		for n := range s.Pages() {
			s.Page(n)[0] = byte(10*i + n + 1)
		}
		p.shares = append(p.shares, s)
		w := newWaiter()
		port, err := w.Unbound(id)
		if err != nil {
			t.Fatal(err)
		}
		p.waiters, p.ports = append(p.waiters, w), append(p.ports, port)
		if d.Peer == nil {
			continue
		}
		fw := waiter(t, d.Peer)
		far, err := fw.Bind(d.Old.ID(), port.ID())
		if err != nil {
			t.Fatal(err)
		}
		wait(t, fw) // a bind fires its own end
		p.farW, p.far = append(p.farW, fw), append(p.far, far)
	}
	return p
}

func (p *possession) offer(t testing.TB) *hypercall.Offer {
	t.Helper()
	o, err := p.Old.Offer(p.shares, p.waiters)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Withdraw)
	return o
}

func (p *possession) adopt(t testing.TB, o *hypercall.Offer, onThread ...bool) *hypercall.Adopted {
	t.Helper()
	a, err := p.New.Adopt(o.State, o.Files, onThread)
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Shares) != len(p.shares) || len(a.Waiters) != len(p.waiters) {
		t.Fatalf("%d shares and %d waiters", len(a.Shares), len(a.Waiters))
	}
	for i, s := range a.Shares {
		was := p.shares[i]
		if s.Peer != was.Peer || s.Access != was.Access || !slices.Equal(s.Refs, was.Refs) || s.Pages() != len(s.Refs) {
			t.Fatalf("share %d: domain %d, %v, %d pages as %v; it was domain %d, %v, %v",
				i, s.Peer, s.Access, s.Pages(), s.Refs, was.Peer, was.Access, was.Refs)
		}
		for n := range s.Pages() {
			if s.Page(n)[0] != byte(10*i+n+1) {
				t.Fatalf("page %d of share %d is another", n, i)
			}
		}
		if n := len(a.Waiters[i].Ports); n != 1 || a.Waiters[i].Ports[0].ID() != p.ports[i].ID() {
			t.Fatalf("waiter %d has %d ports", i, n)
		}
	}
	return a
}

// letGo ends the shares and closes the waiters in Old, which has given them to New.
func (p *possession) letGo(t testing.TB) {
	t.Helper()
	for _, s := range p.shares {
		if err := s.End(); err != nil {
			t.Error("End of what was given:", err)
		}
	}
	for _, w := range p.waiters {
		if err := w.Close(); err != nil {
			t.Error("Close of what was given:", err)
		}
	}
}

// works requires that events pass in both directions, and that the peer sees the pages.
func (p *possession) works(t testing.TB, shares []*hypercall.Share, waiters []hypercall.AdoptedWaiter) {
	t.Helper()
	for i, w := range waiters {
		if p.Peer == nil {
			continue
		}
		notify(t, p.far[i])
		wait(t, w)
		notify(t, w.Ports[0])
		wait(t, p.farW[i])
		s := shares[i]
		if p.NoMap {
			continue
		}
		m := mapRefs(t, p.Peer, p.Old.ID(), s.Refs[1:2], hypercall.ReadOnly)
		s.Page(1)[7]++
		if m.Page(0)[7] != s.Page(1)[7] {
			t.Errorf("the peer does not see share %d", i)
		}
		if err := m.Release(); err != nil {
			t.Error(err)
		}
	}
}

// ended requires that the peer cannot use the share any more.
func (p *possession) ended(t testing.TB, s *hypercall.Share, refs []hypercall.GrantRef) {
	t.Helper()
	if err := s.End(); err != nil {
		t.Error("End:", err)
	}
	if p.Peer == nil || p.NoMap {
		return
	}
	if m, err := p.Peer.Map(p.Old.ID(), refs[:1], hypercall.ReadOnly); err == nil {
		m.Release()
		t.Error("a grant that was ended can be mapped")
	}
}

func (p *possession) end(t testing.TB, a *hypercall.Adopted) {
	t.Helper()
	for _, s := range a.Shares {
		p.ended(t, s, slices.Clone(s.Refs))
	}
	for _, w := range a.Waiters {
		if err := w.Close(); err != nil {
			t.Error("Close:", err)
		}
	}
}

func sharesAndChannelsGoOn(t *testing.T, d Trio) {
	p := possess(t, d)
	for i, far := range p.far { // one event comes before, and one port is masked
		notify(t, far)
		if i == 1 {
			wait(t, p.waiters[1])
			notify(t, far)
		}
	}
	o := p.offer(t)
	a := p.adopt(t, o)
	if d.Peer != nil {
		for _, w := range a.Waiters {
			wait(t, w)
		}
	}
	o.Give()
	p.letGo(t)
	p.works(t, a.Shares, a.Waiters)
	if _, err := d.New.Adopt(o.State, o.Files, nil); err == nil {
		t.Error("an offer is adopted twice")
	}
	p.end(t, a)
}

func adoptedOnThread(t *testing.T, d Trio) {
	blocks := blocking(t, d.Old)
	p := possessWith(t, d, func() hypercall.Waiter { return waiter(t, blocks) })
	o := p.offer(t)
	a := p.adopt(t, o, true, false)
	o.Give()
	p.letGo(t)
	p.works(t, a.Shares, a.Waiters)
	quiet(t, a.Waiters[0], time.Millisecond)
	p.end(t, a)
}

func (p *possession) own() (all []hypercall.AdoptedWaiter) {
	for i, w := range p.waiters {
		all = append(all, hypercall.AdoptedWaiter{Waiter: w, Ports: p.ports[i : i+1]})
	}
	return all
}

func withdrawnOfferIsNone(t *testing.T, d Trio) {
	p := possess(t, d)
	o := p.offer(t)
	state := slices.Clone(o.State)
	o.Withdraw()
	o.Give()
	if a, err := d.New.Adopt(state, nil, nil); err == nil {
		a.Drop()
		t.Error("an offer that was withdrawn is adopted")
	}
	p.works(t, p.shares, p.own())
	again := p.offer(t)
	a := p.adopt(t, again)
	again.Give()
	p.letGo(t)
	p.works(t, a.Shares, a.Waiters)
	p.end(t, a)
}

func droppedStaysWithItsOwner(t *testing.T, d Trio) {
	p := possess(t, d)
	for range 3 {
		o := p.offer(t)
		a := p.adopt(t, o)
		a.Drop()
		a.Drop()
		if err := a.Waiters[0].Wait(time.Time{}, true); !errors.Is(err, hypercall.ErrClosed) {
			t.Errorf("Wait of what was dropped: %v", err)
		}
		o.Withdraw()
		p.works(t, p.shares, p.own())
	}
	for _, s := range p.shares {
		p.ended(t, s, slices.Clone(s.Refs))
	}
}

// The process that has offered ends before it could give, or at any time after.
func ownerEnds(t *testing.T, d Trio) {
	if d.EndOld == nil {
		t.Skip("the old process cannot end by itself here")
	}
	p := possess(t, d)
	a := p.adopt(t, p.offer(t))
	d.EndOld()
	p.works(t, a.Shares, a.Waiters)
	p.end(t, a)
}

func nonsenseIsRefused(t *testing.T, d Trio) {
	p := possess(t, d)
	o := p.offer(t)
	for name, state := range map[string][]byte{
		"none": nil, "short": o.State[:len(o.State)-1], "long": append(slices.Clone(o.State), 0),
		"zeros": make([]byte, len(o.State)), "ones": slices.Repeat([]byte{0xff}, len(o.State)),
	} {
		if a, err := d.New.Adopt(state, o.Files, nil); err == nil {
			a.Drop()
			t.Errorf("%s: adopted", name)
		}
	}
	for i := range o.State { // a number that is one off, and no bit of another's memory
		state := slices.Clone(o.State)
		state[i]++
		if a, err := d.New.Adopt(state, o.Files, nil); err == nil {
			a.Drop()
		}
	}
	if d.Stray == nil {
		t.Fatal("the Trio has no Stray file")
	}
	if a, err := d.New.Adopt(o.State, append(slices.Clone(o.Files), d.Stray), nil); err == nil {
		a.Drop()
		t.Error("adopted with a file too many")
	}
	if n := len(o.Files); n > 0 {
		if a, err := d.New.Adopt(o.State, o.Files[:n-1], nil); err == nil {
			a.Drop()
			t.Error("adopted with a file too few")
		}
		wrong := slices.Clone(o.Files)
		wrong[0] = d.Stray
		if a, err := d.New.Adopt(o.State, wrong, nil); err == nil {
			a.Drop()
			t.Error("adopted with a file that is none of ours")
		}
	}
	o.Withdraw()
	p.works(t, p.shares, p.own())
}

func onlyOwnObjectsAreOffered(t *testing.T, d Trio) {
	p := possess(t, d)
	refuse := func(what string, d hypercall.HandoverDomain, shares []*hypercall.Share, waiters []hypercall.Waiter) {
		t.Helper()
		if o, err := d.Offer(shares, waiters); err == nil {
			o.Withdraw()
			t.Errorf("%s: offered", what)
		}
	}
	if d.New != d.Old {
		refuse("another process's share", d.New, p.shares, nil)
		refuse("another process's waiter", d.New, nil, p.waiters)
	}
	refuse("one share twice", d.Old, []*hypercall.Share{p.shares[0], p.shares[0]}, nil)
	refuse("one waiter twice", d.Old, nil, []hypercall.Waiter{p.waiters[0], p.waiters[0]})
	refuse("nothing", d.Old, nil, nil)
	ended := share(t, d.Old, p.shares[0].Peer, 1, hypercall.ReadOnly)
	if err := ended.End(); err != nil {
		t.Fatal(err)
	}
	refuse("a share that has ended", d.Old, []*hypercall.Share{ended}, nil)
	closed := waiter(t, d.Old)
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	refuse("a waiter that is closed", d.Old, nil, []hypercall.Waiter{closed})
	o := p.offer(t)
	refuse("what is offered already", d.Old, p.shares, nil)
	o.Withdraw()
	p.works(t, p.shares, p.own())
}
