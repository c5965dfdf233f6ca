package shm

import (
	"errors"
	"testing"
)

type record struct {
	A uint32
	B uint16
	C uint16
	D uint32
}

func TestNewRefusesPartsOfPages(t *testing.T) {
	b := Heap(3).Bytes()
	if _, err := New(b[:PageSize-1]); !errors.Is(err, ErrMisaligned) {
		t.Error(err)
	}
	if _, err := New(b[1 : 1+PageSize]); !errors.Is(err, ErrMisaligned) {
		t.Error(err)
	}
	m, err := New(b[:2*PageSize])
	if err != nil || m.Pages() != 2 || cap(m.Page(0)) != PageSize || cap(m.Bytes()) != 2*PageSize {
		t.Error(m.Pages(), err)
	}
}

func TestHeapPagesAreAlignedAndZero(t *testing.T) {
	m := Heap(2)
	if address(m.Bytes())%PageSize != 0 || m.Pages() != 2 {
		t.Fatal("not two aligned pages")
	}
	for _, c := range m.Bytes() {
		if c != 0 {
			t.Fatal("not zero")
		}
	}
}

func TestLayoutsThatDoNotFitPanic(t *testing.T) {
	m := Heap(1)
	for name, f := range map[string]func(){
		"word past the end":   func() { m.In(PageSize) },
		"word misaligned":     func() { m.Out(2) },
		"negative word":       func() { m.In(-4) },
		"slots past the end":  func() { NewSlots[record](m, 64, 512, 12) },
		"slots not 2^n":       func() { NewSlots[record](m, 64, 3, 12) },
		"no slots":            func() { NewSlots[record](m, 64, 0, 12) },
		"stride not of words": func() { NewSlots[record](m, 64, 4, 14) },
		"record over stride":  func() { NewSlots[record](m, 64, 4, 8) },
		"record not of words": func() { NewSlots[[3]byte](m, 64, 4, 8) },
		"record too large":    func() { NewSlots[[16]uint32](m, 64, 4, 64) },
		"page that is not":    func() { m.Page(1) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			f()
		}()
	}
}

func TestLayoutsThatJustFit(t *testing.T) {
	m := Heap(1)
	m.Out(0).Store(1)
	m.Out(PageSize - 4).Store(2)
	if first, last := m.In(0).Load(), m.In(PageSize-4).Load(); first != 1 || last != 2 {
		t.Errorf("first word %d, last %d", first, last)
	}
	whole := NewSlots[[8]uint32](m, 0, PageSize/32, 32)
	v := [8]uint32{1, 2, 3, 4, 5, 6, 7, 8}
	whole.Store(PageSize/32-1, v)
	if got := whole.Load(PageSize/32 - 1); got != v || m.In(PageSize-4).Load() != 8 {
		t.Error(got)
	}
	one := NewSlots[record](m, 64, 1, 12)
	one.Store(7, record{A: 9})
	if got := one.Load(8); got != (record{A: 9}) {
		t.Error(got)
	}
}

func TestSlotsMaskTheirIndex(t *testing.T) {
	m := Heap(1)
	s := NewSlots[record](m, 64, 256, 12)
	if s.Len() != 256 {
		t.Fatal(s.Len())
	}
	for _, i := range []uint32{0, 255, 256, 1 << 31, ^uint32(0)} {
		v := record{i, uint16(i), 7, ^i}
		s.Store(i, v)
		if got := s.Load(i); got != v {
			t.Errorf("slot %d: %v, want %v", i, got, v)
		}
	}
}

func TestAShorterRecordLeavesTheRestOfTheSlot(t *testing.T) {
	m := Heap(1)
	req := NewSlots[record](m, 64, 256, 12)
	rsp := NewSlots[uint32](m, 64, 256, 12)
	req.Store(3, record{1, 2, 3, 4})
	rsp.Store(3, 9)
	if got := req.Load(3); got != (record{9, 2, 3, 4}) {
		t.Error(got)
	}
}
