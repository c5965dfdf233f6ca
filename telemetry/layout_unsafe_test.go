package telemetry

import (
	"testing"
	"unsafe"
)

// Addresses are only compared here, never turned back into pointers.
func TestWritersNeverShareALine(t *testing.T) {
	s := NewSet(3)
	lines := map[uintptr]int{} // the writer of each line
	writer := 0
	for i := range s.blocks {
		b := &s.blocks[i]
		for _, r := range []struct{ from, to uintptr }{
			{uintptr(unsafe.Pointer(&b.words)), uintptr(unsafe.Pointer(&b.dirty)) + unsafe.Sizeof(b.dirty)},
			{uintptr(unsafe.Pointer(&b.mu)), uintptr(unsafe.Pointer(&b.sink)) + unsafe.Sizeof(b.sink)},
		} {
			writer++
			for a := r.from &^ 127; a < r.to; a += 128 {
				if other, ok := lines[a]; ok && other != writer {
					t.Fatalf("block %d shares the 128 bytes at %#x", i, a)
				}
				lines[a] = writer
			}
		}
	}
	if unsafe.Sizeof([BlockWords]uint64{})%128 != 0 {
		t.Error("mirrored blocks would share lines")
	}
}
