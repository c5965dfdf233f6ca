//go:build linux

package xenlab

import (
	"fmt"
	"strings"
	"time"

	"barevif/test/xenlab/image"
	"barevif/test/xenlab/proto"
)

// Programs returns the programs that are in every domain, in image.ProgramDir.
func Programs() []image.Program {
	return []image.Program{
		{Name: "barevif", Package: "barevif/tools/barevif"},
		{Name: "vifrouter", Package: "barevif/tools/vifrouter"},
		{Name: "bench", Package: "barevif/test/bench"},
		{Name: "check", Package: "barevif/test/check"},
		{Name: "grants", Package: "barevif/test/xenlab/grants"},
		{Name: "vectors", Package: "barevif/test/xenlab/vectors"},
		{Name: "granter", Package: "barevif/test/xenlab/granter"},
		{Name: "prober", Package: "barevif/test/xenlab/prober"},
		{Name: "xendev.test", Package: "barevif/hypercall/xendev", Test: true},
		{Name: "xenhost.test", Package: "barevif/tools/xenhost", Test: true},
	}
}

// Plan returns all boots with all scenarios. The package comment shows them as a table.
func Plan() []Boot {
	return []Boot{{
		Name: "dom0 with netback",
		Scenarios: []Scenario{
			{Name: "xl info", Roles: "dom0: toolstack", Run: xlInfo},
			{Name: "vector registers", Roles: "dom0, PV domU: Go programs", Run: vectors},
			{Name: "kernel ends, PV", Roles: "PV domU: netfront; dom0: netback", Run: kernelEnds(PV)},
			{Name: "kernel ends, PVH", Roles: "PVH domU: netfront; dom0: netback", Run: kernelEnds(PVH)},
			{Name: "device nodes, dom0", Roles: "dom0: tests of xendev, xenhost", Run: xendevDom0},
			{Name: "device nodes, PV", Roles: "PV domU: tests of xendev, xenhost", Run: xendevGuest(PV)},
			{Name: "device nodes, PVH", Roles: "PVH domU: tests of xendev, xenhost", Run: xendevGuest(PVH)},
			{Name: "two domains", Roles: "dom0, PV domU: tests of xendev", Run: xendevPeer},
			{Name: "our front, PV", Roles: "PV domU: barevif serve; dom0: netback", Run: ourFront(PV)},
			{Name: "our front, PVH", Roles: "PVH domU: barevif serve; dom0: netback", Run: ourFront(PVH)},
			{Name: "our front, jumbo", Roles: "PV domU: barevif serve; dom0: netback, MTU 9000", Run: ourFrontJumbo},
			{Name: "our front, a kernel's", Roles: "PV domU: barevif attach; dom0: netback", Run: ourFrontKernel},
			{Name: "our front, unplugged", Roles: "PV domU: barevif serve; dom0: netback, its vif taken and given back", Run: ourFrontUnplugged},
			{Name: "our front, netback anew", Roles: "PV domU: barevif serve; dom0: netback, its module taken out and put back", Run: netbackReloaded},
			{Name: "our front, refused", Roles: "PV domU: barevif serve without what it needs", Run: ourFrontRefused},
			{Name: "our front, misled", Roles: "PV domU: barevif serve; dom0: netback, and what xenstore should not say", Run: frontMisled},
			{Name: "our front, taken over", Roles: "PV domU: barevif attach, then serve, each replaced by --take-over; dom0: netback", Limit: 4 * time.Minute, Run: frontTakenOver},
			{Name: "our front, two replaced", Roles: "PV domU: one barevif serve of two vifs, replaced by --take-over; dom0: netback", Limit: 4 * time.Minute, Run: twoFrontsTakenOver},
			{Name: "our front, resumed", Roles: "PV domU: barevif serve, saved and restored; dom0: netback", Limit: 6 * time.Minute, Run: frontResumed(PV), Complaints: toOneQueue},
			{Name: "our front, resumed, PVH", Roles: "PVH domU: barevif serve, saved and restored; dom0: netback", Limit: 6 * time.Minute, Run: frontResumed(PVH), Complaints: toOneQueue},
			{Name: "our front, queues", Roles: "PV domU: barevif serve, 4 queues; dom0: netback, its vif taken and given back", Limit: 8 * time.Minute, Run: ourFrontQueues},
			{Name: "our front, hashed", Roles: "PV domU: a frontend of ours, 4 queues; dom0: netback, which hashes for it", Limit: 6 * time.Minute, Run: frontHashed},
			{Name: "our front, multicast", Roles: "PV domU: a frontend of ours that joins groups; dom0: netback, on a bridge", Limit: 6 * time.Minute, Run: frontMulticast,
				Complaints: []string{mcastBridge + `: port \d+\(.*\) entered disabled state`}},
			{Name: "our front, settings", Roles: "PV domU: barevif attach; dom0: netback, its MTU and carrier changed", Run: settingsOfFront},
			{Name: "image, PV", Roles: "PV domU: an image of hello; dom0: netback", Run: imageBoots(PV, image.Appliance)},
			{Name: "image, PVH", Roles: "PVH domU: an image of hello; dom0: netback", Run: imageBoots(PVH, image.Appliance)},
			{Name: "image, packed", Roles: "PVH domU: an image of hello, compressed as it is by default; dom0: netback", Limit: 4 * time.Minute, Run: imageBoots(PVH, image.PackedAppliance)},
			{Name: "baseline", Roles: "PV domU: netfront and bench, in turns; dom0: netback", Limit: 8 * time.Minute, Asked: true, Run: baseline},
			{Name: "baseline, our back", Roles: "PV domU: netfront; dom0: netback and barevif back, in turns", Limit: 12 * time.Minute, Asked: true, Run: baselineBack},
			{Name: "baseline, image", Roles: "PV and PVH domU: an image of hello, and a shell on the kernel's netfront, in turns; dom0: netback", Limit: 8 * time.Minute, Asked: true, Run: baselineImage},
			{Name: "baseline, attach", Roles: "PV domU: netfront and barevif attach, in turns; dom0: netback", Limit: 6 * time.Minute, Asked: true, Run: baselineAttach},
			{Name: "static grants", Roles: "PV domU: bench; PV driver domain: bench; both ends ours, with and without, in turns", Limit: 6 * time.Minute, Asked: true, Run: staticGrants},
			{Name: "our back, dom0", Roles: "PV domU: netfront; dom0: barevif back", Run: ourBackDom0},
			{Name: "our back, unplugged", Roles: "PV domU: netfront; dom0: barevif back, its vif taken and given back", Run: ourBackUnplugged},
			{Name: "our back, paused", Roles: "PV domU: netfront, paused by xl; another; dom0: barevif back", Limit: 4 * time.Minute, Run: ourBackPaused},
			{Name: "our back, misled", Roles: "PV domU: barevif serve, and a frontend that lies; dom0: barevif back", Run: backMisled},
			{Name: "our back, rate", Roles: "PV domU: netfront; dom0: barevif back, its vif limited", Run: ourBackRate},
			{Name: "our back, queues", Roles: "PV domU: netfront, 4 queues; dom0: barevif back, restarted, its vif taken and given back", Limit: 8 * time.Minute, Run: ourBackQueues},
			{Name: "our back, keys", Roles: "PV domU: netfront; dom0: barevif back, on bridges and routes that xl names", Limit: 8 * time.Minute, Run: backKeys,
				Complaints: []string{keysBridge + `: port \d+\(.*\) entered disabled state`}},
			{Name: "our back, driver domain", Roles: "PV domU: netfront; PV driver domain: barevif back", Limit: 5 * time.Minute, Run: ourBackDriver},
			{Name: "our back, taken over", Roles: "PV domU: netfront; dom0: barevif back, another by --take-over", Run: takenOver,
				Complaints: []string{handoverBridge + `: port \d+\(.*\) entered disabled state`}},
			{Name: "our back, handed over", Roles: "PV domU: netfront; dom0: barevif back, another by SIGUSR1", Run: handedOver,
				Complaints: []string{handoverBridge + `: port \d+\(.*\) entered disabled state`}},
			{Name: "our back, guest resumed", Roles: "PV domU: netfront, saved and restored; dom0: barevif back", Limit: 6 * time.Minute, Run: backGuestResumed,
				Complaints: []string{handoverBridge + `: port \d+\(.*\) entered disabled state`}},
			{Name: "our bridge", Roles: "PV domUs: netfront; dom0: barevif bridge, killed and started again", Limit: 5 * time.Minute, Run: switched},
			{Name: "both ours", Roles: "PV domU: barevif serve; PV driver domain: barevif back", Run: bothOurs},
			{Name: "both ours, restarted", Roles: "PV domU: barevif serve; PV driver domain: barevif back; each killed, both, the domain", Limit: 8 * time.Minute, Run: bothRestarted},
			{Name: "both ours, settings", Roles: "PV domU: barevif serve; PV driver domain: barevif back, its TAP changed", Run: settingsOfBoth},
			{Name: "both ours, multicast", Roles: "PV domU: a frontend of ours that joins groups; dom0: barevif back, on a bridge", Limit: 6 * time.Minute, Run: bothMulticast,
				Complaints: []string{mcastBridge + `: port \d+\(.*\) entered disabled state`}},
			{Name: "both ours, taken over", Roles: "PV domU: barevif serve; dom0: barevif back, another by --take-over", Run: bothTakenOver,
				Complaints: []string{handoverBridge + `: port \d+\(.*\) entered disabled state`}},
			{Name: "both ours, without root", Roles: "PV domU: barevif serve; PV driver domain: barevif back; both as a user", Run: withoutRoot},
			{Name: "units", Roles: "PV domU: systemd with barevif's units and udev rules, twice; dom0: netback", Limit: 8 * time.Minute, Run: units},
			{Name: "router", Roles: "PV domU: netfront; PV driver domain: vifrouter, then Linux's forwarding; dom0: netback", Limit: 8 * time.Minute, Run: routed},
			{Name: "router, image", Roles: "PV domU: netfront; PV driver domain: an image of vifrouter; dom0: netback", Run: routerImage(PV),
				Complaints: []string{refusedConf}},
		},
	}, {
		Name:  "oxenstored",
		Linux: []string{proto.StoreArgument + "=oxenstored"},
		Scenarios: []Scenario{
			{Name: "other xenstore", Roles: "PV domU: barevif serve, netfront; dom0: netback, barevif back", Run: otherStore},
			{Name: "router, image, PVH", Roles: "PV domU: netfront; PVH driver domain: an image of vifrouter; dom0: netback", Run: routerImage(PVH),
				Complaints: []string{refusedConf}},
		},
	}}
}

// Roles returns a plan as a table in Markdown: which role runs in which domain in which boot.
// README.md has the table of [Plan].
func Roles(plan []Boot) string {
	var b strings.Builder
	b.WriteString("| boot | scenario | which role runs where |\n| --- | --- | --- |\n")
	for _, boot := range plan {
		name := boot.Name
		for _, s := range boot.Scenarios {
			fmt.Fprintf(&b, "| %s | %s | %s |\n", name, s.Name, s.Roles)
			name = "" // only in the first row
		}
	}
	return b.String()
}

func xlInfo(t *T) {
	info := t.Dom0().Run("xl", "info").Text()
	for _, key := range [...]string{"release", "xen_version", "xen_caps", "total_memory"} {
		if !strings.Contains("\n"+info, "\n"+key+" ") {
			t.Fatalf("xl info does not tell %s", key)
		}
	}
	if caps := t.Dom0().Sh("cat /proc/xen/capabilities"); caps != "control_d" {
		t.Fatalf("dom0's capabilities are %q", caps)
	}
}

// vectors checks the machine itself: see qemuArgs of package machine.
func vectors(t *T) {
	guest := t.Create(Guest{Name: "domU", Type: PV})
	var running []*Process
	for _, d := range [...]*Domain{t.Dom0(), t.Dom0(), guest} {
		running = append(running, d.Start(image.ProgramDir+"/vectors", d.Name))
	}
	for _, p := range running {
		p.Succeed()
	}
}

// kernelEnds is the reference for all other scenarios: Linux's netfront and netback, with the
// same traffic as our ends.
func kernelEnds(kind GuestType) func(*T) {
	return func(t *T) {
		t.Dom0().Run("modprobe", "xen-netback")
		guest := t.Create(Guest{Name: "domU", Type: kind, VIFs: []VIF{{}}})
		guest.Run("modprobe", "xen-netfront")
		dom0Addr, guestAddr := t.JoinKernel(guest, 0)
		t.kernelTraffic(guest, t.Dom0(), guestAddr, dom0Addr)
		if len(t.mappedGrants()) == 0 {
			t.Fatalf("Xen tells of no grant in use, though netback has mapped the rings")
		}
	}
}

// onXen selects the tests that need a Xen; the others run anywhere.
const onXen = "-test.run=^TestXen"

func xendevDom0(t *T) {
	dom0 := t.Dom0().Within(2 * time.Minute)
	dom0.Test("xendev.test", onXen)
	dom0.Test("xenhost.test", onXen)
}

// xendevGuest runs the tests in a guest with a vif that the kernel's netfront owns. The guest
// may make hypercalls, which current kernels allow only with a parameter of xen-privcmd.
func xendevGuest(kind GuestType) func(*T) {
	return func(t *T) {
		t.Dom0().Run("modprobe", "xen-netback")
		guest := t.Create(Guest{
			Name: "domU", Type: kind, VIFs: []VIF{{}},
			Linux: []string{"xen_privcmd.unrestricted=1"},
		})
		guest.Run("modprobe", "xen-netfront")
		guest.Await("a network interface", "ip link set eth0 up")
		guest = guest.WithEnv("XENHOST_TEST_VIF=0").Within(2 * time.Minute)
		guest.Test("xendev.test", onXen)
		guest.Test("xenhost.test", onXen)
	}
}

// xendevPeer tests grants and event channels between two domains, one of which is killed.
func xendevPeer(t *T) {
	guest := t.Create(Guest{Name: "domU", Type: PV})
	peer := guest.WithEnv("XENDEV_TEST_CHILD=peer").Start(image.ProgramDir + "/xendev.test")
	t.Dom0().WithEnv(fmt.Sprintf("XENDEV_TEST_PEER=%d", guest.ID)).Test("xendev.test", "-test.run=TestXenPeer")
	if r := peer.Wait(); r.Exit != 128+9 {
		t.Fatalf("the peer was to die by SIGKILL: %v", r.problem())
	}
}
