//go:build linux

package xenlab

import "fmt"

// smaller is the memory, in MiB, that a guest keeps when it is to be saved: its kernel needed
// more only to unpack its image.
const smaller = 260

// shrink makes a guest smaller, so that saving and restoring it takes less time.
func (t *T) shrink(d *Domain) {
	t.dom0.Run("xl", "mem-set", d.Name, fmt.Sprint(smaller))
	t.dom0.Await("the guest to give memory back",
		`[ "$(xl list %s | awk 'NR == 2 {print $3}')" -le %d ]`, d.Name, smaller+1)
}

// download fetches a file over one TCP connection that stays open for seconds, in an environment
// without other traffic, and prints the digest of what came.
func download(d *Domain, addr, file string, size, seconds int) *Process {
	return d.Start("sh", "-ec", fmt.Sprintf("curl -sSf --limit-rate %d --max-time 400 http://%s/%s | sha256sum | cut -c1-64",
		size/seconds, addr, file))
}

// toOneQueue is a complaint of netback, which has two queues until the frontend says that it wants
// one.
var toOneQueue = []string{`xenvif_start_xmit: Invalid queue \d+ for packet`}

// frontResumed saves a guest with our appliance in it, and restores it. The appliance goes on
// as the same process, with as many event channels and grants, and so does a download over
// it. It can be ended afterwards: Linux's driver of event channels would stop with a BUG, which
// fails the scenario, if the program or its end touched a port of before. The kernel of a PVH guest
// takes up its grant table and its event channels again by other hypercalls than that of a PV guest.
func frontResumed(kind GuestType) func(*T) {
	return func(t *T) {
		const addr, size = "10.88.0.2", 4 << 20
		t.loadNetback(true)
		dom0 := t.Dom0()
		guest := t.Create(Guest{Name: "domU", Type: kind, VIFs: []VIF{{}}})
		t.shrink(guest)
		network := func() {
			dom0.Sh("ip addr add 10.88.0.1/24 dev %s", guest.VIF(0))
			dom0.awaitCarrier(guest.VIF(0))
		}
		p := t.startAppliance(guest, addr)
		network()
		t.Checkpoint(guest)
		t.Ping(dom0, addr, 1472, 10)
		held := t.domainResources(guest)

		file := fmt.Sprintf("bytes/%d", size)
		want := dom0.Sh("curl -sSf --max-time 50 http://%s/%s.sha256 | cut -c1-64", addr, file)
		get := download(dom0, addr, file, size, 30)
		resume := func() {
			guest = t.Resume(guest)
			p = p.In(guest)
			network()
			p.Await("(?s)link up.*link up")
			t.Ping(dom0, addr, 1472, 10)
			t.requireResources(guest, held)
		}
		resume()
		if got := get.Succeed().Text(); got != want {
			t.Fatalf("the download over the resume has the digest %q, want %q", got, want)
		}
		p.Terminate()
		p = t.startAppliance(guest, addr)
		t.Ping(dom0, addr, 1472, 10)
		resume()
		p.Kill()
		p = t.startAppliance(guest, addr)
		t.Ping(dom0, addr, 1472, 10)
		p.Terminate()
	}
}

// backGuestResumed saves a guest with Linux's netfront on our backend, and restores it. The
// backend goes on as the same process: it lets the old domain's vif go and serves the new
// domain's. A download over it goes on too.
func backGuestResumed(t *T) {
	const bridge, addr, guestAddr, size = handoverBridge, "10.89.4.1", "10.89.4.2", 4 << 20
	t.loadNetback(false)
	dom0 := t.Dom0()
	dom0.Run("modprobe", "-a", "tun", "bridge")
	dom0.Sh("ip link add %s type bridge; ip addr add %s/24 dev %[1]s; ip link set %[1]s up", bridge, addr)
	p := dom0.Start(barevif, "back", "-v", "--xen", "--bridge", bridge)
	p.Await("serves vifs")
	guest := t.Create(Guest{Name: "domU", Type: PV, VIFs: []VIF{{}}})
	t.shrink(guest)
	t.startNetfront(guest, guestAddr)
	t.Ping(guest, addr, 1472, 10)
	t.Checkpoint(guest)
	t.Ping(guest, addr, 1472, 10)

	dom0.Sh("mkdir -p /tmp/www; head -c %d /dev/urandom >/tmp/www/file", size)
	want := dom0.Sh("sha256sum </tmp/www/file | cut -c1-64")
	dom0.Start("busybox", "httpd", "-f", "-p", "80", "-h", "/tmp/www")
	dom0.Await("httpd", "curl -sI http://127.0.0.1/file >/dev/null")
	get := download(guest, addr, "file", size, 30)
	old := guest.ID
	guest = t.Resume(guest)
	p.Await(fmt.Sprintf(`vif %d\.0: gone`, old))
	guest.awaitCarrier("eth0")
	t.Ping(guest, addr, 1472, 10)
	if got := get.In(guest).Succeed().Text(); got != want {
		t.Fatalf("the download over the resume has the digest %q, want %q", got, want)
	}
	t.Destroy(guest)
	p.Terminate()
	dom0.Run("ip", "link", "del", bridge)
}
