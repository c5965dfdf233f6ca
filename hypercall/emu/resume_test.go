package emu

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"barevif/hypercall"
)

func TestResumeEndsEverythingOfBefore(t *testing.T) {
	m, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	peer, err := m.NewDomain(1)
	if err != nil {
		t.Fatal(err)
	}
	d, err := m.NewDomain(2)
	if err != nil {
		t.Fatal(err)
	}
	var died []hypercall.DomID
	m.OnDeath(func(id hypercall.DomID) { died = append(died, id) })

	private, err := d.Memory(1)
	if err != nil {
		t.Fatal(err)
	}
	private.Page(0)[0] = 7
	s, err := d.Share(1, 1, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	waiter := func(d *Domain) hypercall.Waiter {
		w, err := d.Waiter()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Close() })
		return w
	}
	w, pw := waiter(d), waiter(peer)
	old, err := w.Unbound(1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pw.Bind(2, old.ID()); err != nil {
		t.Fatal(err)
	}

	if err := m.Resume(2, 3); err != nil {
		t.Fatal(err)
	}
	if d.ID() != 3 || len(died) != 1 || died[0] != 2 {
		t.Errorf("the domain is %d; died: %v", d.ID(), died)
	}
	if private.Page(0)[0] != 7 {
		t.Error("the private memory is another")
	}
	copies := func(dom hypercall.DomID, ref hypercall.GrantRef) hypercall.Status {
		op := [1]hypercall.CopyOp{{Src: hypercall.Area{Dom: dom, Ref: ref}, Dst: hypercall.Area{Local: make([]byte, 1)}, Len: 1}}
		if err := peer.Copy(op[:]); err != nil {
			t.Fatal(err)
		}
		return op[0].Status
	}
	for _, dom := range []hypercall.DomID{2, 3} {
		if copies(dom, s.Refs[0]) == hypercall.OK {
			t.Errorf("the grant of before is one of domain %d", dom)
		}
	}
	if err := pw.Wait(time.Now().Add(time.Millisecond), true); err != nil { // the event of its binding
		t.Fatal(err)
	}

	// The number of the old port is given again. No call for the old port reaches it.
	nw := waiter(d)
	fresh, err := nw.Unbound(1)
	if err != nil {
		t.Fatal(err)
	}
	if fresh.ID() != old.ID() {
		t.Fatalf("the new port has number %d, the old one had %d", fresh.ID(), old.ID())
	}
	far, err := pw.Bind(3, fresh.ID())
	if err != nil {
		t.Fatal(err)
	}
	if err := pw.Wait(time.Now().Add(time.Second), true); err != nil {
		t.Fatal(err)
	}
	if err := old.Notify(); err != nil {
		t.Error("notify:", err)
	}
	if err := pw.Wait(time.Now().Add(10*time.Millisecond), true); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a notify on a port of before the resume reached another's:", err)
	}
	if old.(hypercall.JoinedPort).Joined() {
		t.Error("a port of before the resume is joined")
	}
	if err := w.Wait(time.Now().Add(time.Millisecond), true); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("wait on a waiter of before:", err)
	}
	if _, err := w.Unbound(1); !errors.Is(err, net.ErrClosed) {
		t.Error("a new port on a waiter of before:", err)
	}
	if err := errors.Join(old.Close(), w.Close(), s.End(), private.Release()); err != nil {
		t.Error(err)
	}
	if err := far.Notify(); err != nil {
		t.Error(err)
	}
	if err := nw.Wait(time.Now().Add(time.Second), true); err != nil {
		t.Error("the close of the old port closed the new one:", err)
	}
	if err := errors.Join(nw.Close(), pw.Close(), m.CheckClean()); err != nil {
		t.Error(err)
	}
}

func TestResumeOfNoDomain(t *testing.T) {
	m, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.NewDomain(1); err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(5, 6); !errors.Is(err, hypercall.ErrNoDomain) {
		t.Error(err)
	}
	if err := m.Resume(1, 1); !errors.Is(err, ErrDomainExists) {
		t.Error(err)
	}
	if n := m.Ledger().Domains; n != 1 {
		t.Errorf("%d domains", n)
	}
}
