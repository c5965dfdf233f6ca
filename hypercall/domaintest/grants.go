package domaintest

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"barevif/arena/shm"
	"barevif/hypercall"
)

func memoryIsZeroedAndOurs(t *testing.T, p pair) {
	m := memory(t, p.front, 3)
	if m.Pages() != 3 || !bytes.Equal(m.Bytes(), make([]byte, 3*shm.PageSize)) {
		t.Fatalf("%d pages, or not zero", m.Pages())
	}
	m.Bytes()[len(m.Bytes())-1] = 1
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
	if err := m.Release(); err != nil {
		t.Fatal("second Release:", err)
	}
	if m.Pages() != 0 {
		t.Fatal("memory outlived Release")
	}
	if n, err := p.front.Memory(0); err == nil {
		n.Release()
		t.Fatal("no pages are no error")
	}
}

func shareGivesOneUsableRefPerPage(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 5, hypercall.ReadOnly)
	if s.Pages() != 5 || len(s.Refs) != 5 || s.Peer != p.back.ID() || s.Access != hypercall.ReadOnly {
		t.Fatalf("%d pages, %d refs, for %d, %v", s.Pages(), len(s.Refs), s.Peer, s.Access)
	}
	if !bytes.Equal(s.Bytes(), make([]byte, 5*shm.PageSize)) {
		t.Fatal("not zero")
	}
	for i, ref := range s.Refs {
		if ref < 8 || slices.Contains(s.Refs[:i], ref) {
			t.Fatalf("refs %v", s.Refs)
		}
	}
}

func mapSeesWhatTheGranterWrites(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 4, hypercall.ReadWrite)
	m := mapRefs(t, p.back, p.front.ID(), s.Refs[1:3], hypercall.ReadWrite)
	if m.Pages() != 2 {
		t.Fatalf("%d pages", m.Pages())
	}
	s.Out(shm.PageSize).Store(0x11)
	s.Out(2*shm.PageSize + 8).Store(0x22)
	if a, b := m.In(0).Load(), m.In(shm.PageSize+8).Load(); a != 0x11 || b != 0x22 {
		t.Fatalf("mapped pages say %#x and %#x", a, b)
	}
	m.Out(4).Store(0x33)
	if v := s.In(shm.PageSize + 4).Load(); v != 0x33 {
		t.Fatalf("the granter sees %#x", v)
	}
	again := mapRefs(t, p.back, p.front.ID(), s.Refs[1:2], hypercall.ReadOnly)
	if v := again.In(4).Load(); v != 0x33 {
		t.Fatalf("a second mapping says %#x", v)
	}
}

func mapIsAllOrNone(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 2, hypercall.ReadWrite)
	for _, refs := range [][]hypercall.GrantRef{
		{s.Refs[0], s.Refs[1], unknownRef},
		{unknownRef},
	} {
		m, err := p.back.Map(p.front.ID(), refs, hypercall.ReadWrite)
		var ge *hypercall.GrantError
		if !errors.As(err, &ge) {
			if err == nil {
				m.Release()
			}
			t.Fatalf("Map(%v): %v", refs, err)
		}
		if ge.Op != "map" || ge.Dom != p.front.ID() || ge.Status == hypercall.OK {
			t.Fatalf("%+v", ge)
		}
	}
	// The failed Map has unmapped the pages that it had mapped, so End succeeds.
	if err := s.End(); err != nil {
		t.Fatal(err)
	}
}

// unknownRef is beyond the end of every grant table.
const unknownRef hypercall.GrantRef = 1<<31 - 1

func mapOfReadOnlyGrantCannotBeWritable(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 1, hypercall.ReadOnly)
	if m, err := p.back.Map(p.front.ID(), s.Refs, hypercall.ReadWrite); err == nil {
		m.Release()
		t.Fatal("mapped writable")
	}
	s.Out(0).Store(7)
	if v := mapRefs(t, p.back, p.front.ID(), s.Refs, hypercall.ReadOnly).In(0).Load(); v != 7 {
		t.Fatalf("mapped page says %d", v)
	}
}

func endWhileMappedSaysInUse(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 3, hypercall.ReadWrite)
	m := mapRefs(t, p.back, p.front.ID(), s.Refs[1:2], hypercall.ReadWrite)
	s.Out(shm.PageSize).Store(5)
	if err := s.End(); !errors.Is(err, hypercall.ErrInUse) {
		t.Fatalf("End of a mapped page: %v", err)
	}
	if err := s.End(); err != nil {
		t.Fatal("second End:", err)
	}
	if v := m.In(0).Load(); v != 5 {
		t.Fatalf("the mapped page says %d", v)
	}
	// A new share does not get that page.
	fresh := share(t, p.front, p.back.ID(), 3, hypercall.ReadWrite)
	clear(fresh.Bytes())
	if v := m.In(0).Load(); v != 5 {
		t.Fatal("the page was given away while mapped")
	}
}

func endedGrantCannotBeUsed(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 2, hypercall.ReadWrite)
	refs := slices.Clone(s.Refs)
	buf := make([]byte, 16)
	ops := []hypercall.CopyOp{fromGrant(p.front, refs[0], 0, buf)}
	if err := p.back.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
		t.Fatal(err, ops[0].Status)
	}
	if err := s.End(); err != nil {
		t.Fatal(err)
	}
	if err := p.back.Copy(ops); err == nil && ops[0].Status == hypercall.OK {
		t.Fatal("copied from an ended grant")
	}
	if m, err := p.back.Map(p.front.ID(), refs, hypercall.ReadOnly); err == nil {
		m.Release()
		t.Fatal("mapped an ended grant")
	}
}

// reusedRefsAreNewPages shares and ends repeatedly: the grefs are used again, but must not
// refer to the old pages.
func reusedRefsAreNewPages(t *testing.T, p pair) {
	buf := make([]byte, 16)
	for i := range 8 {
		s := share(t, p.front, p.back.ID(), 2, hypercall.ReadOnly)
		if s.Page(1)[0] != 0 {
			t.Fatal("a fresh page is not zero")
		}
		want := pattern(len(buf), byte(i+1))
		copy(s.Page(1), want)
		ops := []hypercall.CopyOp{fromGrant(p.front, s.Refs[1], 0, buf)}
		if err := p.back.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
			t.Fatal(err, ops[0].Status)
		}
		if !bytes.Equal(buf, want) {
			t.Fatalf("round %d: bytes of another page", i)
		}
		m := mapRefs(t, p.back, p.front.ID(), s.Refs[1:], hypercall.ReadOnly)
		if !bytes.Equal(m.Bytes()[:len(buf)], want) {
			t.Fatalf("round %d: another page is mapped", i)
		}
		if err := m.Release(); err != nil {
			t.Fatal(err)
		}
		if err := s.End(); err != nil {
			t.Fatal(err)
		}
	}
}

func fromGrant(d hypercall.Domain, ref hypercall.GrantRef, off uint16, to []byte) hypercall.CopyOp {
	return hypercall.CopyOp{
		Src: hypercall.Area{Dom: d.ID(), Ref: ref, Offset: off},
		Dst: hypercall.Area{Local: to},
		Len: uint32(len(to)),
	}
}

func toGrant(d hypercall.Domain, ref hypercall.GrantRef, off uint16, from []byte) hypercall.CopyOp {
	return hypercall.CopyOp{
		Src: hypercall.Area{Local: from},
		Dst: hypercall.Area{Dom: d.ID(), Ref: ref, Offset: off},
		Len: uint32(len(from)),
	}
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i*7)
	}
	return b
}

func copyMovesBytesBothWays(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 4, hypercall.ReadWrite)
	mem := memory(t, p.back, 4)
	for _, c := range []struct {
		page, off, n int
	}{
		{0, 0, 1}, {1, 1, 63}, {2, 4095, 1}, {3, 0, 4096}, {1, 2049, 1500}, {0, 7, 4089},
	} {
		want := pattern(c.n, byte(c.page+c.n))
		copy(s.Page(c.page)[c.off:], want)
		buf := mem.Bytes()[100 : 100+c.n]
		clear(buf)
		ops := []hypercall.CopyOp{fromGrant(p.front, s.Refs[c.page], uint16(c.off), buf)}
		if err := p.back.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
			t.Fatal(c, err, ops[0].Status)
		}
		if !bytes.Equal(buf, want) {
			t.Fatalf("%+v: other bytes came", c)
		}
		clear(s.Page(c.page))
		ops[0] = toGrant(p.front, s.Refs[c.page], uint16(c.off), want)
		if err := p.back.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
			t.Fatal(c, err, ops[0].Status)
		}
		got := s.Page(c.page)
		if !bytes.Equal(got[c.off:c.off+c.n], want) {
			t.Fatalf("%+v: other bytes went", c)
		}
		clear(got[c.off : c.off+c.n])
		if !bytes.Equal(got, make([]byte, shm.PageSize)) {
			t.Fatalf("%+v: bytes beside the range changed", c)
		}
	}
}

func copyBetweenTwoGrants(t *testing.T, p pair) {
	src := share(t, p.front, p.back.ID(), 1, hypercall.ReadOnly)
	dst := share(t, p.front, p.back.ID(), 1, hypercall.ReadWrite)
	want := pattern(200, 3)
	copy(src.Page(0)[10:], want)
	ops := []hypercall.CopyOp{{
		Src: hypercall.Area{Dom: p.front.ID(), Ref: src.Refs[0], Offset: 10},
		Dst: hypercall.Area{Dom: p.front.ID(), Ref: dst.Refs[0], Offset: 1000},
		Len: 200,
	}}
	if err := p.back.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
		t.Fatal(err, ops[0].Status)
	}
	if !bytes.Equal(dst.Page(0)[1000:1200], want) {
		t.Fatal("other bytes came")
	}
}

func copyChecksEveryOperation(t *testing.T, p pair) {
	ro := share(t, p.front, p.back.ID(), 1, hypercall.ReadOnly)
	rw := share(t, p.front, p.back.ID(), 1, hypercall.ReadWrite)
	copy(ro.Page(0), "readable")
	buf, last := make([]byte, 8), make([]byte, 8)
	other := unknownRef + 1
	if !p.loopback() { // a grant for another domain than back
		other = share(t, p.front, p.front.ID(), 1, hypercall.ReadWrite).Refs[0]
	}
	ops := []hypercall.CopyOp{
		fromGrant(p.front, unknownRef, 0, buf),
		toGrant(p.front, ro.Refs[0], 0, []byte("override")),
		fromGrant(p.front, other, 0, buf),
		toGrant(p.front, rw.Refs[0], 0, []byte("welcome!")),
		fromGrant(p.front, ro.Refs[0], 0, last),
	}
	for i := range ops {
		ops[i].Status = 99
	}
	if err := p.back.Copy(ops); err != nil {
		t.Fatal(err)
	}
	for i, op := range ops {
		if good := i >= 3; (op.Status == hypercall.OK) != good || op.Status > 0 {
			t.Errorf("operation %d: %v", i, op.Status)
		}
	}
	if string(ro.Page(0)[:8]) != "readable" || string(rw.Page(0)[:8]) != "welcome!" || string(last) != "readable" {
		t.Errorf("%q %q %q", ro.Page(0)[:8], rw.Page(0)[:8], last)
	}
	if !bytes.Equal(buf, make([]byte, 8)) {
		t.Errorf("a failed copy wrote %q", buf)
	}
}

func copyStaysInItsPage(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 2, hypercall.ReadWrite)
	buf := make([]byte, 3*shm.PageSize)
	for _, c := range []struct {
		off uint16
		n   uint32
	}{{4095, 2}, {1, 4096}, {0, 4097}, {4096, 1}, {65535, 1}, {65535, 65535}, {0, 1<<32 - 1}, {1, 1<<32 - 1}} {
		op := hypercall.CopyOp{
			Src: hypercall.Area{Dom: p.front.ID(), Ref: s.Refs[0], Offset: c.off},
			Dst: hypercall.Area{Local: buf},
			Len: c.n,
		}
		ops := []hypercall.CopyOp{op}
		if err := p.back.Copy(ops); err == nil && ops[0].Status == hypercall.OK {
			t.Errorf("copied %d bytes from %d", c.n, c.off)
		}
		ops[0].Src, ops[0].Dst = op.Dst, op.Src
		if err := p.back.Copy(ops); err == nil && ops[0].Status == hypercall.OK {
			t.Errorf("copied %d bytes to %d", c.n, c.off)
		}
	}
	short := fromGrant(p.front, s.Refs[0], 0, buf[:8])
	short.Len = 9
	ops := []hypercall.CopyOp{short}
	if err := p.back.Copy(ops); err == nil && ops[0].Status == hypercall.OK {
		t.Error("copied more than the local end holds")
	}
}

func copyOfNothingIsFine(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 1, hypercall.ReadWrite)
	ops := []hypercall.CopyOp{fromGrant(p.front, s.Refs[0], 4096, []byte{})}
	ops[0].Status = 99
	if err := p.back.Copy(ops); err != nil || ops[0].Status != hypercall.OK {
		t.Fatal(err, ops[0].Status)
	}
	if err := p.back.Copy(nil); err != nil {
		t.Fatal(err)
	}
}

func copyFromLocalToLocalIsAnError(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 1, hypercall.ReadWrite)
	copy(s.Page(0), "untouched")
	ops := []hypercall.CopyOp{
		toGrant(p.front, s.Refs[0], 0, []byte("changed!!")),
		{Src: hypercall.Area{Local: make([]byte, 4)}, Dst: hypercall.Area{Local: make([]byte, 4)}, Len: 4},
	}
	if err := p.back.Copy(ops); err == nil {
		t.Fatal("no error")
	}
	if string(s.Page(0)[:9]) != "untouched" {
		t.Fatal("part of the batch ran")
	}
}

func copyDoesNotAllocate(t *testing.T, p pair) {
	s := share(t, p.front, p.back.ID(), 32, hypercall.ReadWrite)
	mem := memory(t, p.back, 32)
	ops := make([]hypercall.CopyOp, 32)
	for i := range ops {
		ops[i] = fromGrant(p.front, s.Refs[i], 0, mem.Page(i)[:1500])
	}
	n := testing.AllocsPerRun(100, func() {
		if err := p.back.Copy(ops); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}
