//go:build linux

package steer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"barevif/pvnet"
	"barevif/pvnet/netif"
	"barevif/pvnet/packet"
	"barevif/pvnet/toeplitz"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// loadTest loads the program as one that BPF_PROG_TEST_RUN gives whole frames: of a socket
// filter's it takes the Ethernet header away.
func loadTest(t testing.TB) *Program {
	t.Helper()
	p, err := load(ebpf.SchedCLS)
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		t.Skip("needs CAP_BPF: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func (p *Program) run(t testing.TB, frame []byte) uint32 {
	t.Helper()
	queue, err := p.prog.Run(&ebpf.RunOptions{Data: frame})
	if err != nil {
		t.Fatalf("%d bytes: %v", len(frame), err)
	}
	return queue
}

func (p *Program) set(t testing.TB, s *pvnet.Steering) {
	t.Helper()
	if err := p.Set(s); err != nil {
		t.Fatal(err)
	}
}

// tooShort reports whether BPF_PROG_TEST_RUN refuses the frame: it takes no IP packet without
// its fixed header.
func tooShort(f []byte) bool {
	switch kind := binary.BigEndian.Uint16(f[12:]); kind {
	case packet.IPv4:
		return len(f) < 14+20
	case packet.IPv6:
		return len(f) < 14+40
	}
	return false
}

// want returns the queue of a frame as pvnet.Steering documents it.
func want(s *pvnet.Steering, frame []byte) uint32 {
	h, _, _ := s.Table.Frame(frame, len(frame), s.Types)
	return uint32(s.Queues[h%uint32(len(s.Queues))])
}

// everyHash is a table in which each entry is a queue of its own, so that nearly every two
// hashes are seen to differ.
func everyHash(key []byte, types uint32) *pvnet.Steering {
	s := &pvnet.Steering{Table: toeplitz.NewTable(key), Types: types}
	for i := range 251 {
		s.Queues = append(s.Queues, 1000+i)
	}
	return s
}

// anyFrame returns a frame of some kind: most are IP, many of these inconsistent somewhere.
func anyFrame(r *rand.Rand) []byte {
	f := make([]byte, 12)
	fill := func(n int) {
		for range n {
			f = append(f, byte(r.Uint32()))
		}
	}
	for range max(r.IntN(8)-5, 0) { // VLAN tags
		f = append(f, [][]byte{{0x81, 0}, {0x88, 0xa8}}[r.IntN(2)]...)
		fill(2)
	}
	protos := []byte{6, 6, 6, 17, 1, 47}
	switch r.IntN(10) {
	case 0:
		f = append(f, 8, 6)
		fill(r.IntN(60) + 28)
	case 1, 2, 3, 4:
		f = append(f, 8, 0)
		at := len(f)
		options := 4 * max(r.IntN(20)-9, 0)
		f = append(f, 0x45+byte(options/4))
		fill(5)
		f = append(f, []byte{0, 0x40, 0x20, 0, byte(r.Uint32())}[r.IntN(5)], []byte{0, 0, 0, 1}[r.IntN(4)], 64, protos[r.IntN(len(protos))])
		fill(10 + options + r.IntN(60))
		binary.BigEndian.PutUint16(f[at+2:], uint16(len(f)-at))
	default:
		f = append(f, 0x86, 0xdd)
		f = ipv6(r, f, protos[r.IntN(len(protos))])
	}
	switch r.IntN(6) {
	case 0: // something is wrong
		for range 1 + r.IntN(3) {
			f[12+r.IntN(min(len(f)-12, 48))] = byte(r.Uint32())
		}
	case 1: // cut short
		f = f[:max(14, r.IntN(len(f)))]
	case 2: // padded
		fill(r.IntN(30))
	case 3: // a length of 0
		if len(f) > 20 {
			f[16], f[17], f[18], f[19] = 0, 0, 0, 0
		}
	}
	return f
}

// ipv6 appends an IPv6 packet with extension headers, and sometimes the length of a jumbogram.
func ipv6(r *rand.Rand, f []byte, proto byte) []byte {
	at := len(f)
	f = append(f, 0x60, 1, 2, 3, 0, 0, 59, 64)
	fill := func(n int) {
		for range n {
			f = append(f, byte(r.Uint32()))
		}
	}
	fill(32)
	next := at + 6 // where the number of the next header goes
	for i := range max(r.IntN(16)-5, 0) {
		kind := []byte{0, 43, 44, 51, 60, 60, 60}[r.IntN(7)]
		if i == 0 && r.IntN(2) == 0 {
			kind = 0
		}
		if kind == 44 && r.IntN(3) > 0 {
			kind = 60
		}
		f[next], next = kind, len(f)
		size := 8 * (1 + r.IntN(3))
		length := byte(size/8 - 1)
		if r.IntN(30) == 0 {
			size = 8 * (1 + r.IntN(40))
			length = byte(size/8 - 1)
		}
		if kind == 51 {
			length = byte(size/4 - 2)
		}
		f = append(f, 0, length)
		begin := len(f)
		fill(size - 2)
		if kind == 0 {
			options(r, f[begin:])
		}
	}
	f[next] = proto
	fill(r.IntN(40))
	if i := r.IntN(8); i > 0 {
		binary.BigEndian.PutUint16(f[at+4:], uint16(len(f)-at-40-max(i-6, 0)))
	}
	return f
}

// options fills b with hop-by-hop options, some of which are the length of a jumbogram.
func options(r *rand.Rand, b []byte) {
	for len(b) > 0 {
		n := min(r.IntN(5), max(len(b)-2, 0))
		switch r.IntN(4) {
		case 0:
			b[0], b = 0, b[1:]
			continue
		case 1:
			if len(b) >= 6 {
				n = 4
				copy(b, []byte{0xc2, 4, byte(r.IntN(3) * 0x40), byte(r.IntN(2)), 1, 2})
				b = b[6:]
				continue
			}
		}
		b[0] = byte(r.Uint32())
		if len(b) > 1 {
			b[1] = byte(n)
		}
		b = b[min(2+n, len(b)):]
	}
}

// The program and the rest of barevif choose the same queue for frames of all kinds.
func TestTheProgramAgreesWithTheTable(t *testing.T) {
	p := loadTest(t)
	r := rand.New(rand.NewPCG(1, 2))
	types := make(map[netif.HashType]int)
	kinds := make(map[string]int)
	for round := range 120 {
		key := make([]byte, []int{40, 40, 40, 16, 0}[r.IntN(5)])
		for i := range key {
			key[i] = byte(r.Uint32())
		}
		flags := uint32(netif.HashFlagsAll)
		if round%3 == 0 {
			flags = uint32(r.IntN(16))
		}
		s := everyHash(key, flags)
		p.set(t, s)
		for range 250 {
			f := anyFrame(r)
			if tooShort(f) {
				continue
			}
			if got := p.run(t, f); got != want(s, f) {
				h, typ, ok := s.Table.Frame(f, len(f), s.Types)
				t.Fatalf("types %b: queue %d, want %d (hash %#x, %v, %v) for %x", flags, got, want(s, f), h, typ, ok, f)
			}
			if _, typ, ok := s.Table.Frame(f, len(f), s.Types); ok {
				types[typ]++
			}
			h, ok := packet.Parse(f, len(f))
			kinds[fmt.Sprintf("IPv%d %v, tags %v, fragment %v, extensions %v, transport %v", h.Version, ok, h.Tags != 0, h.Fragment != 0, h.Extensions != 0, h.L4 != 0)]++
		}
	}
	if len(types) != 4 || len(kinds) < 20 {
		t.Errorf("the frames were of the types %v and the kinds %v", types, kinds)
	}
	for typ, n := range types {
		if n < 500 {
			t.Errorf("only %d frames of type %v", n, typ)
		}
	}
}

// The bounds of packet.Parse are the program's, to the byte.
func TestTheProgramAgreesAtTheBounds(t *testing.T) {
	p := loadTest(t)
	s := everyHash([]byte("forty bytes, more or less, are the key.."), netif.HashFlagsAll)
	p.set(t, s)
	check := func(f []byte) {
		t.Helper()
		if tooShort(f) {
			return
		}
		if got := p.run(t, f); got != want(s, f) {
			t.Fatalf("queue %d, want %d, for %x", got, want(s, f), f)
		}
	}
	r := rand.New(rand.NewPCG(3, 4))
	for extensions := range 11 { // as many as Parse follows, and more
		for size := 8; size <= 48; size += 8 {
			f := append(make([]byte, 12), 0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 6, 64)
			for range 32 {
				f = append(f, byte(r.Uint32()))
			}
			next := 20
			for range extensions {
				f[next], next = 60, len(f)
				f = append(append(f, 0, byte(size/8-1)), make([]byte, size-2)...)
			}
			f[next] = 6
			f = append(f, 1, 2, 3, 4, 5, 6, 7, 8)
			binary.BigEndian.PutUint16(f[18:], uint16(len(f)-54))
			for cut := range 16 {
				check(f[:max(len(f)-cut, 14)])
				short := append([]byte(nil), f...)
				binary.BigEndian.PutUint16(short[18:], uint16(max(len(f)-54-cut, 0)))
				check(short)
			}
		}
	}
	for at := 0; at < 230; at++ { // the length of a jumbogram behind that much padding
		f := append(make([]byte, 12), 0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 0, 64)
		f = append(append(f, make([]byte, 32)...), 6, 29)
		f = append(f, make([]byte, 238)...)
		for i := 22; i < 54; i++ {
			f[i] = byte(i)
		}
		copy(f[56+at:], []byte{0xc2, 4, 0, 1, 0, 0})
		check(f)
		f[56+at+2] = 0x80
		check(f)
		f[56+at+2], f[56+at+3] = 0, 0
		check(f)
		check(f[:56+at])
		check(f[:56+at+5])
	}
	for hdr := range 16 {
		for size := range 70 {
			f := append(make([]byte, 12), 8, 0, 0x40+byte(hdr), 0, 0, byte(size), 0, 0, 0, 0, 64, 6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8)
			f = append(f, 9, 10, 11, 12, 13, 14, 15, 16)
			check(f)
			check(append(f, make([]byte, 40)...))
		}
	}
}

func TestSetIsSeenByTheNextFrame(t *testing.T) {
	p := loadTest(t)
	f := append(make([]byte, 12), 8, 6, 0, 0, 0, 0)
	if q := p.run(t, f); q != 0 {
		t.Errorf("queue %d before the first Set", q)
	}
	for i := range 7 {
		p.set(t, &pvnet.Steering{Table: toeplitz.NewTable(nil), Queues: []int{i}})
		if q := p.run(t, f); q != uint32(i) {
			t.Errorf("queue %d, want %d", q, i)
		}
	}
	for _, n := range []int{0, MaxEntries + 1} {
		err := p.Set(&pvnet.Steering{Table: toeplitz.NewTable(nil), Queues: make([]int, n)})
		if err == nil || !strings.Contains(err.Error(), "not of 1 to 256") {
			t.Errorf("%d entries: %v", n, err)
		}
	}
	if q := p.run(t, f); q != 6 {
		t.Errorf("queue %d after a table that was refused", q)
	}
	p.set(t, &pvnet.Steering{Table: toeplitz.NewTable(nil), Queues: append([]int{9}, make([]int, MaxEntries-1)...)})
	if q := p.run(t, f); q != 9 {
		t.Errorf("queue %d of the largest table", q)
	}
}

// While the settings change, each frame takes a queue of the old or of the new ones.
func TestSettingsChangeUnderFrames(t *testing.T) {
	p := loadTest(t)
	f := append(make([]byte, 12), 8, 6, 0, 0, 0, 0)
	p.set(t, &pvnet.Steering{Table: toeplitz.NewTable(nil), Queues: []int{0}})
	failed := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(failed)
		for i := range 300 {
			table := make([]int, MaxEntries)
			for k := range table {
				table[k] = i % 200
			}
			if err := p.Set(&pvnet.Steering{Table: toeplitz.NewTable(nil), Queues: table}); err != nil {
				failed <- err
				break
			}
		}
		close(done)
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		if q := p.run(t, f); q >= 200 {
			t.Fatalf("queue %d", q)
		}
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	if q := p.run(t, f); q != 299%200 {
		t.Errorf("queue %d at last", q)
	}
}

// A change leaves the record alone that frames may be reading, and only then names the other.
func TestAChangeDoesNotTouchTheRecordInUse(t *testing.T) {
	p := loadTest(t)
	for i := range 4 {
		before := p.record
		p.set(t, everyHash([]byte{byte(i)}, 15))
		old, err := p.records.LookupBytes(1 - p.used)
		if err != nil {
			t.Fatal(err)
		}
		now, err := p.records.LookupBytes(p.used)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && !bytes.Equal(old, before[:]) || !bytes.Equal(now, p.record[:]) {
			t.Errorf("change %d has written the record in use", i)
		}
	}
}

// A frame whose VLAN tag the kernel keeps beside it has no hash, like one with the tag in it.
func TestATagBesideTheFrame(t *testing.T) {
	p := loadTest(t)
	s := everyHash([]byte("a key"), netif.HashFlagsAll)
	p.set(t, s)
	pushing, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual MIT/GPL", Instructions: append(asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Mov.Imm(asm.R2, packet.VLAN<<8&0xff00|packet.VLAN>>8), // in network order
		asm.Mov.Imm(asm.R3, 7),
		asm.FnSkbVlanPush.Call(),
		asm.Mov.Reg(asm.R1, asm.R6),
	}, instructions(p.records.FD(), p.current.FD())...)})
	if err != nil {
		t.Fatal(err)
	}
	defer pushing.Close()
	f := append(make([]byte, 12), 8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8)
	f = append(f, make([]byte, 20)...)
	if got := p.run(t, f); got != want(s, f) || got == 1000 {
		t.Errorf("without a tag: queue %d, want %d", got, want(s, f))
	}
	if got, err := pushing.Run(&ebpf.RunOptions{Data: f}); err != nil || got != 1000 {
		t.Errorf("with a tag: queue %d, want 1000; %v", got, err)
	}
}

// The kernel takes the program as one for TUNSETSTEERINGEBPF.
func TestTheKernelLoadsTheProgram(t *testing.T) {
	loadTest(t)
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	if p.FD() < 0 || p.prog.Type() != ebpf.SocketFilter {
		t.Errorf("descriptor %d, type %v", p.FD(), p.prog.Type())
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
