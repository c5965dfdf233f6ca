//go:build linux

package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	kernelIP = [4]byte{192, 0, 2, 1}
	ourIP    = [4]byte{192, 0, 2, 2}
	ourMAC   = [6]byte{2, 0, 0, 0, 0, 2}
)

func addAddress(t testing.TB, name string) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: kernelIP[:], Mask: net.CIDRMask(24, 32)}}
	if err := netlink.AddrAdd(l, addr); err != nil {
		t.Fatal(err)
	}
}

// reply turns an ARP request for ourIP, or an ICMP echo request to it, into the reply.
func reply(f []byte) bool {
	switch {
	case len(f) >= 42 && binary.BigEndian.Uint16(f[12:]) == 0x0806 && f[21] == 1 && [4]byte(f[38:]) == ourIP:
		copy(f, f[6:12])
		copy(f[6:], ourMAC[:])
		f[21] = 2
		copy(f[32:42], f[22:32])
		copy(f[22:], ourMAC[:])
		copy(f[28:], ourIP[:])
		return true
	case len(f) >= 42 && binary.BigEndian.Uint16(f[12:]) == 0x0800 && f[23] == 1 && f[34] == 8:
		copy(f, f[6:12])
		copy(f[6:], ourMAC[:])
		copy(f[26:], []byte(string(f[30:34])+string(f[26:30])))
		f[34] = 0
		total := 14 + int(binary.BigEndian.Uint16(f[16:]))
		f[36], f[37] = 0, 0
		binary.BigEndian.PutUint16(f[36:], ^sum16(f[34:total]))
		return true
	}
	return false
}

// recvFrom receives a packet and repeats a call that fails with EINTR: closing an io_uring
// interrupts the threads that have used it.
func recvFrom(s int, b []byte) (n int, from unix.Sockaddr, err error) {
	for err = unix.EINTR; err == unix.EINTR; {
		n, from, err = unix.Recvfrom(s, b, 0)
	}
	return n, from, err
}

func TestKernelPingsThroughTheLink(t *testing.T) {
	ping := func(t *testing.T, l Link, card string) {
		addAddress(t, card)
		done := make(chan struct{})
		go func() {
			defer close(done)
			buf := make([]byte, MaxFrame)
			for {
				n, off, err := l.ReadFrame([][]byte{buf})
				if err != nil {
					return
				}
				if err := off.Complete(n, [][]byte{buf}); err != nil {
					t.Error(err)
				}
				if reply(buf[:n]) {
					if _, err := l.WriteFrame(Offload{}, [][]byte{buf[:n]}); err != nil {
						t.Error(err)
					}
				}
			}
		}()
		defer func() { l.Close(); <-done }()

		s, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(s)
		unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(wait / time.Second)})
		for seq, size := range []int{0, 1, 56, l.MTU() - 28} {
			echo := make([]byte, 8+size)
			echo[0], echo[5], echo[7] = 8, 77, byte(seq)
			for i := range echo[8:] {
				echo[8+i] = byte(i)
			}
			binary.BigEndian.PutUint16(echo[2:], ^sum16(echo))
			if err := unix.Sendto(s, echo, 0, &unix.SockaddrInet4{Addr: ourIP}); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 20+8+size+1)
			n, _, err := recvFrom(s, got)
			if err != nil {
				t.Fatalf("%d bytes: no reply: %v", size, err)
			}
			if n != 20+len(echo) || got[20] != 0 || got[27] != byte(seq) || !bytes.Equal(got[28:n], echo[8:]) {
				t.Fatalf("%d bytes: got % x", size, got[:n])
			}
		}
	}
	t.Run("tap", func(t *testing.T) {
		tap := openTAP(t, TAPConfig{MTU: 9000})
		ping(t, tap, tap.Name())
	})
	t.Run("packet", func(t *testing.T) {
		card, far := veth(t, 1500)
		ping(t, openPacket(t, far), card)
	})
}

// Without offloads the kernel completes frames before a TAP reads them.
func TestTAPGetsCompleteFrames(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	f, off := partialTCP(500)
	send(t, p, off, f)
	got, left := receive(t, tap)
	if !tcpGood(got) || left.Checksum == ChecksumPartial {
		t.Fatalf("checksum left undone: %+v", left)
	}

	f, off = partialTCP(4000)
	off.GSO, off.GSOSize, off.HeaderLen = GSOTCPv4, 1460, 54
	send(t, p, off, f)
	var payload []byte
	for len(payload) < 4000 {
		got, left := receive(t, tap)
		if len(got) > 1514 || !tcpGood(got) || left.GSO != GSONone || left.Checksum == ChecksumPartial {
			t.Fatalf("a segment of %d bytes: %+v", len(got), left)
		}
		payload = append(payload, got[54:]...)
	}
	if !bytes.Equal(payload, f[54:]) {
		t.Fatal("the segments do not add up")
	}
}

// If another process turns a TAP's offloads on, frames have work left. They must be neither
// lost nor taken for complete.
func TestTAPReportsWorkLeftToDo(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	f, err := tap.File()
	if err != nil {
		t.Fatal(err)
	}
	conn, _ := f.SyscallConn()
	conn.Control(func(fd uintptr) {
		err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4)
	})
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	p := openPacket(t, tap.Name())

	want, off := partialTCP(501)
	send(t, p, off, want)
	got, left := receive(t, tap)
	if left.Checksum != ChecksumPartial || left.SumStart != off.SumStart || left.SumOffset != off.SumOffset || left.GSO != GSONone {
		t.Fatalf("%+v", left)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("not what was sent")
	}
	if err := left.Complete(len(got), [][]byte{got}); err != nil || !tcpGood(got) {
		t.Fatalf("checksum: %v", err)
	}

	want, off = partialTCP(4000)
	off.GSO, off.GSOSize, off.HeaderLen = GSOTCPv4, 1460, 54
	send(t, p, off, want)
	got, left = receive(t, tap)
	if left.GSO != GSOTCPv4 || left.GSOSize != 1460 || left.Checksum != ChecksumPartial || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %+v", len(got), left)
	}
}

func TestTAPPassesWorkOnToTheKernel(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	want, off := partialTCP(4000)
	off.GSO, off.GSOSize, off.HeaderLen, off.ECN = GSOTCPv4, 1460, 54, true
	send(t, tap, off, want)
	got, left := receive(t, p)
	if left != off || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %+v, want %+v", len(got), left, off)
	}
}

// Virtual cards leave checksums to each other.
func TestPacketReportsWorkLeftToDo(t *testing.T) {
	card, far := veth(t, 1500)
	a, b := openPacket(t, card), openPacket(t, far)
	want, off := partialTCP(300)
	send(t, a, off, want)
	got, left := receive(t, b)
	if left.Checksum != ChecksumPartial || !bytes.Equal(got, want) {
		t.Fatalf("%+v", left)
	}
	if err := left.Complete(len(got), [][]byte{got}); err != nil || !tcpGood(got) {
		t.Fatal("wrong checksum")
	}
}

func TestTagStaysInItsPlace(t *testing.T) {
	tagged := func(size int) []byte {
		f := testFrame(size)
		copy(f[12:], []byte{0x81, 0, 0x60, 0x2a, testType >> 8, testType & 0xff})
		return f
	}
	pairs(t, 1500, func(t *testing.T, a, b Link) {
		for _, size := range []int{20, 64, 1518} {
			want := tagged(size)
			for _, way := range [][2]Link{{a, b}, {b, a}} {
				send(t, way[0], Offload{}, want)
				if got, _ := receive(t, way[1]); !bytes.Equal(got, want) {
					t.Fatalf("%d bytes from %T: % x", size, way[0], got[:min(len(got), 20)])
				}
				// Buffers whose boundary splits the tag.
				send(t, way[0], Offload{}, want)
				got := make([]byte, 2000)
				n, _, err := way[1].ReadFrame([][]byte{got[:3], got[3:13], got[13:14], got[14:16], got[16:17], got[17:]})
				if err != nil || !bytes.Equal(got[:n], want) {
					t.Fatalf("%d bytes from %T, scattered: %v % x", size, way[0], err, got[:min(n, 20)])
				}
			}
		}
	})
	t.Run("partial checksum", func(t *testing.T) {
		card, far := veth(t, 1500)
		a, b := openPacket(t, card), openPacket(t, far)
		plain, off := partialTCP(100)
		f := append(append(bytes.Clone(plain[:12]), 0x81, 0, 0, 5), plain[12:]...)
		off.shift(4)
		send(t, a, off, f)
		got, left := receive(t, b)
		if left.SumStart != 38 || !bytes.Equal(got, f) {
			t.Fatalf("%+v", left)
		}
		if err := left.Complete(len(got), [][]byte{got}); err != nil || !tcpGood(append(got[:12:12], got[16:]...)) {
			t.Fatal("wrong checksum")
		}
	})
	t.Run("no room for the tag", func(t *testing.T) {
		card, far := veth(t, 1500)
		a, b := openPacket(t, card), openPacket(t, far)
		want := tagged(100)
		for room := 96; room < 100; room++ {
			send(t, a, Offload{}, want)
			got := make([]byte, room)
			b.SetReadDeadline(time.Now().Add(wait))
			n, _, err := b.ReadFrame([][]byte{got})
			if err != ErrTruncated || n != room || !bytes.Equal(got, want[:room]) {
				t.Fatalf("room for %d: %d, %v", room, n, err)
			}
		}
	})
}

func TestPacketDoesNotHearItself(t *testing.T) {
	card, far := veth(t, 1500)
	a, b := openPacket(t, card), openPacket(t, far)
	send(t, a, Offload{}, testFrame(60))
	receive(t, b)
	a.SetReadDeadline(time.Now().Add(-1))
	if _, _, err := a.ReadFrame([][]byte{make([]byte, 2000)}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	send(t, b, Offload{}, testFrame(61))
	if got, _ := receive(t, a); len(got) != 61 {
		t.Fatalf("%d bytes", len(got))
	}
}

func BenchmarkTAP(b *testing.B) {
	tap := openTAP(b, TAPConfig{})
	f := [][]byte{testFrame(1514)}
	for b.Loop() {
		if _, err := tap.WriteFrame(Offload{}, f); err != nil {
			b.Fatal(err)
		}
	}
}

// The kernel cuts a frame from a packet socket for a TAP without offloads. Our cutter must
// make the same segments.
func TestSegmentsAreThoseOfTheKernel(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	for _, u := range gsoFrames() {
		want := cut(t, u)
		send(t, p, u.off, u.frame)
		for i := range want {
			got, left := receive(t, tap)
			if !bytes.Equal(got, want[i]) || left.GSO != GSONone || left.Checksum == ChecksumPartial {
				t.Errorf("%s: segment %d of %d: the kernel's\n% x\nours\n% x", u.name, i, len(want), got[:min(len(got), 80)], want[i][:min(len(want[i]), 80)])
			}
		}
	}
}
