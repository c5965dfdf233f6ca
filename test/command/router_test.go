//go:build linux

package command_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"barevif/hypercall/anyxen"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
	"barevif/pvnet/netstack"
)

// routerConf is the configuration of a router between this kernel, which has 192.0.2.1 at the
// other end of the uplink, and guests.
const routerConf = `uplink vif 0
uplink ipv4 192.0.2.2/24 via 192.0.2.1
network office ipv4 10.137.0.0/24 router 10.137.0.1 pool 10.137.0.100-10.137.0.110
guest web in office domain 3 ipv4 10.137.0.7
guest * in office
dns off
metrics router 192.0.2.2:9100
allow from uplink to router proto icmp type 8
allow from uplink to router proto tcp port 9100
`

// A router is a process that routes, beside a host, the world and guests, each a process too. The
// world is this kernel's TCP/IP behind a TAP. A guest leases its address, and serves through a
// forward, which a reload adds and takes away; a wrong file changes nothing. When the router is
// killed and comes back, all goes on.
func TestRouterIsAProcess(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1,back=2", "--vif", "front=3,back=1", "--vif", "front=4,back=1")
	s.back("--dom", "2", "--addr", "192.0.2.1/24", "--tap", "world%i").await("joined to world0", 1)
	file := filepath.Join(t.TempDir(), "router.conf")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(routerConf + "forward tcp 8080 to 10.137.0.7:80\n")
	look := filepath.Join(emutest.SocketDir(t), "look") // made by the router
	run := func() *process {
		return start(t, nil, routerProgram(t), "run", "--emu", s.socket, "--dom", "1", "--inspect", look, file)
	}
	status := func(args ...string) *process {
		return start(t, nil, routerProgram(t), append([]string{"status", "--inspect", look}, args...)...)
	}
	r := run()
	r.await("uplink vif 0: connected", 1)
	s.serve("--dom", "3", "--addr", "dhcp").await("address 10.137.0.7/32, from DHCP", 1)
	s.serve("--dom", "4", "--addr", "dhcp").await("address 10.137.0.100/32, from DHCP", 1)
	const url = "http://192.0.2.2:8080"
	fetch(t, url+"/")
	body := fetch(t, url+"/bytes/20000000")
	if sum := fetch(t, url+"/bytes/20000000.sha256"); !bytes.HasPrefix(sum, fmt.Appendf(nil, "%x", sha256.Sum256(body))) {
		t.Errorf("what arrives is not what was sent: %s", sum)
	}
	wants(t, string(fetch(t, "http://192.0.2.2:9100/metrics")), `vifrouter_forwarded_packets_total{port="3.0"} `, `vifrouter_dhcp_leases 2`, "# EOF\n")

	write(routerConf + "forward tcp 8080 to 10.137.0.7:80\nforward tcp 8081 to 10.137.0.100:80\n")
	r.signal(syscall.SIGHUP)
	r.await("the configuration was read again: 1 networks, 2 guests, 2 rules, 2 forwards", 1)
	fetch(t, "http://192.0.2.2:8081/")
	write(routerConf + "forward tcp 8080 10.137.0.7\nallow from nobody to uplink\n")
	r.signal(syscall.SIGHUP)
	r.await("the new configuration is not used, and the old one stays", 2)
	wants(t, r.text(), file+":10: ", file+":11: ", `no network and no guest is called \"nobody\"`)
	fetch(t, "http://192.0.2.2:8081/")
	wants(t, status().exit(0), "config    "+file+", read ", "1 taken, 1 refused", file+":10: ", "vif 0, up, backend in domain 2",
		"address 192.0.2.2/24, of the file", "gateway 192.0.2.1", "office   10.137.0.0/24  10.137.0.1  10.137.0.100-10.137.0.110", "10.137.0.100, leased")
	var all []struct {
		Guests []struct {
			Vif, Name, Link, IPv4 string
			Received              struct{ Packets uint64 }
		}
	}
	if err := json.Unmarshal([]byte(stdout(t, routerProgram(t), "status", "--inspect", look, "--json")), &all); err != nil || len(all) != 1 || len(all[0].Guests) != 2 {
		t.Fatalf("%v, %+v", err, all)
	}
	if g := all[0].Guests[0]; g.Vif != "3.0" || g.Name != "web" || g.Link != "up" || g.IPv4 != "10.137.0.7" || g.Received.Packets == 0 {
		t.Errorf("%+v", g)
	}

	write(routerConf + "forward tcp 8080 to 10.137.0.7:80\n")
	r.signal(syscall.SIGKILL)
	<-r.done
	wants(t, status().exit(1), "no router of this user or root runs here", "next: ")
	r = run()
	r.await("vif 3.0: connected", 1)
	fetch(t, url+"/")
	wants(t, status().exit(0), "not reloaded", "vif 0, up")
	r.signal(syscall.SIGTERM)
	if out := r.exit(0); strings.Contains(out, "level=ERROR") {
		t.Errorf("an ordinary end is no error:\n%s", out)
	}
	if left, err := os.ReadDir(look); err != nil || len(left) != 0 {
		t.Errorf("%v is left, %v", left, err)
	}
}

func TestRouterSaysWhatIsWrong(t *testing.T) {
	router := routerProgram(t)
	file := filepath.Join(t.TempDir(), "router.conf")
	if err := os.WriteFile(file, []byte(strings.Replace(routerConf, "dns off", "dns on\nfrobnicate", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	text := start(t, nil, router, "check", file).exit(1)
	wants(t, text, file+`:6: "on" is nothing of dns: write "dns to 192.0.2.53"`, file+`:7: "frobnicate" is no statement`, "next: ")
	if err := os.WriteFile(file, []byte(routerConf), 0o600); err != nil {
		t.Fatal(err)
	}
	wants(t, start(t, nil, router, "check", file).exit(0), "1 networks, 2 guests, 2 rules, 0 forwards; nothing is wrong")
	wants(t, start(t, nil, router, "check", file+"-none").exit(2), "no such file", `"vifrouter example" prints one`)
	wants(t, start(t, nil, router, "run").exit(2), "FILE is missing", "--line")
	wants(t, start(t, nil, router, "run", file, "--line", "dns off").exit(2), "both FILE and --line are given")
	wants(t, start(t, nil, router, "run", "--line", "uplink vif x").exit(2), `--line:1: "x" is no number of a vif`)
	wants(t, start(t, nil, router, "run", "--take", file).exit(2), "--take is for a real Xen")
	// The example is a configuration.
	example := start(t, nil, router, "example").exit(0)
	if err := os.WriteFile(file, []byte(example), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, nil, router, "check", file).exit(0)
}

// The uplink lives on what a server and router that is not ours gives: an address of each family,
// ways out and name servers. A router that is started again asks for an advertisement, and gets
// the same address. Guests leave with the uplink's addresses.
func TestRouterAndDnsmasq(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1,back=2", "--vif", "front=3,back=1")
	b := s.back("--dom", "2", "--addr", "10.9.6.1/24", "--tap", "card%i")
	file := filepath.Join(t.TempDir(), "router.conf")
	if err := os.WriteFile(file, []byte(`uplink vif 0
uplink ipv4 dhcp
uplink ipv6 auto
uplink nat ipv4 ipv6
network office ipv4 10.137.0.0/24 router 10.137.0.1 pool 10.137.0.100-10.137.0.110
network office ipv6 fd00:137::/56
guest * in office
dns uplink
allow from office to uplink
`), 0o600); err != nil {
		t.Fatal(err)
	}
	look := filepath.Join(emutest.SocketDir(t), "look")
	run := func() *process {
		return start(t, nil, routerProgram(t), "run", "--emu", s.socket, "--dom", "1", "--inspect", look, file)
	}
	r := run()
	b.await("connected to domain 1", 1)
	server := dnsmasq(t, "card0")
	const address = "uplink: address fd00:9:6:0:216:3eff:fe00:100/64, of a prefix that a router announces"
	live := func(r *process) {
		r.await("uplink: address 10.9.6.20/24 by DHCP", 1)
		r.await(address, 1)
		r.await("uplink: IPv6 router fe80::", 1)
	}
	live(r)
	wants(t, start(t, nil, routerProgram(t), "status", "--inspect", look).exit(0), "address 10.9.6.20/24, by DHCP until ",
		"address fd00:9:6:0:216:3eff:fe00:100/64, by a router's advertisement until ", "gateway 10.9.6.1, fe80::", "names asked of 10.9.6.1:53")
	r.signal(syscall.SIGTERM)
	r.exit(0)
	before := strings.Count(server.text(), "RTR-SOLICIT(card0)")
	r = run()
	live(r)
	server.await("RTR-SOLICIT(card0)", before+1)

	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	domain, err := anyxen.Open(ctx, anyxen.Config{Socket: s.socket, Domain: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer domain.(*emu.Domain).Destroy()
	guest, err := netstack.Connect(ctx, domain, "0", netstack.Config{DHCP: true, RA: true})
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	for now := range guest.Changes(ctx) {
		if len(now.Addrs) >= 2 && len(now.DNS) >= 2 {
			break
		}
	}
	for _, to := range []string{"10.9.6.1", "fd00:9:6::1"} {
		if _, err := guest.Ping(ctx, netip.MustParseAddr(to)); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
	if names, err := guest.Resolver().LookupHost(ctx, "web.test"); err != nil || !slices.Contains(names, "fd00:9:6::1") {
		t.Errorf("%v, %v", names, err)
	}
}

// systemd learns when a router is ready, when it reads its file again and has done so, whether
// the file is taken or not, and when it ends.
func TestSystemdFollowsTheRouter(t *testing.T) {
	s := newSite(t, "--vif", "front=1,back=2")
	file := filepath.Join(t.TempDir(), "router.conf")
	if err := os.WriteFile(file, []byte(routerConf), 0o600); err != nil {
		t.Fatal(err)
	}
	told := manager(t)
	r := start(t, nil, routerProgram(t), "run", "--emu", s.socket, "--dom", "1", "--inspect", "off", file)
	r.await("routes between 1 networks", 1)
	r.signal(syscall.SIGHUP)
	r.await("the configuration was read again", 1)
	if err := os.WriteFile(file, []byte("frobnicate\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.signal(syscall.SIGHUP)
	r.await("the new configuration is not used", 1)
	r.signal(syscall.SIGTERM)
	r.exit(0)
	var messages []string
	for _, m := range told() {
		first, rest, _ := strings.Cut(m, "\n")
		if first == "RELOADING=1" && !strings.HasPrefix(rest, "MONOTONIC_USEC=") {
			t.Errorf("%q", m)
		}
		messages = append(messages, first)
	}
	if want := []string{"READY=1", "RELOADING=1", "READY=1", "RELOADING=1", "READY=1", "STOPPING=1"}; !slices.Equal(messages, want) {
		t.Errorf("%q, want %q", messages, want)
	}
}
