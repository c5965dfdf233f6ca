//go:build linux

package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"

	"barevif/pvnet/packet"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// anyGSOFrame returns a TCP or UDP packet to be cut, over IPv4 or IPv6, with random options,
// extension headers and tags, and so many bytes of payload. Its checksum is partial.
func anyGSOFrame(seed uint64, size, payload int) (u gsoFrame) {
	rng := rand.New(rand.NewPCG(seed, 1))
	some := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return b
	}
	udp, v6 := rng.IntN(4) == 0, rng.IntN(2) == 0
	l4 := append(some(4), 0, 0, 0, 0) // ports
	proto, field, kind := byte(17), 6, GSOUDP
	if udp {
		binary.BigEndian.PutUint16(l4[4:], uint16(8+payload))
	} else {
		proto, field, kind = 6, 16, GSOTCPv4
		options := 4 * rng.IntN(11)
		l4 = append(append(l4[:4], some(8)...), byte(5+options/4)<<4, byte(rng.Uint32()))
		l4 = append(append(append(l4, some(2)...), 0, 0, 0, 0), some(options)...)
	}
	length := len(l4) + payload
	frame := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	for range rng.IntN(2) {
		frame = append(frame, 0x81, 0, 0x20, 7)
	}
	var pseudo []byte
	if v6 {
		if !udp {
			kind = GSOTCPv6
		}
		var exts []byte
		next := proto
		for _, number := range []byte{60, 43, 60, 0} { // from the innermost header outwards
			if rng.IntN(4) != 0 || udp { // Linux cuts no datagrams behind extension headers
				continue
			}
			e := make([]byte, 8*(1+rng.IntN(4)))
			e[0], e[1] = next, byte(len(e)/8-1)
			if number == 43 {
				e = append([]byte{next, 2, 4, 0}, make([]byte, 20)...) // no segments left
			} else {
				e[2], e[3] = 1, byte(len(e)-4)
			}
			exts, next = append(e, exts...), number
		}
		ip := append([]byte{0x60, 0, 0, 0, 0, 0, next, 64}, append(append([]byte{0x20, 1}, some(14)...), append([]byte{0x20, 1}, some(14)...)...)...)
		binary.BigEndian.PutUint16(ip[4:], uint16(len(exts)+length))
		pseudo = append(bytes.Clone(ip[8:40]), 0, 0, byte(length>>8), byte(length), 0, 0, 0, proto)
		frame = append(append(append(frame, 0x86, 0xdd), ip...), exts...)
	} else {
		ip := append([]byte{0x45, 0, 0, 0, byte(rng.Uint32()), byte(rng.Uint32()), 0x40, 0, 64, proto, 0, 0, 192, 0, 2, 1, 192, 0, 2, 9}, bytes.Repeat([]byte{1}, 4*rng.IntN(11))...)
		ip[0] = 0x40 | byte(len(ip)/4)
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+length))
		binary.BigEndian.PutUint16(ip[10:], ^sum16(ip))
		pseudo = append(bytes.Clone(ip[12:20]), 0, proto, byte(length>>8), byte(length))
		frame = append(append(frame, 8, 0), ip...)
	}
	binary.BigEndian.PutUint16(l4[field:], sum16(pseudo))
	u.off = Offload{
		Checksum: ChecksumPartial, SumStart: uint16(len(frame)), SumOffset: uint16(field),
		GSO: kind, GSOSize: uint16(size), HeaderLen: uint16(len(frame) + len(l4)), ECN: !udp && l4[13]&0x80 != 0,
	}
	u.frame = append(append(frame, l4...), some(payload)...)
	u.name = fmt.Sprintf("%+v, %d bytes", u.off, len(u.frame))
	return u
}

// bounded limits a segment size and a payload so that the kernel accepts the frame and a
// TAP's queue holds its segments.
func bounded(size, payload uint16) (int, int) {
	s := 8 + int(size)%9000
	return s, min(int(payload)%60000+1, 120*s) // UDP_MAX_SEGMENTS of linux/udp.h
}

// FuzzKernelCuts sends a frame to be cut through a packet socket to a TAP, and compares the
// kernel's segments with ours. A frame of one segment is only completed.
func FuzzKernelCuts(f *testing.F) {
	tap := openTAP(f, TAPConfig{MTU: 65521})
	p := openPacket(f, tap.Name())
	for i := range uint64(60) {
		f.Add(i, uint16(i*150), uint16(i*1000))
	}
	f.Fuzz(func(t *testing.T, seed uint64, size, payload uint16) {
		s, n := bounded(size, payload)
		u := anyGSOFrame(seed, s, n)
		var want [][]byte
		if n > s {
			want = cut(t, u)
		} else {
			u.off.GSO, u.off.GSOSize, u.off.HeaderLen, u.off.ECN = GSONone, 0, 0, false
			b, off := bytes.Clone(u.frame), u.off
			if err := off.Complete(len(b), [][]byte{b[:40], b[40:]}); err != nil {
				t.Fatalf("%s: %v", u.name, err)
			}
			want = [][]byte{b}
		}
		send(t, p, u.off, u.frame)
		for i := range want {
			got, left := receive(t, tap)
			if n <= s && u.off.SumOffset == 16 { // Linux completes a TCP checksum of 0 as 0xffff, but writes 0 when it cuts
				at := int(u.off.SumStart) + 16
				if got[at] == 0xff && got[at+1] == 0xff {
					got[at], got[at+1] = 0, 0
				}
			}
			if !bytes.Equal(got, want[i]) || left.GSO != GSONone || left.Checksum == ChecksumPartial {
				t.Fatalf("%s: packet %d of %d: the kernel's\n% x\nours\n% x", u.name, i, len(want), got[:min(len(got), 120)], want[i][:min(len(want[i]), 120)])
			}
		}
	})
}

// A tunnels is a VXLAN device of the kernel whose frames are bridged to a TAP. A packet
// socket reads them on their way. The TAP takes no frame that has yet to be cut.
type tunnels struct {
	vxlan string // the device's name
	whole *Packet
	cut   *TAP
}

// underlay returns both addresses of a network that no other test uses.
func underlay(v6 bool) (a, b net.IP, number int) {
	n := rand.Uint32N(1 << 16)
	if v6 {
		a = net.ParseIP(fmt.Sprintf("2001:db8:%x::1", n))
		b = net.ParseIP(fmt.Sprintf("2001:db8:%x::2", n))
	} else {
		a = net.IPv4(10, byte(n>>8), byte(n), 1).To4()
		b = net.IPv4(10, byte(n>>8), byte(n), 2).To4()
	}
	return a, b, int(n)
}

func newTunnels(t testing.TB, v6, sum bool) *tunnels {
	t.Helper()
	card, far := veth(t, 9500)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	lower, err := netlink.LinkByName(card)
	must(err)
	own, peer, number := underlay(v6)
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: own, Mask: net.CIDRMask(6*len(own), 8*len(own))}}
	if v6 {
		must(enableIPv6(card))
		addr.Flags = unix.IFA_F_NODAD
	}
	must(netlink.AddrAdd(lower, addr))
	must(netlink.NeighAdd(&netlink.Neigh{
		LinkIndex: lower.Attrs().Index, IP: peer, State: netlink.NUD_PERMANENT, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 1, 2},
	}))
	vx := &netlink.Vxlan{
		LinkAttrs: netlink.LinkAttrs{Name: "x" + card[:8], MTU: 9000}, VxlanId: number, VtepDevIndex: lower.Attrs().Index,
		SrcAddr: own, Group: peer, Port: 4789, UDPCSum: sum, UDP6ZeroCSumTx: !sum,
	}
	add := func(l netlink.Link) {
		t.Helper()
		err := netlink.LinkAdd(l)
		if errors.Is(err, unix.EOPNOTSUPP) {
			t.Skipf("this kernel has no %s: %v", l.Type(), err)
		}
		must(err)
		t.Cleanup(func() { netlink.LinkDel(l) })
	}
	add(vx)
	tap := openTAP(t, TAPConfig{MTU: 9500})
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br" + card[:8], MTU: 9500}}
	add(br)
	for _, name := range []string{far, tap.Name()} {
		l, err := netlink.LinkByName(name)
		must(err)
		must(netlink.LinkSetMaster(l, br))
	}
	setUpDown(t, br.Name, true)
	setUpDown(t, vx.Name, true)
	w := &tunnels{vx.Name, openPacket(t, far), tap}
	w.await(t, openPacket(t, vx.Name))
	return w
}

// await returns once frames that in sends come through the tunnels to the TAP. The kernel drops
// them until it has looked at the carriers of all interfaces on the way.
func (w *tunnels) await(t testing.TB, in *Packet) {
	t.Helper()
	probe := append([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5}, make([]byte, 60)...)
	for k, end := uint64(0), time.Now().Add(wait); ; k++ {
		binary.BigEndian.PutUint64(probe[len(probe)-8:], k)
		send(t, in, Offload{}, probe)
		if arrived(t, w.cut, probe, 50*time.Millisecond) { // and with it all before it, since they keep their order
			if !arrived(t, w.whole, probe, wait) {
				t.Fatal("a frame that came to the end of the tunnels was not seen on its way")
			}
			return
		}
		if time.Now().After(end) {
			t.Fatalf("no frame came through the tunnels of %s", w.vxlan)
		}
	}
}

// arrived reads frames of l until one ends as the given one does, and reports whether that came in time.
func arrived(t testing.TB, l Link, frame []byte, within time.Duration) bool {
	t.Helper()
	if err := l.SetReadDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, MaxFrame)
	for {
		switch n, _, err := l.ReadFrame([][]byte{b}); {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return false
		case err != nil:
			t.Fatalf("ReadFrame: %v", err)
		case bytes.HasSuffix(b[:n], frame):
			return true
		}
	}
}

// FuzzKernelCutsTunnels is FuzzKernelCuts for frames in VXLAN.
func FuzzKernelCutsTunnels(f *testing.F) {
	var all []*tunnels
	var in []*Packet
	for i := range 4 {
		n := newTunnels(f, i&1 != 0, i&2 != 0)
		all, in = append(all, n), append(in, openPacket(f, n.vxlan))
	}
	for i := range uint64(40) {
		f.Add(i, uint16(i*150), uint16(i*1000), byte(i))
	}
	f.Fuzz(func(t *testing.T, seed uint64, size, payload uint16, which byte) {
		w := all[which%4]
		s, n := bounded(size, payload)
		u := anyGSOFrame(seed, min(s, 8500), n)
		if u.off.GSO == GSOUDP || n <= s {
			return // the kernel cuts or completes these before the packet socket
		}
		send(t, in[which%4], u.off, u.frame)
		whole, off := receive(t, w.whole)
		for !bytes.HasSuffix(whole, u.frame[u.off.HeaderLen:]) { // skip frames that the kernel sends by itself
			whole, off = receive(t, w.whole)
		}
		if off.GSO != u.off.GSO || int(off.SumStart) != len(whole)-len(u.frame)+int(u.off.SumStart) {
			t.Fatalf("%+v of %+v", off, u.off)
		}
		var c packet.Cutter
		if !off.startCut(&c, whole, 0) {
			t.Fatalf("%s: not cut\n% x", u.name, whole[:150])
		}
		i := 0
		for c.Left() > 0 {
			head, parts := c.Next([][]byte{whole}, nil)
			want := append(bytes.Clone(head), parts[0]...)
			got, left := receive(t, w.cut)
			for ; len(got) < 60 || !bytes.Equal(got[:12], whole[:12]); got, left = receive(t, w.cut) {
			}
			if !bytes.Equal(got, want) || left.GSO != GSONone || left.Checksum == ChecksumPartial {
				t.Fatalf("%s: packet %d, then %d: %d bytes of the kernel's\n% x\n%d of ours\n% x", u.name, i, c.Left(), len(got), got[:min(len(got), 160)], len(want), want[:min(len(want), 160)])
			}
			i++
		}
	})
}
