//go:build linux

package command_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"

	"github.com/vishvananda/netlink"
)

// tools returns a client of the host's xenstore, as domain 0.
func (s *site) tools() *xenstore.Client {
	s.t.Helper()
	socket := filepath.Join(filepath.Dir(s.socket), "xenstored.sock")
	c, err := xenstore.Dial(s.t.Context(), func(ctx context.Context) (io.ReadWriteCloser, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}, xenstore.Config{})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// soon waits until ok returns no error.
func soon(t *testing.T, ok func() error) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// key waits until a key of a vif's backend has a value that contains part; "" wants it empty
// or missing.
func key(t *testing.T, c *xenstore.Client, v toolstack.Vif, name, part string) {
	t.Helper()
	soon(t, func() error {
		got, err := c.Read(t.Context(), v.BackDir()+"/"+name)
		if err != nil && !errors.Is(err, xenstore.ErrNotFound) {
			return err
		}
		if part == "" && got != "" || !strings.Contains(got, part) {
			return fmt.Errorf("%s of vif %d.%d is %q, want %q", name, v.Front, v.ID, got, part)
		}
		return nil
	})
}

func dirOf(v toolstack.Vif) string { return v.BackDir() }

// bridge makes a bridge with an address, unless addr is "".
func bridge(t *testing.T, name, addr string) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Skip("this machine gives no bridge: ", err)
	}
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err == nil && addr != "" {
		var a *netlink.Addr
		if a, err = netlink.ParseAddr(addr); err == nil {
			err = netlink.AddrAdd(l, a)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// onBridge waits until the interface is on the bridge.
func onBridge(t *testing.T, name, bridge string) {
	t.Helper()
	soon(t, func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		br, err := netlink.LinkByName(bridge)
		if err == nil && l.Attrs().MasterIndex != br.Attrs().Index {
			err = fmt.Errorf("%s is not on %s", name, bridge)
		}
		return err
	})
}

// none waits until there is no interface of that name.
func none(t *testing.T, name string) {
	t.Helper()
	soon(t, func() error {
		if _, err := net.InterfaceByName(name); err == nil {
			return fmt.Errorf("%s is left behind", name)
		}
		return nil
	})
}

// A vif of the toolstack's bridge waits for the bridge, says so in xenstore and in the log,
// and stays on it: over a restart of the guest, and when the bridge is made anew.
func TestAVifIsPutOnItsBridge(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	v := toolstack.Vif{Front: 1, Back: 2}
	s := newSite(t, "--vif", "front=1,bridge=br7,ip=10.9.0.2,gatewaydev=eth7")
	c := s.tools()
	b := s.back()
	b.await("key=bridge value=br7", 1)
	key(t, c, v, "hotplug-status", "error")
	key(t, c, v, "hotplug-error", "bridge=br7: there is no such bridge; make it")
	key(t, c, v, "state", "2")
	wants(t, b.text(), "ip link add br7 type bridge")
	none(t, "vif1.0")
	out := s.serve("--wait", "3s").exit(1) // it must find the vif in that time
	wants(t, out, "br7", "no such bridge")

	// An interface of that name that is no bridge is no better.
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "br7", TxQLen: -1}, PeerName: "other"}); err != nil {
		t.Skip("this machine gives no veth pair: ", err)
	}
	key(t, c, v, "hotplug-error", "it is a veth, no bridge")
	veth, err := netlink.LinkByName("br7")
	if err == nil {
		err = netlink.LinkDel(veth)
	}
	if err != nil {
		t.Fatal(err)
	}

	g := s.serve("--addr", "10.9.0.2/24")
	br := bridge(t, "br7", "10.9.0.1/24")
	b.await("joined to vif1.0, MTU 1500, on bridge br7", 1)
	key(t, c, v, "hotplug-status", "connected")
	key(t, c, v, "hotplug-error", "")
	g.await("serving http", 1)
	b.await("connected to domain 1", 1) // the TAP drops what comes before
	ping(t, "10.9.0.2")
	wants(t, b.text(), "key=ip value=10.9.0.2", "key=gatewaydev value=eth7")

	t.Log("the guest is started again")
	g.signal(syscall.SIGKILL)
	<-g.done
	g = s.serve("--addr", "10.9.0.2/24")
	g.await("serving http", 1)
	b.await("connected to domain 1", 2)
	onBridge(t, "vif1.0", "br7")
	ping(t, "10.9.0.2")

	t.Log("the bridge is removed, and made again")
	if err := netlink.LinkDel(br); err != nil {
		t.Fatal(err)
	}
	b.await("its frames go nowhere", 1)
	bridge(t, "br7", "10.9.0.1/24")
	b.await("on bridge br7 again", 1)
	onBridge(t, "vif1.0", "br7")
	ping(t, "10.9.0.2")

	t.Log("the backend is killed, and started again")
	b.signal(syscall.SIGKILL)
	<-b.done
	b = s.back()
	b.await("connected to domain 1", 1)
	onBridge(t, "vif1.0", "br7")
	ping(t, "10.9.0.2")

	t.Log("a key is changed behind its back")
	if err := c.Write(t.Context(), v.BackDir()+"/bridge", "br8"); err != nil {
		t.Fatal(err)
	}
	g.signal(syscall.SIGTERM)
	g.exit(0)
	s.serve("--addr", "10.9.0.2/24")
	b.await("bridge=br8", 1)

	t.Log("the vif is taken away")
	if err := toolstack.Remove(t.Context(), c, v); err != nil {
		t.Fatal(err)
	}
	none(t, "vif1.0")
	b.await("vif 1.0: gone", 1)
	b.signal(syscall.SIGTERM)
	b.exit(0)
}

// With --lock-mac a guest reaches the bridge from its own address alone.
func TestAGuestIsHeldToItsAddress(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	v := toolstack.Vif{Front: 1, Back: 2}
	s := newSite(t, "--vif", "front=1,bridge=br7", "--vif", "front=1,id=1,script=vif-route")
	c := s.tools()
	br := bridge(t, "br7", "10.9.0.1/24")
	tap, err := link.OpenPacket("br7")
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	b := s.back("--lock-mac")
	b.await("key=--lock-mac", 1) // routed, not bridged
	dom, err := emu.Join(t.Context(), s.socket, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer dom.Destroy()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	guest, err := pvnet.Connect(ctx, dom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Disconnect()

	mine, others := guest.MAC(), pvnet.MAC{0x00, 0x16, 0x3e, 0x99, 0x99, 0x99}
	for round := range 2 {
		onBridge(t, "vif1.0", "br7")
		seen := make(map[byte]pvnet.MAC) // by the number of a frame
		for number := byte(0); len(seen) == 0; number += 2 {
			for i, from := range []pvnet.MAC{others, mine} {
				frame := append([]byte("\xff\xff\xff\xff\xff\xff"), from[:]...)
				frame = append(frame, 0x88, 0xb5, number+byte(i))
				if _, err := guest.Write(append(frame, make([]byte, 46)...)); err != nil {
					t.Fatal(err)
				}
			}
			tap.SetReadDeadline(time.Now().Add(200 * time.Millisecond)) // the port may still be blocked
			for buf := make([]byte, 2000); ; {
				n, _, err := tap.ReadFrame([][]byte{buf})
				if errors.Is(err, os.ErrDeadlineExceeded) {
					break
				}
				if err == nil && n > 14 && buf[12] == 0x88 && buf[13] == 0xb5 {
					seen[buf[14]] = pvnet.MAC(buf[6:12])
				}
			}
			if ctx.Err() != nil {
				t.Fatal("no frame reaches the bridge")
			}
		}
		for number, from := range seen {
			if from != mine {
				t.Errorf("frame %d of %v reached the bridge", number, from)
			}
		}
		if round == 0 { // and when the bridge is made anew
			if err := netlink.LinkDel(br); err != nil {
				t.Fatal(err)
			}
			b.await("its frames go nowhere", 1)
			tap.Close()
			bridge(t, "br7", "10.9.0.1/24")
			b.await("on bridge br7 again", 1)
			if tap, err = link.OpenPacket("br7"); err != nil {
				t.Fatal(err)
			}
			defer tap.Close()
		}
	}

	if err := c.Write(t.Context(), v.BackDir()+"/mac", "moon"); err != nil {
		t.Fatal(err)
	}
	b.signal(syscall.SIGTERM)
	b.exit(0)
	b = s.back("--lock-mac")
	key(t, c, v, "hotplug-error", "mac: there is no usable one, as --lock-mac needs")
	b.signal(syscall.SIGTERM)
	b.exit(0)
}

// TAPs have the names that the toolstack gives them, if nothing else has.
func TestAVifHasTheNameOfTheToolstack(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "taken"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "taken-peer"}); err != nil {
		t.Skip("this machine gives no veth pair: ", err)
	}
	s := newSite(t, "--vif", "front=1,vifname=web0", "--vif", "front=1,id=1,vifname=web0", "--vif", "front=1,id=2,vifname=taken",
		"--vif", "front=1,id=3,vifname=lo", "--vif", "front=1,id=4,vifname=longer-than-any0", "--vif", "front=1,id=5,vifname=a/../b",
		"--vif", "front=1,id=6,vifname=v%d", "--vif", "front=1,id=7,vifname=\x1b[2J\xff", "--vif", "front=1,id=8")
	c := s.tools()
	b := s.back()
	vif := func(id uint32) toolstack.Vif { return toolstack.Vif{Front: 1, Back: 2, ID: id} }
	first, second := vif(0), vif(1) // whichever was first has the name
	soon(t, func() error {
		status := make(map[string]toolstack.Vif)
		for id := range uint32(2) {
			got, err := c.Read(t.Context(), dirOf(vif(id))+"/hotplug-status")
			if err != nil {
				return err
			}
			status[got] = vif(id)
		}
		if len(status) != 2 || status["connected"].Front == 0 || status["error"].Front == 0 {
			return fmt.Errorf("of two vifs of one name: %v", status)
		}
		first, second = status["connected"], status["error"]
		return nil
	})
	for id, says := range map[uint32]string{
		second.ID: "vifname=web0: there is an interface of that name",
		2:         "vifname=taken: there is an interface of that name",
		3:         "vifname=lo: there is an interface of that name",
		4:         "the name of an interface: 1 to 15 printable bytes",
		5:         `vifname="a/../b"`,
		6:         `vifname="v%d"`,
		7:         `vifname="\x1b[2J\xff"`,
	} {
		key(t, c, vif(id), "hotplug-status", "error")
		key(t, c, vif(id), "hotplug-error", says)
	}
	key(t, c, vif(8), "hotplug-status", "connected")
	if strings.Contains(b.text(), "\x1b") || strings.Contains(b.text(), "\xff") {
		t.Error("bytes of xenstore reach the terminal")
	}

	t.Log("the name becomes free")
	if err := toolstack.Remove(t.Context(), c, first); err != nil {
		t.Fatal(err)
	}
	key(t, c, second, "hotplug-status", "connected")
	b.await(fmt.Sprintf("vif 1.%d: joined to web0", second.ID), 1)

	t.Log("a key is corrected")
	if err := c.Write(t.Context(), dirOf(vif(5))+"/vifname", "b0"); err != nil {
		t.Fatal(err)
	}
	b.await("vif 1.5: joined to b0", 1)
	b.signal(syscall.SIGTERM)
	b.exit(0)
	for _, name := range []string{"web0", "b0", "vif1.8"} {
		none(t, name)
	}
	if _, err := net.InterfaceByName("taken"); err != nil {
		t.Error(err)
	}
}

// With script=vif-route this machine routes to the guest's addresses.
func TestAVifIsRouted(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1,bridge=xenbr0,script=/etc/xen/scripts/vif-route,ip=10.9.0.2 10.8.0.0/24 fd00:9::2,gatewaydev=up0",
		"--vif", "front=3,script=vif-route,ip=10.9.0.2,gatewaydev=up0",
		"--vif", "front=4,script=vif-barevif-route,ip=10.9.0.4,gatewaydev=bare0",
		"--vif", "front=5,script=vif-route,ip=10.9.0.5 moon",
		"--vif", "front=6,script=vif-route")
	c := s.tools()
	b := s.back()
	key(t, c, toolstack.Vif{Front: 1, Back: 2}, "hotplug-error", "gatewaydev=up0: ")
	bridge(t, "bare0", "")
	bridge(t, "up0", "10.9.0.1/32")
	key(t, c, toolstack.Vif{Front: 4, Back: 2}, "hotplug-error", "gatewaydev=bare0: it has no IPv4 address")
	key(t, c, toolstack.Vif{Front: 5, Back: 2}, "hotplug-error", `ip="10.9.0.5 moon": not a list`)
	key(t, c, toolstack.Vif{Front: 6, Back: 2}, "hotplug-status", "connected")
	one, three := toolstack.Vif{Front: 1, Back: 2}, toolstack.Vif{Front: 3, Back: 2}
	soon(t, func() error { // one of the two has the address
		for _, v := range []toolstack.Vif{one, three} {
			if got, err := c.Read(t.Context(), v.BackDir()+"/hotplug-error"); err == nil && strings.Contains(got, "ip=10.9.0.2: there is a route to it already") {
				return nil
			}
		}
		return errors.New("two vifs of one address, and none is refused")
	})
	if got, err := c.Read(t.Context(), three.BackDir()+"/hotplug-status"); err == nil && got == "connected" {
		if err := toolstack.Remove(t.Context(), c, three); err != nil {
			t.Fatal(err)
		}
	}
	b.await("vif 1.0: joined to vif1.0, MTU 1500, routed to 10.9.0.2 10.8.0.0/24 fd00:9::2", 1)
	s.serve("--addr", "10.9.0.2/24").await("serving http", 1)
	b.await("vif 1.0: connected to domain 1", 1)
	ping(t, "10.9.0.2")
	l, err := netlink.LinkByName("vif1.0")
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_V4)
	if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != "10.9.0.1/32" {
		t.Errorf("the TAP has %v, %v", addrs, err)
	}
	for family, want := range map[int][]string{
		netlink.FAMILY_V4: {"10.9.0.2/32", "10.8.0.0/24"}, netlink.FAMILY_V6: {"fd00:9::2/128"},
	} {
		routes, err := netlink.RouteList(l, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, dst := range want {
			found := false
			for _, r := range routes {
				if r.Dst != nil && r.Dst.String() == dst && r.Priority == 2 {
					found = true
					if family == netlink.FAMILY_V4 && r.Src.String() != "10.9.0.1" {
						t.Errorf("the route to %s is from %v", dst, r.Src)
					}
				}
			}
			if !found {
				t.Errorf("no route to %s: %v", dst, routes)
			}
		}
	}
	b.signal(syscall.SIGTERM)
	b.exit(0)
	none(t, "vif1.0")
	if routes, err := netlink.RouteList(nil, netlink.FAMILY_V4); err != nil || strings.Contains(fmt.Sprint(routes), "10.8.0.0") {
		t.Errorf("routes are left: %v, %v", routes, err)
	}
}

// What the flags say, and what the toolstack says, and who is heard.
func TestKeysAndFlags(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t,
		"--vif", "front=1,bridge=xenbr0,script=/etc/xen/scripts/vif-bridge", // what libxl writes where nothing was said
		"--vif", "front=1,id=1,bridge=br1,script=vif-barevif,vifname=own1",
		"--vif", "front=1,id=2,bridge=xenbr0,script=/etc/xen/scripts/vif-nat",
		"--vif", "front=1,id=3,bridge=nosuch")
	c := s.tools()
	vif := func(id uint32) toolstack.Vif { return toolstack.Vif{Front: 1, Back: 2, ID: id} }
	if err := c.Write(t.Context(), dirOf(vif(0))+"/forwarddev", "eth0"); err != nil {
		t.Fatal(err)
	}
	if err := c.Write(t.Context(), dirOf(vif(0))+"/type", "vif_ioemu"); err != nil {
		t.Fatal(err)
	}
	if err := c.Write(t.Context(), dirOf(vif(0))+"/mac", "moon"); err != nil {
		t.Fatal(err)
	}
	bridge(t, "br0", "")
	bridge(t, "br1", "")

	t.Log("nothing is said but keys")
	b := s.back()
	key(t, c, vif(0), "hotplug-error", "bridge=xenbr0: there is no such bridge")
	key(t, c, vif(2), "hotplug-error", "script=/etc/xen/scripts/vif-nat: back runs no scripts; ")
	onBridge(t, "own1", "br1")
	b.signal(syscall.SIGTERM)
	b.exit(0)

	t.Log("a bridge for those of which the toolstack names none")
	b = s.back("--bridge", "br0")
	b.await("joined to", 3)
	onBridge(t, "vif1.0", "br0")
	onBridge(t, "own1", "br1")
	onBridge(t, "vif1.2", "br0")
	wants(t, b.text(), "key=script value=/etc/xen/scripts/vif-nat", "key=forwarddev", "key=type value=vif_ioemu", `key=mac value="\"moon\""`)
	key(t, c, vif(3), "hotplug-error", "bridge=nosuch")
	if err := c.Write(t.Context(), dirOf(vif(3))+"/vlan", "7"); err != nil {
		t.Fatal(err)
	}
	key(t, c, vif(3), "hotplug-error", "vlan: ")
	b.signal(syscall.SIGTERM)
	b.exit(0)

	t.Log("an address for one vif")
	b = s.back("--addr", "1.1=10.9.1.1/24")
	b.await("joined to own1, MTU 1500; ", 1)
	b.await("key=bridge value=br1", 1)
	b.signal(syscall.SIGTERM)
	b.exit(0)

	t.Log("flags alone")
	b = s.back("--hotplug", "flags")
	b.await("joined to vif1.", 4)
	b.signal(syscall.SIGTERM)
	b.exit(0)

	t.Log("an interface that all share")
	b = s.back("--packet", "lo")
	b.await("key=bridge value=br1", 1)
	b.await("key=vifname value=own1", 1)
	b.signal(syscall.SIGTERM)
	b.exit(0)

	t.Log("a script of the toolstack")
	v := toolstack.Vif{Front: 1, Back: 2, ID: 9, MAC: [6]byte{2, 0, 0, 0, 0, 9}, Script: "/etc/xen/scripts/vif-nat", Bridge: "nosuch", Name: "later0"}
	if err := toolstack.Add(t.Context(), c, v); err != nil {
		t.Fatal(err)
	}
	b = s.back("--hotplug", "script")
	b.await("joined to vif1.9, MTU 1500, set up by the toolstack's script", 1)
	g := s.serve("--vif", "9", "--addr", "10.9.9.2/24", "--wait", "0")
	key(t, c, v, "state", "2")
	l, err := netlink.LinkByName("vif1.9")
	if err == nil && l.Attrs().Flags&net.FlagUp != 0 {
		t.Error("the TAP is up before the script: Linux before 6.2 would not rename it")
	}
	if err == nil {
		err = netlink.LinkSetName(l, "later0")
	}
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err == nil {
		var a *netlink.Addr
		if a, err = netlink.ParseAddr("10.9.9.1/24"); err == nil {
			err = netlink.AddrAdd(l, a)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	key(t, c, v, "hotplug-status", "")
	if err := c.Write(t.Context(), v.BackDir()+"/hotplug-status", "connected"); err != nil {
		t.Fatal(err)
	}
	g.await("serving http", 1)
	b.await("connected to domain 1", 1)
	ping(t, "10.9.9.2")

	t.Log("the script does not run again for the next backend")
	b.signal(syscall.SIGKILL)
	<-b.done
	b = s.back("--hotplug", "script")
	b.await("joined to later0, MTU 1500; ", 1)
	b.await("key=script value=/etc/xen/scripts/vif-nat", 1)
	b.signal(syscall.SIGTERM)
	b.exit(0)
	start(t, nil, s.bin, "back", "--hotplug", "moon").exit(2)
}
