package pvnet

import (
	"bytes"
	"fmt"
	"testing"

	"barevif/arena"
	"barevif/arena/shm"
)

// lentFrame makes a frame in pages that its holder may not write.
func lentFrame(t testing.TB, size int) (f Frame, done func() bool) {
	t.Helper()
	pages := shm.Heap(maxFrameBuffers)
	for i := range pages.Bytes() {
		pages.Bytes()[i] = byte(i*7 + i>>8)
	}
	a := arena.NewReadOnly(pages, shm.PageSize, func() {})
	n := (size + shm.PageSize - 1) / shm.PageSize
	for i := 1; i < n; i++ {
		a.Link(uint32(i-1), uint32(i), 0, uint16(min(size-i*shm.PageSize, shm.PageSize)))
	}
	f = Frame{buf: a.Buffer(0), total: uint32(size), n: uint16(min(size, shm.PageSize)), pieces: uint8(n), csum: ChecksumVerified}
	return f, func() bool { var back [maxFrameBuffers]uint32; return a.Get(back[:]) == n }
}

func TestACopyTakesTheFramesPlace(t *testing.T) {
	for _, size := range []int{MinFrame, 1514, shm.PageSize, shm.PageSize + 1, 9014, MaxFrame} {
		c := NewCopies(2 * maxFrameBuffers)
		f, back := lentFrame(t, size)
		want := make([]byte, size)
		f.CopyTo(want)
		lent := f
		if !c.Replace(&f) {
			t.Fatalf("%d bytes: no copy", size)
		}
		got := make([]byte, size)
		if n := f.CopyTo(got); n != size || !bytes.Equal(got, want) || f.Checksum() != ChecksumVerified || f.ReadOnly() || !f.buf.Exclusive() {
			t.Errorf("%d bytes: the copy has %d, or others", size, n)
		}
		if !back() || lent.Valid() || c.Replace(&lent) {
			t.Errorf("%d bytes: the frame is still held", size)
		}
		if err := f.Release(); err != nil {
			t.Error(err)
		}
		if free := c.arena.Free(); free != c.arena.Len() {
			t.Errorf("%d bytes: %d of %d pages came back", size, free, c.arena.Len())
		}
	}
}

func TestACopyThatFindsNoPageLeavesTheFrame(t *testing.T) {
	c := NewCopies(0) // counts as 1
	f, _ := lentFrame(t, 1514)
	g, _ := lentFrame(t, 1514)
	if !c.Replace(&f) || c.Replace(&g) || !g.Valid() || !g.ReadOnly() {
		t.Error("a page for one frame alone")
	}
	if f.Release(); !c.Replace(&g) {
		t.Error("no page, though one has come back")
	}
	long, _ := lentFrame(t, MaxFrame)
	if NewCopies(maxFrameBuffers-1).Replace(&long) || !long.Valid() {
		t.Error("a frame longer than all pages")
	}
	other, _ := lentFrame(t, 1514)
	other.Retain()
	if !NewCopies(1).Replace(&other) || !other.buf.Exclusive() {
		t.Error("a frame with another holder")
	}
}

func BenchmarkCopies(b *testing.B) {
	for _, size := range []int{512, 1514, 9014} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			c := NewCopies(maxFrameBuffers)
			lent, _ := lentFrame(b, size)
			b.ReportAllocs()
			for b.Loop() {
				lent.Retain()
				f := lent
				if !c.Replace(&f) {
					b.Fatal("no page")
				}
				f.Release()
			}
		})
	}
}
