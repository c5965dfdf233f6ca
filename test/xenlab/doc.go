//go:build linux

// Package xenlab tests this project on a real Xen. It boots Xen on a CPU that QEMU emulates,
// with Linux in dom0 and in the other domains, and runs scenarios there:
//
//	BAREVIF_XENLAB=1 go test ./test/xenlab -run TestLab -timeout 55m -v
//	go run ./test/xenlab/cmd/xenlab -run 'PVH' -shell
//
// It needs Debian, or another system with apt and dpkg-deb, about 3.5 GiB of memory, and the
// network for the first run. If QEMU is not installed, root's run installs it.
//
// Package [barevif/test/xenlab/image] builds the images from Debian packages, package
// [barevif/test/xenlab/machine] runs QEMU, and an agent in each domain runs the programs of a
// scenario. The lab does not check what the agents send, because all programs in the domains
// are the project's own.
//
// # Scenarios
//
// A scenario is a function of a [T], and a row of the table below. It fails if one of its steps
// fails, if it leaves something behind (nodes of xenstore, event channels, grants, interrupts,
// devices or domains), or if the log of Xen or of a kernel has a complaint that concerns the
// lab.
//
//	dom0 with netback
//
//	  xl info                  dom0: toolstack
//	  vector registers         dom0, PV domU: Go programs
//	  kernel ends, PV          PV domU: netfront; dom0: netback
//	  kernel ends, PVH         PVH domU: netfront; dom0: netback
//	  device nodes, dom0       dom0: tests of xendev, xenhost
//	  device nodes, PV         PV domU: tests of xendev, xenhost
//	  device nodes, PVH        PVH domU: tests of xendev, xenhost
//	  two domains              dom0, PV domU: tests of xendev
//	  our front, PV            PV domU: barevif serve; dom0: netback
//	  our front, PVH           PVH domU: barevif serve; dom0: netback
//	  our front, jumbo         PV domU: barevif serve; dom0: netback, MTU 9000
//	  our front, a kernel's    PV domU: barevif attach; dom0: netback
//	  our front, unplugged     PV domU: barevif serve; dom0: netback, its vif taken and given back
//	  our front, netback anew  PV domU: barevif serve; dom0: netback, its module taken out and put back
//	  our front, refused       PV domU: barevif serve without what it needs
//	  our front, misled        PV domU: barevif serve; dom0: netback, and what xenstore should not say
//	  our front, taken over    PV domU: barevif attach, then serve, each replaced by --take-over; dom0: netback
//	  our front, two replaced  PV domU: one barevif serve of two vifs, replaced by --take-over; dom0: netback
//	  our front, resumed       PV domU: barevif serve, saved and restored; dom0: netback
//	  our front, resumed, PVH  PVH domU: barevif serve, saved and restored; dom0: netback
//	  our front, queues        PV domU: barevif serve, 4 queues; dom0: netback, its vif taken and given back
//	  our front, hashed        PV domU: a frontend of ours, 4 queues; dom0: netback, which hashes for it
//	  our front, multicast     PV domU: a frontend of ours that joins groups; dom0: netback, on a bridge
//	  our front, settings      PV domU: barevif attach; dom0: netback, its MTU and carrier changed
//	  image, PV                PV domU: an image of hello; dom0: netback
//	  image, PVH               PVH domU: an image of hello; dom0: netback
//	  image, packed            PVH domU: an image of hello, compressed as it is by default; dom0: netback
//	  baseline                 PV domU: netfront and bench, in turns; dom0: netback
//	  baseline, our back       PV domU: netfront; dom0: netback and barevif back, in turns
//	  baseline, image          PV and PVH domU: an image of hello, and a shell on the kernel's netfront, in turns; dom0: netback
//	  baseline, attach         PV domU: netfront and barevif attach, in turns; dom0: netback
//	  static grants            PV domU: bench; PV driver domain: bench; both ends ours, with and without, in turns
//	  our back, dom0           PV domU: netfront; dom0: barevif back
//	  our back, unplugged      PV domU: netfront; dom0: barevif back, its vif taken and given back
//	  our back, paused         PV domU: netfront, paused by xl; another; dom0: barevif back
//	  our back, misled         PV domU: barevif serve, and a frontend that lies; dom0: barevif back
//	  our back, rate           PV domU: netfront; dom0: barevif back, its vif limited
//	  our back, queues         PV domU: netfront, 4 queues; dom0: barevif back, restarted, its vif taken and given back
//	  our back, keys           PV domU: netfront; dom0: barevif back, on bridges and routes that xl names
//	  our back, driver domain  PV domU: netfront; PV driver domain: barevif back
//	  our back, taken over     PV domU: netfront; dom0: barevif back, another by --take-over
//	  our back, handed over    PV domU: netfront; dom0: barevif back, another by SIGUSR1
//	  our back, guest resumed  PV domU: netfront, saved and restored; dom0: barevif back
//	  our bridge               PV domUs: netfront; dom0: barevif bridge, killed and started again
//	  both ours                PV domU: barevif serve; PV driver domain: barevif back
//	  both ours, restarted     PV domU: barevif serve; PV driver domain: barevif back; each killed, both, the domain
//	  both ours, settings      PV domU: barevif serve; PV driver domain: barevif back, its TAP changed
//	  both ours, multicast     PV domU: a frontend of ours that joins groups; dom0: barevif back, on a bridge
//	  both ours, taken over    PV domU: barevif serve; dom0: barevif back, another by --take-over
//	  both ours, without root  PV domU: barevif serve; PV driver domain: barevif back; both as a user
//	  units                    PV domU: systemd with barevif's units and udev rules, twice; dom0: netback
//	  router                   PV domU: netfront; PV driver domain: vifrouter, then Linux's forwarding; dom0: netback
//	  router, image            PV domU: netfront; PV driver domain: an image of vifrouter; dom0: netback
//
//	oxenstored
//
//	  other xenstore           PV domU: barevif serve, netfront; dom0: netback, barevif back
//	  router, image, PVH       PV domU: netfront; PVH driver domain: an image of vifrouter; dom0: netback
//
// The baselines measure, so they need a machine without other work. They run only if -run
// names them.
//
// # How to add a scenario
//
// Write a func(*T). Add it to [Plan] with a name and its roles, and to the table above. Every
// step that fails ends the scenario, except those whose method begins with Try:
//
//	func example(t *T) {
//		t.Dom0().Run("modprobe", "xen-netback")
//		guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{MTU: 9000}}})
//		p := guest.Start(image.ProgramDir+"/barevif", "serve", "--xen")
//		p.Await("serving http")
//		t.Dom0().Sh("ip addr add 10.90.0.1/24 dev %s", guest.VIF(0))
//		t.Ping(t.Dom0(), "10.90.0.2", 8972, 20)
//		p.Kill()
//		t.Dom0().Await("the state", `[ "$(xenstore-read %s/state)" = 4 ]`, guest.Backend(t.Dom0(), 0))
//		t.Note("what the table's last column says")
//	}
//
// To have one of the project's programs in every domain, add a line to [Programs]: a command, or
// the test binary of a package, which [Domain.Test] runs.
package xenlab
