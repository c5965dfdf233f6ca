//go:build linux

package xenlab

import "regexp"

// The network of the rows of this file: a bridge, and a pair of interfaces whose inner end is
// on it. Netback filters only frames that came from an interface as multicast (pkt_type of
// struct sk_buff), as those that a bridge forwards do, and not those of dom0's own sockets.
const mcastBridge, mcastInner, mcastOuter = "xenlabmc", "mcinner", "mcouter"

// multicastBridge makes the bridge. It floods: with snooping, what it forwards would depend on
// reports of members, which a frontend that lists groups does not send.
func (t *T) multicastBridge() {
	dom0 := t.Dom0()
	dom0.Run("modprobe", "-a", "bridge", "veth")
	for _, old := range [...]string{mcastOuter, mcastBridge} { // of a row that failed
		dom0.Sh("if [ -e /sys/class/net/%s ]; then ip link del %[1]s; fi", old)
	}
	dom0.Sh("ip link add %s type bridge; echo 0 >/sys/class/net/%[1]s/bridge/multicast_snooping; "+
		"ip link add %[2]s type veth peer name %[3]s; ip link set %[2]s master %[1]s; "+
		"for i in %[1]s %[2]s %[3]s; do ip link set $i up; done", mcastBridge, mcastInner, mcastOuter)
}

// requireMulticast lets a frontend of ours go through lists of groups, twice: the first program
// is killed with a list in force, and the second begins with all groups. connected runs
// each time the frontend is connected.
func (t *T) requireMulticast(guest *Domain, connected func()) {
	sender := t.Dom0().Start(prober, "send", mcastOuter)
	sender.Await("sending")
	first := guest.Start(prober, "multicast")
	first.Await("connected, MAC")
	connected()
	first.Await("three groups: ")
	first.Kill()
	second := guest.Start(prober, "multicast")
	second.Await("connected, MAC")
	connected()
	for _, line := range listSaid.FindAllString(string(second.Succeed().Stdout), -1) {
		t.Note("%s", line)
	}
	sender.Kill()
	t.Dom0().Sh("ip link del %s; ip link del %s", mcastOuter, mcastBridge)
}

var listSaid = regexp.MustCompile(`.*: \d+ multicast frames .*`)

// frontMulticast has Linux's netback filter the multicast of a frontend of ours.
func frontMulticast(t *T) {
	t.loadNetback(true)
	t.multicastBridge()
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	idle := t.domainResources(guest)
	vif := guest.VIF(0)
	t.requireMulticast(guest, func() {
		t.Dom0().Sh("ip link set %s up master %s", vif, mcastBridge)
		t.Dom0().awaitCarrier(vif)
	})
	t.requireResources(guest, idle)
}

// bothMulticast is frontMulticast with our backend in dom0.
func bothMulticast(t *T) {
	t.loadNetback(false)
	t.multicastBridge()
	t.Dom0().Run("modprobe", "tun")
	back := t.Dom0().Start(barevif, "back", "-v", "--xen", "--bridge", mcastBridge)
	back.Await("serves vifs")
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	idle := t.domainResources(guest)
	t.requireMulticast(guest, func() { t.Dom0().awaitCarrier(guest.VIF(0)) })
	t.requireResources(guest, idle)
	back.Terminate()
}
