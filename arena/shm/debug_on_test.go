//go:build shmdebug

package shm

import "testing"

func TestASecondLoadOfASlotPanics(t *testing.T) {
	s := NewSlots[record](Heap(1), 64, 256, 12)
	s.Load(5)
	s.Load(6)
	s.Load(5 + 256) // the next generation
	defer func() {
		if recover() == nil {
			t.Fatal("no panic")
		}
	}()
	s.Load(5 + 256)
}

func TestTamperChangesEveryLoad(t *testing.T) {
	m := Heap(1)
	n := uint32(0)
	restore := Tamper(func(uint32) uint32 { n++; return n })
	s := NewSlots[record](m, 64, 256, 12)
	if got := s.Load(0); got != (record{1, 2, 0, 3}) {
		t.Error(got)
	}
	if a, b := m.In(0).Load(), m.In(0).Load(); a == b {
		t.Error("two loads gave the same")
	}
	restore()
	if m.In(0).Load() != 0 {
		t.Error("not restored")
	}
}

func TestEveryWordIsLoadedOnce(t *testing.T) {
	m := Heap(1)
	var loads int
	defer Tamper(func(v uint32) uint32 { loads++; return v })()
	s := NewSlots[record](m, 64, 256, 12)
	for i := range uint32(2) {
		if loads = 0; s.Load(i) != (record{}) || loads != 3 {
			t.Errorf("slot %d: %d loads of a record of 3 words", i, loads)
		}
	}
	if loads = 0; m.In(0).Load() != 0 || loads != 1 {
		t.Errorf("%d loads of a word", loads)
	}
}
