//go:build linux

package link

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"testing"

	"barevif/pvnet"
	"barevif/telemetry"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// scriptedJoint joins a scripted link to the backend. The channel got has the frames that
// the guest receives.
func scriptedJoint(t *testing.T, back, front pvnet.Config) (l *scripted, j *Joint, got <-chan []byte) {
	t.Helper()
	h := newHostOf(t, 1500, back, front)
	got = h.listen()
	l, j, _ = h.joinScripted(bare{})
	return l, j, got
}

// bigFrames returns TCP segments of more than 64 KiB, as Linux leaves them: with an IP
// length of 0, or with the length of a jumbogram.
func bigFrames(payload int) []gsoFrame {
	tcp4, off4 := partialTCP(payload)
	binary.BigEndian.PutUint16(tcp4[16:], 0)
	sumIPv4(tcp4[14:])
	pseudo := func(addrs []byte, length int) uint16 {
		return sum16(append(binary.BigEndian.AppendUint32(bytes.Clone(addrs), uint32(length)), 0, 0, 0, 6))
	}
	binary.BigEndian.PutUint16(tcp4[50:], pseudo(tcp4[26:34], 20+payload))
	off4.GSO, off4.GSOSize, off4.HeaderLen = GSOTCPv4, 1448, 54
	six := gsoFrames()[3]
	tcp6 := append(bytes.Clone(six.frame[:74]), tcp4[54:]...)
	binary.BigEndian.PutUint16(tcp6[18:], 0)
	binary.BigEndian.PutUint16(tcp6[70:], pseudo(tcp6[22:54], 20+payload))
	off6 := six.off
	jumbo := append(binary.BigEndian.AppendUint32(append(bytes.Clone(tcp6[:54]), 6, 0, 0xc2, 4), uint32(8+20+payload)), tcp6[54:]...)
	jumbo[20] = 0
	offJumbo := off6
	offJumbo.SumStart, offJumbo.HeaderLen = off6.SumStart+8, off6.HeaderLen+8
	return []gsoFrame{{"IPv4", tcp4, off4}, {"IPv6", tcp6, off6}, {"jumbogram", jumbo, offJumbo}}
}

func TestBigTCPReachesTheGuest(t *testing.T) {
	for _, offload := range []bool{true, false} {
		t.Run(fmt.Sprintf("offload=%t", offload), func(t *testing.T) {
			l, j, got := scriptedJoint(t, pvnet.Config{}, pvnet.Config{Offload: offload})
			for _, payload := range []int{66000, 140000, 8*65535 - 74 - 8} {
				for _, u := range bigFrames(payload) {
					before := j.Stats()
					l.frame(u.frame, u.off)
					want := u.frame[u.off.HeaderLen:]
					header := int(u.off.HeaderLen)
					if u.name == "jumbogram" {
						header -= 8
					}
					seq, frames := uint32(1), 0
					for len(want) > 0 {
						b := next(t, got)
						frames++
						tcp := b[header-20:]
						if len(b) > pvnet.MaxFrame || !offload && len(b) > 1514 || binary.BigEndian.Uint32(tcp[4:]) != seq || !bytes.HasPrefix(want, b[header:]) {
							t.Fatalf("%s of %d: frame %d: %d bytes, seq %d", u.name, payload, frames, len(b), seq)
						}
						ip := b[14:]
						length := int(binary.BigEndian.Uint16(ip[2:]))
						addrs := ip[12:20]
						if ip[0]>>4 == 6 {
							length = 40 + int(binary.BigEndian.Uint16(ip[4:]))
							addrs = ip[8:40]
						}
						pseudo := binary.BigEndian.AppendUint16(append(bytes.Clone(addrs), 0, 6), uint16(len(tcp)))
						whole := len(b)-header <= 1448
						if sum := sum16(append(bytes.Clone(pseudo), tcp...)); length != len(ip) || whole && !offload && sum != 0xffff {
							t.Fatalf("%s of %d: frame %d: length %d of %d, sum %#x", u.name, payload, frames, length, len(ip), sum)
						}
						if offload && !whole && binary.BigEndian.Uint16(tcp[16:]) != sum16(pseudo) {
							t.Fatalf("%s of %d: frame %d: the checksum is not that of its pseudo-header", u.name, payload, frames)
						}
						if fin := tcp[13]&0x08 != 0; fin != (len(want) == len(b)-header) && (whole || offload) {
							t.Fatalf("%s of %d: frame %d: PSH is %v", u.name, payload, frames, fin)
						}
						seq += uint32(len(b) - header)
						want = want[len(b)-header:]
					}
					if offload && frames > 1+payload/62000 {
						t.Errorf("%s of %d: %d frames", u.name, payload, frames)
					}
					settle(t, j, func(st JointStats) bool { return st.FromLinkGSO > before.FromLinkGSO && st.Uncut+st.Oversize == 0 })
				}
			}
		})
	}
}

// SCTP from a packet socket has its CRC32c left to do. It must not be completed as a 16-bit
// sum.
func TestSCTPReachesTheGuestWithItsCRC(t *testing.T) {
	l, j, got := scriptedJoint(t, pvnet.Config{}, pvnet.Config{Offload: true})
	for n := range 50 {
		b, off := partialTCP(n)
		b[23] = 132
		sumIPv4(b[14:])
		clear(b[42:46])
		off.SumOffset = 8
		want := bytes.Clone(b)
		binary.LittleEndian.PutUint32(want[42:], crc32.Checksum(b[34:], crc32.MakeTable(crc32.Castagnoli)))
		l.frame(b, off)
		if b := next(t, got); !bytes.Equal(b, want) {
			t.Fatalf("% x, want % x", b, want)
		}
		// No protocol has its checksum at this offset.
		off.SumOffset = 16
		l.frame(b, off)
		l.frame(testFrame(60), Offload{})
		if b := next(t, got); len(b) != 60 {
			t.Fatalf("% x", b)
		}
		settle(t, j, func(st JointStats) bool { return st.Uncut == uint64(n+1) })
	}
}

// ethernetIn connects the TCP of this kernel to that of a guest. The near kernel uses one end
// of a veth pair; a packet socket at the other end is joined to the vif.
func ethernetIn(t *testing.T, v6, offload bool) (c *cable, card, farCard string) {
	t.Helper()
	c = &cable{far: newSpace(t)}
	card, other := veth(t, 1500)
	near, far := netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("198.51.100.2/24")
	if v6 {
		near, far = netip.MustParsePrefix("2001:db8::1/64"), netip.MustParsePrefix("2001:db8::2/64")
	}
	farTAP := c.far.tap(t, 1500, far)
	c.host = newHostOf(t, 1500, pvnet.Config{Offload: offload}, pvnet.Config{Offload: offload})
	c.nearJoint, _ = c.join(context.Background(), c.Back, openPacket(t, other))
	c.farJoint, _ = c.join(context.Background(), c.Front, farTAP)
	if err := giveAddress(card, near); err != nil {
		t.Fatal(err)
	}
	c.nearAddr, c.farAddr = near.Addr(), far.Addr()
	return c, card, farTAP.Name()
}

// TCP in VXLAN, which the kernel leaves whole, works in both directions.
func TestTCPInATunnelReachesTheGuest(t *testing.T) {
	for _, offload := range []bool{true, false} {
		t.Run(fmt.Sprintf("offload=%t", offload), func(t *testing.T) {
			c, card, farCard := ethernetIn(t, false, offload)
			vxlan := func(lower, name, addr, own, peer string) (err error) {
				l, err := netlink.LinkByName(lower)
				if err != nil {
					return err
				}
				vx := &netlink.Vxlan{
					LinkAttrs: netlink.LinkAttrs{Name: name, MTU: 1450}, VxlanId: 5, VtepDevIndex: l.Attrs().Index,
					SrcAddr: net.ParseIP(own).To4(), Group: net.ParseIP(peer).To4(), Port: 4789,
				}
				if err := netlink.LinkAdd(vx); err != nil {
					return err
				}
				if err := netlink.LinkSetUp(vx); err != nil {
					return err
				}
				return giveAddress(name, netip.MustParsePrefix(addr))
			}
			name := "n" + card[:8]
			switch err := vxlan(card, name, "203.0.113.1/24", "198.51.100.1", "198.51.100.2"); err {
			case nil:
			case unix.EOPNOTSUPP:
				t.Skip("this kernel has no VXLAN:", err)
			default:
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if l, err := netlink.LinkByName(name); err == nil {
					netlink.LinkDel(l)
				}
			})
			var err error
			c.far.do(func() { err = vxlan(farCard, "x0", "203.0.113.2/24", "198.51.100.2", "198.51.100.1") })
			if err != nil {
				t.Fatal(err)
			}
			c.nearAddr, c.farAddr = netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")
			c.both(4<<20, c.dial)
			if st := c.nearJoint.Stats(); st.Segments == 0 {
				t.Errorf("the kernel left nothing whole: %+v", st)
			}
		})
	}
}

// With BIG TCP the kernel's frames are several times as long as a vif's longest frame.
func TestTheKernelsBigTCPReachesTheGuest(t *testing.T) {
	for i := range 4 {
		v6, offload := i&1 != 0, i&2 != 0
		t.Run(fmt.Sprintf("v6=%t/offload=%t", v6, offload), func(t *testing.T) {
			c, card, _ := ethernetIn(t, v6, offload)
			l, err := netlink.LinkByName(card)
			if err != nil {
				t.Fatal(err)
			}
			for _, set := range []func(netlink.Link, int) error{netlink.LinkSetGSOMaxSize, netlink.LinkSetGSOIPv4MaxSize} {
				if err := set(l, 200000); err != nil {
					t.Skip("this kernel has no BIG TCP:", err)
				}
			}
			c.both(16<<20, c.dial)
			st := c.nearJoint.Stats()
			if st.FromLinkGSO == 0 {
				t.Errorf("%+v", st)
			}
			sent := c.Back.Stats().TX
			if n := sent.Get(telemetry.GSOPackets); (n > 0) != offload {
				t.Errorf("%d long frames went through the vif", n)
			}
		})
	}
}
