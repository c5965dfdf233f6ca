package emu_test

import (
	"bytes"
	"errors"
	"slices"
	"sync"
	"testing"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/emu"
)

func share(t testing.TB, d hypercall.Domain, peer hypercall.DomID, pages int, access hypercall.Access) *hypercall.Share {
	t.Helper()
	s, err := d.Share(peer, pages, access)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func end(t testing.TB, s *hypercall.Share) {
	t.Helper()
	if err := s.End(); err != nil {
		t.Fatal(err)
	}
}

func mapped(t testing.TB, d hypercall.Domain, peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) *hypercall.Mapping {
	t.Helper()
	m, err := d.Map(peer, refs, access)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func release(t testing.TB, m *hypercall.Mapping) {
	t.Helper()
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
}

// copyFrom returns the status of copying len(to) bytes from a grant.
func copyFrom(t testing.TB, d hypercall.Domain, dom hypercall.DomID, ref hypercall.GrantRef, off uint16, to []byte) hypercall.Status {
	t.Helper()
	ops := []hypercall.CopyOp{{
		Src: hypercall.Area{Dom: dom, Ref: ref, Offset: off}, Dst: hypercall.Area{Local: to}, Len: uint32(len(to)),
	}}
	if err := d.Copy(ops); err != nil {
		t.Fatal(err)
	}
	return ops[0].Status
}

func copyTo(t testing.TB, d hypercall.Domain, dom hypercall.DomID, ref hypercall.GrantRef, from []byte) hypercall.Status {
	t.Helper()
	ops := []hypercall.CopyOp{{
		Src: hypercall.Area{Local: from}, Dst: hypercall.Area{Dom: dom, Ref: ref}, Len: uint32(len(from)),
	}}
	if err := d.Copy(ops); err != nil {
		t.Fatal(err)
	}
	return ops[0].Status
}

func TestConfigIsChecked(t *testing.T) {
	for _, cfg := range []emu.Config{{Grants: -1}, {Grants: 1 << 20}, {Ports: -1}, {Ports: 1 << 20}} {
		if m, err := emu.New(cfg); err == nil {
			m.Close()
			t.Errorf("%+v is accepted", cfg)
		}
	}
}

func TestDomainNumbersAreChecked(t *testing.T) {
	m := machine(t, emu.Config{})
	d := domain(t, m, 0) // dom0 is a domain like others
	if _, err := m.NewDomain(0); !errors.Is(err, emu.ErrDomainExists) {
		t.Errorf("a second domain 0: %v", err)
	}
	if _, err := m.NewDomain(hypercall.DomSelf); !errors.Is(err, hypercall.ErrNoDomain) {
		t.Errorf("DOMID_SELF as a number: %v", err)
	}
	if got, err := m.Domain(0); got != d || err != nil {
		t.Errorf("Domain(0) is %p, %v, not %p", got, err, d)
	}
	if _, err := m.Domain(1); !errors.Is(err, hypercall.ErrNoDomain) {
		t.Errorf("a domain nobody made: %v", err)
	}
	if err := m.Destroy(1); !errors.Is(err, hypercall.ErrNoDomain) {
		t.Errorf("its end: %v", err)
	}
}

func TestGrantLimitIsThatOfTheDomain(t *testing.T) {
	m := machine(t, emu.Config{Grants: 10})
	a, b := domain(t, m, 1), domain(t, m, 2)
	s := share(t, a, 2, 6, hypercall.ReadWrite)
	if _, err := a.Share(2, 5, hypercall.ReadWrite); !errors.Is(err, hypercall.ErrNoGrants) {
		t.Fatalf("11 pages of 10: %v", err)
	}
	rest := share(t, a, 2, 4, hypercall.ReadWrite)
	other := share(t, b, 1, 10, hypercall.ReadWrite) // b has its own limit
	end(t, s)
	again := share(t, a, 2, 6, hypercall.ReadWrite)
	for _, s := range []*hypercall.Share{rest, other, again} {
		end(t, s)
	}
	if _, err := a.Share(2, 0, hypercall.ReadWrite); err == nil {
		t.Fatal("a share of no pages")
	}
}

// Pages set aside do not count as granted, but the size of the table bounds them.
func TestQuarantineIsBounded(t *testing.T) {
	m := machine(t, emu.Config{Grants: 4})
	a, b := domain(t, m, 1), domain(t, m, 2)
	var held []*hypercall.Mapping
	var live *hypercall.Share
	for i := range 3 {
		s, err := a.Share(2, 4, hypercall.ReadWrite)
		if i == 2 {
			if !errors.Is(err, hypercall.ErrNoGrants) {
				t.Fatalf("12 refs of 8: %v", err)
			}
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, mapped(t, b, 1, s.Refs, hypercall.ReadWrite))
		if err := s.End(); !errors.Is(err, hypercall.ErrInUse) {
			t.Fatal(err)
		}
	}
	if l := m.Ledger(); l.Quarantined != 8 || l.Grants != 0 || l.Pages != 0 || l.Mappings != 8 {
		t.Fatalf("%+v", l)
	}
	release(t, held[0])
	live = share(t, a, 2, 4, hypercall.ReadWrite)
	release(t, held[1])
	end(t, live)
}

func TestStatusesAreThoseOfXen(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		// An empty entry could be read as a grant to domain 0.
		a, b := domain(t, m, 1), domain(t, m, 0)
		rw, ro := share(t, a, 0, 1, hypercall.ReadWrite), share(t, a, 0, 1, hypercall.ReadOnly)
		other := share(t, a, 3, 1, hypercall.ReadWrite)
		ended := share(t, a, 0, 1, hypercall.ReadWrite)
		endedRef := ended.Refs[0]
		end(t, ended)
		buf := make([]byte, 100)
		for _, c := range []struct {
			name string
			dom  hypercall.DomID
			ref  hypercall.GrantRef
			off  uint16
			want hypercall.Status
		}{
			{"good", 1, rw.Refs[0], 0, hypercall.OK},
			{"read-only", 1, ro.Refs[0], 3996, hypercall.OK},
			{"no such domain", 9, rw.Refs[0], 0, hypercall.BadDomain},
			{"beyond the table", 1, 1 << 20, 0, hypercall.BadGntref},
			{"reserved", 1, 0, 0, hypercall.GeneralError},
			{"reserved", 1, 7, 0, hypercall.GeneralError},
			{"never granted", 1, 200, 0, hypercall.GeneralError},
			{"ended", 1, endedRef, 0, hypercall.GeneralError},
			{"another domain's", 1, other.Refs[0], 0, hypercall.GeneralError},
			{"our own ref of another domain", hypercall.DomSelf, rw.Refs[0], 0, hypercall.GeneralError},
			{"across the page", 1, rw.Refs[0], 3997, hypercall.BadCopyArg},
		} {
			if st := copyFrom(t, b, c.dom, c.ref, c.off, buf); st != c.want {
				t.Errorf("copy from %s: %v", c.name, st)
			}
		}
		if st := copyTo(t, b, 1, ro.Refs[0], buf); st != hypercall.GeneralError {
			t.Errorf("copy to a read-only grant: %v", st)
		}
		var ge *hypercall.GrantError
		if _, err := b.Map(1, []hypercall.GrantRef{rw.Refs[0], ro.Refs[0]}, hypercall.ReadWrite); !errors.As(err, &ge) ||
			*ge != (hypercall.GrantError{Op: "map", Dom: 1, Ref: ro.Refs[0], Status: hypercall.GeneralError}) {
			t.Errorf("map: %v", err)
		}
		if _, err := b.Map(9, rw.Refs, hypercall.ReadWrite); !errors.Is(err, hypercall.ErrNoDomain) {
			t.Errorf("map of a domain that is not there: %v", err)
		}
		if _, err := b.Map(1, nil, hypercall.ReadWrite); err == nil {
			t.Error("a mapping of nothing")
		}
		for _, s := range []*hypercall.Share{rw, ro, other} {
			end(t, s)
		}
	})
}

func TestDomainMayUseGrantsToItself(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		a := domain(t, m, 5)
		s := share(t, a, hypercall.DomSelf, 1, hypercall.ReadWrite)
		copy(s.Bytes(), "mine")
		buf := make([]byte, 4)
		for _, dom := range []hypercall.DomID{5, hypercall.DomSelf} {
			clear(buf)
			if st := copyFrom(t, a, dom, s.Refs[0], 0, buf); st != hypercall.OK || string(buf) != "mine" {
				t.Errorf("%v, %q", st, buf)
			}
		}
		p := mapped(t, a, hypercall.DomSelf, s.Refs, hypercall.ReadWrite)
		if string(p.Bytes()[:4]) != "mine" {
			t.Error("another page")
		}
		release(t, p)
		end(t, s)
	})
}

// A page that is set aside stays granted, as on Xen, and no other page gets its ref until
// the last mapping is gone.
func TestQuarantinedPageIsReclaimedByTheLastUnmap(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		a, b := domain(t, m, 1), domain(t, m, 2)
		s := share(t, a, 2, 3, hypercall.ReadWrite)
		copy(s.Page(1), "in use")
		refs := slices.Clone(s.Refs)
		one := mapped(t, b, 1, refs[1:2], hypercall.ReadWrite)
		two := mapped(t, b, 1, refs[1:], hypercall.ReadOnly)
		if l := m.Ledger(); l.Mappings != 3 || l.Grants != 3 {
			t.Fatalf("%+v", l)
		}
		if err := s.End(); !errors.Is(err, hypercall.ErrInUse) {
			t.Fatal(err)
		}
		if l := m.Ledger(); l.Quarantined != 2 || l.Grants != 0 || l.Pages != 0 {
			t.Fatalf("%+v", l)
		}
		buf := make([]byte, 6)
		if st := copyFrom(t, b, 1, refs[1], 0, buf); st != hypercall.OK || string(buf) != "in use" {
			t.Errorf("the page in use: %v, %q", st, buf)
		}
		if st := copyFrom(t, b, 1, refs[0], 0, buf); st != hypercall.GeneralError {
			t.Errorf("the page beside it: %v", st)
		}
		late := share(t, a, 2, 100, hypercall.ReadWrite)
		if slices.Contains(late.Refs, refs[1]) || slices.Contains(late.Refs, refs[2]) {
			t.Error("a ref in use was given away")
		}
		if !slices.Contains(late.Refs, refs[0]) {
			t.Error("a free ref is not reused")
		}
		release(t, two)
		if l := m.Ledger(); l.Quarantined != 1 {
			t.Fatalf("%+v", l)
		}
		if string(one.Bytes()[:6]) != "in use" {
			t.Error("the page was taken from who maps it")
		}
		release(t, one)
		end(t, late)
	})
}

func TestHeapPagesMapOnlyAsTheyLie(t *testing.T) {
	m := machine(t, emu.Config{})
	a, b := domain(t, m, 1), domain(t, m, 2)
	s, o := share(t, a, 2, 3, hypercall.ReadWrite), share(t, a, 2, 1, hypercall.ReadWrite)
	for _, refs := range [][]hypercall.GrantRef{
		{s.Refs[1], s.Refs[0]}, {s.Refs[0], s.Refs[2]}, {s.Refs[2], o.Refs[0]}, {s.Refs[0], s.Refs[0]},
	} {
		if _, err := b.Map(1, refs, hypercall.ReadWrite); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%v: %v", refs, err)
		}
	}
	end(t, s)
	end(t, o) // the refused mappings hold nothing
}

func TestMappedPagesMapInAnyOrder(t *testing.T) {
	if !canMap {
		t.Skip("memfds are Linux's")
	}
	m := machine(t, emu.Config{Mapped: true})
	a, b := domain(t, m, 1), domain(t, m, 2)
	s, o := share(t, a, 2, 4, hypercall.ReadWrite), share(t, a, 2, 1, hypercall.ReadWrite)
	for i := range 4 {
		s.Out(i * shm.PageSize).Store(uint32(i))
	}
	o.Out(0).Store(100)
	refs := []hypercall.GrantRef{s.Refs[3], o.Refs[0], s.Refs[1], s.Refs[2], s.Refs[1]}
	for _, access := range []hypercall.Access{hypercall.ReadOnly, hypercall.ReadWrite} {
		p := mapped(t, b, 1, refs, access)
		for i, want := range []uint32{3, 100, 1, 2, 1} {
			if got := p.In(i * shm.PageSize).Load(); got != want {
				t.Errorf("page %d says %d, not %d", i, got, want)
			}
		}
		if access == hypercall.ReadWrite {
			p.Out(2*shm.PageSize + 4).Store(77)
			if got := p.In(4*shm.PageSize + 4).Load(); got != 77 {
				t.Errorf("the same page twice says %d", got)
			}
		}
		release(t, p)
	}
	end(t, s)
	end(t, o)
}

// Copy may run while a share ends and another takes over its refs. It copies the bytes of
// one of the two.
func TestCopyRacesEnd(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		a, b := domain(t, m, 1), domain(t, m, 2)
		const rounds, pages = 1000, 32
		refs := make(chan []hypercall.GrantRef, 1)
		first := share(t, a, 2, pages, hypercall.ReadOnly)
		refs <- first.Refs
		stop := make(chan struct{})
		var copiers sync.WaitGroup
		known := <-refs
		for range 2 {
			copiers.Go(func() {
				buf := make([]byte, pages*shm.PageSize)
				ops := make([]hypercall.CopyOp, pages)
				for {
					select {
					case <-stop:
						return
					default:
					}
					for i := range ops {
						ops[i] = hypercall.CopyOp{
							Src: hypercall.Area{Dom: 1, Ref: known[i]},
							Dst: hypercall.Area{Local: buf[i*shm.PageSize:]}, Len: shm.PageSize,
						}
					}
					if err := b.Copy(ops); err != nil {
						t.Error(err)
						return
					}
					for i, op := range ops {
						page := buf[i*shm.PageSize : (i+1)*shm.PageSize]
						if op.Status == hypercall.OK && !bytes.Equal(page, make([]byte, shm.PageSize)) {
							t.Error("bytes nobody wrote")
							return
						}
					}
				}
			})
		}
		s := first
		for range rounds {
			end(t, s)
			s = share(t, a, 2, pages, hypercall.ReadOnly)
		}
		close(stop)
		copiers.Wait()
		end(t, s)
	})
}

func TestMemoryIsAccountedFor(t *testing.T) {
	m := machine(t, emu.Config{})
	a := domain(t, m, 1)
	p, err := a.Memory(7)
	if err != nil {
		t.Fatal(err)
	}
	if l := m.Ledger(); l.Pages != 7 || l.Grants != 0 {
		t.Fatalf("%+v", l)
	}
	if m.CheckClean() == nil {
		t.Fatal("7 pages are clean")
	}
	release(t, p)
}
