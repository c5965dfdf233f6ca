//go:build linux

package link

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A space is a further network namespace, in which one thread runs.
type space struct {
	calls chan func()
	ended chan struct{}
}

func newSpace(t testing.TB) *space {
	t.Helper()
	needTAP(t)
	s := &space{make(chan func()), make(chan struct{})}
	made := make(chan error)
	go func() {
		defer close(s.ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = quiet()
		}
		made <- err
		for f := range s.calls {
			f()
		}
	}()
	if err := <-made; err != nil {
		close(s.calls)
		t.Skip("this machine gives no second network namespace:", err)
	}
	t.Cleanup(func() { close(s.calls); <-s.ended })
	return s
}

// do runs f in the namespace. A nil space is the namespace of the tests.
func (s *space) do(f func()) {
	if s == nil {
		f()
		return
	}
	done := make(chan struct{})
	s.calls <- func() { defer close(done); f() }
	<-done
}

// tap opens a TAP of the namespace with an address.
func (s *space) tap(t testing.TB, mtu int, addr netip.Prefix) (tap *TAP) {
	t.Helper()
	s.do(func() {
		var err error
		if tap, err = OpenTAP(TAPConfig{MTU: mtu}); err == nil {
			err = giveAddress(tap.Name(), addr)
		}
		if err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { tap.Close() })
	return tap
}

func giveAddress(name string, addr netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), addr.Addr().BitLen())}}
	if addr.Addr().Is6() {
		if err := enableIPv6(name); err != nil {
			return err
		}
		a.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(l, a)
}

func enableIPv6(name string) error {
	return os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("0"), 0)
}

// counter reads a TCP counter of the namespace.
func (s *space) counter(t testing.TB, name string) (n uint64) {
	t.Helper()
	s.do(func() {
		b, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			t.Error(err)
			return
		}
		var names []string
		for line := range strings.Lines(string(b)) {
			fields := strings.Fields(line)
			if fields[0] != "Tcp:" {
				continue
			}
			if names == nil {
				names = fields
				continue
			}
			for i := range names {
				if names[i] == name {
					n, err = strconv.ParseUint(fields[i], 10, 64)
				}
			}
		}
		if names == nil || err != nil {
			t.Errorf("no %s in\n%s", name, b)
		}
	})
	return n
}

// A cable connects the TCP/IP of two network namespaces through a vif, with a TAP at each
// end of it.
type cable struct {
	*host
	far                 *space // at the frontend's end; the tests' namespace is at the backend's
	nearAddr, farAddr   netip.Addr
	nearJoint, farJoint *Joint
}

func newCable(t testing.TB, mtu int, v6 bool, back, front pvnet.Config) *cable {
	t.Helper()
	c := &cable{far: newSpace(t)}
	near, far := netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("198.51.100.2/24")
	if v6 {
		near, far = netip.MustParsePrefix("2001:db8::1/64"), netip.MustParsePrefix("2001:db8::2/64")
	}
	c.nearAddr, c.farAddr = near.Addr(), far.Addr()
	nearTAP, farTAP := (*space)(nil).tap(t, mtu, near), c.far.tap(t, mtu, far)
	c.host = newHostOf(t, mtu, back, front)
	c.nearJoint, _ = c.join(context.Background(), c.Back, nearTAP)
	c.farJoint, _ = c.join(context.Background(), c.Front, farTAP)
	return c
}

// dial connects the two kernels; the far one listens.
func (c *cable) dial() (near, far *net.TCPConn) { return c.dialMSS(0) }

// dialMSS is dial with a maximum segment size of mss bytes; 0 leaves the default.
func (c *cable) dialMSS(mss int) (near, far *net.TCPConn) {
	c.t.Helper()
	limit := func(_, _ string, conn syscall.RawConn) (err error) {
		if mss == 0 {
			return nil
		}
		ctlErr := conn.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, mss) })
		return errors.Join(ctlErr, err)
	}
	var l net.Listener
	var err error
	c.far.do(func() {
		l, err = (&net.ListenConfig{Control: limit}).Listen(context.Background(), "tcp", netip.AddrPortFrom(c.farAddr, 0).String())
	})
	if err != nil {
		c.t.Fatal(err)
	}
	defer l.Close()
	conn, err := (&net.Dialer{Control: limit, Timeout: wait}).Dial("tcp", l.Addr().String())
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	accepted, err := l.Accept()
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { accepted.Close() })
	return conn.(*net.TCPConn), accepted.(*net.TCPConn)
}

// transfer sends size bytes and fails unless they arrive.
func transfer(from, to *net.TCPConn, size int, seed byte) error {
	key := [32]byte{seed}
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(from, rand.NewChaCha8(key), int64(size))
		sent <- err
	}()
	got, want := sha256.New(), sha256.New()
	io.CopyN(want, rand.NewChaCha8(key), int64(size))
	n, err := io.CopyN(got, to, int64(size))
	if err = errors.Join(err, <-sent); err != nil {
		return err
	}
	if n != int64(size) || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		return fmt.Errorf("%d bytes of %d, or others", n, size)
	}
	return nil
}

// both moves size bytes in each direction, one after the other. It fails unless they arrive
// and both kernels find every checksum correct.
func (c *cable) both(size int, dial func() (near, far *net.TCPConn)) {
	c.t.Helper()
	const wrong = "InCsumErrors"
	nearBefore, farBefore := (*space)(nil).counter(c.t, wrong), c.far.counter(c.t, wrong)
	near, far := dial()
	limit := time.Now().Add(4 * wait)
	near.SetDeadline(limit)
	far.SetDeadline(limit)
	if err := transfer(near, far, size, 1); err != nil {
		c.t.Fatalf("to the frontend's end: %v; %+v, %+v", err, c.nearJoint.Stats(), c.farJoint.Stats())
	}
	if err := transfer(far, near, size, 2); err != nil {
		c.t.Fatalf("to the backend's end: %v; %+v, %+v", err, c.nearJoint.Stats(), c.farJoint.Stats())
	}
	if n := (*space)(nil).counter(c.t, wrong) - nearBefore; n != 0 {
		c.t.Errorf("%d wrong checksums at the backend's end", n)
	}
	if n := c.far.counter(c.t, wrong) - farBefore; n != 0 {
		c.t.Errorf("%d wrong checksums at the frontend's end", n)
	}
	for _, j := range []*Joint{c.nearJoint, c.farJoint} {
		if st := j.Stats(); st.Oversize+st.Uncut+st.Refused+st.Unsent != 0 {
			c.t.Errorf("%+v", st)
		}
	}
}

func TestKernelsTalkThroughAVif(t *testing.T) {
	for _, takes := range []struct {
		name        string
		back, front bool
	}{{"both take long frames", true, true}, {"the backend does", true, false}, {"the frontend does", false, true}, {"neither does", false, false}} {
		for _, mtu := range []int{1500, 9000} {
			for _, v6 := range []bool{false, true} {
				name := fmt.Sprintf("%s/mtu=%d/v6=%t", takes.name, mtu, v6)
				t.Run(name, func(t *testing.T) {
					c := newCable(t, mtu, v6, pvnet.Config{Offload: takes.back}, pvnet.Config{Offload: takes.front})
					c.both(4<<20, c.dial)
					for _, end := range []struct {
						name        string
						dev         *pvnet.Device
						joint       *Joint
						takes, peer bool
					}{
						{"back", c.Back, c.nearJoint, takes.back, takes.front},
						{"front", c.Front, c.farJoint, takes.front, takes.back},
					} {
						// The stream may end before the joint, or the device, has counted the last of its frames.
						st := end.dev.Stats()
						settle(t, end.joint, func(js JointStats) bool {
							st = end.dev.Stats()
							return js.ToLinkGSO == st.RX.Get(telemetry.GSOPackets) && js.FromLinkGSO >= st.TX.Get(telemetry.GSOPackets)
						})
						in := st.RX.Get(telemetry.GSOPackets)
						js := end.joint.Stats()
						if js.FromLinkGSO == 0 || js.Segments != 0 {
							t.Errorf("%s: the kernel left nothing whole: %+v", end.name, js)
						}
						if (in > 0) != end.takes {
							t.Errorf("%s: %d long frames came through the vif", end.name, in)
						}
						if out := st.TX.Get(telemetry.GSOPackets); (out > 0) != end.peer || out > js.FromLinkGSO {
							t.Errorf("%s: %d long frames left through the vif, of %d", end.name, out, js.FromLinkGSO)
						}
						if in := st.RX.Get(telemetry.CsumPartial); (in > 0) != end.takes {
							t.Errorf("%s: %d partial checksums", end.name, in)
						}
					}
				})
			}
		}
	}
}

// Frames for a peer with a small MSS are left whole, too. The end that cuts them makes as
// many segments as it takes.
func TestSmallSegmentsAreCut(t *testing.T) {
	for _, offload := range []bool{true, false} {
		t.Run(fmt.Sprintf("offload=%t", offload), func(t *testing.T) {
			cfg := pvnet.Config{Offload: offload}
			c := newCable(t, 1500, false, cfg, cfg)
			c.both(1<<20, func() (near, far *net.TCPConn) { return c.dialMSS(100) })
			for _, j := range []*Joint{c.nearJoint, c.farJoint} {
				if st := j.Stats(); st.Segments != 0 || st.FromLinkGSO == 0 {
					t.Errorf("%+v", st)
				}
			}
		})
	}
}

// Every queue of a multi-queue TAP leaves its work to a queue of the vif.
func TestQueuesOfACardLeaveTheirWork(t *testing.T) {
	far := newSpace(t)
	near, there := netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("198.51.100.2/24")
	cfg := pvnet.Config{Queues: 2, Offload: true}
	c := &cable{far: far, nearAddr: near.Addr(), farAddr: there.Addr()}
	var ends [2][]Link
	for i, s := range []*space{nil, far} {
		s.do(func() {
			taps, err := OpenTAPQueues(TAPConfig{}, cfg.Queues)
			if err != nil {
				t.Error(err)
				return
			}
			for _, tap := range taps {
				t.Cleanup(func() { tap.Close() })
				ends[i] = append(ends[i], tap)
			}
			if err := giveAddress(taps[0].Name(), []netip.Prefix{near, there}[i]); err != nil {
				t.Error(err)
			}
		})
	}
	if t.Failed() {
		t.FailNow()
	}
	c.host = newHostOf(t, 1500, cfg, cfg)
	c.nearJoint, _ = c.join(context.Background(), c.Back, ends[0]...)
	c.farJoint, _ = c.join(context.Background(), c.Front, ends[1]...)
	for range 4 { // the kernel chooses a queue by the flow
		c.both(1<<20, c.dial)
	}
	if st := c.nearJoint.Stats(); st.FromLinkGSO == 0 || st.ToLinkGSO == 0 || st.Segments != 0 {
		t.Errorf("%+v", st)
	}
}

// BenchmarkTCP moves a stream from one namespace's TCP/IP to the other's. Without offloads
// the sender cuts long frames.
func BenchmarkTCP(b *testing.B) {
	for _, mtu := range []int{1500, 9000} {
		for _, long := range []bool{true, false} {
			cfg := pvnet.Config{Offload: long}
			b.Run(fmt.Sprintf("mtu=%d/long=%t/back-to-front", mtu, long), func(b *testing.B) {
				c := newCable(b, mtu, false, cfg, cfg)
				near, far := c.dial()
				stream(b, near, far)
			})
			b.Run(fmt.Sprintf("mtu=%d/long=%t/front-to-back", mtu, long), func(b *testing.B) {
				c := newCable(b, mtu, false, cfg, cfg)
				near, far := c.dial()
				stream(b, far, near)
			})
		}
	}
}

func stream(b *testing.B, from, to *net.TCPConn) {
	block, room := make([]byte, 1<<20), make([]byte, 1<<20)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if _, err := from.Write(block); err != nil {
				return
			}
		}
	})
	b.SetBytes(1 << 20)
	for b.Loop() {
		if _, err := io.ReadFull(to, room); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*8*(1<<20)/b.Elapsed().Seconds()/1e9, "Gbit/s")
	to.SetLinger(0)
	to.Close()
	wg.Wait()
}
