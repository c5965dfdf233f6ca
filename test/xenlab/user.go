//go:build linux

package xenlab

import (
	"fmt"
	"strings"
	"syscall"
)

// Commands from tools/barevif/DEPLOYING.md, with which an administrator makes our ends work
// without root. User, group and names are those of the page; a test compares.
const (
	openFront = "chgrp barevif /dev/xen/gntalloc /dev/xen/evtchn /dev/xen/xenbus; chmod 0660 /dev/xen/gntalloc /dev/xen/evtchn /dev/xen/xenbus"
	openBack  = "chgrp barevif /dev/xen/gntdev /dev/xen/evtchn /dev/xen/xenbus; chmod 0660 /dev/xen/gntdev /dev/xen/evtchn /dev/xen/xenbus; chmod 0666 /dev/net/tun"
	openPins  = "chmod 0711 /sys/fs/bpf; mkdir -p /sys/fs/bpf/barevif; chown barevif:barevif /sys/fs/bpf/barevif"

	asUser  = "setpriv --reuid=barevif --regid=barevif --clear-groups --no-new-privs"
	noCaps  = " --inh-caps=-all --ambient-caps=-all --bounding-set=-all"
	capsOf  = " --inh-caps=-all,%[1]s --ambient-caps=-all,%[1]s --bounding-set=-all,%[1]s"
	netCaps = "+net_admin"
	bpfCaps = "+bpf,+perfmon"
)

// deployingSays returns the lines that the page must have.
func deployingSays() []string {
	return []string{
		openFront, openBack, openPins,
		asUser + noCaps + " barevif serve --xen",
		asUser + fmt.Sprintf(capsOf, netCaps) + " barevif back --xen",
		asUser + fmt.Sprintf(capsOf, bpfCaps) + " barevif serve --xen",
	}
}

// withoutRoot runs both our ends as a user with only the rights that the page grants.
func withoutRoot(t *T) {
	const addr, backAddr = "10.89.4.2", "10.89.4.1"
	t.loadNetback(false)
	driver := t.Create(Guest{Name: "driver", Type: PV, Config: []string{"driver_domain=1"}})
	driver.Run("modprobe", "tun")
	as := func(caps string, args ...string) []string {
		return append(strings.Fields(asUser+caps+" "+barevif), args...)
	}
	caps := func(names string) string { return fmt.Sprintf(capsOf, names) }
	start := func(d *Domain, ready, effective string, argv []string) *Process {
		p := d.Start(argv...)
		p.Await(ready)
		status := d.Sh("grep -E '^(Uid|Gid|Groups|CapEff|NoNewPrivs):' /proc/$(pidof barevif)/status")
		for _, want := range [...]string{"Uid:\t990\t990\t990\t990", "Gid:\t990\t990\t990\t990", "NoNewPrivs:\t1", "CapEff:\t" + effective + "\n"} {
			if !strings.Contains(status, want) {
				t.Fatalf("%s: no %q in %q", p.name, want, status)
			}
		}
		return p
	}
	serve := []string{"serve", "-v", "--xen", "--addr", addr + "/24"}
	back := []string{"back", "-v", "--xen", "--addr", backAddr + "/24", "--remove"}
	refused := func(d *Domain, argv []string, want ...string) {
		r := d.Try(argv...)
		if r.Err != nil || r.Exit != 3 {
			t.Fatalf("%q: exit status %d, %w", argv, r.Exit, r.Err)
		}
		t.requireWords(string(r.Stderr), want...)
	}

	// Each refusal names the remedy.
	const rule = `SUBSYSTEM=="misc", KERNEL=="xen/%s", GROUP="barevif", MODE="0660"`
	refused(driver, as(caps(netCaps), back...), "chmod 0666 /dev/net/tun")
	driver.Sh(openBack)
	refused(driver, as(noCaps, back...), "setcap cap_net_admin,cap_net_raw+ep")
	b := start(driver, "serves vifs", "0000000000001000", as(caps(netCaps), back...))

	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{Backend: "driver"}}})
	refused(guest, as(noCaps, serve...), fmt.Sprintf(rule, "xenbus"))
	guest.Sh(openFront)
	f := start(guest, "serving http", "0000000000000000", as(noCaps, serve...))
	f.Await("counters: memfd")
	t.Ping(driver, addr, 1472, 20)
	t.fetchServed(driver, addr, 3<<20)

	// A restart needs no more rights than the start. Pins need two capabilities and a
	// directory, because systemd mounts the BPF file system for root alone.
	guest.Sh("chmod 0700 /sys/fs/bpf; %s", openPins)
	f.Kill()
	f = start(guest, "serving http", "000000c000000000", as(caps(bpfCaps), serve...))
	f.Await("counters: bpf")
	guest.Sh("grep rx_packets /sys/fs/bpf/barevif/front-*/metrics")
	t.fetchServed(driver, addr, 1<<20)
	b.Signal(syscall.SIGUSR1)
	b.Succeed()
	// Follow the advice of the refusal.
	driver.Sh("cp %s /tmp/barevif; setcap cap_net_admin,cap_net_raw+ep /tmp/barevif", barevif)
	b = driver.Start(append(strings.Fields("setpriv --reuid=barevif --regid=barevif --clear-groups /tmp/barevif"), back...)...)
	b.Await("connected to domain")
	driver.Await("the guest", "ping -c 1 -W 1 %s", addr)
	t.fetchServed(driver, addr, 1<<20)
	f.Terminate()
	t.Destroy(guest)
	b.Await("gone; ")
	b.Terminate()
}
