package emu

import (
	"encoding/binary"
	"errors"
	"io"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/emu/emutest"
)

func TestErrorsKeepTheirIdentityOnTheWire(t *testing.T) {
	for _, want := range append(wireErrors(),
		&hypercall.GrantError{Op: "map", Dom: 3, Ref: 9, Status: hypercall.NoSpace},
		&hypercall.GrantError{Op: "copy", Dom: 4, Ref: 10, Status: hypercall.BadPage},
	) {
		var r reply
		text := r.setError(want)
		got := r.error([]byte(text))
		var a, b *hypercall.GrantError
		if errors.As(want, &a) {
			if !errors.As(got, &b) || *a != *b {
				t.Errorf("%v became %v", want, got)
			}
		} else if !errors.Is(got, want) {
			t.Errorf("%v became %v", want, got)
		}
	}
	var r reply
	if got := r.error([]byte(r.setError(io.ErrUnexpectedEOF))); got == nil || got.Error() != "emu: the host: unexpected EOF" {
		t.Errorf("%v", got)
	}
	r.Code = 255
	if r.error(nil) == nil {
		t.Error("an unknown code is no error")
	}
}

// FuzzHost makes two domains send the requests of the input. Each takes 28 bytes: one
// that selects the domain, the request, a ref. No request may harm the host or leave
// anything behind.
func FuzzHost(f *testing.F) {
	seed := func(reqs ...request) {
		var in []byte
		for i, r := range reqs {
			in = append(in, byte(i))
			in, _ = binary.Append(in, binary.NativeEndian, &r)
			in = binary.NativeEndian.AppendUint32(in, reservedRefs)
		}
		f.Add(in)
	}
	seed(request{Op: opShare, Peer: 2, N: 2}, request{Op: opMap, Peer: 1}, request{Op: opEndShare, ID: 5}, request{Op: opUnmap, ID: 6})
	seed(request{Op: opShare, Peer: 2, N: 1, Access: 1}, request{Op: opAttach, Peer: 1, N: 8}, request{Op: opEndShare, ID: 5, Refuse: true})
	seed(request{Op: opWaiter}, request{Op: opWaiter}, request{Op: opUnbound, ID: 5, Peer: 2}, request{Op: opBind, ID: 6, Peer: 1, N: 1},
		request{Op: opFarEnd, N: 1, Gen: 1}, request{Op: opClosePort, N: 1, Gen: 1}, request{Op: opCloseWaiter, ID: 5})
	seed(request{Op: opStore}, request{Op: opCloseStore, ID: 5}, request{Op: opKeepPages, N: 1 << 31}, request{Op: opDropPages, ID: 5},
		request{Op: opLookup, Peer: 1}, request{Op: opLookup, Peer: 9})
	seed(request{Op: opOffer}, request{Op: opAdoptShare, ID: 5}, request{Op: opAdoptWaiter, ID: 5}, request{Op: opForget, ID: 5}, request{Op: opWithdraw, ID: 5})

	h, err := Listen(filepath.Join(emutest.SocketDir(f), "xen"), Config{
		Grants: 16, Ports: 8,
		Store: func(_ hypercall.DomID, c io.ReadWriteCloser) { _, _ = io.Copy(io.Discard, c) },
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { h.Close() })
	size := 1 + binary.Size(request{}) + 4
	f.Fuzz(func(t *testing.T, in []byte) {
		h.serial.Store(2) // so that ids are the same in each run
		var servers [2]*server
		for i := range servers {
			g, err := h.newGuest(hypercall.DomID(i + 1))
			if err != nil {
				t.Fatal(err)
			}
			defer g.destroy()
			p := &program{g, make(map[uint64]kind), make(map[uint64]int)}
			servers[i] = &server{tables: h.tables.(*fileTables), g: g, p: p}
		}
		for n := 0; len(in) >= size && n < 64; n++ {
			var r request
			if _, err := binary.Decode(in[1:], binary.NativeEndian, &r); err != nil {
				t.Fatal(err)
			}
			var a answer
			refs := []hypercall.GrantRef{hypercall.GrantRef(binary.NativeEndian.Uint32(in[size-4:]))}
			err := servers[in[0]%2].do(&r, refs, &a)
			if err != nil {
				a.setError(err)
			} else {
				servers[in[0]%2].p.note(&r, &a.reply)
			}
			for _, fd := range a.fds {
				if unix.Close(fd) != nil {
					t.Fatal("an answer with a bad descriptor")
				}
			}
			in = in[size:]
		}
		for _, s := range servers {
			s.g.destroy()
		}
		if err := h.CheckClean(); err != nil {
			t.Error(err)
		}
		if n := h.Ledger().Domains; n != 0 {
			t.Errorf("%d domains", n)
		}
	})
}

// hostOf is a host with the servers of a process of each of doms.
func hostOf(t *testing.T, doms ...hypercall.DomID) (h *Host, servers []*server) {
	t.Helper()
	h, err := Listen(filepath.Join(emutest.SocketDir(t), "xen"), Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	for _, dom := range doms {
		p, err := h.newProgram(dom, true, func() {})
		if err != nil {
			t.Fatal(err)
		}
		servers = append(servers, &server{tables: h.tables.(*fileTables), g: p.g, p: p})
	}
	return h, servers
}

// ask does a request and returns the error.
func (s *server) ask(r request, refs ...hypercall.GrantRef) (a answer, err error) {
	if err = s.do(&r, refs, &a); err == nil {
		s.p.note(&r, &a.reply)
	}
	for _, fd := range a.fds {
		unix.Close(fd)
	}
	return a, err
}

// A process offers what it holds, to its own domain, once.
func TestOnlyAHolderOffersAndOnlyItsDomainAdopts(t *testing.T) {
	h, s := hostOf(t, 1, 1, 2)
	old, next, foreign := s[0], s[1], s[2]
	share, _ := old.ask(request{Op: opShare, Peer: 2, N: 1})
	w, _ := old.ask(request{Op: opWaiter})
	both := splitIDs(share.ID, w.ID)
	for name, f := range map[string]func() error{
		"another process's":    func() error { _, err := next.ask(request{Op: opOffer, N: 1}, both...); return err },
		"another domain's":     func() error { _, err := foreign.ask(request{Op: opOffer, N: 1}, both...); return err },
		"a waiter as a share":  func() error { _, err := old.ask(request{Op: opOffer, N: 2}, both...); return err },
		"a share as a waiter":  func() error { _, err := old.ask(request{Op: opOffer}, both...); return err },
		"more shares than ids": func() error { _, err := old.ask(request{Op: opOffer, N: 9}, both...); return err },
		"nothing":              func() error { _, err := old.ask(request{Op: opOffer}); return err },
		"too much": func() error {
			_, err := old.ask(request{Op: opOffer}, make([]hypercall.GrantRef, maxWireRefs)...)
			return err
		},
		"an offer that is none":  func() error { _, err := next.ask(request{Op: opAdoptShare, ID: 1}); return err },
		"a waiter that is none":  func() error { _, err := next.ask(request{Op: opAdoptWaiter, ID: 1}); return err },
		"an id of nothing":       func() error { _, err := old.ask(request{Op: opOffer, N: 1}, 77, 0); return err },
		"half an id and nothing": func() error { _, err := old.ask(request{Op: opOffer, N: 1}, 77); return err },
	} {
		if f() == nil {
			t.Errorf("%s: answered", name)
		}
	}
	o, err := old.ask(request{Op: opOffer, N: 1}, both...)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, s *server, r request) {
		t.Helper()
		if _, err := s.ask(r); err == nil {
			t.Errorf("%s: answered", what)
		}
	}
	refused("another domain adopts", foreign, request{Op: opAdoptShare, ID: o.ID})
	refused("another domain adopts a waiter", foreign, request{Op: opAdoptWaiter, ID: o.ID})
	refused("an index beyond", next, request{Op: opAdoptShare, ID: o.ID, N: 1})
	refused("an index far beyond", next, request{Op: opAdoptWaiter, ID: o.ID, N: 1<<32 - 1})
	next.ask(request{Op: opWithdraw, ID: o.ID})      // not its offer
	foreign.ask(request{Op: opForget, ID: share.ID}) // not its share
	next.ask(request{Op: opForget, ID: share.ID})    // not yet
	if a, err := next.ask(request{Op: opAdoptShare, ID: o.ID}); err != nil || a.ID != share.ID || a.Peer != 2 {
		t.Fatalf("%+v, %v", a, err)
	}
	refused("a share twice", next, request{Op: opAdoptShare, ID: o.ID})
	if _, err := next.ask(request{Op: opAdoptWaiter, ID: o.ID}); err != nil {
		t.Fatal(err)
	}
	for range 3 { // only the first counts
		old.ask(request{Op: opForget, ID: share.ID})
		old.ask(request{Op: opForget, ID: w.ID})
	}
	if l := h.Ledger(); l.Grants != 1 || l.Waiters != 1 {
		t.Errorf("%+v", l)
	}
	refused("after its end", next, request{Op: opAdoptWaiter, ID: o.ID})
	next.p.end(true)
	if l := h.Ledger(); l.Grants != 0 || l.Waiters != 0 {
		t.Errorf("after the end of the last holder: %+v", l)
	}
}

// The offer of a process that has ended is none; what was adopted of it stays.
func TestTheOfferOfAProcessThatEndsIsNone(t *testing.T) {
	h, s := hostOf(t, 1, 1, 2)
	old, next := s[0], s[1]
	a, _ := old.ask(request{Op: opShare, Peer: 2, N: 1})
	b, _ := old.ask(request{Op: opShare, Peer: 2, N: 2})
	o, err := old.ask(request{Op: opOffer, N: 2}, splitIDs(a.ID, b.ID)...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := next.ask(request{Op: opAdoptShare, ID: o.ID}); err != nil {
		t.Fatal(err)
	}
	old.p.end(true)
	if _, err := next.ask(request{Op: opAdoptShare, ID: o.ID, N: 1}); !errors.Is(err, hypercall.ErrNoOffer) {
		t.Errorf("adopted from a process that has ended: %v", err)
	}
	if l := h.Ledger(); l.Grants != 1 {
		t.Errorf("%+v", l)
	}
	next.ask(request{Op: opEndShare, ID: a.ID})
	if l := h.Ledger(); l.Grants != 0 {
		t.Errorf("%+v", l)
	}
}
