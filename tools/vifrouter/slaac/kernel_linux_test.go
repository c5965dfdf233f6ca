//go:build linux

package slaac

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"barevif/pvnet/link"
	"barevif/pvnet/packet"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A neighbourhood is a kernel behind a TAP, in a network namespace of its own.
type neighbourhood struct {
	*testing.T
	tap    *link.TAP
	frames chan []byte // that the kernel sends
	calls  chan func() // to its thread
}

func newNeighbourhood(t *testing.T) *neighbourhood {
	n := &neighbourhood{T: t, frames: make(chan []byte, 64), calls: make(chan func())}
	made, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		made <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range n.calls {
			f()
		}
	}()
	err := <-made
	t.Cleanup(func() { close(n.calls); <-ended })
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs root, for a network namespace:", err)
	}
	if err == nil {
		n.do(func() { n.tap, err = link.OpenTAP(link.TAPConfig{MTU: 1500}) })
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			t.Skip("this machine gives no TAP:", err)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		b := make([]byte, link.MaxFrame)
		for {
			k, _, err := n.tap.ReadFrame([][]byte{b})
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				return
			}
			select {
			case n.frames <- append([]byte(nil), b[:k]...):
			default: // nobody looks for it
			}
		}
	}()
	t.Cleanup(func() { n.tap.Close(); <-read })
	return n
}

func (n *neighbourhood) do(f func()) {
	done := make(chan struct{})
	n.calls <- func() { defer close(done); f() }
	<-done
}

// address gives the kernel one.
func (n *neighbourhood) address(a netip.Addr, flags int) {
	n.Helper()
	var err error
	n.do(func() {
		var l netlink.Link
		if l, err = netlink.LinkByName(n.tap.Name()); err == nil {
			err = netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: flags})
		}
	})
	if err != nil {
		n.Fatal(err)
	}
}

// claims waits until something that the kernel sends claims an address of the client's. It sends the
// kernel frames, and again: an address that was added is not answered for before a worker has set it up.
func (n *neighbourhood) claims(c *Client, at time.Time, frames ...[]byte) (netip.Addr, byte) {
	n.Helper()
	limit, again := time.After(2*time.Minute), time.NewTicker(time.Second)
	defer again.Stop()
	send := func() {
		for _, frame := range frames {
			if _, err := n.tap.WriteFrame(link.Offload{}, [][]byte{frame}); err != nil {
				n.Fatal(err)
			}
		}
	}
	send()
	for {
		select {
		case <-again.C:
			send()
		case b := <-n.frames:
			h, ok := packet.Parse(b, len(b))
			if !ok || h.Version != 6 || h.Proto != 58 || h.L4 == 0 || b[h.L3+7] != 255 {
				continue
			}
			src, dst := netip.AddrFrom16([16]byte(b[h.L3+8:])), netip.AddrFrom16([16]byte(b[h.L3+24:]))
			if a, ok := c.Claimed(at, [6]byte(b[6:12]), src, dst, b[h.L4:h.End]); ok {
				return a, b[h.L4]
			}
		case <-limit:
			n.Fatal("the kernel claims nothing")
		}
	}
}

// Linux answers the solicitation for an address that it has, and its own duplicate address
// detection is noticed.
func TestLinuxClaimsWhatItHasAndWants(t *testing.T) {
	n := newNeighbourhood(t)
	n.address(global, unix.IFA_F_NODAD)
	c := wants(t)
	at := now.Add(mostDelay)
	if a, typ := n.claims(c, at, c.Probes(at)...); a != global || typ != TypeAdvertisement {
		t.Errorf("%v, by message %d", a, typ)
	}
	if s := c.Settings(at.Add(answerWait)); len(s.Addrs) != 0 || len(s.Taken) != 1 {
		t.Errorf("%+v", s)
	}
	// The link-local address is free, and another prefix's is one that Linux asks for, too.
	both, err := Parse(first, message(0, 1800, prefixOption("2001:db8:2::/64", onLink|own, 7200, 3600)))
	if err != nil {
		t.Fatal(err)
	}
	at = at.Add(answerWait)
	c.Hear(at, both)
	wanted := packet.EUI64(netip.MustParsePrefix("2001:db8:2::/64"), mac)
	if s := c.Settings(at); len(s.Tentative) != 1 || s.Tentative[0] != wanted {
		t.Fatalf("%+v", s)
	}
	n.address(wanted, 0)
	if a, typ := n.claims(c, at); a != wanted || typ != TypeSolicitation {
		t.Errorf("%v, by message %d", a, typ)
	}
}
