//go:build linux

package xenlab

import (
	"fmt"
	"strconv"
)

// queuesOfRow is how many queues the rows of this file have: more than any domain here has
// processors, so every driver has to be told.
const queuesOfRow = 4

// requireSpread fails unless f moves frames through every queue of one of our ends, in both
// directions. A flow keeps to its queue, so f makes many.
func (t *T) requireSpread(d *Domain, name string, f func()) {
	count := func() (n [queuesOfRow][2]uint64) {
		dump := t.dumpCounters(d, name)
		if len(dump) != queuesOfRow {
			t.Fatalf("%s: %s has %d queues", d.Name, name, len(dump))
		}
		for q, values := range dump {
			for i, field := range [...]string{"rx_packets", "tx_packets"} {
				v, err := strconv.ParseUint(string(values[field]), 10, 64)
				if err != nil {
					t.Fatalf("%s: %s: queue %d: %s: %w", d.Name, name, q, field, err)
				}
				n[q][i] = v
			}
		}
		return n
	}
	before := count()
	f()
	var moved [queuesOfRow][2]uint64
	for limit := t.machine.Limit(restLimit); ; { // counters are published once a second
		after, all := count(), true
		for q := range after {
			for i := range after[q] {
				moved[q][i] = after[q][i] - before[q][i]
				all = all && moved[q][i] > 0
			}
		}
		if all {
			t.Note("frames to and from each queue: %v", moved)
			return
		}
		if limit.Over() {
			t.Fatalf("%s: %s: frames to and from each queue: %v", d.Name, name, moved)
		}
	}
}

// manyFlows fetches from a web server over many connections, each a flow of its own. curl puts
// numbers in the place of [1-40].
func manyFlows(from *Domain, url string) {
	from.Sh("curl -sSf --max-time 50 -H 'Connection: close' -o /dev/null '%s?[1-40]'", url)
}

// ourFrontQueues runs our appliance with four queues on Linux netback: killed and started
// again, its vif unplugged and plugged again, and at last with the number of queues that it
// chooses itself.
func ourFrontQueues(t *T) {
	const addr, most = "10.88.0.2", "/sys/module/xen_netback/parameters/max_queues"
	t.loadNetback(true)
	dom0 := t.Dom0()
	was := dom0.Sh("cat %s; echo %d >%[1]s", most, queuesOfRow)
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	vif, name := guest.VIF(0), frontName(guest, 0)
	guest.Sh("echo %d >%s", queuesOfRow*514+2, grantLimit) // two for a control ring
	reachable := func() {
		dom0.Sh("ip addr replace 10.88.0.1/24 dev %s", vif)
		dom0.awaitCarrier(vif)
	}
	serve := func(d *Domain, more ...string) *Process {
		p := d.Start(append([]string{barevif, "serve", "-v", "--xen", "--addr", addr + "/24", "--check", "7007"}, more...)...)
		p.Await("serving http")
		reachable()
		return p
	}
	works := func() {
		t.requireChecksums(func() {
			t.requireSpread(guest, name, func() { manyFlows(dom0, "http://"+addr+"/bytes/3000") })
			t.fetchServed(dom0, addr, 1<<20)
			t.Send(dom0, addr, 1<<20)
			t.Datagrams(dom0, addr, "1-1472:7")
		}, dom0)
	}
	same := func() {
		t.requireSameCounts("netback", func() flow { return t.ourCounters(guest, name) }, func() flow { return t.netbackCounters(guest) })
	}
	idle := t.domainResources(guest)
	p := serve(guest, "--queues", fmt.Sprint(queuesOfRow))
	p.Await(fmt.Sprintf(`%d queues, %d pages shared`, queuesOfRow, queuesOfRow*514+2))
	works()
	same()
	held := t.domainResources(guest)

	p.Kill()
	p = serve(guest, "--queues", fmt.Sprint(queuesOfRow))
	works()
	same()
	t.requireResources(guest, held)

	dom0.Run("xl", "network-detach", guest.Name, "0")
	p.Await("link down")
	t.Attach(guest, VIF{})
	p.Await("connected again")
	reachable()
	works() // netback counts from 0 again, and we go on
	t.requireResources(guest, held)
	p.Terminate()
	t.requireResources(guest, idle)

	// Without --queues it takes what processors, netback and the limit of grants give.
	p = serve(guest.WithEnv(fmt.Sprintf("GOMAXPROCS=%d", queuesOfRow)))
	p.Await(fmt.Sprintf(`%d queues, (%d|%d) pages shared`, queuesOfRow, queuesOfRow*514, queuesOfRow*514+2))
	works()
	same()
	p.Terminate()
	guest.Sh("echo 1024 >%s", grantLimit)
	p = serve(guest.WithEnv(fmt.Sprintf("GOMAXPROCS=%d", queuesOfRow)))
	p.Await("1 queue, 516 pages shared")
	t.fetchServed(dom0, addr, 1<<20)
	p.Terminate()
	t.requireResources(guest, idle)
	dom0.Sh("echo %s >%s", was, most)
}

// ourBackQueues runs Linux netfront with four queues on our backend, which is killed and
// started again under it; then the vif is unplugged and plugged again.
func ourBackQueues(t *T) {
	const addr, guestAddr = "10.89.0.1", "10.89.0.2"
	t.loadNetback(false)
	dom0 := t.Dom0()
	dom0.Run("modprobe", "tun")
	serve := func() *Process {
		p := dom0.Start(barevif, "back", "-v", "--xen", "--queues", fmt.Sprint(queuesOfRow), "--addr", addr+"/24")
		p.Await("serves vifs")
		return p
	}
	p := serve()
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	name := backName(guest, 0)
	guest.Run("modprobe", "xen-netfront", fmt.Sprintf("max_queues=%d", queuesOfRow))
	guest.Sh("mkdir -p /tmp/www; head -c 3000 /dev/urandom >/tmp/www/file")
	guest.Start("busybox", "httpd", "-f", "-p", "80", "-h", "/tmp/www")
	works := func() {
		p.Await(fmt.Sprintf("connected to domain %d, MTU 1500, %d queues", guest.ID, queuesOfRow))
		dom0.Await("the guest", "ping -c 1 -W 1 %s", guestAddr)
		t.requireChecksums(func() {
			t.requireSpread(dom0, name, func() { manyFlows(dom0, "http://"+guestAddr+"/file") })
			t.answered(dom0, func() { t.Datagrams(guest, addr, "1-1472:7") })
			t.Fetch(guest, dom0, addr, 1<<20)
		}, guest, dom0)
	}
	t.startNetfront(guest, guestAddr)
	works()
	t.requireSameCounts("netfront", func() flow { return t.ourCounters(dom0, name) }, func() flow { return t.netfrontCounters(guest) })

	p.Kill()
	p = serve()
	works()

	dom0.Run("xl", "network-detach", guest.Name, "0")
	guest.Await("the interface to go", "[ ! -e /sys/class/net/eth0 ]")
	p.Await("gone; ")
	t.Attach(guest, VIF{})
	t.startNetfront(guest, guestAddr)
	works()
	t.Destroy(guest)
	p.Terminate()
	t.requireNoPins(dom0, name)
}

// settingsOfFront: netback's toolstack changes the MTU of a vif at run time, and writes a
// carrier, which netback itself does not.
func settingsOfFront(t *T) {
	const addr = "10.88.0.2"
	t.loadNetback(true)
	dom0 := t.Dom0()
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	vif := guest.VIF(0)
	dom0.Sh("ip addr add 10.88.0.1/24 dev %s", vif)
	guest.Run("modprobe", "tun")
	p := guest.Start(barevif, "attach", "-v", "--xen", "--tap", "card%i", "--addr", addr+"/24")
	p.Await("the kernel has it as card0")
	dom0.awaitCarrier(vif)
	t.Ping(dom0, addr, 1472, 5)
	for _, mtu := range []int{9000, 1400} {
		// What Xen's hotplug scripts do: xen-network-common.sh, set_mtu.
		dom0.Sh("ip link set %s mtu %d; xenstore-write %s/mtu %[2]d", vif, mtu, guest.Frontend(0))
		p.Await(fmt.Sprintf("its MTU is now %d", mtu))
		guest.Await("the TAP's MTU", `[ "$(cat /sys/class/net/card0/mtu)" = %d ]`, mtu)
		t.Ping(dom0, addr, mtu-28, 5)
		t.Ping(guest, "10.88.0.1", mtu-28, 5)
	}
	carrier := guest.Backend(dom0, 0) + "/carrier"
	for round := 1; round <= 2; round++ {
		dom0.Run("xenstore-write", carrier, "0")
		p.Await(fmt.Sprintf("(?s)(down: the backend has no carrier.*){%d}", round))
		guest.Await("no carrier", `[ "$(cat /sys/class/net/card0/carrier)" = 0 ]`)
		dom0.Run("xenstore-write", carrier, "1")
		p.Await(fmt.Sprintf("(?s)(connected again.*){%d}", round))
		guest.awaitCarrier("card0")
		t.Ping(dom0, addr, 56, 5)
	}
	p.Terminate()
}

// settingsOfBoth: the interface behind our backend in a driver domain is set down, up, and
// to another MTU; our frontend learns it.
func settingsOfBoth(t *T) {
	const addr = "10.89.2.2"
	t.loadNetback(false)
	driver, back := t.createDriverDomain("10.89.2.1")
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{Backend: "driver"}}})
	front := t.startAppliance(guest, addr)
	driver.Await("the guest", "ping -c 1 -W 1 %s", addr)
	vif := guest.VIF(0)
	for _, mtu := range []int{9000, 1280} {
		driver.Sh("ip link set %s mtu %d", vif, mtu)
		front.Await(fmt.Sprintf("its MTU is now %d", mtu))
		for _, key := range []string{guest.Frontend(0), guest.Backend(driver, 0)} {
			t.Dom0().Await("the key", `[ "$(xenstore-read %s/mtu)" = %d ]`, key, mtu)
		}
		t.Ping(driver, addr, mtu-28, 5)
		t.fetchServed(driver, addr, 1<<20)
	}
	t.Dom0().Run("xenstore-write", guest.Backend(driver, 0)+"/mtu", "4000") // the toolstack, at run time
	front.Await("its MTU is now 4000")
	driver.Await("the TAP's MTU", `[ "$(cat /sys/class/net/%s/mtu)" = 4000 ]`, vif)
	t.Ping(driver, addr, 3972, 5)
	driver.Sh("ip link set %s down", vif)
	front.Await("down: the backend has no carrier")
	driver.Sh("ip link set %s up; ip addr replace 10.89.2.1/24 dev %[1]s", vif)
	front.Await("connected again")
	t.Ping(driver, addr, 1472, 5)
	t.fetchServed(driver, addr, 1<<20)
	front.Terminate()
	t.Destroy(guest)
	back.Terminate()
}
