package pvnet

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/pvnet/netif"
	"barevif/pvnet/packet"
	"barevif/telemetry"
)

// layout derives the sizes of a frame's pieces, and the offset of the first, from seed:
// as many pieces as a peer may send, the first of at least MinFrame bytes.
func layout(seed uint64, total int) (off int, sizes []int) {
	rng := rand.New(rand.NewPCG(seed, 1))
	first := shm.PageSize - rng.IntN(200)
	if rng.IntN(2) == 0 {
		first = MinFrame + rng.IntN(200)
	}
	sizes = []int{first}
	for left := total - first; left > 0 && len(sizes) < maxPieces; left -= sizes[len(sizes)-1] {
		rest := maxPieces - len(sizes) - 1 // pieces after this one
		least := max(left-shm.PageSize*rest, 0)
		n := least + rng.IntN(shm.PageSize+1-min(least, shm.PageSize))
		sizes = append(sizes, min(n, shm.PageSize, left))
	}
	return rng.IntN(shm.PageSize + 1 - min(first, total)), sizes
}

// bytesOf returns the bytes of a frame.
func bytesOf(f *Frame) []byte {
	b := make([]byte, f.Len())
	if f.CopyTo(b) != len(b) {
		panic("a frame is shorter than it says")
	}
	return b
}

// completed reports whether the checksum of the segment in b is right, computed in the
// slow way.
func completed(b []byte, h packet.Headers) bool {
	length := h.End - h.L4
	pseudo := append(append([]byte(nil), h.Addresses(b)...), 0, h.Proto, byte(length>>8), byte(length))
	return naive(append(pseudo, b[h.L4:h.End]...)) == 0xffff
}

// FuzzArrived receives arbitrary bytes from a peer, in pieces of any length and with any
// offloads. The frame must be dropped, or match its offloads and be sendable to every
// peer.
func FuzzArrived(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 30 {
		s := streams(rng)
		s.payload = min(s.payload, 5000)
		f.Add(s.frame(), uint16(s.size), byte(s.gso().Type), byte(rng.IntN(8)), rng.Uint64())
	}
	f.Add(udp4(f, 60), uint16(0), byte(0), byte(6), uint64(3))
	f.Add(make([]byte, MinFrame), uint16(1), byte(2), byte(7), uint64(4))
	count := telemetry.NewSet(1).RX(0)
	f.Fuzz(func(t *testing.T, in []byte, size uint16, kind, how byte, seed uint64) {
		if len(in) < MinFrame || len(in) > MaxFrame {
			return
		}
		a := arena.New(shm.Heap(maxPieces), shm.PageSize)
		off, sizes := layout(seed, len(in))
		frame := chop(t, a, in, off, sizes...)
		if frame.slots() == 0 || !bytes.Equal(bytesOf(&frame), in) {
			t.Fatal("the test's own frame is wrong")
		}
		keep := how&4 != 0
		frame.csum = []Checksum{ChecksumUnknown, ChecksumVerified, ChecksumPartial, ChecksumPartial}[how&3]
		was, gso := frame.csum, netif.GSO{Size: size, Type: netif.GSOType(kind)}
		if how&8 != 0 {
			gso = netif.GSO{}
		}
		x := extrasOf(gso)
		if gso.Size != 0 && x.Len() == 0 {
			return // an engine refuses this extra info
		}
		reason := frame.takeOffloads(x, keep, count)
		if !slices.Contains([]telemetry.Reason{0, telemetry.DropBadCsum, telemetry.DropBadGSO}, reason) {
			t.Fatalf("reason %v", reason)
		}
		if reason != 0 {
			return
		}
		start, field, has := frame.PartialAt()
		if frame.Checksum() == ChecksumPartial != (has && keep && (was == ChecksumPartial || gso.Size != 0)) {
			t.Fatalf("%v comes as %v, kept %v", was, frame.Checksum(), keep)
		}
		out := bytesOf(&frame)
		want := bytes.Clone(in)
		if has { // arrived may write the checksum field
			copy(want[start+field:], out[start+field:start+field+2])
		}
		if !bytes.Equal(out, want) {
			t.Fatal("other bytes than those of the checksum have changed")
		}
		if was == ChecksumPartial && !keep {
			h, ok := packet.Parse(out, len(out))
			if !ok {
				t.Fatal("a checksum of nothing")
			}
			// Garbage in the field stays garbage, as in Linux.
			if binary.BigEndian.Uint16(in[start+field:]) == h.Pseudo(out, h.End-h.L4) && !completed(out, h) {
				t.Fatal("the checksum is not complete")
			}
		}
		if (frame.GSO() != GSO{}) && (!keep || frame.Checksum() != ChecksumPartial || frame.GSO() != GSO{GSOType(kind), size}) {
			t.Fatalf("%+v comes as %+v", gso, frame.GSO())
		}
		checkSendable(t, &frame)
	})
}

// checkSendable asserts that a received frame can be sent to a peer that takes all of its
// offloads, and to one that takes none.
func checkSendable(t *testing.T, f *Frame) {
	t.Helper()
	const all = takesCsum4 | takesCsum6 | takesGSO4 | takesGSO6
	h, _ := f.Headers()
	if w := all.needs(f); w != needNothing && (h.Tags == 0 && h.Extensions == 0 || w == needImpossible) {
		t.Fatalf("what came does not fit who takes everything: %d", w)
	}
	switch w := offloads(0).needs(f); {
	case f.GSO() != GSO{}:
		if w != needCut {
			t.Fatalf("%d, not to be cut", w)
		}
		checkCut(t, f)
	case f.Checksum() == ChecksumPartial:
		if w != needChecksum || !f.completeChecksum() {
			t.Fatalf("%d, not to be completed", w)
		}
	case w != needNothing:
		t.Fatalf("%d, for a whole frame", w)
	}
}

// checkCut cuts f and asserts that the pieces are few, short enough, and complete.
func checkCut(t *testing.T, f *Frame) {
	t.Helper()
	whole := bytesOf(f)
	was, ok := f.Headers()
	good := binary.BigEndian.Uint16(whole[was.L4+16:]) == was.Pseudo(whole, was.End-was.L4)
	pieces := cutAll(t, f)
	if !ok || len(pieces) < 2 || len(pieces) > packet.MostCuts {
		t.Fatalf("%d pieces", len(pieces))
	}
	rest := whole[was.L5:was.End]
	for _, b := range pieces {
		h, ok := packet.Parse(b, len(b))
		if !ok || h.End != len(b) || h.L5 != was.L5 || len(b)-h.L5 > int(f.GSO().Size) || len(b) == h.L5 {
			t.Fatalf("a piece of %d bytes: %+v", len(b), h)
		}
		if !bytes.HasPrefix(rest, b[h.L5:]) {
			t.Fatal("a piece of something else")
		}
		rest = rest[len(b)-h.L5:]
		if good && !completed(b, h) {
			t.Fatal("a piece whose checksum is wrong")
		}
	}
	if len(rest) > 0 {
		t.Fatalf("%d bytes are missing", len(rest))
	}
}

// FuzzSetGSO sets an arbitrary GSO on a frame of arbitrary bytes.
func FuzzSetGSO(f *testing.F) {
	rng := rand.New(rand.NewPCG(2, 2))
	for range 30 {
		s := streams(rng)
		s.payload = min(s.payload, 3000)
		f.Add(s.frame(), uint16(s.size), byte(s.gso().Type), rng.Uint64(), []byte{byte(rng.IntN(100)), byte(rng.Uint32())})
	}
	f.Fuzz(func(t *testing.T, in []byte, size uint16, kind byte, seed uint64, changes []byte) {
		if len(in) < MinFrame || len(in) > MaxFrame {
			return
		}
		a := arena.New(shm.Heap(maxPieces), shm.PageSize)
		off, sizes := layout(seed, len(in))
		frame := chop(t, a, in, off, sizes...)
		err := frame.SetGSO(GSO{GSOType(kind), size})
		if err != nil && (err != ErrOffload || frame.GSO() != GSO{} || frame.Checksum() != ChecksumUnknown) {
			t.Fatalf("%v, %+v, %v", err, frame.GSO(), frame.Checksum())
		}
		if err == nil && size != 0 {
			checkSendable(t, &frame)
			if !bytes.Equal(bytesOf(&frame), in) && (frame.GSO() != GSO{}) {
				t.Fatal("the frame has changed")
			}
		}
		// The headers change afterwards: the frame must be refused, or cut without a
		// panic.
		for len(changes) >= 2 {
			if i := int(changes[0]); i < len(frame.Bytes()) {
				frame.Bytes()[i] = changes[1]
			}
			changes = changes[2:]
		}
		for o := range takesGSO6 << 1 {
			var c cutting
			if o.needs(&frame) == needCut && c.start(&frame) && c.Left() > 1 {
				checkCut(t, &frame)
				break // the pieces are the same for all peers
			}
		}
	})
}

// FuzzCut cuts long frames of every kind, in pieces of every layout.
func FuzzCut(f *testing.F) {
	for i := range uint64(20) {
		f.Add(i, i, uint16(1+100*i), uint16(3000*i))
	}
	f.Fuzz(func(t *testing.T, kind, where uint64, size, payload uint16) {
		s := streams(rand.New(rand.NewPCG(kind, 3)))
		s.behind = 0
		s.size = max(int(size), 1)
		s.payload = min(int(payload), MaxFrame-s.headers())
		a := arena.New(shm.Heap(maxPieces), shm.PageSize)
		off, sizes := layout(where, s.headers()+s.payload)
		sizes[0] = max(sizes[0], s.headers())
		off = min(off, shm.PageSize-min(sizes[0], s.headers()+s.payload))
		frame := chop(t, a, s.frame(), off, sizes...)
		err := frame.SetGSO(s.gso())
		if s.payload > packet.MostCuts*s.size {
			if err != ErrOffload {
				t.Fatalf("%+v: %v", s, err)
			}
			return
		}
		if err != nil || (frame.GSO() == GSO{}) != (s.payload <= s.size) {
			t.Fatalf("%+v: %v, %+v", s, err, frame.GSO())
		}
		if (frame.GSO() == GSO{}) {
			return
		}
		s.cut(t, cutAll(t, &frame))
	})
}
