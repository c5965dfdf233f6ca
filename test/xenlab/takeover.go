//go:build linux

package xenlab

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	"barevif/telemetry/bpf"
)

const (
	handoverBridge = "xenlabbr0"
	handoverAddr   = "10.89.3.1"
	handoverGuest  = "10.89.3.2"
)

// A replacement is a guest on a network of dom0. One of its vif's ends is ours, and is replaced
// by another one while frames move.
type replacement struct {
	*T
	guest *Domain
	card  string      // the vif's interface in the guest
	downs string      // how often its carrier was off when the traffic began
	want  [2]string   // digests of the files that are fetched, from the guest and from dom0
	gets  [2]*Process // fetch them
	pings [2]*Process // from dom0, and from the guest
}

func (t *T) startReplacement() *replacement {
	t.loadNetback(false)
	t.Dom0().Run("modprobe", "-a", "tun", "bridge")
	t.Dom0().Sh("ip link add %s type bridge; ip addr add %s/24 dev %[1]s; ip link set %[1]s up", handoverBridge, handoverAddr)
	return &replacement{T: t, card: "eth0"}
}

// back starts a backend of ours.
func (r *replacement) back(args ...string) *Process {
	p := r.Dom0().Start(append([]string{barevif, "back", "-v", "--xen", "--bridge", handoverBridge}, args...)...)
	p.Await("serves vifs")
	return p
}

// plug makes the guest. A backend is there.
func (r *replacement) plug() {
	r.guest = r.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	r.startNetfront(r.guest, handoverGuest)
	r.serveFiles()
}

// serveFiles makes each end serve a file over HTTP.
func (r *replacement) serveFiles() {
	r.Ping(r.guest, handoverAddr, 56, 5)
	for i, d := range []*Domain{r.guest, r.Dom0()} {
		d.Sh("mkdir -p /tmp/www; head -c %d /dev/urandom >/tmp/www/file", 6<<20)
		r.want[i] = d.Sh("sha256sum </tmp/www/file")
		d.Start("busybox", "httpd", "-f", "-p", "80", "-h", "/tmp/www")
		d.Await("httpd", "curl -sI http://127.0.0.1/file >/dev/null")
	}
}

// startTraffic fetches a file each way and pings each way, and returns once the guest has that
// many replies.
func (r *replacement) startTraffic(pings int, every string, replies int) {
	r.downs = r.carrierDowns()
	for i, d := range []*Domain{r.Dom0(), r.guest} {
		to := [...]string{handoverGuest, handoverAddr}[i]
		r.gets[i] = d.Start("sh", "-ec", fmt.Sprintf("curl -sSf --limit-rate 1M --max-time 50 http://%s/file | sha256sum", to))
		r.pings[i] = d.Start("ping", "-c", fmt.Sprint(pings), "-i", every, "-w", "60", to)
	}
	r.pings[1].Await(fmt.Sprintf("icmp_seq=%d ", replies))
}

func (r *replacement) carrierDowns() string {
	return r.guest.Sh("cat /sys/class/net/%s/carrier_down_count", r.card)
}

// requireTraffic waits for the end of the traffic. The files must have come whole, at most so
// many pings may be lost to the guest and from it, and the guest's link was never down.
func (r *replacement) requireTraffic(toGuest, fromGuest int) {
	for i, get := range r.gets {
		if got := get.Succeed().Text(); got != r.want[i] {
			r.Fatalf("fetched %s, want %s", got, r.want[i])
		}
	}
	for i, ping := range r.pings {
		out := ping.Wait().Text()
		sent, lost, longest, err := pingLoss(out)
		if err != nil {
			r.Fatalf("%w: %s", err, out)
		}
		r.Note("%s lost %d of %d pings, longest %.0f ms", [...]string{"dom0→domU", "domU→dom0"}[i], lost, sent, longest)
		if lost > [...]int{toGuest, fromGuest}[i] {
			r.Fatalf("too many pings were lost: %s", out)
		}
	}
	if now := r.carrierDowns(); now != r.downs {
		r.Fatalf("the guest saw its link go down: %s times, %s before", now, r.downs)
	}
	r.Ping(r.guest, handoverAddr, 1472, 10)
}

// end removes the guest, then its backend p, and the bridge.
func (r *replacement) end(p *Process) {
	r.Destroy(r.guest)
	p.Terminate()
	r.Dom0().Run("ip", "link", "del", handoverBridge)
}

// takenOver has one of our backends take over from another, twice, under a Linux netfront that
// sends and receives. No ping is lost and no transfer breaks; the time for which the vif
// stands still is told.
func takenOver(t *T) {
	r := t.startReplacement()
	p := r.back()
	r.plug()
	dom0 := t.Dom0()
	state := r.guest.Backend(dom0, 0) + "/state"
	card := dom0.Sh("cat /sys/class/net/%s/ifindex", r.guest.VIF(0))
	r.startTraffic(400, "0.01", 30)
	for range 2 {
		p = r.takeOver(p)
		if s := dom0.Sh("xenstore-read %s", state); s != "4" {
			t.Fatalf("the backend's state is %s", s)
		}
	}
	r.requireTraffic(0, 0)
	if now := dom0.Sh("cat /sys/class/net/%s/ifindex", r.guest.VIF(0)); now != card {
		t.Fatalf("the interface of the vif is another one: %s, not %s", now, card)
	}
	r.end(p)
}

// takeOver has another backend take over from p, and returns it. It notes how long the vif stood
// still, and of what the backend says that was made.
func (r *replacement) takeOver(p *Process) *Process {
	next := r.back("--take-over")
	next.Await("1 vif taken over from")
	up := string(next.Await("a vif was taken over").Stderr)
	old := p.Succeed()
	stood, err := gap(string(old.Stderr), up)
	if err != nil {
		r.Fatalf("%w: %s\n%s", err, old.Stderr, up)
	}
	r.Note("the vif stood still for %d ms; %s", stood.Milliseconds(), stoodStill.FindString(up))
	return next
}

// bothTakenOver has one of our backends take over from another, twice, under a frontend of ours
// whose pages it keeps mapped. Afterwards no frame is copied by grant operations.
func bothTakenOver(t *T) {
	r := t.startReplacement()
	p := r.back()
	r.guest = t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	front := t.startAppliance(r.guest, handoverGuest)
	dom0, name := t.Dom0(), backName(r.guest, 0)
	t.Ping(dom0, handoverGuest, 56, 3)
	const bytes = 3 << 20
	want := dom0.Sh("curl -sSf --max-time 50 http://%s/bytes/%d.sha256 | cut -c1-64", handoverGuest, bytes)
	for range 2 {
		get := dom0.Start("sh", "-ec", fmt.Sprintf("curl -sSf --limit-rate 500k --max-time 50 http://%s/bytes/%d | sha256sum | cut -c1-64", handoverGuest, bytes))
		ping := dom0.Start("ping", "-c", "400", "-i", "0.01", "-w", "60", handoverGuest)
		ping.Await("icmp_seq=30 ")
		p = r.takeOver(p)
		if got := get.Succeed().Text(); got != want {
			t.Fatalf("fetched %s, want %s", got, want)
		}
		out := ping.Wait().Text()
		sent, lost, longest, err := pingLoss(out)
		if err != nil {
			t.Fatalf("%w: %s", err, out)
		}
		t.Note("lost %d of %d pings, longest %.0f ms", lost, sent, longest)
		if lost > 0 {
			t.Fatalf("pings were lost: %s", out)
		}
		dom0.Await("the counters of the new backend", "[ -e %s/%s/counters ]", bpf.DefaultRoot, name)
		grantOps := func() uint64 {
			dump := t.dumpCounters(dom0, name)
			return t.counterTotal(dump, "rx_grant_ops") + t.counterTotal(dump, "tx_grant_ops")
		}
		before := t.settled(dom0, grantOps)
		t.Ping(dom0, handoverGuest, 1472, 20)
		t.fetchServed(dom0, handoverGuest, 1<<20)
		t.Send(dom0, handoverGuest, 1<<20)
		if n := grantOps() - before; n != 0 {
			t.Fatalf("%d grant operations with static grants that were taken over", n)
		}
	}
	if said := string(front.Await("serving http").Stdout); strings.Contains(said, "vif 0: down") {
		t.Fatalf("the frontend has noticed it: %s", said)
	}
	front.Terminate()
	r.end(p)
}

// stoodStill is what a backend says of the time in which a vif stood still.
var stoodStill = regexp.MustCompile(`still=.*`)

// frontTakenOver has a frontend of ours take over from another on Linux's netback, twice, with
// a TAP and then with a TCP/IP stack of its own. No ping through the TAP is lost, and a transfer
// through it goes on. The domain has the same pages and event channels afterwards.
func frontTakenOver(t *T) {
	t.loadNetback(true)
	dom0, guest := t.Dom0(), t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	r := &replacement{T: t, guest: guest, card: "card0"}
	vif := guest.VIF(0)
	dom0.Sh("ip addr add %s/24 dev %s", handoverAddr, vif)
	guest.Run("modprobe", "tun")
	attach := func(args ...string) *Process {
		p := guest.Start(append([]string{barevif, "attach", "-v", "--xen", "--tap", "card%i", "--addr", handoverGuest + "/24"}, args...)...)
		p.Await("the kernel has it as card0")
		return p
	}
	p := attach()
	dom0.awaitCarrier(vif)
	r.serveFiles()
	card, held := guest.Sh("cat /sys/class/net/card0/ifindex"), t.domainResources(guest)
	r.startTraffic(400, "0.01", 30)
	for range 2 {
		p = r.replaceFront(p, func() *Process { return attach("--take-over") })
	}
	r.requireTraffic(0, 0)
	if now := guest.Sh("cat /sys/class/net/card0/ifindex"); now != card {
		t.Fatalf("the interface of the vif is another one: %s, not %s", now, card)
	}
	t.requireResources(guest, held)
	p.Terminate()

	p = t.startAppliance(guest, handoverGuest)
	dom0.awaitCarrier(vif)
	t.fetchServed(dom0, handoverGuest, 1<<20)
	pings := dom0.Start("ping", "-c", "300", "-i", "0.01", "-w", "60", handoverGuest)
	pings.Await("icmp_seq=30 ")
	for range 2 {
		p = r.replaceFront(p, func() *Process {
			next := guest.Start(barevif, "serve", "-v", "--xen", "--addr", handoverGuest+"/24", "--check", "7007", "--take-over")
			next.Await("serving http")
			return next
		})
	}
	out := pings.Wait().Text()
	sent, lost, longest, err := pingLoss(out)
	// With the guest's only processor busy, an answer of the old stack may come after it was
	// held, and ends with that process: one at each of the two take-overs, or so.
	if err != nil {
		t.Fatalf("%w: %s", err, out)
	}
	if lost > sent/100 {
		t.Fatalf("serve lost %d of %d pings in two take-overs, more than one in a hundred: the old stack did not answer what it had received before it gave the vif away: %s", lost, sent, out)
	}
	t.Note("serve: lost %d of %d pings, longest %.0f ms", lost, sent, longest)
	t.fetchServed(dom0, handoverGuest, 1<<20)
	t.Datagrams(dom0, handoverGuest, "1-1472:31")
	p.Terminate()
}

// twoFrontsTakenOver has a serve with two vifs on Linux's netback taken over by another, twice,
// while each vif is pinged. Each vif is handed over for itself. The backend notices nothing, at
// most one ping in a hundred is lost, and both vifs serve whole files afterwards.
func twoFrontsTakenOver(t *T) {
	t.loadNetback(true)
	dom0, guest := t.Dom0(), t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}, {}}})
	// Two full queue pairs take more than the 1024 pages that gntalloc grants by default.
	guest.Sh("echo 4096 >%s", grantLimit)
	addrs := [...]string{handoverGuest, "10.89.4.2"}
	args := []string{barevif, "serve", "-v", "--xen"}
	for i, own := range [...]string{handoverAddr, "10.89.4.1"} {
		dom0.Sh("ip addr add %s/24 dev %s", own, guest.VIF(i))
		args = append(args, "--vif", fmt.Sprint(i), "--addr", fmt.Sprintf("%d=%s/24", i, addrs[i]))
	}
	serve := func(more ...string) *Process {
		p := guest.Start(append(args[:len(args):len(args)], more...)...)
		p.Await(`(?s)serving http.*serving http`)
		return p
	}
	p := serve()
	var pings [len(addrs)]*Process
	for i, addr := range addrs {
		dom0.awaitCarrier(guest.VIF(i))
		t.fetchServed(dom0, addr, 1<<20)
		pings[i] = dom0.Start("ping", "-c", "300", "-i", "0.02", "-w", "60", addr)
	}
	for _, ping := range pings {
		ping.Await("icmp_seq=30 ")
	}
	for range 2 {
		next := serve("--take-over")
		next.Await(`(?s)1 vif taken over from.*1 vif taken over from`)
		p.Succeed()
		p = next
		for i := range addrs {
			for _, dir := range [...]string{guest.Backend(dom0, i), guest.Frontend(i)} {
				if s := dom0.Sh("xenstore-read %s/state", dir); s != "4" {
					t.Fatalf("the state of %s is %s", dir, s)
				}
			}
		}
	}
	for i, ping := range pings {
		out := ping.Wait().Text()
		sent, lost, longest, err := pingLoss(out)
		if err != nil {
			t.Fatalf("%w: %s", err, out)
		}
		t.Note("vif %d: lost %d of %d pings, longest %.0f ms", i, lost, sent, longest)
		if lost > sent/100 {
			t.Fatalf("vif %d lost %d of %d pings in two take-overs, more than one in a hundred: %s", i, lost, sent, out)
		}
		t.fetchServed(dom0, addrs[i], 1<<20)
	}
	p.Terminate()
}

// replaceFront has the frontend that start starts take over from p.
func (r *replacement) replaceFront(p *Process, start func() *Process) *Process {
	next := start()
	next.Await("1 vif taken over from")
	up := string(next.Await("link up").Stderr)
	old := p.Succeed()
	stood, err := gap(string(old.Stderr), up)
	if err != nil {
		r.Fatalf("%w: %s\n%s", err, old.Stderr, up)
	}
	r.Note("the vif stood still for %d ms", stood.Milliseconds())
	for _, dir := range [...]string{r.guest.Backend(r.Dom0(), 0), fmt.Sprintf("/local/domain/%d/device/vif/0", r.guest.ID)} {
		if s := r.Dom0().Sh("xenstore-read %s/state", dir); s != "4" {
			r.Fatalf("the state of %s is %s", dir, s)
		}
	}
	return next
}

var (
	linkDown = regexp.MustCompile(`time=(\S+) .*msg="link down".*another process takes the vif over`)
	linkUp   = regexp.MustCompile(`time=(\S+) .*msg="link up"`)
)

// gap returns the time between the old process's last frame and the first that the new one
// could move, from what both have logged.
func gap(old, next string) (time.Duration, error) {
	var at [2]time.Time
	for i, m := range [...][]string{linkDown.FindStringSubmatch(old), linkUp.FindStringSubmatch(next)} {
		if m == nil {
			return 0, fmt.Errorf("no line says when the link of process %d changed", i)
		}
		var err error
		if at[i], err = time.Parse(time.RFC3339Nano, m[1]); err != nil {
			return 0, err
		}
	}
	return at[1].Sub(at[0]), nil
}
