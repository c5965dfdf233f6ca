//go:build linux

package command_test

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// iface changes an interface of the test's network namespace.
func iface(t *testing.T, name string, change func(netlink.Link) error) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = change(l)
	}
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func mtu(n int) func(netlink.Link) error {
	return func(l netlink.Link) error { return netlink.LinkSetMTU(l, n) }
}

// awaitMTU waits until an interface has an MTU.
func awaitMTU(t *testing.T, name string, want int) {
	t.Helper()
	got := 0
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		iface(t, name, func(l netlink.Link) error { got = l.Attrs().MTU; return nil })
		if got == want {
			return
		}
	}
	t.Fatalf("the MTU of %s is %d, not %d", name, got, want)
}

// An operator sets the backend's TAP, or its bridge, down and up, and changes its MTU. The
// frontend learns each, and so does the TAP in which the guest's kernel has the vif. What
// the toolstack writes reaches the backend's TAP and, through it, the guest.
func TestFrontendsLearnOfTheNetworkBehindTheirVif(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "lan", TxQLen: -1}}); err != nil {
		t.Skip("this machine gives no bridge: ", err)
	}
	iface(t, "lan", netlink.LinkSetUp)
	s := newSite(t)
	b := s.back("--bridge", "lan")
	b.await("joined to vif1.0, MTU 1500", 1)
	g := start(t, nil, s.bin, "attach", "--emu", s.socket, "--tap", "card%i")
	g.await("the kernel has it as card0", 1)

	carrier := func(want int) {
		t.Helper()
		for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
			var state netlink.LinkOperState
			iface(t, "card0", func(l netlink.Link) error { state = l.Attrs().OperState; return nil })
			if (state == netlink.OperDown) == (want == 0) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("card0 is %v, wanted carrier %d", state, want)
			}
		}
	}
	for n, name := range []string{"vif1.0", "lan"} {
		iface(t, name, netlink.LinkSetDown)
		g.await("vif 0: down: the backend has no carrier", n+1)
		carrier(0)
		iface(t, name, netlink.LinkSetUp)
		g.await("vif 0: connected again", n+1)
		carrier(1)
	}
	for _, n := range []int{9000, 1280} {
		iface(t, "vif1.0", mtu(n))
		g.await(fmt.Sprintf("vif 0: its MTU is now %d", n), 1)
		b.await(fmt.Sprintf("vif 1.0: its MTU is now %d", n), 1)
		awaitMTU(t, "card0", n)
		awaitMTU(t, "vif1.0", n)
	}
	g.signal(syscall.SIGTERM)
	g.exit(0)
}
