//go:build linux

package command_test

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"

	"barevif/xenbus/toolstack"

	"github.com/vishvananda/netlink"
)

// A guest that is told no address takes the one that the toolstack has for it; what cannot be
// used is an error that names the key.
func TestAGuestTakesTheAddressOfTheToolstack(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1,ip=10.9.4.7/24")
	b := s.back("--addr", "10.9.4.1/24")
	key := dirOf(toolstack.Vif{Front: 1, Back: 2}) + "/ip"
	ip := func(value string) {
		t.Helper()
		if err := s.tools().Write(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
	serves := func(says, address string, args ...string) {
		t.Helper()
		g := s.serve(args...)
		g.await(says, 1)
		g.await("serving http://"+address+"/", 1)
		g.signal(syscall.SIGTERM)
		g.exit(0)
	}
	g := s.serve()
	g.await("address 10.9.4.7/24, from the toolstack", 1)
	g.await("serving http://10.9.4.7/", 1)
	b.await("connected to domain 1", 1)
	ping(t, "10.9.4.7")
	g.signal(syscall.SIGTERM)
	g.exit(0)
	serves("MTU 1500", "10.9.4.9", "--addr", "10.9.4.9/24")
	ip("10.9.4.8 255.255.255.0 10.9.4.1")
	serves("address 10.9.4.8/24, from the toolstack", "10.9.4.8")
	ip("10.9.4.5/25 fd00::9/64 10.9.4.5/24")
	serves("addresses 10.9.4.5/25 fd00::9/64, from the toolstack", "10.9.4.5", "--addr", "auto", "--gateway", "10.9.4.1")
	ip("10.9.4.6")
	serves("address 10.9.4.6/24, from the toolstack", "10.9.4.6", "--addr", "auto/24")

	for _, c := range []struct {
		ip   string
		args []string
		code int
		says []string
	}{
		{"10.9.4.6", nil, 1, []string{"ip=10.9.4.6 does not say which network", "next: write ip=10.9.4.6/24", "--addr auto/24"}},
		{"10.9.4.6,10.9.4.7", nil, 1, []string{key, `"10.9.4.6,10.9.4.7"`, "next: correct ip=..."}},
		{"10.9.4.6", []string{"--addr", "auto/40"}, 2, []string{"--addr auto/40: ip=10.9.4.6 has no network of 40 bits"}},
		{"10.9.4.6/24", []string{"--gateway", "10.8.0.1"}, 2, []string{"--gateway", "10.9.4.0/24"}},
	} {
		ip(c.ip)
		wants(t, s.serve(c.args...).exit(c.code), c.says...)
	}
	if err := s.tools().Remove(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	serves("the toolstack has no address for it, so it is 10.9.0.2/24", "10.9.0.2")
	b.signal(syscall.SIGTERM)
	b.exit(0)
}

// With --addr auto the TAP of attach gets the toolstack's addresses, all of them.
func TestATAPTakesTheAddressesOfTheToolstack(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1,ip=10.9.4.7/24 10.9.5.7 fd00::7/64")
	b := s.back()
	for args, want := range map[string]string{
		"auto":        "[10.9.4.7/24 10.9.5.7/32 fd00::7/64]",
		"auto/16":     "[10.9.4.7/24 10.9.5.7/16 fd00::7/64]",
		"10.9.6.1/24": "[10.9.6.1/24]",
	} {
		g := start(t, nil, s.bin, "attach", "--emu", s.socket, "--tap", "card%i", "--addr", args)
		g.await("the kernel has it as card0, ", 1)
		if got := addressesOf(t, "card0"); got != want {
			t.Errorf("--addr %s: card0 has %s, want %s", args, got, want)
		}
		g.signal(syscall.SIGTERM)
		g.exit(0)
	}
	g := start(t, nil, s.bin, "attach", "--emu", s.socket, "--tap", "card%i", "--addr", "auto/129")
	wants(t, g.exit(2), "--addr", "auto/129")
	b.signal(syscall.SIGTERM)
	b.exit(0)
}

// The toolstack changes the addresses while the vif is connected: the stack of serve follows, and
// a value of no use is named and changes nothing.
func TestServeFollowsTheAddressOfTheToolstack(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1,ip=10.9.4.7/24")
	b := s.back("--addr", "10.9.4.1/24")
	ip := func(value string) {
		t.Helper()
		if err := s.tools().Write(t.Context(), dirOf(toolstack.Vif{Front: 1, Back: 2})+"/ip", value); err != nil {
			t.Fatal(err)
		}
	}
	g := s.serve()
	g.await("serving http://10.9.4.7/", 1)
	b.await("connected to domain 1", 1)
	ping(t, "10.9.4.7")
	ip("10.9.4.8/24 10.9.4.9/24")
	g.await("addresses 10.9.4.8/24 10.9.4.9/24, from the toolstack", 1)
	g.await("serving http://10.9.4.8/", 1)
	ping(t, "10.9.4.8")
	ping(t, "10.9.4.9")
	ip("10.9.4.300")
	g.await("a vif, which keeps those it has", 1)
	g.await("10.9.4.300", 1)
	ping(t, "10.9.4.9")
	ip("10.9.4.10")
	g.await("does not say which network", 1)
	ping(t, "10.9.4.9")
	ip("10.9.4.7 255.255.255.0 10.9.4.1")
	g.await("address 10.9.4.7/24, from the toolstack", 2)
	ping(t, "10.9.4.7")
	for _, end := range []*process{g, b} {
		end.signal(syscall.SIGTERM)
		end.exit(0)
	}
}

// The same for attach: its TAP gets the new addresses and loses those that attach gave it.
// Addresses of the machine's own stay, also if they are in a network of which attach had the
// first address.
func TestAttachFollowsTheAddressesOfTheToolstack(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1,ip=10.9.4.7/24 fd00::7/64")
	b := s.back()
	key := dirOf(toolstack.Vif{Front: 1, Back: 2}) + "/ip"
	ip := func(value string) {
		t.Helper()
		if err := s.tools().Write(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
	has := func(want string) {
		t.Helper()
		got := strings.Fields(strings.Trim(addressesOf(t, "card0"), "[]"))
		slices.Sort(got) // the kernel moves those that it promotes
		if fmt.Sprint(got) != want {
			t.Errorf("card0 has %s, want %s", got, want)
		}
	}
	run := func(more ...string) *process {
		return start(t, nil, s.bin, append([]string{"attach", "--emu", s.socket, "--tap", "card%i", "--addr", "auto/16"}, more...)...)
	}
	g := run()
	g.await("the kernel has it as card0, ", 1)
	has("[10.9.4.7/24 fd00::7/64]")
	card, err := netlink.LinkByName("card0")
	if err != nil {
		t.Fatal(err)
	}
	for _, own := range []string{"10.9.4.99/24", "10.9.5.1/24"} {
		a, err := netlink.ParseAddr(own)
		if err == nil {
			err = netlink.AddrAdd(card, a)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ip("10.9.6.7/24 10.9.5.1/24 fd00::8/64")
	g.await("card0 has 10.9.6.7/24 fd00::8/64", 1)
	has("[10.9.4.99/24 10.9.5.1/24 10.9.6.7/24 fd00::8/64]")
	ip("10.9.6.7/24 10.9.6.300/24")
	g.await("a vif, which keeps those it has", 1)
	has("[10.9.4.99/24 10.9.5.1/24 10.9.6.7/24 fd00::8/64]")

	// A successor goes on with a vif whose key is of no use, but not with its addresses.
	next := run("--take-over")
	g.exit(0)
	next.await("keeps its addresses", 1)
	has("[10.9.4.99/24 10.9.5.1/24 10.9.6.7/24 fd00::8/64]")

	// One that can read it does: it takes away what those before it have given.
	ip("10.9.6.7/24 fd00::8/64")
	g = next
	next = run("--take-over")
	g.exit(0)
	ip("10.9.7.7")
	next.await("card0 has 10.9.7.7/16", 1)
	has("[10.9.4.99/24 10.9.5.1/24 10.9.7.7/16]")
	if err := s.tools().Remove(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	next.await("card0 has none of them", 1)
	has("[10.9.4.99/24 10.9.5.1/24]")
	for _, end := range []*process{next, b} {
		end.signal(syscall.SIGTERM)
		end.exit(0)
	}
}

// addressesOf returns the addresses of an interface, without link-local ones.
func addressesOf(t *testing.T, name string) string {
	t.Helper()
	i, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	all, err := i.Addrs()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range all {
		if p, ok := a.(*net.IPNet); ok && !p.IP.IsLinkLocalUnicast() {
			out = append(out, p.String())
		}
	}
	return fmt.Sprint(out)
}
