package emu_test

import (
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
)

const soon = 2 * time.Minute

func waiter(t testing.TB, d hypercall.Domain) hypercall.Waiter {
	t.Helper()
	w, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func channel(t testing.TB, a, b hypercall.Domain) (wa, wb hypercall.Waiter, pa, pb hypercall.Port) {
	t.Helper()
	wa, wb = waiter(t, a), waiter(t, b)
	pa, err := wa.Unbound(b.ID())
	if err != nil {
		t.Fatal(err)
	}
	pb, err = wb.Bind(a.ID(), pa.ID())
	if err != nil {
		t.Fatal(err)
	}
	if err := wb.Wait(time.Now().Add(soon), true); err != nil {
		t.Fatal(err)
	}
	return wa, wb, pa, pb
}

func fires(t testing.TB, w hypercall.Waiter) {
	t.Helper()
	if err := w.Wait(time.Now().Add(soon), true); err != nil {
		t.Fatal("no event:", err)
	}
}

func silent(t testing.TB, w hypercall.Waiter) {
	t.Helper()
	if err := w.Wait(time.Now().Add(20*time.Millisecond), true); err == nil {
		t.Fatal("an event")
	}
}

func TestDeathTakesEverythingButWhatOthersMap(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		var died []hypercall.DomID
		m.OnDeath(func(id hypercall.DomID) { died = append(died, id) })
		a, b := domain(t, m, 1), domain(t, m, 2)

		s := share(t, a, 2, 2, hypercall.ReadWrite)
		refs := slices.Clone(s.Refs)
		copy(s.Bytes(), "kept")
		kept := mapped(t, b, 1, refs[:1], hypercall.ReadWrite)
		buf := make([]byte, 4)
		if st := copyFrom(t, b, 1, refs[1], 0, buf); st != hypercall.OK {
			t.Fatal(st)
		}
		bs := share(t, b, 1, 1, hypercall.ReadWrite)
		am := mapped(t, a, 2, bs.Refs, hypercall.ReadWrite)
		if _, err := a.Memory(3); err != nil {
			t.Fatal(err)
		}
		wa, wb, pa, pb := channel(t, a, b)
		ended := make(chan error, 1)
		go func() { ended <- wa.Wait(time.Time{}, true) }()

		if err := m.Destroy(1); err != nil {
			t.Fatal(err)
		}
		a.Destroy() // a second time
		<-a.Done()
		if !slices.Equal(died, []hypercall.DomID{1}) {
			t.Errorf("deaths: %v", died)
		}
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Wait of the dead: %v", err)
		}

		// The survivor.
		if string(kept.Bytes()[:4]) != "kept" {
			t.Error("mapped memory is gone")
		}
		if st := copyFrom(t, b, 1, refs[1], 0, buf); st != hypercall.BadDomain {
			t.Errorf("copy: %v", st)
		}
		if _, err := b.Map(1, refs[:1], hypercall.ReadOnly); !errors.Is(err, hypercall.ErrNoDomain) {
			t.Errorf("map: %v", err)
		}
		if err := pb.Notify(); err != nil {
			t.Errorf("Notify: %v", err)
		}
		silent(t, wb)
		if _, err := wb.Bind(1, pa.ID()); !errors.Is(err, hypercall.ErrNoDomain) {
			t.Errorf("Bind: %v", err)
		}
		if l := m.Ledger(); l != (emu.Ledger{
			Domains: 1, Grants: 1, Pages: 1, Mappings: 1, Quarantined: 1, Ports: 1, Waiters: 1,
		}) {
			t.Errorf("%+v", l)
		}
		end(t, bs) // the dead domain no longer maps it
		release(t, kept)
		if l := m.Ledger(); l.Quarantined != 0 {
			t.Errorf("%+v", l)
		}
		if err := wb.Close(); err != nil {
			t.Error(err)
		}

		// The dead domain may release what it still holds, but gets nothing new.
		copy(am.Bytes(), "no fault")
		release(t, am)
		end(t, s)
		if err := wa.Close(); err != nil {
			t.Error(err)
		}
		if err := pa.Notify(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Notify of the dead: %v", err)
		}
		_, err1 := a.Share(2, 1, hypercall.ReadOnly)
		_, err2 := a.Map(2, refs, hypercall.ReadOnly)
		_, err3 := a.Memory(1)
		_, err4 := a.Waiter()
		_, err5 := a.Store(t.Context())
		err6 := a.Copy(make([]hypercall.CopyOp, 1))
		for i, err := range []error{err1, err2, err3, err4, err5, err6} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("call %d of the dead: %v", i+1, err)
			}
		}
	})
}

// A domain that takes over a number has none of its predecessor's resources.
func TestReusedNumberIsAnotherDomain(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		a, b := domain(t, m, 1), domain(t, m, 2)
		s := share(t, a, 2, 1, hypercall.ReadWrite)
		copy(s.Bytes(), "old")
		ref := s.Refs[0]
		old := mapped(t, b, 1, s.Refs, hypercall.ReadWrite)
		buf := make([]byte, 3)
		if st := copyFrom(t, b, 1, ref, 0, buf); st != hypercall.OK {
			t.Fatal(st)
		}
		wa, wb, pa, pb := channel(t, a, b)
		if err := pb.Notify(); err != nil { // b has cached the old end
			t.Fatal(err)
		}
		a.Destroy()

		a2 := domain(t, m, 1)
		if st := copyFrom(t, b, 1, ref, 0, buf); st != hypercall.GeneralError {
			t.Errorf("an old ref of the new domain: %v", st)
		}
		if _, err := b.Map(1, []hypercall.GrantRef{ref}, hypercall.ReadOnly); err == nil {
			t.Error("mapped")
		}
		w2 := waiter(t, a2)
		p2, err := w2.Unbound(2)
		if err != nil {
			t.Fatal(err)
		}
		if p2.ID() != pa.ID() {
			t.Fatalf("the test needs port %d again, got %d", pa.ID(), p2.ID())
		}
		if err := pb.Notify(); err != nil {
			t.Fatal(err)
		}
		if err := pa.Notify(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Notify of the dead: %v", err)
		}
		silent(t, w2)
		silent(t, wb)

		s2 := share(t, a2, 2, 1, hypercall.ReadWrite)
		if s2.Refs[0] != ref {
			t.Fatalf("the test needs ref %d again, got %d", ref, s2.Refs[0])
		}
		copy(s2.Bytes(), "new")
		if st := copyFrom(t, b, 1, ref, 0, buf); st != hypercall.OK || string(buf) != "new" {
			t.Errorf("%v, %q", st, buf)
		}
		if string(old.Bytes()[:3]) != "old" {
			t.Error("the old page changed")
		}
		release(t, old) // must not take anything from the new ref
		if st := copyFrom(t, b, 1, ref, 0, buf); st != hypercall.OK {
			t.Error(st)
		}
		end(t, s2)
		end(t, s)
		for _, w := range []hypercall.Waiter{wa, wb, w2} {
			if err := w.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// Xen knows a domain by its number: the next domain with the number may use what was
// granted to it. So a domain that loses a peer must end its grants.
func TestGrantsToANumberOutliveItsDomain(t *testing.T) {
	m := machine(t, emu.Config{})
	a, b := domain(t, m, 1), domain(t, m, 2)
	s := share(t, a, 2, 1, hypercall.ReadOnly)
	b.Destroy()
	b2 := domain(t, m, 2)
	buf := make([]byte, 1)
	if st := copyFrom(t, b2, 1, s.Refs[0], 0, buf); st != hypercall.OK {
		t.Error(st)
	}
	refs := slices.Clone(s.Refs)
	end(t, s)
	if st := copyFrom(t, b2, 1, refs[0], 0, buf); st == hypercall.OK {
		t.Error("an ended grant")
	}
}

func TestDestroyWhileEverythingRuns(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		b := domain(t, m, 2)
		for range 20 {
			a := domain(t, m, 1)
			s := share(t, a, 2, 4, hypercall.ReadWrite)
			wa, wb, pa, pb := channel(t, a, b)
			var busy sync.WaitGroup
			stop := make(chan struct{})
			loop := func(f func()) {
				busy.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
							f()
						}
					}
				})
			}
			refs := slices.Clone(s.Refs)
			ops := []hypercall.CopyOp{{
				Src: hypercall.Area{Dom: 1, Ref: refs[0]}, Dst: hypercall.Area{Local: make([]byte, 64)}, Len: 64,
			}}
			loop(func() {
				if err := b.Copy(ops); err != nil {
					t.Error(err)
				}
			})
			loop(func() { _ = pb.Notify() })
			loop(func() { _ = pa.Notify() })
			loop(func() { _ = wb.Wait(time.Now().Add(time.Millisecond), true) })
			busy.Go(func() {
				for wa.Wait(time.Time{}, true) == nil {
				}
			})
			loop(func() {
				if p, err := b.Map(1, refs[:2], hypercall.ReadWrite); err == nil {
					_ = p.Release()
				}
			})
			a.Destroy()
			close(stop)
			busy.Wait()
			_ = wb.Close()
			_ = wa.Close()
			_ = s.End()
		}
	})
}

// A domain ends during a Copy: its view of other domains' pages goes only when no Copy
// reads it.
func TestDestroyWhileCopying(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		const pages = 64
		a := domain(t, m, 1)
		s := share(t, a, 2, pages, hypercall.ReadWrite)
		for range 100 {
			b := domain(t, m, 2)
			var busy sync.WaitGroup
			started := make(chan struct{})
			busy.Go(func() {
				ops := make([]hypercall.CopyOp, pages)
				for i := range ops {
					ops[i] = hypercall.CopyOp{
						Src: hypercall.Area{Dom: 1, Ref: s.Refs[i]},
						Dst: hypercall.Area{Local: make([]byte, 4096)}, Len: 4096,
					}
				}
				for first := true; b.Copy(ops) == nil; first = false {
					if first {
						close(started)
					}
				}
			})
			<-started
			b.Destroy()
			busy.Wait()
		}
		end(t, s)
	})
}

func TestMachineCloseEndsDomains(t *testing.T) {
	m, err := emu.New(emu.Config{})
	if err != nil {
		t.Fatal(err)
	}
	d := domain(t, m, 1)
	share(t, d, 2, 1, hypercall.ReadOnly)
	for range 2 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	<-d.Done()
	if err := m.CheckClean(); err != nil {
		t.Error(err)
	}
	if _, err := m.NewDomain(2); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a domain of a closed machine: %v", err)
	}
}

// echoStore answers every byte, and reports when and why it ended.
func echoStore(ends chan<- error) func(hypercall.DomID, io.ReadWriteCloser) {
	return func(_ hypercall.DomID, conn io.ReadWriteCloser) {
		_, err := io.Copy(conn, conn)
		ends <- err
	}
}

func testStore(t *testing.T, m *emu.Machine, d *emu.Domain, ends <-chan error) {
	t.Helper()
	c, err := d.Store(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if l := m.Ledger(); l.Connections != 1 {
		t.Errorf("%+v", l)
	}
	big := make([]byte, 300<<10) // more than the buffers in between hold
	for i := range big {
		big[i] = byte(i * 31 >> 3)
	}
	written := make(chan error, 1)
	go func() {
		_, err := c.Write(big)
		written <- err
	}()
	got := make([]byte, len(big))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil || !slices.Equal(got, big) {
		t.Fatalf("%v, or other bytes", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ends; err != nil {
		t.Errorf("the store's end saw %v, not io.EOF", err)
	}
	if l := m.Ledger(); l.Connections != 0 {
		t.Errorf("%+v", l)
	}

	// The death of a domain ends a connection at both ends.
	if c, err = d.Store(t.Context()); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		read <- err
	}()
	if err := m.Destroy(d.ID()); err != nil {
		t.Fatal(err)
	}
	if err := <-ends; err != nil {
		t.Errorf("the store's end saw %v, not io.EOF", err)
	}
	if err := <-read; err == nil {
		t.Error("read from a dead connection")
	}
	_ = c.Close()
}

func TestStoreConnection(t *testing.T) {
	ends := make(chan error, 2)
	m := machine(t, emu.Config{Store: echoStore(ends)})
	testStore(t, m, domain(t, m, 3), ends)
}

func TestNoStore(t *testing.T) {
	m := machine(t, emu.Config{})
	if _, err := domain(t, m, 1).Store(t.Context()); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
}
