//go:build linux

package xenlab

import (
	"fmt"
	"strings"

	"barevif/test/xenlab/image"
)

const (
	barevif      = image.ProgramDir + "/barevif"
	benchProgram = image.ProgramDir + "/bench"
	checkProgram = image.ProgramDir + "/check"
	prober       = image.ProgramDir + "/prober"
)

// loadNetback loads Linux's backend, or unloads it, because it would bind every vif.
func (t *T) loadNetback(wanted bool) {
	if wanted {
		t.Dom0().Run("modprobe", "xen-netback")
		return
	}
	// A vif that was detached a moment ago may still hold the module.
	t.Dom0().Await("netback to let go of its vifs", "if grep -q ^xen_netback /proc/modules; then rmmod xen_netback; fi")
}

// startAppliance starts our appliance on a guest's vif 0 and waits until it is reachable.
func (t *T) startAppliance(guest *Domain, addr string) *Process {
	p := guest.Start(barevif, "serve", "-v", "--xen", "--addr", addr+"/24", "--check", "7007")
	p.Await(`serving http`)
	return p
}

// fetchServed fetches size bytes from the appliance, and compares them with the digest that
// the appliance serves.
func (t *T) fetchServed(client *Domain, addr string, size int) {
	url := fmt.Sprintf("http://%s/bytes/%d", addr, size)
	want := client.Sh("curl -sSf --max-time 50 %s.sha256 | cut -c1-64", url)
	got := client.Sh("curl -sSf --max-time 50 %s | sha256sum | cut -c1-64", url)
	if got != want || len(got) != 64 {
		t.Fatalf("%s: digest %q, the server says %q", url, got, want)
	}
	t.Note("curl %d bytes", size)
}

// ourFront runs our appliance on Linux netback. The appliance is ended, and killed, and
// started again each time. Both ends count the same frames, and the appliance gives back its
// grants and event channels.
func ourFront(kind GuestType) func(*T) {
	return func(t *T) {
		t.loadNetback(true)
		guest := t.Create(Guest{Name: "domU", Type: kind, VIFs: []VIF{{}}})
		vif, name := guest.VIF(0), frontName(guest, 0)
		t.Dom0().Sh("ip addr add 10.88.0.1/24 dev %s", vif)
		held := t.domainResources(guest)
		state := guest.Backend(t.Dom0(), 0) + "/state"

		// Two of the granted pages belong to the guest's console and xenstore, two to the control ring.
		granted := func() []string { return t.grantedPages(guest) }
		serve := func() *Process {
			p := t.startAppliance(guest, "10.88.0.2")
			t.Dom0().awaitCarrier(vif)
			return p
		}
		end := func(p *Process) {
			t.requireSameCounts("netback", func() flow { return t.ourCounters(guest, name) }, func() flow { return t.netbackCounters(guest) })
			p.Terminate()
			t.Dom0().Await("the backend to see it close", `[ "$(xenstore-read %s)" = 6 ]`, state)
			t.requireNoPins(guest, name)
			t.requireResources(guest, held)
		}
		p := serve()
		t.requireChecksums(func() {
			for _, size := range [...]int{56, 1472} {
				t.Ping(t.Dom0(), "10.88.0.2", size, 20)
			}
			t.Datagrams(t.Dom0(), "10.88.0.2", "1-1472,1473,65507")
			t.fetchServed(t.Dom0(), "10.88.0.2", 3<<20)
			t.Send(t.Dom0(), "10.88.0.2", 3<<20)
		}, t.Dom0())
		t.requireEveryCounter(guest, name)
		t.requireIdle(guest, "barevif")
		t.awaitResources([]string{"256 pages granted to 0, to read", "257 pages granted to 0", "5 pages granted to 0, mapped"}, granted)
		end(p)

		p = serve()
		t.Ping(t.Dom0(), "10.88.0.2", 1472, 20)
		p.Kill()
		t.requireEveryCounter(guest, name)                                  // the pins outlive their owner
		t.awaitResources([]string{"5 pages granted to 0, mapped"}, granted) // the rings, until netback unmaps them
		p = serve()
		t.Ping(t.Dom0(), "10.88.0.2", 1472, 20)
		t.fetchServed(t.Dom0(), "10.88.0.2", 1<<20)
		end(p)
	}
}

// requireIdle notes the cost of a program without work over a while: context switches to its
// threads, and processor time. The program is woken by its own tick once a second, by the
// rest of the traffic before, and by the neighbour discovery of the other kernel. For each
// wake-up Go's runtime switches between its own threads some six times: its monitor goes back
// to sleep in four steps, and a second thread looks for work. A busy loop or a short timer
// exceeds the limit.
func (t *T) requireIdle(d *Domain, program string) {
	const seconds = 10
	count := func() (switches, ticks int) {
		out := d.Sh("pid=$(pidof %s); cat /proc/$pid/task/*/status | awk '/ctxt_switches/ {n += $2} END {print n}'; awk '{print $14 + $15}' /proc/$pid/stat", program)
		if n, err := fmt.Sscan(out, &switches, &ticks); n != 2 {
			t.Fatalf("%s: cannot count the wake-ups: %q: %w", d.Name, out, err)
		}
		return switches, ticks
	}
	switches, ticks := count()
	d.Sh("sleep %d", seconds)
	after, used := count()
	rate := float64(after-switches) / seconds
	t.Note("idle: %.1f switches to a thread a second, %d ms of processor in %d s", rate, 10*(used-ticks), seconds)
	if rate > 25 {
		t.Fatalf("%s of %s was woken %.1f times a second with nothing to do", program, d.Name, rate)
	}
}

func ourFrontJumbo(t *T) {
	t.loadNetback(true)
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{MTU: 9000}}})
	t.Dom0().Sh("ip addr add 10.88.0.1/24 dev %s", guest.VIF(0))
	p := t.startAppliance(guest, "10.88.0.2")
	t.Dom0().awaitCarrier(guest.VIF(0))
	t.requireChecksums(func() {
		for _, size := range [...]int{56, 1473, 4096, 8972} {
			t.Ping(t.Dom0(), "10.88.0.2", size, 20)
		}
		t.Datagrams(t.Dom0(), "10.88.0.2", jumboSizes)
		t.fetchServed(t.Dom0(), "10.88.0.2", 3<<20)
		t.Send(t.Dom0(), "10.88.0.2", 3<<20)
	}, t.Dom0())
	t.requireSameCounts("netback", func() flow { return t.ourCounters(guest, frontName(guest, 0)) }, func() flow { return t.netbackCounters(guest) })
	t.requireCapture(guest, frontName(guest, 0), t.Dom0(), "10.88.0.2")
	t.requireNetbackRings(guest, frontName(guest, 0), guest.VIF(0))
	p.Terminate()
}

// ourFrontKernel attaches the guest's kernel to the vif through our frontend and a TAP.
// Programs that need sockets of the kernel then run through the vif on both sides.
func ourFrontKernel(t *T) {
	t.loadNetback(true)
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	vif, name := guest.VIF(0), frontName(guest, 0)
	t.Dom0().Sh("ip addr add 10.88.0.1/24 dev %s", vif)
	held := t.domainResources(guest)
	guest.Run("modprobe", "tun")
	p := guest.Start(barevif, "attach", "-v", "--xen", "--tap", "card%i", "--addr", "10.88.0.2/24")
	p.Await("the kernel has it as card0")
	t.Dom0().awaitCarrier(vif)
	if mac := guest.Sh("cat /sys/class/net/card0/address"); mac != MAC(0) {
		t.Fatalf("the TAP's address is %s, the vif's %s", mac, MAC(0))
	}
	t.kernelTraffic(guest, t.Dom0(), "10.88.0.2", "10.88.0.1")
	t.requireSameCounts("netback", func() flow { return t.ourCounters(guest, name) }, func() flow { return t.netbackCounters(guest) })
	p.Terminate()
	t.requireNoPins(guest, name)
	t.requireResources(guest, held)
	t.requireNetfrontAfterUs(guest)
}

// requireNetfrontAfterUs fails if the guest's netfront cannot have the vif after our
// frontend, whether that ended by itself or was killed. netfront removes no key that it does
// not know, and netback refuses a control ring that is gone.
func (t *T) requireNetfrontAfterUs(guest *Domain) {
	guest.Sh("! %s xen release 0 2>/tmp/release && grep -q 'not loaded and can be now' /tmp/release", barevif)
	guest.Run("modprobe", "xen-netfront")
	dom0Addr, _ := t.JoinKernel(guest, 0)
	t.Ping(guest, dom0Addr, 56, 5)
	guest.Run(barevif, "xen", "take", "0")
	p := guest.Start(barevif, "attach", "--xen", "--tap", "card%i", "--addr", "10.88.0.2/24")
	p.Await("the kernel has it as card0")
	t.Dom0().awaitCarrier(guest.VIF(0))
	p.Kill()
	guest.Run(barevif, "xen", "release", "0")
	dom0Addr, _ = t.JoinKernel(guest, 0)
	t.Ping(guest, dom0Addr, 56, 5)
}

// ourFrontUnplugged detaches the vif under our appliance and attaches it again. The same
// process goes on serving, and uses as many grants and event channels each time.
func ourFrontUnplugged(t *T) {
	t.loadNetback(true)
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	t.Dom0().Sh("ip addr add 10.88.0.1/24 dev %s", guest.VIF(0))
	p := t.startAppliance(guest, "10.88.0.2")
	t.Ping(t.Dom0(), "10.88.0.2", 56, 20)
	held := t.domainResources(guest)
	for round := range 2 {
		t.Dom0().Run("xl", "network-detach", guest.Name, "0")
		p.Await(fmt.Sprintf("(?s)(link down.*){%d}", round+1))
		t.Attach(guest, VIF{})
		t.Dom0().Sh("ip addr add 10.88.0.1/24 dev %s", guest.VIF(0))
		t.Dom0().awaitCarrier(guest.VIF(0))
		t.Ping(t.Dom0(), "10.88.0.2", 1472, 20)
		t.requireResources(guest, held)
	}
	p.Terminate()
}

// netbackReloaded unbinds Linux's driver from the vif under our appliance, and removes its
// module, which is impossible while the interface exists. With the module loaded again the
// appliance must be reachable, whether it has seen the states change or the backend has
// mapped the same rings again.
func netbackReloaded(t *T) {
	t.loadNetback(true)
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	vif, dir := guest.VIF(0), guest.Backend(t.Dom0(), 0)
	t.Dom0().Sh("ip addr add 10.88.0.1/24 dev %s", vif)
	p := t.startAppliance(guest, "10.88.0.2")
	t.Ping(t.Dom0(), "10.88.0.2", 56, 20)
	held := t.domainResources(guest)
	t.Dom0().Sh("! rmmod xen_netback")
	t.Dom0().Sh("echo vif-%d-0 >/sys/bus/xen-backend/drivers/vif/unbind; rmmod xen_netback; modprobe xen-netback", guest.ID)
	t.Dom0().Await("the new interface", "[ -e /sys/class/net/%s ]", vif)
	// The toolstack runs its hotplug script only for a new device, so run it here.
	t.Dom0().Sh("XENBUS_PATH=%s vif=%s /etc/xen/scripts/%s online; ip addr add 10.88.0.1/24 dev %s",
		strings.TrimPrefix(dir, "/local/domain/0/"), vif, image.VifScript, vif)
	t.Dom0().awaitCarrier(vif)
	t.Ping(t.Dom0(), "10.88.0.2", 1472, 20)
	t.fetchServed(t.Dom0(), "10.88.0.2", 1<<20)
	t.requireResources(guest, held)
	p.Terminate()
}

// ourFrontRefused checks that each refusal names the cause and the remedy.
func ourFrontRefused(t *T) {
	t.loadNetback(true)
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	refused := func(want string, args ...string) {
		args = append([]string{barevif, "serve", "--xen", "--wait", "5s"}, args...)
		r := guest.Try(args...)
		if r.Err != nil || r.Exit == 0 || !strings.Contains(string(r.Stderr), want) {
			t.Fatalf("%q, wanted an error with %q: %w", args, want, r.problem())
		}
	}
	refused("vif", "--vif", "7")
	guest.Run("modprobe", "xen-netfront")
	guest.Await("a network interface", "[ -e /sys/class/net/eth0 ]")
	refused("xen-netfront")
	guest.Run(barevif, "xen", "take", "0")
	limit := "/sys/module/xen_gntalloc/parameters/limit"
	guest.Sh("echo 16 >%s", limit)
	refused(limit)
	guest.Sh("echo 1024 >%s", limit)
	guest.Run("rmmod", "xen_gntalloc")
	refused("xen-gntalloc")
	guest.Run("modprobe", "xen-gntalloc")
	p := t.startAppliance(guest, "10.88.0.2")
	p.Terminate()
}

// startBackend starts our backend in a domain, with addr for its TAP.
func (t *T) startBackend(d *Domain, addr string) *Process {
	d.Run("modprobe", "tun")
	args := []string{barevif, "back", "-v", "--xen", "--addr", addr + "/24"}
	if d.ID != 0 {
		args = append(args, "--remove") // xl waits ten seconds for the backend's directory to be removed
	}
	p := d.Start(args...)
	p.Await(`serves vifs`)
	return p
}

func (t *T) startNetfront(guest *Domain, addr string) {
	guest.Run("modprobe", "xen-netfront")
	guest.Await("a network interface", "ip link set eth0 up")
	guest.Sh("ip addr add %s/24 dev eth0", addr)
	guest.awaitCarrier("eth0")
}

// ourBackDom0 runs Linux netfront on our backend, which is killed and started again while the
// frontend is connected.
func ourBackDom0(t *T) {
	t.loadNetback(false)
	p := t.startBackend(t.Dom0(), "10.89.0.1")
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	t.startNetfront(guest, "10.89.0.2")
	name := backName(guest, 0)
	t.kernelTraffic(guest, t.Dom0(), "10.89.0.2", "10.89.0.1")
	t.requireEveryCounter(t.Dom0(), name)
	t.requireSameCounts("netfront", func() flow { return t.ourCounters(t.Dom0(), name) }, func() flow { return t.netfrontCounters(guest) })
	t.requireCapture(t.Dom0(), name, guest, "10.89.0.1")
	p.Kill()
	p = t.startBackend(t.Dom0(), "10.89.0.1")
	t.Dom0().Await("the guest behind the new backend", "ping -c 1 -W 1 10.89.0.2")
	t.Ping(guest, "10.89.0.1", 1472, 20)
	t.Fetch(guest, t.Dom0(), "10.89.0.1", 1<<20)
	t.Destroy(guest)
	p.Terminate()
	t.requireNoPins(t.Dom0(), name)
}

// ourBackUnplugged detaches the vif under our backend, which goes on. The next vif is for
// jumbo frames.
func ourBackUnplugged(t *T) {
	t.loadNetback(false)
	p := t.startBackend(t.Dom0(), "10.89.0.1")
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	for round := range 2 {
		t.startNetfront(guest, "10.89.0.2")
		t.Ping(guest, "10.89.0.1", 1472, 20)
		if round == 0 { // raise the MTU at both ends while they are connected; neither end is notified
			guest.Sh("ip link set eth0 mtu 9000")
			t.Dom0().Sh("ip link set %s mtu 9000", guest.VIF(0))
			t.Ping(guest, "10.89.0.1", 8972, 20)
			t.answered(t.Dom0(), func() { t.Datagrams(guest, "10.89.0.1", jumboSizes) })
		}
		if round == 1 {
			guest.Sh("ip link set eth0 mtu 9000")
			t.Ping(guest, "10.89.0.1", 8972, 20)
			t.answered(t.Dom0(), func() { t.Datagrams(guest, "10.89.0.1", jumboSizes) })
			t.requireSameCounts("netfront", func() flow { return t.ourCounters(t.Dom0(), backName(guest, 0)) }, func() flow { return t.netfrontCounters(guest) })
		}
		t.Dom0().Run("xl", "network-detach", guest.Name, "0")
		guest.Await("the interface to go", "[ ! -e /sys/class/net/eth0 ]")
		if round == 0 {
			t.Attach(guest, VIF{MTU: 9000})
		}
	}
	p.Terminate()
}

// createDriverDomain creates a driver domain with our backend in it.
func (t *T) createDriverDomain(addr string) (*Domain, *Process) {
	d := t.Create(Guest{Name: "driver", Type: PV, Config: []string{"driver_domain=1"}})
	return d, t.startBackend(d, addr)
}

func ourBackDriver(t *T) {
	t.loadNetback(false)
	driver, p := t.createDriverDomain("10.89.1.1")
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{Backend: "driver"}}})
	t.startNetfront(guest, "10.89.1.2")
	t.kernelTraffic(guest, driver, "10.89.1.2", "10.89.1.1")
	t.Destroy(guest)
	p.Terminate()
}

// settled returns a counter of a program in domain d once it has stayed the same for longer
// than a half that is idle takes to show its counters.
func (t *T) settled(d *Domain, counter func() uint64) uint64 {
	for n := counter(); ; {
		d.Run("sleep", "2.5")
		now := counter()
		if now == n {
			return n
		}
		n = now
	}
}

// bothOurs has both ends ours, with static grants: once they are told, no frame takes a grant
// operation.
func bothOurs(t *T) {
	t.loadNetback(false)
	driver, back := t.createDriverDomain("10.89.2.1")
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{Backend: "driver"}}})
	front := t.startAppliance(guest, "10.89.2.2")
	t.Ping(driver, "10.89.2.2", 56, 3)
	grantOps := func() uint64 {
		dump := t.dumpCounters(driver, backName(guest, driver.ID))
		return t.counterTotal(dump, "rx_grant_ops") + t.counterTotal(dump, "tx_grant_ops")
	}
	before := t.settled(driver, grantOps)
	t.requireChecksums(func() {
		for _, size := range [...]int{56, 1472} {
			t.Ping(driver, "10.89.2.2", size, 20)
		}
		t.Datagrams(driver, "10.89.2.2", "1-1472")
		t.fetchServed(driver, "10.89.2.2", 3<<20)
		t.Send(driver, "10.89.2.2", 3<<20)
	}, driver)
	t.requireSameCounts("the other end", func() flow { return t.ourCounters(guest, frontName(guest, driver.ID)) }, func() flow { return t.ourCounters(driver, backName(guest, driver.ID)) })
	if n := grantOps() - before; n != 0 {
		t.Fatalf("%d grant operations with static grants", n)
	}
	front.Terminate()
	t.Destroy(guest)
	back.Terminate()
}
