//go:build linux

package xenlab

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"barevif/test/xenlab/image"
)

const grantLimit = "/sys/module/xen_gntalloc/parameters/limit"

// serveRefused runs our appliance, which must not come up, and returns its output.
func (t *T) serveRefused(guest *Domain, args ...string) string {
	args = append([]string{barevif, "serve", "--xen"}, args...)
	r := guest.Try(args...)
	if r.Err != nil || r.Exit == 0 {
		t.Fatalf("%q, wanted an error: exit status %d, %w", args, r.Exit, r.Err)
	}
	return string(r.Stderr)
}

// requireUnanswered runs our appliance against a backend that does not come up. Its output must
// have the words, and the time for which it waited. On a loaded machine the appliance may not
// get as far as the words say, so requireUnanswered retries with more time.
func (t *T) requireUnanswered(guest *Domain, words ...string) {
	for wait := 2 * time.Second; ; wait *= 2 {
		said := t.serveRefused(guest, "--wait", wait.String())
		t.requireWords(said, "waited "+wait.String())
		missing := func(w string) bool { return !strings.Contains(said, w) }
		if !slices.ContainsFunc(words, missing) {
			return
		}
		if wait > 10*time.Second {
			t.requireWords(said, words...)
		}
	}
}

// requireWords fails unless text has each of the words.
func (t *T) requireWords(text string, words ...string) {
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Fatalf("no %q in %q", w, text)
		}
	}
}

// frontMisled gives our appliance wrong or incomplete data in xenstore. Each time the appliance
// must say what it saw. With correct data it must connect.
func frontMisled(t *T) {
	t.loadNetback(true)
	dom0 := t.Dom0()
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	guest.Sh("echo 516 >%s", grantLimit) // as many as one queue needs, so that a single leaked grant is noticed
	held := t.domainResources(guest)
	front, back := guest.Frontend(0), guest.Backend(dom0, 0)
	truth := dom0.Run("xenstore-read", front+"/backend").Text()

	// A backend domain that does not match the path, that does not exist, or that is the
	// wrong one.
	dom0.Run("xenstore-write", front+"/backend-id", "77")
	t.requireWords(t.serveRefused(guest), truth, "a backend directory of domain 77")
	for other, want := range map[int]string{
		77:       "own state Initialising, other end showed no state we may read",
		guest.ID: fmt.Sprintf("still without /local/domain/%[1]d/backend/vif/%[1]d/0/frontend", guest.ID),
	} {
		dom0.Run("xenstore-write", front+"/backend-id", fmt.Sprint(other),
			front+"/backend", strings.Replace(truth, "/domain/0/", fmt.Sprintf("/domain/%d/", other), 1))
		t.requireUnanswered(guest, want)
	}
	dom0.Run("xenstore-write", front+"/backend-id", "0", front+"/backend", truth)

	// Nodes that the appliance may not read, or not write.
	dom0.Run("xenstore-chmod", back+"/state", "n0")
	t.requireUnanswered(guest, "showed no state we may read")
	dom0.Run("xenstore-chmod", back+"/state", "n0", fmt.Sprintf("r%d", guest.ID))
	perms := func(owner, other int) {
		dom0.Run("xenstore-chmod", "-r", front, fmt.Sprintf("n%d", owner), fmt.Sprintf("r%d", other))
	}
	perms(0, guest.ID)
	t.requireWords(t.serveRefused(guest), "device/vif/0/state: EACCES")
	perms(guest.ID, 0)

	// A backend that never comes up. Then the vif is detached during the handshake, and the
	// same process serves the next vif.
	dom0.Sh("echo vif-%d-0 >/sys/bus/xen-backend/drivers/vif/unbind; xenstore-write %s/state 2", guest.ID, back)
	t.requireUnanswered(guest, "own state Connected", "other end showed InitWait")
	t.requireResources(guest, held)
	p := guest.Start(barevif, "serve", "-v", "--xen", "--addr", "10.88.0.2/24", "--wait", "0")
	dom0.Await("the frontend", `[ "$(xenstore-read %s/state)" = 4 ]`, front)
	// Do what xl does ten seconds later, when it gives up its wait for the backend to close.
	dom0.Run("xenstore-rm", front, back, fmt.Sprintf("/libxl/%d/device/vif/0", guest.ID))
	t.Attach(guest, VIF{More: "devid=0"}) // xl still counts the vif that it did not remove itself
	p.Await(`516 pages shared(?s).*serving http`)
	reachable := func() {
		dom0.Sh("ip addr add 10.88.0.1/24 dev %s", guest.VIF(0))
		dom0.awaitCarrier(guest.VIF(0))
		t.Ping(dom0, "10.88.0.2", 1472, 10)
	}
	reachable()

	// Too few grants for a reconnect: the appliance names the setting, and connects once
	// there are enough.
	guest.Sh("echo 16 >%s", grantLimit)
	dom0.Run("xl", "network-detach", guest.Name, "0")
	p.Await("vif 0: down")
	t.Attach(guest, VIF{})
	p.Await("cannot connect.*limit for the whole system is 16 ." + grantLimit)
	guest.Sh("echo 516 >%s", grantLimit)
	p.Await("connected again")
	p.Await("(?s)(516 pages shared.*){2}")
	reachable()
	t.fetchServed(dom0, "10.88.0.2", 1<<20)
	p.Terminate()
}

// A lie holds the data that a frontend publishes, and the expected words of our backend.
type lie struct {
	tx, rx, port string
	want         string
}

// backMisled has a frontend that publishes wrong grefs and ports. Our backend must refuse it,
// say why, serve the guest's other vif, and serve this vif once its data is correct.
func backMisled(t *T) {
	t.loadNetback(false)
	dom0 := t.Dom0()
	p := t.startBackend(dom0, "10.89.1.1")
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}, {}}})
	serve := func(vif, addr string) *Process {
		front := guest.Start(barevif, "serve", "-v", "--xen", "--vif", vif, "--addr", addr+"/24")
		front.Await("serving http")
		return front
	}
	witness := serve("1", "10.89.1.2")
	t.Ping(dom0, "10.89.1.2", 56, 10)

	// Pages granted to our backend, and pages granted to another domain.
	ours, granter := t.startGranter(guest, 0)
	others, otherGranter := t.startGranter(guest, guest.ID)
	front, back := guest.Frontend(0), guest.Backend(dom0, 0)
	note := "/local/domain/0/error/" + strings.TrimPrefix(back, "/local/domain/0/") + "/error"
	publish := func(l lie) {
		dom0.Run("xenstore-write", front+"/state", "1")
		dom0.Await("InitWait", `[ "$(xenstore-read %s/state)" = 2 ]`, back)
		dom0.Run("xenstore-write", front+"/request-rx-copy", "1", front+"/tx-ring-ref", l.tx,
			front+"/rx-ring-ref", l.rx, front+"/event-channel", l.port)
		dom0.Run("xenstore-write", front+"/state", "4")
	}
	lies := []lie{
		{others["tx"], ours["rx"], ours["port"], "tx ring: "},
		{ours["tx"], "30000", ours["port"], "rx ring: "},
		{ours["readonly"], ours["rx"], ours["port"], "tx ring: "},
		{ours["tx"], ours["tx"], ours["port"], "two rings"},
		{ours["tx"], ours["rx"], others["port"], "event channel"},
		{ours["tx"], ours["rx"], "4000", "event channel 4000"},
		{ours["tx"], ours["rx"], "4294967295", "event channel 4294967295"},
		{"0x1f", ours["rx"], ours["port"], "tx-ring-ref"},
	}
	for _, l := range lies {
		publish(l)
		dom0.Await("Closing", `[ "$(xenstore-read %s/state)" = 5 ]`, back)
		t.requireWords(dom0.Run("xenstore-read", note).Text(), l.want)
		dom0.Run("xenstore-write", front+"/state", "6")
		dom0.Await("Closed", `[ "$(xenstore-read %s/state)" = 6 ]`, back)
	}
	said := string(p.Await("cannot connect").Stderr)
	if n := strings.Count(said, "cannot connect"); n != len(lies) {
		t.Fatalf("%d lines about %d frontends", n, len(lies))
	}
	t.Ping(dom0, "10.89.1.2", 56, 10)

	// Correct data; then the frontend disappears without closing.
	publish(lie{ours["tx"], ours["rx"], ours["port"], ""})
	dom0.Await("Connected", `[ "$(xenstore-read %s/state)" = 4 ]`, back)
	dom0.Sh("! xenstore-read %s", note)
	granter.Kill()
	otherGranter.Kill()
	dom0.Run("xenstore-write", front+"/state", "6")
	dom0.Await("Closed", `[ "$(xenstore-read %s/state)" = 6 ]`, back)
	t.fetchServed(dom0, "10.89.1.2", 1<<20)
	witness.Terminate()

	honest := serve("0", "10.89.2.2")
	dom0.Sh("ip addr add 10.89.2.1/24 dev %s", guest.VIF(0))
	t.fetchServed(dom0, "10.89.2.2", 1<<20)
	honest.Terminate()

	// The vif is removed after a refusal: the note about it goes with it.
	publish(lies[0])
	dom0.Await("the note", "xenstore-exists %s", note)
	dom0.Run("xenstore-write", front+"/state", "6")
	dom0.Await("Closed", `[ "$(xenstore-read %s/state)" = 6 ]`, back)
	dom0.Run("xenstore-write", front+"/state", "1")
	dom0.Await("InitWait", `[ "$(xenstore-read %s/state)" = 2 ]`, back)
	dom0.Run("xl", "network-detach", guest.Name, "0")
	p.Await(fmt.Sprintf(`vif %d\.0: gone`, guest.ID))
	dom0.Await("the note to go", "! xenstore-exists %s", note)
	p.Terminate()
}

// startGranter makes a program in the guest grant pages to a domain and open an event channel for
// it. It returns their numbers by name.
func (t *T) startGranter(guest *Domain, to int) (numbers map[string]string, p *Process) {
	p = guest.Start(image.ProgramDir+"/granter", fmt.Sprint(to))
	numbers = map[string]string{}
	for _, m := range granterNumber.FindAllStringSubmatch(string(p.Await("port=").Stdout), -1) {
		numbers[m[1]] = m[2]
	}
	return numbers, p
}

var granterNumber = regexp.MustCompile(`(\w+)=(\d+)`)
