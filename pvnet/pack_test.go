package pvnet

import (
	"math/rand/v2"
	"slices"
	"testing"

	"barevif/arena/shm"
	"barevif/pvnet/packet"
)

// A part ends up in one page if there are pages enough, and no byte is lost if there are not.
func TestPacker(t *testing.T) {
	const first = shm.PageSize - headroom
	full := func(n int) []uint32 { return slices.Repeat([]uint32{shm.PageSize}, n) }
	for _, c := range []struct {
		what  string
		parts []uint32
		want  []uint16
	}{
		{"headers, and a frame of the kernel's that begins inside of a page", []uint32{200, 1000, 4096, 4096, 500}, []uint16{1200, 4096, 4096, 500}},
		{"headers, and full pages: the first piece must hold all headers", []uint32{66, 4096, 4096, 4096}, []uint16{first, 194, 4096, 4096}},
		{"as our own frontend sends", []uint32{first, 4096, 936}, []uint16{first, 4096, 936}},
		{"short slots share a page", []uint32{300, 300, 300, 4000, 90}, []uint16{900, 4090}},
		{"nothing in a slot", []uint32{2000, 0, 4096, 0, 10}, []uint16{2000, 4096, 10}},
		{"the longest frame", append(append([]uint32{first}, full(15)...), 127), slices.Concat([]uint16{first}, slices.Repeat([]uint16{4096}, 15), []uint16{127})},
		{"a page could be left, but then the last would not fit", append([]uint32{300}, full(15)...), nil},
	} {
		var l packer
		total := uint32(0)
		for _, n := range c.parts {
			total += n
		}
		l.begin(total, maxFrameBuffers, first, packet.MaxHeaders)
		for _, n := range c.parts {
			l.add(n)
		}
		if got := l.sizes[:l.pages()]; c.want != nil && !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
}

// Whatever the parts are, every byte has its place, the first page has the headers, and parts
// are divided only where there is no page to spare.
func TestPackerPlacesEveryByte(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200_000 {
		total := uint32(1 + rng.IntN(MaxFrame))
		room := uint32(shm.PageSize - rng.IntN(2)*headroom)
		least := uint16(1 + rng.IntN(2)*(packet.MaxHeaders-1))
		need := 1 + int((max(total, room)-room+shm.PageSize-1)/shm.PageSize)
		most := min(need+rng.IntN(3), maxFrameBuffers)
		var l packer
		l.begin(total, most, room, least)
		for left := total; left > 0; {
			n := min(uint32(rng.IntN(shm.PageSize+1)), left)
			affords := l.sizes[l.last] >= l.least && left <= uint32(most-l.pages())*shm.PageSize
			fits := n <= l.room
			if l.add(n); !fits && affords && uint32(l.sizes[l.last]) != n {
				t.Fatalf("a part of %d bytes is divided: %v of %d pages", n, l.sizes[:l.pages()], most)
			}
			left -= n
		}
		sum := uint32(0)
		for i, n := range l.sizes[:l.pages()] {
			if sum += uint32(n); n == 0 || uint32(n) > shm.PageSize || i == 0 && uint32(n) > room {
				t.Fatalf("page %d of %v has %d bytes", i, l.sizes[:l.pages()], n)
			}
		}
		if sum != total || l.left != 0 || l.pages() > most || uint32(l.sizes[0]) < min(total, uint32(least), room) {
			t.Fatalf("%d bytes in at most %d pages: %v", total, most, l.sizes[:l.pages()])
		}
	}
}
