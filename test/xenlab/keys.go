//go:build linux

package xenlab

import (
	"slices"
	"strings"
)

const keysBridge = "xenlabbr1"

// backKeys attaches a vif with each key of xl that says what it is joined to. Our backend in
// dom0 honours the key, or xl fails with its words. Then Debian's own scripts do the same with
// the backend's TAP, as with netback's interface.
func backKeys(t *T) {
	const addr, guestAddr, routed = "10.89.5.1", "10.89.5.2", "10.89.6.2"
	t.loadNetback(false)
	dom0 := t.Dom0()
	dom0.Run("modprobe", "-a", "tun", "bridge")
	start := func(args ...string) *Process {
		p := dom0.Start(append([]string{barevif, "back", "-v", "--xen"}, args...)...)
		p.Await("serves vifs")
		return p
	}
	back := start()
	guest := t.Create(Guest{Name: "domU", Type: PV})
	guest.Run("modprobe", "xen-netfront")
	vif := guest.VIF(0)

	attach := func(keys ...string) Result {
		return dom0.Try(slices.Concat([]string{"xl", "network-attach", guest.Name, "mac=" + MAC(0)}, keys)...)
	}
	attached := func(keys ...string) {
		if r := attach(keys...); r.problem() != nil {
			t.Fatalf("xl network-attach %v: %w", keys, r.problem())
		}
	}
	refused := func(want string, keys ...string) {
		r := attach(keys...)
		if r.Err != nil || r.Exit == 0 || !strings.Contains(string(r.Stderr), want) {
			t.Fatalf("xl network-attach %v, wanted an error with %q: exit %d: %s", keys, want, r.Exit, r.Stderr)
		}
		for line := range strings.Lines(string(r.Stderr)) {
			if strings.Contains(line, want) {
				t.Logf("xl: %s", line)
			}
		}
	}
	detach := func() {
		dom0.Run("xl", "network-detach", guest.Name, "0")
		guest.Await("the interface to go", "[ ! -e /sys/class/net/eth0 ]")
	}
	up := func(cidr string) {
		guest.Await("a network interface", "ip link set eth0 up")
		guest.Sh("ip addr add %s dev eth0", cidr)
		guest.awaitCarrier("eth0")
	}
	onBridge := func(name string) {
		dom0.Await(name+" on the bridge", "[ -e /sys/class/net/%s/brif/%s ]", keysBridge, name)
	}
	reaches := func() { t.Ping(guest, addr, 1472, 10) }
	gone := func(names ...string) {
		for _, name := range names {
			dom0.Await(name+" to go", "[ ! -e /sys/class/net/%s ]", name)
		}
	}

	t.Logf("bridge: missing, and made later")
	refused("bridge="+keysBridge+": there is no such bridge", "script=vif-barevif", "bridge="+keysBridge)
	back.Await("key=bridge value=" + keysBridge)
	gone(vif)
	dom0.Sh("ip link add %s type bridge; ip addr add %s/24 dev %[1]s; ip link set %[1]s up", keysBridge, addr)
	up(guestAddr + "/24")
	onBridge(vif)
	reaches()
	detach()
	gone(vif)

	t.Logf("vifname, mac, type: honoured")
	attached("script=vif-barevif", "bridge="+keysBridge, "vifname=web0", "type=vif")
	up(guestAddr + "/24")
	onBridge("web0")
	gone(vif)
	if mac := guest.Sh("cat /sys/class/net/eth0/address"); mac != MAC(0) {
		t.Fatalf("the guest's address is %s, xl said %s", mac, MAC(0))
	}
	reaches()
	detach()
	gone("web0")

	t.Logf("vifname: taken")
	refused("vifname=lo: there is an interface of that name", "script=vif-barevif", "bridge="+keysBridge, "vifname=lo")
	detach()
	t.Logf("vifname: none that an interface can have")
	refused(`vifname="a/b": not the name of an interface`, "script=vif-barevif", "bridge="+keysBridge, "vifname=a/b")
	detach()
	t.Logf("type: xl itself refuses an emulated card of a PV guest")
	refused("emulated interface", "script=vif-barevif", "bridge="+keysBridge, "type=ioemu")

	t.Logf("ip, gatewaydev: routed")
	attached("script=vif-barevif-route", "ip="+routed, "gatewaydev="+keysBridge)
	up(routed + "/32")
	guest.Sh("ip route add %s dev eth0", addr)
	if r := dom0.Sh("ip route show %s", routed); !strings.Contains(r, "dev "+vif) || !strings.Contains(r, "src "+addr) {
		t.Fatalf("the route to the guest: %q", r)
	}
	t.Ping(dom0, routed, 1472, 10)
	reaches()
	detach()
	gone(vif)
	if r := dom0.Sh("ip route show %s", routed); r != "" {
		t.Fatalf("the route is left behind: %q", r)
	}
	refused("ip=", "script=vif-barevif-route", "ip=moon")
	detach()
	t.Logf("ip: on a bridge it is named, not enforced")
	attached("script=vif-barevif", "bridge="+keysBridge, "ip="+guestAddr)
	back.Await("key=ip value=" + guestAddr)
	detach()

	t.Logf("script: Debian's own, which xl runs")
	attached("script=vif-bridge", "bridge="+keysBridge, "vifname=stock0")
	up(guestAddr + "/24")
	onBridge("stock0")
	reaches()
	detach()
	gone("stock0", vif)
	// vif-bridge makes the path of the guest's "mtu" from the interface's name, also when it has
	// another one by then.
	dom0.Run("xenstore-rm", "/local/domain/stock0")
	refused("Could not find bridge device nosuchbr", "script=vif-bridge", "bridge=nosuchbr")
	detach()
	attached("script=vif-route", "ip="+routed, "gatewaydev="+keysBridge)
	up(routed + "/32")
	guest.Sh("ip route add %s dev eth0", addr)
	t.Ping(dom0, routed, 1472, 10)
	detach()
	gone(vif)

	t.Logf("script: refused where back is to do it")
	back.Terminate()
	back = start("--hotplug", "keys")
	attach("script=vif-xenlab", "bridge="+keysBridge)
	back.Await("key=script value=/etc/xen/scripts/vif-xenlab")
	dom0.Await("the reason", `xenstore-read %s/hotplug-error | grep -q "^script=/etc/xen/scripts/vif-xenlab: back runs no scripts"`, guest.Backend(dom0, 0))
	if state := dom0.Sh("xenstore-read %s/state", guest.Backend(dom0, 0)); state != "2" {
		t.Fatalf("the backend of a refused vif is in state %s", state)
	}
	detach()

	t.Logf("a backend that is killed puts the next TAP where it was")
	attached("script=vif-barevif", "bridge="+keysBridge, "vifname=web0")
	up(guestAddr + "/24")
	back.Kill()
	back = start()
	back.Await("connected to domain")
	onBridge("web0")
	dom0.Await("the guest behind the new backend", "ping -c 1 -W 1 %s", guestAddr)
	reaches()
	detach()
	back.Terminate()
	dom0.Sh("ip link del %s", keysBridge)
	t.Note("bridge, vifname, ip, gatewaydev, script, mac, type")
}
