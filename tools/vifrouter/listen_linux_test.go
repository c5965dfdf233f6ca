//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/pvnet/link"

	"golang.org/x/sys/unix"
)

// insideSpace names the test that runs in a network namespace of its own.
const insideSpace = "BAREVIF_VIFROUTER_TEST_INSIDE"

// inSpace runs a test in a process that has a network namespace of its own, which needs no root. It reports
// whether this is that process.
func inSpace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideSpace) == t.Name() {
		return true
	}
	runtime.LockOSThread() // Pdeathsig fires when this thread ends
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), insideSpace+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err != nil && !errors.As(err, &exit):
		t.Skip("this machine gives no network namespace:", err)
	case err != nil:
		t.Fatalf("%v\n%s", err, out)
	case strings.Contains(string(out), "\n--- SKIP"):
		t.Skipf("%s", out)
	}
	t.Logf("%s", out)
	return false
}

// ip runs a command of iproute2.
func ip(t *testing.T, command string) string {
	t.Helper()
	words := strings.Fields(command)
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// members returns the groups that the bridge has learnt at a port.
func members(t *testing.T, port string) (list []string) {
	t.Helper()
	var all []struct {
		MDB []struct{ Port, Grp string } `json:"mdb"`
	}
	if err := json.Unmarshal([]byte(ip(t, "bridge -j mdb show dev br0")), &all); err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		for _, m := range one.MDB {
			if m.Port == port {
				list = append(list, m.Grp)
			}
		}
	}
	return list
}

// pings sends a neighbour that has to be found an echo request, and waits for the answer.
func pings(ctx context.Context, from, to netip.Addr) error {
	c, err := net.ListenPacket("ip6:ipv6-icmp", from.String())
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, 1500)
	for n := byte(0); ; n++ {
		if _, err := c.WriteTo([]byte{typeEcho6, 0, 0, 0, 0, 7, 0, n}, &net.IPAddr{IP: to.AsSlice()}); err != nil && !errors.Is(err, unix.EHOSTUNREACH) {
			return err
		}
		end := time.Now().Add(time.Second)
		for time.Now().Before(end) {
			c.SetReadDeadline(end)
			k, who, err := c.ReadFrom(b)
			if err == nil && k == 8 && b[0] == typeEcho6+1 && b[5] == 7 && who.String() == to.String() {
				return nil
			}
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%v does not answer %v: %w", to, from, ctx.Err())
		}
	}
}

// openPort makes the interface router0, and opens its other end: a TAP, or where this user may have none a veth pair.
func openPort(t *testing.T) interface {
	link.Link
	Close() error
} {
	t.Helper()
	tap, err := link.OpenTAP(link.TAPConfig{Name: "router0", MTU: 1500})
	if err == nil {
		return tap
	}
	if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
		t.Fatal(err)
	}
	for _, command := range []string{"ip link add router0 type veth peer name outside", "ip link set outside addrgenmode none arp off up"} {
		ip(t, command)
	}
	packets, err := link.OpenPacket("outside")
	if err != nil {
		t.Fatal(err)
	}
	return packets
}

// A bridge of Linux that snoops, and asks who listens, brings a station's solicitation to a port only if
// somebody there has said that he listens to the group: the router is found, and stays so as long as it answers, by
// either version.
func TestARouterIsFoundBehindASwitchThatSnoops(t *testing.T) {
	for _, program := range []string{"ip", "bridge"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("needs iproute2:", err)
		}
	}
	if !inSpace(t) {
		return
	}
	// Queries come every second, and a group that nobody speaks of is forgotten after three.
	const times = "mcast_query_interval 100 mcast_query_response_interval 50 mcast_startup_query_interval 100 mcast_membership_interval 300"
	if out, err := exec.Command("ip", strings.Fields("link add br0 type bridge mcast_snooping 1 mcast_mld_version 2 "+times)...).CombinedOutput(); err != nil {
		t.Skipf("this kernel has no bridge that snoops: %v: %s", err, out)
	}
	port := openPort(t)
	defer port.Close()
	for _, name := range []string{"router0", "br0"} {
		ip(t, "ip link set "+name+" addrgenmode none")
	}
	for _, command := range []string{
		"ip link add host0 type veth peer name port0",
		"ip link set port0 addrgenmode none",
		"ip link set port0 master br0 up", "ip link set router0 master br0 up", "ip link set br0 up", "ip link set host0 up",
		"ip addr add fe80::b/64 dev br0 nodad", // it asks from there
		"ip addr add 2001:db8::1/64 dev host0 nodad",
		"ip link set br0 type bridge mcast_querier 1",
	} {
		ip(t, command)
	}
	s := newWorldless(t, standard+"allow from uplink to router proto icmpv6 type 128\n")
	ctx, cancel := context.WithCancel(context.Background())
	joined := make(chan error, 1)
	dev := s.uplinkDevice()
	go func() { joined <- link.Join(ctx, dev, port) }()
	defer func() {
		cancel()
		if err := <-joined; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	router := netip.MustParseAddr("2001:db8::2")
	for _, version := range []string{"2", "1"} {
		ip(t, "ip link set br0 type bridge mcast_mld_version "+version)
		before := s.d.listens.now().Queries
		// The first finds a bridge that may not have a querier yet, and the last one that would have forgotten.
		s.comes("queries of version "+version, func() bool {
			now := s.d.listens.now()
			return now.Queries >= before+6 && now.MLDv1 == (version == "1")
		})
		s.comes("the bridge knows the groups", func() bool {
			have := members(t, "router0")
			return slices.Contains(have, staticGroup.String()) && slices.Contains(have, cardGroup.String())
		})
		ip(t, "ip neigh flush dev host0")
		if err := pings(s.ctx, worldAddr6, router); err != nil {
			t.Errorf("%v\n%s%s", err, ip(t, "bridge -d mdb show"), ip(t, "ip -6 neigh show"))
		}
		t.Logf("version %s: %+v, the bridge has %v", version, s.d.listens.now(), members(t, "router0"))
	}
}
