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
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// wait bounds every wait of a test; no working test comes near it.
const wait = 2 * time.Minute

func openTAP(t testing.TB, cfg TAPConfig) *TAP {
	t.Helper()
	needTAP(t)
	tap, err := OpenTAP(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	return tap
}

func openPacket(t testing.TB, name string) *Packet {
	t.Helper()
	needNamespace(t)
	p, err := OpenPacket(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// veth makes a pair of interfaces, both up, and returns their names.
func veth(t testing.TB, mtu int) (a, b string) {
	t.Helper()
	needNamespace(t)
	a, b = fmt.Sprintf("a%d", rand.Uint32()), fmt.Sprintf("b%d", rand.Uint32())
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: a, MTU: mtu}, PeerName: b, PeerMTU: uint32(mtu)}
	if err := netlink.LinkAdd(pair); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(pair) })
	setUpDown(t, a, true)
	setUpDown(t, b, true)
	carrier(t, a)
	carrier(t, b)
	return a, b
}

// carrier waits until the kernel sends frames through an interface whose other end came
// up. The kernel checks for that at most once a second, and drops frames until then.
func carrier(t testing.TB, name string) {
	t.Helper()
	for end := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if l.Attrs().OperState == netlink.OperUp {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", name, l.Attrs().OperState)
		}
	}
}

func setUpDown(t testing.TB, name string, up bool) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	set := netlink.LinkSetDown
	if up {
		set = netlink.LinkSetUp
	}
	if err := set(l); err != nil {
		t.Fatal(err)
	}
}

// testType is a local experimental EtherType (IEEE 802), which no stack answers.
const testType = 0x88b5

func testFrame(size int) []byte {
	f := make([]byte, size)
	for i := range f {
		f[i] = byte(i * 7)
	}
	copy(f, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2})
	binary.BigEndian.PutUint16(f[12:], testType)
	return f
}

func send(t testing.TB, l Link, off Offload, bufs ...[]byte) {
	t.Helper()
	size := 0
	for _, b := range bufs {
		size += len(b)
	}
	if n, err := l.WriteFrame(off, bufs); err != nil || n != size {
		t.Fatalf("WriteFrame of %d bytes: %d, %v", size, n, err)
	}
}

func receive(t testing.TB, l Link) ([]byte, Offload) {
	t.Helper()
	if err := l.SetReadDeadline(time.Now().Add(wait)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, MaxFrame)
	n, off, err := l.ReadFrame([][]byte{b})
	if err != nil {
		t.Fatalf("ReadFrame: %v", err)
	}
	return b[:n], off
}

// pairs runs f with each kind of link: b reads the frames that a writes, and the reverse.
func pairs(t *testing.T, mtu int, f func(t *testing.T, a, b Link)) {
	t.Run("tap-packet", func(t *testing.T) {
		tap := openTAP(t, TAPConfig{MTU: mtu})
		f(t, tap, openPacket(t, tap.Name()))
	})
	t.Run("packet-packet", func(t *testing.T) {
		a, b := veth(t, mtu)
		f(t, openPacket(t, a), openPacket(t, b))
	})
}

func TestFrameOfEverySizeArrives(t *testing.T) {
	pairs(t, 65521, func(t *testing.T, a, b Link) {
		if a.MTU() != 65521 || b.MTU() != 65521 {
			t.Fatalf("MTU %d and %d", a.MTU(), b.MTU())
		}
		for _, size := range []int{14, 15, 16, 42, 59, 60, 61, 1513, 1514, 1518, 4096, 9014, 65520, 65521, 65535} {
			want := testFrame(size)
			for _, way := range [][2]Link{{a, b}, {b, a}} {
				send(t, way[0], Offload{}, want)
				if got, off := receive(t, way[1]); !bytes.Equal(got, want) {
					t.Fatalf("%d bytes from %T: got %d others", size, way[0], len(got))
				} else if off.Checksum == ChecksumPartial || off.GSO != GSONone {
					t.Fatalf("%d bytes from %T: %+v", size, way[0], off)
				}
			}
		}
	})
}

func TestJumboMTU(t *testing.T) {
	pairs(t, 9000, func(t *testing.T, a, b Link) {
		want := testFrame(9014)
		send(t, a, Offload{}, want)
		if got, _ := receive(t, b); !bytes.Equal(got, want) {
			t.Fatal("not what was sent")
		}
		// A packet socket refuses frames beyond the MTU, a TAP does not.
		if p, ok := b.(*Packet); ok {
			if _, err := p.WriteFrame(Offload{}, [][]byte{testFrame(9015 + 4)}); !errors.Is(err, ErrSize) {
				t.Fatalf("a frame beyond the MTU: %v", err)
			}
		}
	})
}

func TestFrameIsScatteredAndGathered(t *testing.T) {
	pairs(t, 9000, func(t *testing.T, a, b Link) {
		want := testFrame(3000)
		for _, way := range [][2]Link{{a, b}, {b, a}} {
			send(t, way[0], Offload{}, want[:5], nil, want[5:6], want[6:2000], want[2000:])
			got := make([]byte, 4000)
			way[1].SetReadDeadline(time.Now().Add(wait))
			n, _, err := way[1].ReadFrame([][]byte{got[:1], got[1:13], nil, got[13:14], got[14:2500], got[2500:]})
			if err != nil || !bytes.Equal(got[:n], want) {
				t.Fatalf("%T: %d bytes, %v", way[1], n, err)
			}
		}
	})
}

func TestTruncationIsSeenAndExactFitIsNone(t *testing.T) {
	pairs(t, 1500, func(t *testing.T, a, b Link) {
		want := testFrame(200)
		for _, way := range [][2]Link{{a, b}, {b, a}} {
			for room, wantErr := range map[int]error{199: ErrTruncated, 14: ErrTruncated, 0: ErrTruncated, 200: nil} {
				send(t, way[0], Offload{}, want)
				got := make([]byte, room)
				way[1].SetReadDeadline(time.Now().Add(wait))
				n, _, err := way[1].ReadFrame([][]byte{got})
				if err != wantErr || n != room || !bytes.Equal(got, want[:room]) {
					t.Fatalf("%T, room for %d: %d, %v", way[1], room, n, err)
				}
			}
		}
	})
}

func TestRefusedFramesAreNotSent(t *testing.T) {
	pairs(t, 1500, func(t *testing.T, a, b Link) {
		for _, l := range []Link{a, b} {
			for _, c := range []struct {
				off  Offload
				bufs [][]byte
				want error
			}{
				{Offload{}, nil, ErrSize},
				{Offload{}, [][]byte{testFrame(20)[:13]}, ErrSize},
				{Offload{}, [][]byte{testFrame(MaxFrame), {1}}, ErrSize},
				{Offload{}, make([][]byte, MaxPieces+1), ErrTooManyPieces},
				{Offload{Checksum: ChecksumPartial, SumStart: 60000}, [][]byte{testFrame(100)}, ErrOffload},
				{Offload{GSO: 0x1f, GSOSize: 10}, [][]byte{testFrame(100)}, ErrOffload},
			} {
				if n, err := l.WriteFrame(c.off, c.bufs); n != 0 || !errors.Is(err, c.want) {
					t.Errorf("%T %+v: %d, %v, want %v", l, c.off, n, err, c.want)
				}
			}
			if _, _, err := l.ReadFrame(make([][]byte, MaxPieces+1)); err != ErrTooManyPieces {
				t.Errorf("%T: %v", l, err)
			}
		}
		// The link still works, and none of the frames above arrives first.
		want := testFrame(77)
		send(t, a, Offload{}, want)
		if got, _ := receive(t, b); !bytes.Equal(got, want) {
			t.Fatal("not what was sent")
		}
	})
}

func TestCloseWakesReader(t *testing.T) {
	pairs(t, 1500, func(t *testing.T, a, b Link) {
		for _, l := range []Link{b, a} { // b first: closing a TAP removes its interface
			started, done := make(chan struct{}), make(chan error)
			go func() {
				close(started)
				_, _, err := l.ReadFrame([][]byte{make([]byte, 2000)})
				done <- err
			}()
			<-started
			for range 2 {
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
			}
			select {
			case err := <-done:
				if err != net.ErrClosed {
					t.Fatalf("%T: %v", l, err)
				}
			case <-time.After(wait):
				t.Fatalf("%T: reader still waits", l)
			}
			if _, _, err := l.ReadFrame([][]byte{make([]byte, 2000)}); err != net.ErrClosed {
				t.Fatalf("%T: ReadFrame after Close: %v", l, err)
			}
			if _, err := l.WriteFrame(Offload{}, [][]byte{testFrame(60)}); err != net.ErrClosed {
				t.Fatalf("%T: WriteFrame after Close: %v", l, err)
			}
			if err := l.SetReadDeadline(time.Time{}); err != net.ErrClosed {
				t.Fatalf("%T: SetReadDeadline after Close: %v", l, err)
			}
		}
	})
}

func TestDeadlineEndsTheWaitAndCanBeLifted(t *testing.T) {
	pairs(t, 1500, func(t *testing.T, a, b Link) {
		b.SetReadDeadline(time.Now().Add(-time.Second))
		if _, _, err := b.ReadFrame([][]byte{make([]byte, 2000)}); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		done := make(chan error)
		b.SetReadDeadline(time.Time{})
		go func() {
			_, _, err := b.ReadFrame([][]byte{make([]byte, 2000)})
			done <- err
		}()
		b.SetReadDeadline(time.Now())
		if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		send(t, a, Offload{}, testFrame(60))
		receive(t, b) // sets a deadline in the future
	})
}

func remove(t testing.TB, l Link) {
	t.Helper()
	i, err := netlink.LinkByName(l.Name())
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(i); err != nil {
		t.Fatal(err)
	}
}

func TestRemovedInterfaceIsGone(t *testing.T) {
	check := func(t *testing.T, l Link) {
		t.Helper()
		done := make(chan error, 1)
		go func() {
			for {
				_, _, err := l.ReadFrame([][]byte{make([]byte, 2000)})
				if err != ErrDown { // the interface goes down before it is removed
					done <- err
					return
				}
				runtime.Gosched()
			}
		}()
		remove(t, l)
		select {
		case err := <-done:
			if err != ErrGone {
				t.Fatalf("ReadFrame: %v", err)
			}
		case <-time.After(wait):
			t.Fatal("reader still waits")
		}
		if _, err := l.WriteFrame(Offload{}, [][]byte{testFrame(60)}); err != ErrGone {
			t.Fatalf("WriteFrame: %v", err)
		}
	}
	t.Run("tap", func(t *testing.T) { check(t, openTAP(t, TAPConfig{})) })
	t.Run("packet", func(t *testing.T) {
		a, _ := veth(t, 1500)
		check(t, openPacket(t, a))
	})
}

func TestInterfaceGoesDownAndComesBack(t *testing.T) {
	t.Run("tap", func(t *testing.T) {
		tap := openTAP(t, TAPConfig{})
		setUpDown(t, tap.Name(), false)
		if _, err := tap.WriteFrame(Offload{}, [][]byte{testFrame(60)}); err != ErrDown {
			t.Fatalf("WriteFrame: %v", err)
		}
		setUpDown(t, tap.Name(), true)
		p := openPacket(t, tap.Name())
		send(t, tap, Offload{}, testFrame(60))
		receive(t, p)
		send(t, p, Offload{}, testFrame(60))
		receive(t, tap)
	})
	t.Run("packet", func(t *testing.T) {
		an, bn := veth(t, 1500)
		a, b := openPacket(t, an), openPacket(t, bn)
		setUpDown(t, an, false)
		for range 3 {
			a.SetReadDeadline(time.Now().Add(wait))
			if _, _, err := a.ReadFrame([][]byte{make([]byte, 2000)}); err != ErrDown {
				t.Fatalf("ReadFrame: %v", err)
			}
		}
		if _, err := a.WriteFrame(Offload{}, [][]byte{testFrame(60)}); err != ErrDown {
			t.Fatalf("WriteFrame: %v", err)
		}
		setUpDown(t, an, true)
		carrier(t, bn)
		send(t, b, Offload{}, testFrame(60))
		receive(t, a)
	})
	t.Run("packet whose writer hears of it", func(t *testing.T) {
		an, _ := veth(t, 1500)
		a := openPacket(t, an)
		setUpDown(t, an, false)
		if _, err := a.WriteFrame(Offload{}, [][]byte{testFrame(60)}); err != ErrDown {
			t.Fatalf("WriteFrame: %v", err)
		}
		if _, _, err := a.ReadFrame([][]byte{make([]byte, 2000)}); err != ErrDown {
			t.Fatalf("ReadFrame: %v", err)
		}
	})
}

func TestReadersAndWritersTakeTurns(t *testing.T) {
	pairs(t, 1500, func(t *testing.T, a, b Link) {
		const writers, each = 4, 100
		var wg sync.WaitGroup
		seen := make(chan byte, writers*each)
		for w := range writers {
			wg.Go(func() {
				f := testFrame(100)
				for i := range f[14:] {
					f[14+i] = byte(w)
				}
				for range each {
					if _, err := a.WriteFrame(Offload{}, [][]byte{f[:50], f[50:]}); err != nil {
						t.Error(err)
					}
				}
			})
			wg.Go(func() {
				buf := make([]byte, 200)
				for range each {
					n, _, err := b.ReadFrame([][]byte{buf[:20], buf[20:]})
					if err != nil || n != 100 || bytes.Count(buf[14:n], buf[14:15]) != n-14 {
						t.Errorf("%d bytes, %v: % x", n, err, buf[:n])
						return
					}
					seen <- buf[14]
				}
			})
		}
		b.SetReadDeadline(time.Now().Add(wait))
		wg.Wait()
		close(seen)
		count := map[byte]int{}
		for w := range seen {
			count[w]++
		}
		for w := range byte(writers) {
			if count[w] != each {
				t.Errorf("writer %d: %d frames of %d", w, count[w], each)
			}
		}
	})
}

func TestFramesMakeNoGarbage(t *testing.T) {
	pairs(t, 1500, func(t *testing.T, a, b Link) {
		f, buf := testFrame(1514), make([]byte, 2000)
		in, out := [][]byte{f[:14], f[14:]}, [][]byte{buf[:14], buf[14:]}
		for _, way := range [][2]Link{{a, b}, {b, a}} {
			way[1].SetReadDeadline(time.Now().Add(wait))
			if got := testing.AllocsPerRun(200, func() {
				if _, err := way[0].WriteFrame(Offload{}, in); err != nil {
					t.Fatal(err)
				}
				if _, _, err := way[1].ReadFrame(out); err != nil {
					t.Fatal(err)
				}
			}); got != 0 {
				t.Errorf("%T to %T: %v allocations a frame", way[0], way[1], got)
			}
		}
	})
}

// A reader that parks must not allocate either.
func TestParkedReaderMakesNoGarbage(t *testing.T) {
	pairs(t, 1500, func(t *testing.T, a, b Link) {
		f, buf := [][]byte{testFrame(60)}, [][]byte{make([]byte, 2000)}
		turn := make(chan struct{})
		go func() {
			for range turn {
				runtime.Gosched() // most of the time the reader is parked by now
				a.WriteFrame(Offload{}, f)
			}
		}()
		defer close(turn)
		b.SetReadDeadline(time.Now().Add(wait))
		if got := testing.AllocsPerRun(200, func() {
			turn <- struct{}{}
			if _, _, err := b.ReadFrame(buf); err != nil {
				t.Fatal(err)
			}
		}); got != 0 {
			t.Errorf("%v allocations a frame", got)
		}
	})
}

func descriptors(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestNoDescriptorIsLeft(t *testing.T) {
	needTAP(t)
	a, _ := veth(t, 1500)
	round := func() {
		tap, err := OpenTAP(TAPConfig{Name: "leak0"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenTAP(TAPConfig{Name: "leak0"}); err == nil {
			t.Fatal("opened twice")
		}
		if _, err := OpenTAP(TAPConfig{MTU: 1 << 20}); err == nil {
			t.Fatal("an MTU of a megabyte")
		}
		if _, err := OpenTAPQueues(TAPConfig{Name: "leak0"}, 3); err == nil {
			t.Fatal("opened twice")
		}
		if _, err := OpenPacket("lo2"); err == nil {
			t.Fatal("no such interface")
		}
		p, err := OpenPacket(a)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range []interface {
			Link
			File() (*os.File, error)
		}{tap, p} {
			f, err := l.File()
			if err != nil {
				t.Fatal(err)
			}
			if l == Link(tap) { // a descriptor of the wrong kind
				_, err = NewPacket(f, Info{})
			} else {
				_, err = NewTAP(f, Info{})
			}
			if err == nil {
				t.Fatal("adopted a descriptor of the other kind")
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := l.File(); err != net.ErrClosed {
				t.Fatal(err)
			}
		}
	}
	round() // the first use of the poller opens descriptors that stay open
	before := descriptors(t)
	for range 20 {
		round()
	}
	if after := descriptors(t); after > before { // fewer: what earlier tests left was collected
		t.Fatalf("%d descriptors before, %d after", before, after)
	}
}

func TestOpenErrorsSayWhatToDo(t *testing.T) {
	needTAP(t)
	taken := openTAP(t, TAPConfig{Name: "taken0"})
	other, _ := veth(t, 1500)
	for _, c := range []struct {
		name string
		open func() (Link, error)
		err  error
		next string
	}{
		{"tap in use", func() (Link, error) { return OpenTAP(TAPConfig{Name: taken.Name()}) }, unix.EBUSY, "choose another"},
		{"tap held by another", func() (Link, error) { return OpenTAP(TAPConfig{Name: taken.Name(), Attach: true}) }, unix.EBUSY, "choose another"},
		{"not a tap", func() (Link, error) { return OpenTAP(TAPConfig{Name: other, Attach: true}) }, unix.EINVAL, "another kind"},
		{"name", func() (Link, error) { return OpenTAP(TAPConfig{Name: "sixteen-bytes-long"}) }, unix.EINVAL, "15 bytes"},
		{"mtu", func() (Link, error) { return OpenTAP(TAPConfig{MTU: 65522}) }, unix.EINVAL, "65521"},
		{"no interface", func() (Link, error) { return OpenPacket("lo2") }, unix.ENODEV, "no such interface"},
		{"tap without privilege", func() (Link, error) {
			return withoutPrivilege(func() (Link, error) { return OpenTAP(TAPConfig{}) })
		}, unix.EPERM, "CAP_NET_ADMIN"},
		{"packet without privilege", func() (Link, error) {
			return withoutPrivilege(func() (Link, error) { return OpenPacket(other) })
		}, unix.EPERM, "CAP_NET_RAW"},
	} {
		l, err := c.open()
		var oe *OpenError
		if !errors.As(err, &oe) || !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.next) {
			t.Errorf("%s: %v (%T)", c.name, err, err)
		}
		if err == nil {
			l.Close()
		}
	}
}

// withoutPrivilege runs f on a thread that has no capabilities and dies with it.
func withoutPrivilege(f func() (Link, error)) (l Link, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err = unix.Capset(&hdr, &none[0]); err == nil {
			l, err = f()
		}
	}()
	<-done
	return l, err
}

func TestMissingTUNDeviceIsNamed(t *testing.T) {
	for errno, want := range map[error]string{
		unix.ENOENT: "modprobe tun", unix.ENODEV: "modprobe tun", unix.EACCES: "chmod",
	} {
		if err := openError("x", errno); !errors.Is(err, errno) || !strings.Contains(err.Error(), want) {
			t.Error(err)
		}
	}
}

func TestAttachJoinsATAPThatExists(t *testing.T) {
	needTAP(t)
	dev := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "kept0"}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(dev); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(dev) })
	if _, err := OpenTAP(TAPConfig{Name: "kept0"}); !errors.Is(err, unix.EBUSY) {
		t.Fatalf("without Attach: %v", err)
	}
	tap := openTAP(t, TAPConfig{Name: "kept0", Attach: true, MTU: 1400})
	p := openPacket(t, "kept0")
	send(t, tap, Offload{}, testFrame(60))
	receive(t, p)
	if tap.MTU() != 1400 || tap.MAC() != p.MAC() || tap.MAC() == ([6]byte{}) {
		t.Fatalf("%+v, %+v", tap.Info(), p.Info())
	}
}

func TestQueuesShareOneCard(t *testing.T) {
	needTAP(t)
	const queues, frames = 3, 30
	taps, err := OpenTAPQueues(TAPConfig{Name: "many%d"}, queues)
	if err != nil {
		t.Fatal(err)
	}
	for _, tap := range taps {
		t.Cleanup(func() { tap.Close() })
		if tap.Name() != taps[0].Name() {
			t.Fatalf("%q and %q", tap.Name(), taps[0].Name())
		}
	}
	p := openPacket(t, taps[0].Name())
	for _, tap := range taps {
		send(t, tap, Offload{}, testFrame(60))
		receive(t, p)
	}
	got := make(chan error, frames*2)
	var wg sync.WaitGroup
	for _, tap := range taps {
		wg.Go(func() {
			for {
				_, _, err := tap.ReadFrame([][]byte{make([]byte, 2000)})
				if err == net.ErrClosed {
					return
				}
				got <- err
			}
		})
	}
	for range frames {
		send(t, p, Offload{}, testFrame(60))
	}
	for range frames {
		select {
		case err := <-got:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(wait):
			t.Fatal("a frame came out of no queue")
		}
	}
	for _, tap := range taps {
		tap.Close()
	}
	wg.Wait()
	if len(got) != 0 {
		t.Fatalf("%d frames too many", len(got))
	}
}

func TestLinkIsPassedOnAsADescriptor(t *testing.T) {
	pairs(t, 1500, func(t *testing.T, a, b Link) {
		var again Link
		var err error
		switch a := a.(type) {
		case *TAP:
			f, e := a.File()
			if e != nil {
				t.Fatal(e)
			}
			again, err = NewTAP(f, a.Info())
		case *Packet:
			f, e := a.File()
			if e != nil {
				t.Fatal(e)
			}
			again, err = NewPacket(f, a.Info())
		}
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		a.Close()
		send(t, again, Offload{}, testFrame(60))
		receive(t, b)
		send(t, b, Offload{}, testFrame(60))
		receive(t, again)
	})
}
