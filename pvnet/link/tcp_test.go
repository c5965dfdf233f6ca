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
	"testing"
	"time"

	"barevif/pvnet"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A space is a network namespace beside the one the tests run in, held by a
// thread.
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

// do runs f in the namespace; nil is the one the tests run in.
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
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("0"), 0); err != nil {
			return err
		}
		a.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(l, a)
}

// counter reads a counter of the namespace's TCP.
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

// A cable is two kernels' TCP/IP, each behind a TAP and a vif's end.
type cable struct {
	*host
	far                 *space // at the frontend's end; the tests' own is at the backend's
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
func (c *cable) dial() (near, far *net.TCPConn) {
	c.t.Helper()
	var l *net.TCPListener
	var err error
	c.far.do(func() { l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.farAddr, 0))) })
	if err != nil {
		c.t.Fatal(err)
	}
	defer l.Close()
	near, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { near.Close() })
	l.SetDeadline(time.Now().Add(wait))
	if far, err = l.AcceptTCP(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { far.Close() })
	return near, far
}

// transfer sends size bytes and fails unless they arrive.
func transfer(from, to *net.TCPConn, size int, seed byte) error {
	key := [32]byte{seed}
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(from, rand.NewChaCha8(key), int64(size))
		sent <- errors.Join(err, from.CloseWrite())
	}()
	got, want := sha256.New(), sha256.New()
	io.CopyN(want, rand.NewChaCha8(key), int64(size))
	n, err := io.Copy(got, to)
	if err = errors.Join(err, <-sent); err != nil {
		return err
	}
	if n != int64(size) || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		return fmt.Errorf("%d bytes of %d, or others", n, size)
	}
	return nil
}

// BenchmarkTCP moves a stream from one kernel's TCP/IP to the other's.
func BenchmarkTCP(b *testing.B) {
	for _, mtu := range []int{1500, 9000} {
		b.Run(fmt.Sprintf("mtu=%d/back-to-front", mtu), func(b *testing.B) {
			c := newCable(b, mtu, false, pvnet.Config{Offload: true}, pvnet.Config{Offload: true})
			near, far := c.dial()
			stream(b, near, far)
		})
		b.Run(fmt.Sprintf("mtu=%d/front-to-back", mtu), func(b *testing.B) {
			c := newCable(b, mtu, false, pvnet.Config{Offload: true}, pvnet.Config{Offload: true})
			near, far := c.dial()
			stream(b, far, near)
		})
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
