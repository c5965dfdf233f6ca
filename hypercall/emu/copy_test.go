package emu

import (
	"testing"
	"time"

	"barevif/hypercall"
)

// Pages that Copy may be reading are not unmapped, even if their grant has ended.
func TestSweepWaitsForCopies(t *testing.T) {
	m, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	a, err := m.NewDomain(1)
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.NewDomain(2)
	if err != nil {
		t.Fatal(err)
	}
	copyOne := func() *hypercall.Share {
		s, err := a.Share(2, 1, hypercall.ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		ops := []hypercall.CopyOp{{
			Src: hypercall.Area{Dom: 1, Ref: s.Refs[0]}, Dst: hypercall.Area{Local: make([]byte, 1)}, Len: 1,
		}}
		if err := b.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
			t.Fatal(err, ops[0].Status)
		}
		return s
	}
	old := copyOne()
	freed := make(chan struct{})
	v := (*b.views.Load())[1]
	b.mu.Lock()
	for serial, at := range v.attached {
		at.free = func() error { close(freed); return nil }
		v.attached[serial] = at
	}
	b.mu.Unlock()
	if err := old.End(); err != nil {
		t.Fatal(err)
	}

	next, err := a.Share(2, 1, hypercall.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	b.gate.RLock() // stands for a slow Copy
	fetched := make(chan hypercall.Status, 1)
	go func() { fetched <- b.fetch(&hypercall.Area{Dom: 1, Ref: next.Refs[0]}) }()
	select {
	case <-freed:
		t.Error("unmapped under a Copy")
	case <-time.After(50 * time.Millisecond):
	}
	b.gate.RUnlock()
	if st := <-fetched; st != hypercall.OK {
		t.Error(st)
	}
	<-freed
	if err := next.End(); err != nil {
		t.Error(err)
	}
}
