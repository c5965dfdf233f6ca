//go:build linux

package xenlab

import "barevif/test/xenlab/image"

// Addresses of the router's scenario. dom0 is the world behind the uplink.
const (
	routerWorld  = "10.90.0.1"
	routerUplink = "10.90.0.2"
	routerInside = "10.91.0.1"
	routerGuest  = "10.91.0.100"
)

// routerConf lets the guest begin what it likes, and dom0 reach its iperf3.
const routerConf = `uplink vif 0
uplink ipv4 ` + routerUplink + `/24 via ` + routerWorld + `
network inside ipv4 10.91.0.0/24 router ` + routerInside + `
guest client in inside vif 0 ipv4 ` + routerGuest + `
dns off
allow from inside to uplink
forward tcp 5201 to ` + routerGuest + `
`

// routerSeconds is how long each rate is measured.
const routerSeconds = 8

// routed has a guest of its own route between another guest and dom0: first vifrouter, whose
// uplink is a frontend and whose guest's vif has its backend there, then Linux with netfront and
// netback on the same vifs. It notes the rates and their ratio, and asserts none.
func routed(t *T) {
	t.loadNetback(true)
	router := t.Create(Guest{Name: "router", Type: PV, VIFs: []VIF{{}}, Config: []string{"driver_domain=1"}})
	router.Put("/tmp/router.conf", []byte(routerConf), 0o600)
	router.Run(vifrouter, "check", "/tmp/router.conf")
	p := router.Start(vifrouter, "run", "-v", "--xen", "/tmp/router.conf")
	p.Await("routes between 1 networks")
	t.routerUplink(router)
	p.Await("uplink vif 0: connected")
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{Backend: "router"}}})
	t.routedGuest(guest)
	for _, size := range [...]int{56, 1472} {
		t.Ping(guest, routerWorld, size, 20)
	}
	t.Fetch(guest, t.Dom0(), routerWorld, 3<<20)
	t.requireChecksums(func() { t.Fetch(guest, t.Dom0(), routerWorld, 1<<20) }, guest, t.Dom0())
	router.Run("sh", "-c", "kill -HUP $(pidof vifrouter)")
	p.Await("the configuration was read again")
	out := t.iperf(guest, t.Dom0(), routerWorld, routerSeconds)
	in := t.iperf(t.Dom0(), guest, routerUplink, routerSeconds)
	t.Destroy(guest)
	p.Terminate()

	// Linux on the same vif of the router, and on one of a guest like the first.
	router.Sh("! %s xen release 0 2>/tmp/release && grep -q 'not loaded and can be now' /tmp/release", barevif)
	router.Run("modprobe", "xen-netfront")
	router.Await("the uplink's interface", "ip link set eth0 up")
	router.Sh("ip addr replace %s/24 dev eth0", routerUplink)
	router.awaitCarrier("eth0")
	t.routerUplink(router)
	router.Run("modprobe", "xen-netback")
	guest = t.Create(Guest{Name: "domU2", Type: PV, VIFs: []VIF{{Backend: "router"}}})
	// No xl devd runs in the router, which would say that the hotplug script was there.
	t.Dom0().Sh("xenstore-write %s/hotplug-status connected", guest.Backend(router, 0))
	vif := guest.VIF(0)
	router.Await("the backend's interface", "ip link set %s up", vif)
	router.Sh("ip addr replace %s/32 dev %s; ip route replace %s/32 dev %s; echo 1 >/proc/sys/net/ipv4/ip_forward", routerInside, vif, routerGuest, vif)
	t.Dom0().Sh("ip route replace %s/32 via %s", routerGuest, routerUplink)
	t.routedGuest(guest)
	t.Dom0().Await("the guest behind Linux", "ping -c 1 -W 1 %s", routerGuest)
	linuxOut := t.iperf(guest, t.Dom0(), routerWorld, routerSeconds)
	linuxIn := t.iperf(t.Dom0(), guest, routerGuest, routerSeconds)
	t.Dom0().Sh("ip route del %s/32", routerGuest)
	t.Note("iperf3 from the guest %.0f Mbit/s, Linux without NAT %.0f (%.2f); to the guest %.0f, Linux %.0f (%.2f)",
		out, linuxOut, out/linuxOut, in, linuxIn, in/linuxIn)
	t.Destroy(guest)
	router.Await("netback to let go of its vif", "rmmod xen_netback")
}

// vifrouter is the program of the scenario.
const vifrouter = image.ProgramDir + "/vifrouter"

// routerUplink gives dom0's end of the router's uplink its address.
func (t *T) routerUplink(router *Domain) {
	vif := router.VIF(0)
	t.Dom0().Await("the backend's interface", "ip link set %s up", vif)
	t.Dom0().Sh("ip addr replace %s/24 dev %s", routerWorld, vif)
	t.Dom0().awaitCarrier(vif)
}

// routedGuest gives the kernel of a guest its address, and the router as its only neighbour.
func (t *T) routedGuest(guest *Domain) {
	guest.Run("modprobe", "xen-netfront")
	guest.Await("a network interface", "ip link set eth0 up")
	guest.awaitCarrier("eth0")
	guest.Sh("ip addr replace %s/32 dev eth0; ip route replace %s/32 dev eth0; ip route replace default via %s dev eth0", routerGuest, routerInside, routerInside)
	guest.Await("the world behind the router", "ping -c 1 -W 1 %s", routerWorld)
}
