package forward

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// FuzzWrittenQueue compares the ring of frames that wait with a list of them.
func FuzzWrittenQueue(f *testing.F) {
	f.Add(uint64(1), []byte{200, 0, 3, 255, 255, 255, 0, 0, 0, 0, 9})
	f.Add(uint64(2), bytes.Repeat([]byte{250, 0}, 600))
	f.Add(uint64(3), bytes.Repeat([]byte{255}, 300))
	f.Fuzz(func(t *testing.T, seed uint64, moves []byte) {
		if len(moves) > 4096 {
			return
		}
		random := rand.New(rand.NewPCG(seed, 1))
		var w writtenQueue
		var want [][]byte
		total := 0
		for _, m := range moves {
			if m%2 == 0 && len(want) > 0 {
				a, b := w.peek()
				if got := append(bytes.Clone(a), b...); !bytes.Equal(got, want[0]) {
					t.Fatalf("a frame of %d bytes, want %d, or others", len(got), len(want[0]))
				}
				w.drop()
				total -= len(want[0])
				want = want[1:]
				continue
			}
			b := make([]byte, 14+int(m)*int(m)%65522)
			for i := range b[:min(len(b), 64)] {
				b[i] = byte(random.Uint32())
			}
			b[len(b)-1] = byte(random.Uint32())
			took := w.put(b)
			if may := len(want) < mostWritten && total+len(b) <= mostWrittenBytes; took != may {
				t.Fatalf("%d frames of %d bytes, and one of %d is taken: %t", len(want), total, len(b), took)
			}
			if took {
				want = append(want, b)
				total += len(b)
			}
			if w.frames != len(want) || w.bytes != total || len(w.ring) > mostWrittenBytes {
				t.Fatalf("%d frames of %d bytes in a ring of %d; want %d of %d", w.frames, w.bytes, len(w.ring), len(want), total)
			}
		}
	})
}
