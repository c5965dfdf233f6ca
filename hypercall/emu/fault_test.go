package emu_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
)

var errInjected = errors.New("injected")

// TestEveryCallCanFail makes the third call of each kind fail, and checks that no other
// fails.
func TestEveryCallCanFail(t *testing.T) {
	m := machine(t, emu.Config{Store: func(_ hypercall.DomID, c io.ReadWriteCloser) { _, _ = io.Copy(io.Discard, c) }})
	a, b := domain(t, m, 1), domain(t, m, 2)
	theirs := share(t, b, 1, 1, hypercall.ReadWrite)
	w := waiter(t, a)
	wb := waiter(t, b)
	port, err := w.Unbound(2)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	for _, c := range []struct {
		op   emu.Op
		call func() error
	}{
		{emu.OpMemory, func() error {
			p, err := a.Memory(1)
			if err != nil {
				return err
			}
			return p.Release()
		}},
		{emu.OpShare, func() error {
			s, err := a.Share(2, 1, hypercall.ReadOnly)
			if err != nil {
				return err
			}
			return s.End()
		}},
		{emu.OpMap, func() error {
			p, err := a.Map(2, theirs.Refs, hypercall.ReadWrite)
			if err != nil {
				return err
			}
			return p.Release()
		}},
		{emu.OpCopy, func() error {
			return a.Copy([]hypercall.CopyOp{{
				Src: hypercall.Area{Local: buf}, Dst: hypercall.Area{Dom: 2, Ref: theirs.Refs[0]}, Len: 4,
			}})
		}},
		{emu.OpWaiter, func() error {
			w, err := a.Waiter()
			if err != nil {
				return err
			}
			return w.Close()
		}},
		{emu.OpUnbound, func() error {
			p, err := w.Unbound(2)
			if err != nil {
				return err
			}
			return p.Close()
		}},
		{emu.OpBind, func() error {
			far, err := wb.Unbound(1)
			if err != nil {
				return err
			}
			defer far.Close()
			p, err := w.Bind(2, far.ID())
			if err != nil {
				return err
			}
			return p.Close()
		}},
		{emu.OpNotify, port.Notify},
		{emu.OpStore, func() error {
			c, err := a.Store(context.Background())
			if err != nil {
				return err
			}
			return c.Close()
		}},
	} {
		if _, err := m.Fail(emu.Fault{Dom: 1, Op: c.op, K: 3, Err: errInjected}); err != nil {
			t.Fatal(err)
		}
		for k := 1; k <= 5; k++ {
			if err := c.call(); errors.Is(err, errInjected) != (k == 3) || (err != nil) != (k == 3) {
				t.Errorf("call %d of op %d: %v", k, c.op, err)
			}
		}
	}
	end(t, theirs)
	_ = w.Close()
	_ = wb.Close()
	if _, err := m.Fail(emu.Fault{Dom: 99}); !errors.Is(err, hypercall.ErrNoDomain) {
		t.Error(err)
	}
}

func TestFaultsLastAsLongAsAsked(t *testing.T) {
	m := machine(t, emu.Config{})
	a := domain(t, m, 1)
	fails := func() bool {
		p, err := a.Memory(1)
		if err != nil {
			return true
		}
		release(t, p)
		return false
	}
	a.Fail(emu.Fault{Op: emu.OpMemory, Times: 2, Err: errInjected})
	lift := a.Fail(emu.Fault{Op: emu.OpMemory, K: 4, Times: -1, Err: errInjected})
	for i, want := range []bool{true, true, false, true, true, true} {
		if got := fails(); got != want {
			t.Errorf("call %d: %v", i+1, got)
		}
	}
	lift()
	lift()
	if fails() {
		t.Error("a lifted fault")
	}
}

func TestOneOperationOfABatchCanFail(t *testing.T) {
	m := machine(t, emu.Config{})
	a, b := domain(t, m, 1), domain(t, m, 2)
	s := share(t, a, 2, 1, hypercall.ReadWrite)
	b.Fail(emu.Fault{Op: emu.OpCopyGrant, K: 6, Times: 2, Status: hypercall.TryAgain})
	bufs := make([][4]byte, 4)
	ops := make([]hypercall.CopyOp, 4)
	copy(s.Bytes(), "data")
	for batch := range 3 {
		for i := range ops {
			bufs[i] = [4]byte{}
			ops[i] = hypercall.CopyOp{
				Src: hypercall.Area{Dom: 1, Ref: s.Refs[0]}, Dst: hypercall.Area{Local: bufs[i][:]}, Len: 4,
			}
		}
		if err := b.Copy(ops); err != nil {
			t.Fatal(err)
		}
		for i, op := range ops {
			n := batch*4 + i + 1
			want, data := hypercall.OK, "data"
			if n == 6 || n == 7 {
				want, data = hypercall.TryAgain, "\x00\x00\x00\x00"
			}
			if op.Status != want || string(bufs[i][:]) != data {
				t.Errorf("operation %d: %v, %q", n, op.Status, bufs[i])
			}
		}
	}
	end(t, s)
}

func TestMapCanFailWithAStatus(t *testing.T) {
	m := machine(t, emu.Config{})
	a, b := domain(t, m, 1), domain(t, m, 2)
	s := share(t, a, 2, 2, hypercall.ReadWrite)
	b.Fail(emu.Fault{Op: emu.OpMap, Status: hypercall.NoSpace})
	_, err := b.Map(1, s.Refs, hypercall.ReadWrite)
	var ge *hypercall.GrantError
	if !errors.As(err, &ge) || *ge != (hypercall.GrantError{Op: "map", Dom: 1, Ref: s.Refs[0], Status: hypercall.NoSpace}) {
		t.Error(err)
	}
	end(t, s)
}

func TestShareCanRefuseToEnd(t *testing.T) {
	m := machine(t, emu.Config{})
	a := domain(t, m, 1)
	a.Fail(emu.Fault{Op: emu.OpEnd, K: 2})
	one, two := share(t, a, 2, 3, hypercall.ReadWrite), share(t, a, 2, 5, hypercall.ReadWrite)
	refs := append([]hypercall.GrantRef(nil), two.Refs...)
	end(t, one)
	if err := two.End(); !errors.Is(err, hypercall.ErrInUse) {
		t.Fatal(err)
	}
	if l := m.Ledger(); l.Quarantined != 5 || l.Grants != 0 {
		t.Errorf("%+v", l)
	}
	late := share(t, a, 2, 100, hypercall.ReadWrite)
	for _, r := range late.Refs {
		for _, old := range refs {
			if r == old {
				t.Fatal("a ref that did not end was given away")
			}
		}
	}
	end(t, late)
	if m.CheckClean() == nil {
		t.Error("quarantined pages are clean")
	}
	a.Destroy() // ends all its shares and mappings
}

func TestReleaseCanFailAndLeaveThePagesMapped(t *testing.T) {
	m := machine(t, emu.Config{})
	a, b := domain(t, m, 1), domain(t, m, 2)
	s := share(t, a, 2, 1, hypercall.ReadWrite)
	p := mapped(t, b, 1, s.Refs, hypercall.ReadWrite)
	b.Fail(emu.Fault{Op: emu.OpRelease, Err: errInjected})
	if err := p.Release(); !errors.Is(err, errInjected) {
		t.Fatal(err)
	}
	if err := s.End(); !errors.Is(err, hypercall.ErrInUse) {
		t.Fatal(err)
	}
	b.Destroy()
}

func TestEventsGetLostDelayedDuplicated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := machine(t, emu.Config{})
		a, b := domain(t, m, 1), domain(t, m, 2)
		wa, wb, pa, _ := channel(t, a, b)
		took := func() time.Duration {
			start := time.Now()
			if err := pa.Notify(); err != nil {
				t.Fatal(err)
			}
			if err := wb.Wait(start.Add(time.Minute), true); err != nil {
				return -1
			}
			return time.Since(start)
		}
		if d := took(); d != 0 {
			t.Errorf("an event took %v", d)
		}
		a.Fail(emu.Fault{Op: emu.OpNotify, Event: emu.EventLost})
		if d := took(); d != -1 {
			t.Errorf("a lost event came after %v", d)
		}
		a.Fail(emu.Fault{Op: emu.OpNotify, Event: emu.EventDelayed, Delay: time.Second})
		if d := took(); d != time.Second {
			t.Errorf("an event delayed by a second came after %v", d)
		}
		a.Fail(emu.Fault{Op: emu.OpNotify, Event: emu.EventDuplicated, Delay: time.Second})
		if d := took(); d != 0 {
			t.Errorf("a duplicated event took %v", d)
		}
		start := time.Now()
		if err := wb.Wait(time.Time{}, true); err != nil || time.Since(start) != time.Second {
			t.Errorf("it came again after %v, %v", time.Since(start), err)
		}
		if d := took(); d != 0 {
			t.Errorf("an event took %v", d)
		}
		_ = wa.Close()
		_ = wb.Close()
	})
}

// A delayed event may come after its port, its domain and its machine have gone.
func TestDelayedEventsAreHarmless(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		for range 10 {
			a, b := domain(t, m, 1), domain(t, m, 2)
			wa, wb, pa, _ := channel(t, a, b)
			a.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventDuplicated, Delay: time.Millisecond})
			for range 20 {
				if err := pa.Notify(); err != nil {
					t.Fatal(err)
				}
			}
			_ = wb.Wait(time.Now().Add(time.Millisecond), true)
			_ = wb.Close()
			a.Destroy()
			b.Destroy()
			_ = wa.Close()
		}
	})
}

func TestCallsAreCounted(t *testing.T) {
	m := machine(t, emu.Config{Store: func(hypercall.DomID, io.ReadWriteCloser) {}})
	a, b := domain(t, m, 1), domain(t, m, 2)
	theirs := share(t, b, 1, 1, hypercall.ReadWrite)
	ours := share(t, a, 2, 1, hypercall.ReadWrite)
	p := mapped(t, a, 2, theirs.Refs, hypercall.ReadWrite)
	buf := make([]byte, 1)
	op := hypercall.CopyOp{Src: hypercall.Area{Local: buf}, Dst: hypercall.Area{Dom: 2, Ref: theirs.Refs[0]}, Len: 1}
	for range 2 {
		if err := a.Copy([]hypercall.CopyOp{op, op, op}); err != nil {
			t.Fatal(err)
		}
	}
	priv, err := a.Memory(1)
	if err != nil {
		t.Fatal(err)
	}
	wa, wb, pa, pb := channel(t, a, b)
	if _, err := wa.Bind(2, pb.ID()); err == nil {
		t.Fatal("bound twice")
	}
	if err := pa.Notify(); err != nil {
		t.Fatal(err)
	}
	silent(t, wa)
	c, err := a.Store(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	release(t, p)
	release(t, priv)
	end(t, ours)
	if got := a.Calls(); got != (emu.Calls{
		Memory: 1, Share: 1, Map: 1, Copy: 2, CopyOps: 6, Waiter: 1, Unbound: 1, Bind: 1,
		Notify: 1, Wait: 1, Store: 1, End: 1, Release: 1,
	}) {
		t.Errorf("%+v", got)
	}
	end(t, theirs)
	_ = wa.Close()
	_ = wb.Close()
}
