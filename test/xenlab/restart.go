//go:build linux

package xenlab

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bothRestarted kills and restarts each of our ends, both, and the driver domain with the
// backend in it. The end that is not killed goes on as the same process, with the same number
// of pages.
func bothRestarted(t *T) {
	const addr, backAddr = "10.89.2.2", "10.89.2.1"
	t.loadNetback(false)
	dom0 := t.Dom0()
	driver, back := t.createDriverDomain(backAddr)
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{Backend: "driver"}}})
	guest.Sh("echo 516 >%s", grantLimit) // as many as one queue needs, so that a single leaked grant is noticed
	front := t.startAppliance(guest, addr)
	works := func() {
		driver.Await("the guest", "ping -c 1 -W 1 %s", addr)
		t.fetchServed(driver, addr, 1<<20)
	}
	works()
	held := t.domainResources(guest)

	front.Kill()
	front = t.startAppliance(guest, addr)
	works()

	back.Kill()
	back = t.startBackend(driver, backAddr)
	works()

	back.Kill()
	front.Kill() // the later one: its pages are mapped no more, and so they are free at once
	back = t.startBackend(driver, backAddr)
	front = t.startAppliance(guest, addr)
	works()

	// A backend that may not write its state says so, and goes on once it may.
	state := guest.Backend(driver, 0) + "/state"
	front.Terminate()
	dom0.Await("the backend to see it close", `[ "$(xenstore-read %s)" = 6 ]`, state)
	dom0.Run("xenstore-chmod", state, "n0", fmt.Sprintf("r%d", driver.ID), fmt.Sprintf("r%d", guest.ID))
	front = guest.Start(barevif, "serve", "-v", "--xen", "--addr", addr+"/24")
	back.Await("cannot write the state.*EACCES")
	dom0.Run("xenstore-chmod", state, fmt.Sprintf("n%d", driver.ID), fmt.Sprintf("r%d", guest.ID))
	front.Await("serving http")
	works()
	// The backend had the 516 pages of the first frontend mapped when that was killed. Linux frees
	// such pages ten a second once they are unmapped (gnttab_handle_deferred of
	// drivers/xen/grant-table.c).
	t.requireResourcesWithin(guest, held, 4*time.Minute)

	// xl does not change the frontend when the backend's domain ends. A new vif names the
	// next backend domain.
	t.Destroy(driver)
	front.Await("vif 0: down: the other end is gone")
	driver, back = t.createDriverDomain(backAddr)
	dom0.Run("xl", "network-detach", guest.Name, "0")
	t.Attach(guest, VIF{Backend: "driver"})
	front.Await(fmt.Sprintf("connected again, backend in domain %d", driver.ID))
	works()
	if said := string(front.Await(`link up(?s).*link up`).Stderr); strings.Count(said, "516 pages shared") != 2 {
		t.Fatalf("not the same pages: %s", said)
	}
	front.Terminate()
	t.Destroy(guest)
	back.Await("gone; ")
	back.Terminate()
}

// handedOver replaces our backend by SIGUSR1 under a Linux netfront that sends and receives. No
// connection may break; the frames lost in the pause are counted.
func handedOver(t *T) {
	r := t.startReplacement()
	p := r.back()
	r.plug()
	r.startTraffic(80, "0.05", 10)
	p.Signal(syscall.SIGUSR1)
	p.Succeed()
	p = r.back()
	p.Await("connected to domain")
	// Frames from the guest wait in its ring. Frames to the guest are lost, because there is
	// no interface.
	r.requireTraffic(80, 10)
	r.end(p)
}

var (
	pingCounts = regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`)
	pingSeq    = regexp.MustCompile(`icmp_seq=(\d+) ttl`)
	pingTimes  = regexp.MustCompile(`rtt min/avg/max/mdev = [\d.]+/[\d.]+/([\d.]+)/`)
)

// pingLoss parses the summary of ping's output: the number of requests, the number without a
// reply, and the longest round trip in ms.
func pingLoss(out string) (sent, lost int, longest float64, err error) {
	if err := pingSpoilt(out); err != nil {
		return 0, 0, 0, err
	}
	c, r := pingCounts.FindStringSubmatch(out), pingTimes.FindStringSubmatch(out)
	if c == nil || r == nil {
		return 0, 0, 0, errors.New("ping told no numbers")
	}
	var errs [3]error
	var received int
	sent, errs[0] = strconv.Atoi(c[1])
	received, errs[1] = strconv.Atoi(c[2])
	longest, errs[2] = strconv.ParseFloat(r[1], 64)
	// With a deadline ping ends once it has as many answers as it was to send, and says that
	// those are lost which are still on their way. So only a hole in the answers is a loss: a
	// request before the one that was answered last. Answers may be overtaken, as by those of a
	// process that took a vif over while others wait there for the neighbour's address.
	if seqs := pingSeq.FindAllStringSubmatch(out, -1); len(seqs) > 0 && sent > received {
		sent, errs[0] = strconv.Atoi(seqs[len(seqs)-1][1])
		received = 0
		for _, m := range seqs {
			n, err := strconv.Atoi(m[1])
			if n <= sent {
				received++
			}
			errs[0] = errors.Join(errs[0], err)
		}
	}
	return sent, sent - received, longest, errors.Join(errs[:]...)
}

// otherStore runs each of our ends against Linux's, with oxenstored as the xenstore. One vif
// is first for netback and our frontend, then for our backend and netfront.
func otherStore(t *T) {
	const addr, guestAddr = "10.89.5.1", "10.89.5.2"
	dom0 := t.Dom0()
	if names := dom0.Sh("ps -o comm"); !strings.Contains(names, "oxenstored") {
		t.Fatalf("no oxenstored among %q", names)
	}
	t.loadNetback(true)
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	dom0.Sh("ip addr add %s/24 dev %s", addr, guest.VIF(0))
	front := t.startAppliance(guest, guestAddr)
	dom0.awaitCarrier(guest.VIF(0))
	t.Ping(dom0, guestAddr, 1472, 10)
	t.fetchServed(dom0, guestAddr, 1<<20)
	front.Kill()
	front = t.startAppliance(guest, guestAddr)
	t.fetchServed(dom0, guestAddr, 1<<20)
	front.Terminate()
	dom0.Run("xl", "network-detach", guest.Name, "0")

	t.loadNetback(false)
	back := t.startBackend(dom0, addr)
	t.Attach(guest, VIF{})
	t.startNetfront(guest, guestAddr)
	t.Ping(guest, addr, 1472, 10)
	back.Kill()
	back = t.startBackend(dom0, addr)
	dom0.Await("the guest behind the new backend", "ping -c 1 -W 1 %s", guestAddr)
	t.Fetch(guest, dom0, addr, 1<<20)
	dom0.Run("xl", "network-detach", guest.Name, "0")
	back.Await("gone; ")
	back.Terminate()
}
