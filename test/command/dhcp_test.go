//go:build linux

package command_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"barevif/hypercall/anyxen"
	"barevif/hypercall/emu"
	"barevif/pvnet/netstack"

	"github.com/vishvananda/netlink"
)

// dnsmasq starts Debian's dnsmasq on the TAP of a vif, with the address 10.9.6.1/24 there: a DHCP
// server, a router that advertises fd00:9:6::/64, and a name server. It skips the test where
// there is none.
func dnsmasq(t *testing.T, tap string) *process {
	t.Helper()
	program, err := exec.LookPath("dnsmasq")
	if err != nil {
		program = "/usr/sbin/dnsmasq"
	}
	if _, err := os.Stat(program); errors.Is(err, fs.ErrNotExist) {
		t.Skip("dnsmasq is not installed (Debian: dnsmasq-base)")
	}
	link, err := netlink.LinkByName(tap)
	if err != nil {
		t.Fatal(err)
	}
	addr, err := netlink.ParseAddr("fd00:9:6::1/64")
	if err != nil {
		t.Fatal(err)
	}
	addr.Flags = syscall.IFA_F_PERMANENT | 0x02 // IFA_F_NODAD: at once
	if err := netlink.AddrAdd(link, addr); err != nil {
		t.Skip("this machine gives its cards no IPv6 address: ", err)
	}
	p := start(t, nil, program, "--no-daemon", "--log-dhcp", "--conf-file=/dev/null",
		"--pid-file=", "--dhcp-leasefile="+filepath.Join(t.TempDir(), "leases"),
		"--interface="+tap, "--bind-interfaces", "--no-resolv", "--no-hosts", "--no-ping",
		"--dhcp-range=10.9.6.20,10.9.6.20,255.255.255.0,2m", "--dhcp-option=option:T1,5", "--dhcp-option=option:T2,100",
		"--dhcp-option=option:mtu,1400", "--enable-ra", "--dhcp-range=fd00:9:6::,ra-only,64,10m",
		"--address=/web.test/10.9.6.1", "--address=/web.test/fd00:9:6::1")
	p.await("DHCP, sockets bound exclusively to interface "+tap, 1)
	return p
}

// A stack asks a real server: it leases and renews an address, follows a real router's
// advertisement, and looks names up.
func TestStackAndDnsmasq(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t)
	b := s.back("--addr", "10.9.6.1/24", "--tap", "card%i")
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	domain, err := anyxen.Open(ctx, anyxen.Config{Socket: s.socket})
	if err != nil {
		t.Fatal(err)
	}
	defer domain.(*emu.Domain).Destroy()
	stack, err := netstack.Connect(ctx, domain, "0", netstack.Config{Addr: netip.MustParsePrefix("10.9.6.9/24"), DHCP: true, RA: true, Hostname: "guest"})
	if err != nil {
		t.Fatal(err)
	}
	defer stack.Close()
	b.await("connected to domain 1", 1)
	server := dnsmasq(t, "card0")

	leased := netip.MustParsePrefix("10.9.6.20/24")
	var now netstack.Settings
	for now = range stack.Changes(ctx) {
		if len(now.Addrs) == 3 && len(now.DNS) >= 2 {
			break
		}
	}
	if len(now.Addrs) != 3 || now.Addrs[1] != (netstack.Address{Prefix: leased, Origin: netstack.Leased}) ||
		now.Addrs[2].Origin != netstack.Announced || !netip.MustParsePrefix("fd00:9:6::/64").Contains(now.Addrs[2].Addr()) {
		t.Fatalf("%+v\n%s", now, server.text())
	}
	var routers []string
	for _, r := range now.Routes {
		routers = append(routers, r.To.String())
	}
	if !slices.Contains(routers, "0.0.0.0/0") || !slices.Contains(routers, "::/0") || now.MTU != 1400 {
		t.Errorf("%+v", now)
	}
	if names, err := stack.Resolver().LookupHost(ctx, "web.test"); err != nil || !slices.Contains(names, "10.9.6.1") || !slices.Contains(names, "fd00:9:6::1") {
		t.Errorf("%v, %v", names, err)
	}
	var missing *net.DNSError
	if _, err := stack.Dial("tcp", "none.test:80"); !errors.As(err, &missing) {
		t.Error(err)
	}
	for _, to := range []string{"10.9.6.1", "fd00:9:6::1"} {
		if _, err := stack.Ping(ctx, netip.MustParseAddr(to)); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
	// Renewed at T1, after 5 s: the server sees a request from the address itself.
	server.await("DHCPACK(card0) 10.9.6.20", 2)
	if text := server.text(); strings.Count(text, "DHCPDISCOVER(card0)") != 1 || !strings.Contains(text, "client provides name: guest") {
		t.Error(text)
	}
}

func TestServeTakesItsAddressByDHCP(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t)
	b := s.back("--addr", "10.9.6.1/24", "--tap", "card%i")
	g := s.serve("--addr", "dhcp")
	g.await("waits for an address: DHCP and router advertisements; a signal ends it", 1)
	b.await("connected to domain 1", 1)
	dnsmasq(t, "card0")
	g.await("address 10.9.6.20/24, from DHCP; serving http://10.9.6.20/\n", 1)
	g.await("/64, from a router; serving http://[fd00:9:6:", 1)
	fetch(t, "http://10.9.6.20/")
	g.signal(syscall.SIGTERM)
	g.exit(0)
	wants(t, s.serve("--addr", "dhcp", "--gateway", "10.9.6.1").exit(2), "--gateway", "leave it away")
}
