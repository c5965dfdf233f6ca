//go:build linux

package bridge

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
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A space is a network namespace of its own, in which one thread runs.
type space struct {
	calls chan func()
	ended chan struct{}
}

func newSpace(t testing.TB) *space {
	t.Helper()
	s := &space{make(chan func()), make(chan struct{})}
	made := make(chan error)
	go func() {
		defer close(s.ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		made <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range s.calls {
			f()
		}
	}()
	if err := <-made; err != nil {
		close(s.calls)
		t.Skip("this user may make no network namespace:", err)
	}
	t.Cleanup(func() { close(s.calls); <-s.ended })
	return s
}

// do runs f in the namespace.
func (s *space) do(f func()) {
	done := make(chan struct{})
	s.calls <- func() { defer close(done); f() }
	<-done
}

// tap opens a TAP of the namespace with an address.
func (s *space) tap(t testing.TB, addr netip.Prefix) (tap *link.TAP) {
	t.Helper()
	var err error
	s.do(func() {
		if tap, err = link.OpenTAP(link.TAPConfig{}); err != nil {
			return
		}
		var l netlink.Link
		if l, err = netlink.LinkByName(tap.Name()); err == nil {
			err = netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), 32)}})
		}
	})
	if tap == nil && (errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission)) {
		t.Skip("this machine gives no TAP:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	return tap
}

// The TCP/IP of two kernels talks through a bridge of two vifs, with a TAP at the guest's end
// of each: ARP is flooded, the rest goes to its port, and long frames stay long where both
// guests take them.
func TestKernelsTalkThroughABridge(t *testing.T) {
	for _, takes := range [][2]bool{{true, true}, {true, false}, {false, false}} {
		t.Run(fmt.Sprintf("offload=%v", takes), func(t *testing.T) {
			spaces := [2]*space{newSpace(t), newSpace(t)}
			addrs := [2]netip.Prefix{netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("198.51.100.2/24")}
			taps := [2]*link.TAP{spaces[0].tap(t, addrs[0]), spaces[1].tap(t, addrs[1])}
			h := pvnettest.NewHub(t, 2, toolstack.Vif{}, func(i int) pvnet.Config { return pvnet.Config{Offload: takes[i]} },
				pvnet.ServeConfig{Config: pvnet.Config{Offload: true}})
			b, err := New(Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			var ports [2]*Port
			for i := range ports {
				if ports[i], err = b.Add(h.Backs[i], PortConfig{}); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan struct{})
				go func() {
					defer close(done)
					link.Join(ctx, h.Fronts[i], taps[i])
				}()
				t.Cleanup(func() { cancel(); <-done })
			}
			var l net.Listener
			spaces[1].do(func() { l, err = net.Listen("tcp", netip.AddrPortFrom(addrs[1].Addr(), 0).String()) })
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			var near net.Conn
			spaces[0].do(func() {
				near, err = (&net.Dialer{Timeout: labtest.Limit}).Dial("tcp4", l.Addr().String())
			})
			if err != nil {
				t.Fatalf("%v; %+v %+v", err, ports[0].Stats(), ports[1].Stats())
			}
			defer near.Close()
			far, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			for i, way := range [][2]net.Conn{{near, far}, {far, near}} {
				if err := transfer(way[0], way[1], 8<<20, byte(i)); err != nil {
					t.Fatalf("way %d: %v; %+v %+v", i, err, ports[0].Stats(), ports[1].Stats())
				}
			}
			for i, p := range ports {
				s := p.Stats()
				if s.Flooded == 0 || s.Unicast < 100 || s.Unicast < 10*s.Flooded {
					t.Errorf("port %d: %+v", i, s)
				}
				if s.Out.Refused+s.Out.Oversize+s.Spoofed+s.Invalid != 0 {
					t.Errorf("port %d: %+v", i, s)
				}
				if long := h.Backs[i].Stats().RX.Get(telemetry.GSOPackets); long == 0 {
					t.Errorf("port %d: no long frame came from the guest", i)
				}
				if long := h.Backs[i].Stats().TX.Get(telemetry.GSOPackets); (long > 0) != takes[i] {
					t.Errorf("port %d: %d long frames went to the guest", i, long)
				}
			}
		})
	}
}

// transfer sends size bytes and fails unless they arrive.
func transfer(from, to net.Conn, size int, seed byte) error {
	key := [32]byte{seed}
	limit := time.Now().Add(labtest.Limit)
	from.SetDeadline(limit)
	to.SetDeadline(limit)
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
