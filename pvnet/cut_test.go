package pvnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall/emu"
	"barevif/pvnet/packet"
	"barevif/telemetry"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server/labtest"
)

// A stream describes a TCP segment that is to be cut.
type stream struct {
	v6      bool
	tags    int  // VLAN tags
	ip      int  // bytes of IPv4 options
	options int  // bytes of TCP options
	payload int  // bytes
	size    int  // bytes of TCP payload in a piece
	flags   byte // TCP flags
	id      uint16
	seq     uint32
	behind  int // bytes after the IP packet
}

// headers returns the length of all headers in bytes.
func (s stream) headers() int {
	if s.v6 {
		return 14 + 4*s.tags + 40 + 20 + s.options
	}
	return 14 + 4*s.tags + 20 + s.ip + 20 + s.options
}

func (s stream) gso() GSO {
	if s.v6 {
		return GSO{GSOTCPv6, uint16(s.size)}
	}
	return GSO{GSOTCPv4, uint16(s.size)}
}

func (s stream) pieces() int { return (s.payload + s.size - 1) / s.size }

// frame returns the frame, with the sum of the pseudo-header in the checksum field.
func (s stream) frame() []byte {
	b := make([]byte, s.headers()+s.payload+s.behind)
	for i := range b {
		b[i] = byte(i*3 + i>>8)
	}
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2})
	at := 12
	for i := range s.tags {
		binary.BigEndian.PutUint16(b[at:], []uint16{0x88a8, 0x8100}[i%2])
		at += 4
	}
	segment := 20 + s.options + s.payload
	var pseudo uint16
	if s.v6 {
		binary.BigEndian.PutUint16(b[at:], 0x86dd)
		at += 2
		ip := header.IPv6(b[at:])
		ip[0], ip[6], ip[7] = 0x60, 6, 64
		ip.SetPayloadLength(uint16(segment))
		pseudo = header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(segment))
		at += 40
	} else {
		binary.BigEndian.PutUint16(b[at:], 0x0800)
		at += 2
		ip := header.IPv4(b[at:])
		ip[0], ip[6], ip[7], ip[8], ip[9] = 0x40|byte(5+s.ip/4), 0x40, 0, 64, 6
		ip.SetTotalLength(uint16(20 + s.ip + segment))
		ip.SetID(s.id)
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
		pseudo = header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(segment))
		at += 20 + s.ip
	}
	tcp := header.TCP(b[at:])
	tcp.SetSequenceNumber(s.seq)
	tcp[12], tcp[13] = byte(5+s.options/4)<<4, s.flags
	tcp.SetChecksum(pseudo)
	return b
}

// cut asserts that pieces are what tcp_gso_segment of net/ipv4/tcp_offload.c and
// inet_gso_segment of net/ipv4/af_inet.c, or its IPv6 counterpart, make of s.
func (s stream) cut(t testing.TB, pieces [][]byte) {
	t.Helper()
	whole := s.frame()
	if len(pieces) != s.pieces() {
		t.Fatalf("%+v: %d pieces, want %d", s, len(pieces), s.pieces())
	}
	at := 14 + 4*s.tags // offset of the IP header
	for i, p := range pieces {
		n := min(s.size, s.payload-i*s.size)
		if len(p) != s.headers()+n {
			t.Fatalf("%+v: piece %d has %d bytes, want %d", s, i, len(p), s.headers()+n)
		}
		if !bytes.Equal(p[s.headers():], whole[s.headers()+i*s.size:][:n]) {
			t.Fatalf("%+v: piece %d carries other bytes", s, i)
		}
		want := append([]byte(nil), whole[:s.headers()]...)
		var src, dst = header.IPv4(want[at:]).SourceAddress(), header.IPv4(want[at:]).DestinationAddress()
		l4 := at + 20 + s.ip
		if s.v6 {
			ip := header.IPv6(want[at:])
			src, dst = ip.SourceAddress(), ip.DestinationAddress()
			l4 = at + 40
			ip.SetPayloadLength(uint16(20 + s.options + n))
		} else {
			ip := header.IPv4(want[at:])
			ip.SetTotalLength(uint16(40 + s.ip + s.options + n))
			ip.SetID(s.id + uint16(i))
			if got := header.IPv4(p[at:]); !got.IsChecksumValid() {
				t.Fatalf("%+v: piece %d: header checksum %#x", s, i, got.Checksum())
			}
			ip.SetChecksum(header.IPv4(p[at:]).Checksum())
		}
		tcp := header.TCP(want[l4:])
		tcp.SetSequenceNumber(s.seq + uint32(i*s.size))
		if i > 0 {
			tcp[13] &^= 0x80 // CWR
		}
		if i < len(pieces)-1 {
			tcp[13] &^= 0x09 // PSH, FIN
		}
		got := header.TCP(p[l4:])
		if !got.IsChecksumValid(src, dst, checksum.Checksum(p[s.headers():], 0), uint16(n)) {
			t.Fatalf("%+v: piece %d: checksum %#x", s, i, got.Checksum())
		}
		tcp.SetChecksum(got.Checksum())
		if !bytes.Equal(p[:s.headers()], want) {
			t.Fatalf("%+v: piece %d begins\n%x, want\n%x", s, i, p[:s.headers()], want)
		}
	}
}

// chop returns a frame of the bytes of b in buffers of a. The first buffers hold as many
// bytes as sizes say, the others are full. The bytes begin at off in the first buffer and
// anywhere in the others.
func chop(t testing.TB, a *arena.Arena, b []byte, off int, sizes ...int) Frame {
	t.Helper()
	var f Frame
	var prev uint32
	for i := 0; len(b) > 0 || i < len(sizes); i++ {
		n := a.Size()
		if i == 0 {
			n -= off
		}
		if i < len(sizes) {
			n = min(n, sizes[i])
		}
		n = min(n, len(b))
		var buf [1]uint32
		if a.Get(buf[:]) == 0 {
			t.Fatal("no buffer")
		}
		at := (a.Size() - n) * (i % 7) / 7
		if i == 0 {
			at = off
			f = Frame{buf: a.Buffer(buf[0]), off: uint16(off), n: uint16(n)}
		} else {
			a.Link(prev, buf[0], uint16(at), uint16(n))
		}
		copy(a.Bytes(buf[0])[at:], b[:n])
		b, prev = b[n:], buf[0]
		f.total += uint32(n)
		f.pieces++
	}
	return f
}

// cutAll returns the pieces into which a TX cuts f.
func cutAll(t testing.TB, f *Frame) (pieces [][]byte) {
	t.Helper()
	var c cutting
	if !c.start(f) {
		t.Fatalf("%+v is not to be cut", f.gso)
	}
	var srcs, parts [maxPieces][]byte
	all := f.gather(srcs[:0])
	for c.Left() > 0 {
		n := c.Len()
		head, payload := c.Next(all, parts[:0])
		b := bytes.Clone(head)
		for _, p := range payload {
			b = append(b, p...)
		}
		if len(b) != n {
			t.Fatalf("%d bytes, %d were said", len(b), n)
		}
		pieces = append(pieces, b)
	}
	return pieces
}

// streams returns a random stream of any kind.
func streams(rng *rand.Rand) stream {
	s := stream{
		v6: rng.IntN(2) == 0, tags: rng.IntN(3), options: 4 * rng.IntN(11), flags: byte(rng.Uint32()),
		id: uint16(rng.Uint32()), seq: rng.Uint32(),
	}
	if !s.v6 {
		s.ip = 4 * rng.IntN(11)
	}
	if rng.IntN(4) == 0 {
		s.seq = -uint32(rng.IntN(20000)) // the sequence number wraps
	}
	s.size = []int{1 + rng.IntN(100), 536, 1448, 1 + rng.IntN(9000), 1 + rng.IntN(40000)}[rng.IntN(5)]
	most := min(MaxFrame-s.headers(), packet.MostCuts*s.size)
	s.payload = min(s.size+1+rng.IntN(most), most)
	if rng.IntN(8) == 0 {
		s.payload = most
	}
	if s.payload <= s.size { // the frame would not be cut
		s.payload, s.size = s.size, max(1, s.size/2)
	}
	if rng.IntN(4) == 0 {
		s.behind = rng.IntN(min(50, MaxFrame-s.headers()-s.payload+1))
	}
	return s
}

func TestCutPiecesAreWhatLinuxMakes(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 12))
	for range 1500 {
		s := streams(rng)
		a := arena.New(shm.Heap(64), shm.PageSize)
		off := rng.IntN(300)
		sizes := []int{s.headers() + rng.IntN(200)}
		for range rng.IntN(12) {
			sizes = append(sizes, rng.IntN(shm.PageSize+1))
		}
		if rng.IntN(2) == 0 {
			sizes = nil
		}
		f := chop(t, a, s.frame(), off, sizes...)
		if err := f.SetGSO(s.gso()); err != nil {
			t.Fatalf("%+v: %v", s, err)
		}
		s.cut(t, cutAll(t, &f))
		if got := make([]byte, f.Len()); f.CopyTo(got) != len(got) || !bytes.Equal(got, s.frame()) {
			t.Fatalf("%+v: the frame itself has changed", s)
		}
	}
}

// gather receives n frames.
func gather(t testing.TB, rx *RX, n int) (all [][]byte) {
	t.Helper()
	var f [32]Frame
	for len(all) < n {
		k, err := rx.Receive(f[:min(len(f), n-len(all))])
		if err != nil {
			t.Fatal(err)
		}
		for i := range f[:k] {
			if f[i].Checksum() == ChecksumPartial || f[i].GSO() != (GSO{}) {
				t.Fatalf("a frame came with %v, %v", f[i].Checksum(), f[i].GSO())
			}
			b := make([]byte, f[i].Len())
			f[i].CopyTo(b)
			all = append(all, b)
		}
		rx.Release(f[:k])
	}
	return all
}

// A way is a direction through a pair.
type way struct {
	tx *TX
	rx *RX
}

func ways(t testing.TB, p *pair) []way {
	ftx, frx := own(t, p.front)
	btx, brx := own(t, p.back)
	return []way{{ftx, brx}, {btx, frx}}
}

// load allocates a frame with the bytes of s.
func (s stream) put(t testing.TB, tx *TX) (f [1]Frame) {
	t.Helper()
	b := s.frame()
	if n, err := tx.AllocWait(f[:], len(b)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	f[0].CopyFrom(b)
	if err := f[0].SetGSO(s.gso()); err != nil {
		t.Fatalf("%+v: %v", s, err)
	}
	return f
}

var typical = stream{options: 12, payload: 64000, size: 1448, flags: 0x99, id: 0xfff0, seq: 1 << 31}

// Linux takes neither a GSO frame nor a partial checksum behind a VLAN tag, whatever it
// offers.
func TestWhatIsTaggedIsMadeWholeForEverybody(t *testing.T) {
	const all = takesCsum4 | takesCsum6 | takesGSO4 | takesGSO6
	p := join(t, emu.Config{}, plain, Config{})
	tx := ways(t, p)[0].tx
	for tags := range 3 {
		for _, v6 := range []bool{false, true} {
			s := typical
			s.tags, s.v6 = tags, v6
			f := s.put(t, tx)
			long := all.needs(&f[0])
			f[0].SetGSO(GSO{})
			partial := all.needs(&f[0])
			if tags == 0 && (long != needNothing || partial != needNothing) || tags > 0 && (long != needCut || partial != needChecksum) {
				t.Errorf("%d tags: %d long, %d with a partial checksum", tags, long, partial)
			}
			f[0].Release()
		}
	}
}

// A peer that takes no chains takes no GSO frames, but it takes their pieces.
func TestAFrameIsCutForAPeerWithoutScatterGather(t *testing.T) {
	none := plain
	none.frontSG, none.backSG = false, false
	p := join(t, emu.Config{}, none, Config{})
	for _, way := range ways(t, p) {
		tx, rx := way.tx, way.rx
		for _, size := range []int{1448, 4000} {
			s := typical
			s.size = size
			f := s.put(t, tx)
			if n, err := tx.Send(f[:]); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			s.cut(t, gather(t, rx, s.pieces()))
		}
		// If the pieces would be chains themselves, none is sent.
		s := typical
		s.size = 9000
		f := s.put(t, tx)
		if n, err := tx.Send(f[:]); n != 0 || err != ErrFrameSize {
			t.Fatal(n, err)
		}
		f[0].Release()
		put(t, tx, 1, 60)
		if got := gather(t, rx, 1); len(got[0]) != 60 {
			t.Fatalf("%d bytes came first", len(got[0]))
		}
	}
}

func TestCuttingAllocatesNothing(t *testing.T) {
	for _, kind := range []offloads{0, takesCsum4 | takesGSO4} {
		f := plain
		f.offload, f.peerTakes = kind != 0, kind
		p := join(t, emu.Config{}, f, Config{})
		for _, way := range ways(t, p) {
			tx, rx := way.tx, way.rx
			whole := typical.frame()
			n := 1
			if kind == 0 {
				n = typical.pieces()
			}
			var f [64]Frame
			cycle := func() {
				if tx.AllocSize(f[:1], len(whole)) != 1 {
					t.Fatal("no buffers")
				}
				f[0].CopyFrom(whole)
				if err := f[0].SetGSO(typical.gso()); err != nil {
					t.Fatal(err)
				}
				if _, err := tx.Send(f[:1]); err != nil {
					t.Fatal(err)
				}
				for got := 0; got < n; {
					k, err := rx.Receive(f[:])
					if err != nil {
						t.Fatal(err)
					}
					rx.Release(f[:k])
					got += k
				}
			}
			cycle()
			if k := testing.AllocsPerRun(50, cycle); k != 0 {
				t.Errorf("offers %b: %v allocations", kind, k)
			}
		}
	}
}

// A GSO frame stalls like any other, after the pieces that there is room for have been
// sent.
func TestAStallOfAFrameToBeCut(t *testing.T) {
	both(t, plain, func(t *testing.T, s *stalled) {
		f := typical.put(t, s.p.back.tx[0]) // in the backend's pages: the frontend's pages would run out, too
		k := typical.pieces()
		s.fill(k - 2)
		for range 2 {
			if n, err := s.tx.Send(f[:]); n != 0 || err != ErrFull {
				t.Fatal(n, err)
			}
			if n := int(s.room()); n != 0 {
				t.Fatalf("%d slots are free", n)
			}
		}
		go func() {
			_, err := s.tx.SendWait(f[:])
			s.sent <- err
		}()
		synctest.Wait()
		s.tick(0, 0)
		s.tick(1, 0)
		s.tick(1, 0)
		if e := s.last(); e.A != 1 {
			t.Errorf("short of %d slots", e.A)
		}
		take(t, s.rx, 1)
		synctest.Wait()
		take(t, s.rx, 200)
		if err := <-s.sent; err != nil {
			t.Fatal(err)
		}
		s.tick(1, 1)
	})
}

// A frame that was sent in part continues where it stopped, but only if it is unchanged.
func TestACutThatWasInterrupted(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	for _, way := range ways(t, p) {
		for _, again := range []bool{true, false} {
			s := typical
			f := s.put(t, way.tx.dev.otherEnd(p).tx[0])
			left := fillUp(t, way.tx, 10)
			if n, err := way.tx.Send(f[:]); n != 0 || err != ErrFull || !f[0].Valid() {
				t.Fatal(n, err)
			}
			gather(t, way.rx, left)
			got := gather(t, way.rx, 10)
			if !again { // another packet in the same page
				s.seq, s.id = s.seq+1000, s.id+1
				f[0].CopyFrom(s.frame())
				got = nil
			}
			if n, err := way.tx.Send(f[:]); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			s.cut(t, append(got, gather(t, way.rx, s.pieces()-len(got))...))
		}
	}
}

// other returns the device at the other end.
func (d *Device) otherEnd(p *pair) *Device {
	if d == p.front {
		return p.back
	}
	return p.front
}

// fillUp sends frames until only free slots are left, and returns how many it sent.
func fillUp(t *testing.T, tx *TX, free int) (n int) {
	t.Helper()
	for {
		if ok, err := tx.eng.hasSpace(space{slots: free + 1, bufs: 1}); err != nil {
			t.Fatal(err)
		} else if !ok {
			return n
		}
		put(t, tx, 1, 60)
		n++
	}
}

// With pieces of a few bytes, a frame needs many times the slots of a ring.
func TestMorePiecesThanSlots(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	for _, way := range ways(t, p) {
		for _, size := range []int{8, 48, 100, 500} {
			s := typical
			s.size = size
			f := s.put(t, way.tx)
			sent := make(chan error, 1)
			go func() {
				_, err := way.tx.SendWait(f[:])
				sent <- err
			}()
			s.cut(t, gather(t, way.rx, s.pieces()))
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
		}
	}
}

// The extra info needs one more slot.
func TestAStallIsTheSlotOfTheExtraInfo(t *testing.T) {
	f := plain
	f.offload, f.peerTakes = true, takesCsum4|takesGSO4
	both(t, f, func(t *testing.T, s *stalled) {
		short := typical
		short.payload, short.size = 1000, 100
		f := short.put(t, s.p.back.tx[0])
		s.fill(1)
		go func() {
			_, err := s.tx.SendWait(f[:])
			s.sent <- err
		}()
		synctest.Wait()
		s.tick(0, 0)
		s.tick(1, 0)
		if e := s.last(); e.A != 1 {
			t.Errorf("short of %d slots", e.A)
		}
		take(t, s.rx, 200)
		if err := <-s.sent; err != nil {
			t.Fatal(err)
		}
		s.tick(1, 1)
	})
}

// The checksum of a frame with several holders is completed in a copy. A sender without a
// buffer for the copy returns an error instead of waiting for ever.
func TestACopyToCompleteNeedsABuffer(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	for _, way := range ways(t, p) {
		tx, rx := way.tx, way.rx
		tx.SetDeadline(time.Now().Add(labtest.Limit))
		held := make([]Frame, pagesPerHalf)
		if n := tx.AllocSize(held, 142); n != len(held) {
			t.Fatal(n)
		}
		whole := udp4(t, 100)
		f := held[0]
		f.CopyFrom(whole)
		blank(f.Bytes())
		f.SetChecksum(ChecksumPartial)
		before := append([]byte(nil), f.Bytes()...)
		f.Retain()
		if n, err := tx.SendWait([]Frame{f}); n != 0 || err != ErrNoBuffers {
			t.Errorf("%d, %v", n, err)
		}
		held[1].Release()
		if n, err := tx.SendWait([]Frame{f}); n != 1 || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		if !bytes.Equal(f.Bytes(), before) || f.Checksum() != ChecksumPartial {
			t.Error("the other holder's frame has changed")
		}
		if got := gather(t, rx, 1)[0]; !bytes.Equal(got, whole) {
			t.Error("the copy is not complete")
		}
		f.Release()
		for _, h := range held[2:] {
			h.Release()
		}
	}
}

// A frame that is received into one with little room in its first page either has all of
// its headers there, or stays in the ring.
func TestHeadersAreReceivedIntoOnePiece(t *testing.T) {
	f := plain
	f.offload, f.peerTakes = true, takesCsum4|takesCsum6|takesGSO4|takesGSO6
	p := join(t, emu.Config{}, f, Config{})
	s := typical
	s.ip, s.options = 40, 40
	for _, way := range ways(t, p) {
		for room := s.headers() - 40; room <= packet.MaxHeaders+1; room++ {
			f := s.put(t, way.tx)
			if _, err := way.tx.Send(f[:]); err != nil {
				t.Fatal(err)
			}
			var into [1]Frame
			if n, err := way.tx.AllocWait(into[:], MaxFrame); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			into[0].TrimFront(len(into[0].Bytes()) - room)
			n, err := way.rx.ReceiveInto(into[:])
			if room < packet.MaxHeaders {
				if n != 0 || err != ErrShortFrame {
					t.Fatalf("%d bytes of room: %d, %v", room, n, err)
				}
				var f [1]Frame
				if n, err := way.rx.Receive(f[:]); n != 1 || err != nil || f[0].GSO() != s.gso() {
					t.Fatal(n, err)
				}
				way.rx.Release(f[:])
			} else if n != 1 || err != nil || into[0].GSO() != s.gso() {
				t.Fatalf("%d bytes of room: %d, %v", room, n, err)
			}
			into[0].Release()
		}
	}
}

// A frame whose headers were changed after SetGSO is refused, whatever the peer takes.
func TestWhatIsNoLongerToBeCutIsRefused(t *testing.T) {
	for _, peer := range []offloads{0, takesCsum4 | takesCsum6, takesCsum4 | takesCsum6 | takesGSO4 | takesGSO6} {
		f := plain
		f.peerTakes = peer
		p := join(t, emu.Config{}, f, Config{})
		for _, way := range ways(t, p) {
			for what, change := range map[string]func(f *Frame){
				"UDP":                 func(f *Frame) { f.Bytes()[23] = packet.UDP },
				"ICMP":                func(f *Frame) { f.Bytes()[23] = 1 },
				"a fragment":          func(f *Frame) { f.Bytes()[20] |= 0x20 },
				"ARP":                 func(f *Frame) { f.Bytes()[13] = 6 },
				"IPv6":                func(f *Frame) { copy(f.Bytes(), stream{v6: true, payload: 60000, size: 1}.frame()[:60]) },
				"in a tunnel":         func(f *Frame) { copy(f.Prepend(42), udp4(t, 0)) },
				"too short":           func(f *Frame) { f.Truncate(1000) },
				"complete, they say":  func(f *Frame) { f.SetChecksum(ChecksumVerified) },
				"unknown, they say":   func(f *Frame) { f.SetChecksum(ChecksumUnknown) },
				"longer than it says": func(f *Frame) { binary.BigEndian.PutUint16(f.Bytes()[16:], 65000) },
			} {
				f := typical.put(t, way.tx)
				change(&f[0])
				if n, err := way.tx.Send(f[:]); n != 0 || err != ErrOffload {
					t.Errorf("%s to a peer that takes %b: %d, %v", what, peer, n, err)
				} else {
					f[0].Release()
				}
			}
			put(t, way.tx, 1, 60)
			if got := gather(t, way.rx, 1); len(got[0]) != 60 {
				t.Fatalf("%d bytes came", len(got[0]))
			}
		}
	}
}

func TestWhatIsOffered(t *testing.T) {
	const all = takesCsum4 | takesCsum6 | takesGSO4 | takesGSO6
	const nocsum, csum6, gso4, gso6 = "feature-no-csum-offload", "feature-ipv6-csum-offload", "feature-gso-tcpv4", "feature-gso-tcpv6"
	for _, c := range []struct {
		keys    xenstore.Values
		scatter bool
		want    offloads
	}{
		{xenstore.Values{}, true, takesCsum4},
		{xenstore.Values{nocsum: "0"}, true, takesCsum4},
		{xenstore.Values{nocsum: "1"}, true, 0},
		{offloadValues(true), true, all},
		{offloadValues(true), false, takesCsum4 | takesCsum6},
		{offloadValues(false), true, 0},
		{xenstore.Values{csum6: "1"}, false, takesCsum4 | takesCsum6},
		{xenstore.Values{csum6: "0", gso4: "0", gso6: "0"}, true, takesCsum4},
		{xenstore.Values{gso4: "1"}, true, takesCsum4 | takesGSO4},
		{xenstore.Values{gso4: "1"}, false, takesCsum4},
		{xenstore.Values{gso6: "1"}, true, takesCsum4},                                                 // no IPv6 checksums, so no GSO over IPv6
		{xenstore.Values{nocsum: "1", csum6: "1", gso4: "1", gso6: "1"}, true, takesCsum6 | takesGSO6}, // no IPv4 checksums, so no GSO over IPv4
		{xenstore.Values{csum6: "1", gso6: "1"}, true, takesCsum4 | takesCsum6 | takesGSO6},
	} {
		if got := offeredOffloads(c.keys, c.scatter); got != c.want {
			t.Errorf("%v, chains %v: %b, want %b", c.keys, c.scatter, got, c.want)
		}
	}
	for _, v := range []string{"", "2", "-1", "01", "1 ", " 1", "true", "0x1", "1\x00", "\xff", strings.Repeat("1", 4096)} {
		for _, key := range []string{nocsum, csum6, gso4, gso6} {
			keys := offloadValues(true)
			keys[key] = v
			want := map[string]offloads{
				nocsum: all &^ (takesCsum4 | takesGSO4), csum6: all &^ (takesCsum6 | takesGSO6),
				gso4: all &^ takesGSO4, gso6: all &^ takesGSO6,
			}[key]
			if got := offeredOffloads(keys, true); got != want {
				t.Errorf("%s = %.20q: %b, want %b", key, v, got, want)
			}
		}
	}
}

// A chain that was truncated and extended again has empty pieces in its middle, which
// take no slots. The extra info takes a slot without a buffer, so counting an empty piece
// would exceed the free slots.
func TestEmptyPiecesTakeNoSlots(t *testing.T) {
	f := plain
	f.offload, f.peerTakes = true, takesCsum4|takesGSO4
	p := join(t, emu.Config{}, f, Config{})
	short := typical
	short.payload, short.size = 1000, 100
	for _, way := range ways(t, p) {
		for free := 1; free <= 3; free++ {
			var f [1]Frame
			if n, err := way.tx.AllocWait(f[:], 12000); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			f[0].Truncate(100)
			if b := f[0].Extend(50); b == nil {
				t.Fatal("no room")
			}
			content := make([]byte, 150)
			pattern(content, free)
			f[0].CopyFrom(content)
			sent := 0
			for ; sent < 20; sent++ {
				f := short.put(t, way.tx)
				if _, err := way.tx.Send(f[:]); err != nil {
					t.Fatal(err)
				}
			}
			slots := 40
			for ; slots < 256-free; slots++ {
				put(t, way.tx, 1, 60)
				sent++
			}
			n, err := way.tx.Send(f[:])
			want := 1
			if way.tx.dev == p.front {
				want = 2
			}
			if free < want && (n != 0 || err != ErrFull) || free >= want && (n != 1 || err != nil) {
				t.Fatalf("with %d slots: %d, %v", free, n, err)
			}
			take(t, way.rx, sent)
			if n == 0 {
				if _, err := way.tx.SendWait(f[:]); err != nil {
					t.Fatal(err)
				}
			}
			if got := gather(t, way.rx, 1)[0]; !bytes.Equal(got, content) {
				t.Fatal("other bytes")
			}
		}
	}
}

// A lent frame may have as many pieces as a peer may send, all of them short.
func TestAFrameOfManyPiecesIsCut(t *testing.T) {
	for _, size := range []int{100, 1448, 3000, 30000} {
		s := typical
		s.payload, s.size = max(4000, size+1), size
		a := arena.New(shm.Heap(32), shm.PageSize)
		sizes := []int{s.headers()}
		for len(sizes) < maxRxSlots-1 {
			sizes = append(sizes, s.payload/maxRxSlots)
		}
		f := chop(t, a, s.frame(), 0, sizes...)
		if size < 4000 && f.pieces != maxRxSlots {
			t.Fatalf("%d pieces", f.pieces)
		}
		if err := f.SetGSO(s.gso()); err != nil {
			t.Fatal(err)
		}
		s.cut(t, cutAll(t, &f))
	}
}

// Both ends count the same number of slots, with extra infos, and agree in all other
// counters.
func TestBothEndsCountTheSame(t *testing.T) {
	f := plain
	f.offload, f.peerTakes = true, takesCsum4|takesCsum6|takesGSO4|takesGSO6
	p := join(t, emu.Config{}, f, Config{})
	for i, way := range ways(t, p) {
		slots := uint64(0)
		for _, payload := range []int{1449, 3000, 5000, 64000} {
			for _, v6 := range []bool{false, true} {
				s := typical
				s.payload, s.v6 = payload, v6
				f := s.put(t, way.tx)
				slots += uint64(f[0].slots()) + 1
				if i == 1 {
					slots += uint64(f[0].pages()) - uint64(f[0].slots())
				}
				whole := append([]byte(nil), s.frame()...)
				if n, err := way.tx.Send(f[:]); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				if n, err := way.rx.Receive(f[:]); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				got := make([]byte, f[0].Len())
				f[0].CopyTo(got)
				if f[0].GSO() != s.gso() || f[0].Checksum() != ChecksumPartial || !bytes.Equal(got, whole) {
					t.Errorf("%+v: arrived as %v, %v, %d bytes", s, f[0].GSO(), f[0].Checksum(), len(got))
				}
				way.rx.Release(f[:])
			}
		}
		sent, got := way.tx.dev.Stats().TX, way.rx.dev.Stats().RX
		for _, c := range []struct {
			what telemetry.Counter
			want uint64
		}{
			{telemetry.Packets, 8}, {telemetry.Slots, slots}, {telemetry.ChainedPackets, 8}, {telemetry.GSOPackets, 8},
			{telemetry.CsumPartial, 8}, {telemetry.GSOCsumFixup, 0}, {telemetry.CsumVerified, 0},
		} {
			if s, g := sent.Get(c.what), got.Get(c.what); s != c.want || g != c.want {
				t.Errorf("%v: sent %d, received %d, want %d", c.what, s, g, c.want)
			}
		}
		if n := got.Get(telemetry.ExtraInfos); n != 8 {
			t.Errorf("%d extra infos", n)
		}
	}
}

// A frame is cut even if the system grants so few pages that not all of its pieces fit.
func TestMorePiecesThanPages(t *testing.T) {
	p := join(t, emu.Config{Grants: 80}, plain, Config{})
	tx, _ := own(t, p.front)
	other, rx := own(t, p.back)
	if n := tx.eng.(*frontTX).shared.Len(); n != pagesPerHalfMin {
		t.Fatalf("%d pages", n)
	}
	for _, from := range []*TX{other, tx} { // a frame in the sender's own pages leaves fewer for the pieces
		f := typical.put(t, from)
		sent := make(chan error, 1)
		go func() {
			_, err := tx.SendWait(f[:])
			sent <- err
		}()
		typical.cut(t, gather(t, rx, typical.pieces()))
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
	}
}

// Batches mix whole frames and frames that are cut, and meet a full ring. No frame
// overtakes another, is lost or sent twice, and the caller keeps those that Send did not
// take.
func TestCutFramesKeepTheirOrder(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		rng := rand.New(rand.NewPCG(7, 8))
		var all []stream
		frames, pieces := 400, 0
		for i := range frames {
			s := typical
			s.seq, s.size, s.payload = uint32(i)<<16, 600+rng.IntN(3000), 1+rng.IntN(30000)
			if rng.IntN(2) == 0 {
				s.payload = rng.IntN(s.size)
			}
			all = append(all, s)
			pieces += max(s.pieces(), 1)
		}
		failed := make(chan error, 1)
		go func() {
			rng := rand.New(rand.NewPCG(9, 10))
			rest := all
			for len(rest) > 0 {
				batch := make([]Frame, min(1+rng.IntN(6), len(rest)))
				for i := range batch {
					b := rest[i].frame()
					if _, err := tx.AllocWait(batch[i:i+1], len(b)); err != nil {
						failed <- err
						return
					}
					batch[i].CopyFrom(b)
					if err := batch[i].SetGSO(rest[i].gso()); err != nil {
						failed <- err
						return
					}
				}
				rest = rest[len(batch):]
				for len(batch) > 0 {
					send := tx.Send
					if rng.IntN(2) == 0 {
						send = tx.SendWait
					}
					n, err := send(batch)
					if err != nil && err != ErrFull {
						failed <- err
						return
					}
					for _, f := range batch[:n] {
						if f.Valid() {
							failed <- errors.New("a sent frame is still held")
							return
						}
					}
					if batch = batch[n:]; len(batch) > 0 && !batch[0].Valid() {
						failed <- errors.New("a frame that was not sent is gone")
						return
					}
				}
			}
			failed <- nil
		}()
		got := gather(t, rx, pieces)
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
		for i, s := range all {
			if s.payload <= s.size { // sent whole, with a completed checksum
				want := s.frame()
				l4 := s.headers() - 20 - s.options
				header.TCP(want[l4:]).SetChecksum(header.TCP(got[0][l4:]).Checksum())
				if !bytes.Equal(got[0], want) {
					t.Fatalf("frame %d is another", i)
				}
				got = got[1:]
				continue
			}
			s.cut(t, got[:s.pieces()])
			got = got[s.pieces():]
		}
		if lost := from.Stats().TX; lost.Dropped() != 0 || lost.Get(telemetry.Packets) != uint64(pieces) {
			t.Errorf("%d of %d sent, %d lost", lost.Get(telemetry.Packets), pieces, lost.Dropped())
		}
	})
}
