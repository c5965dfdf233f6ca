//go:build linux

package xenlab

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"barevif/test/xenlab/image"
)

// installUnits are the lines of tools/barevif/DEPLOYING.md with which an operator installs what is in
// image.DeployDir. A test compares.
var installUnits = [...]string{
	"cp -r etc/. /etc/",
	"systemd-sysusers && udevadm control --reload && systemctl restart systemd-modules-load",
	"udevadm trigger /dev/xen/* && systemd-tmpfiles --create barevif.conf",
	"systemctl daemon-reload && systemctl enable --now barevif-serve@0",
}

// keepNetfrontAway is the line of that page without which udev has the kernel's driver take the vifs.
const keepNetfrontAway = "echo 'blacklist xen-netfront' > /etc/modprobe.d/barevif.conf && udevadm control --reload"

// readJournal is the line of that page which reads what a service logs with --log json.
const readJournal = "journalctl -u barevif-serve@0 -t barevif -o cat"

// unitsImage is the guest's image, in dom0.
const unitsImage = "/run/units.cpio"

// Addresses of the guest's vifs 0 and 1.
const (
	unitServeAddr  = "10.88.0.2"
	unitAttachAddr = "10.88.1.2"
)

// A hardening is what a unit asks for, as /proc shows it.
type hardening struct {
	unit  string
	user  string
	caps  string   // of CapEff, as all others
	nodes []string // of deviceNodes that the control group lets through
}

// deviceNodes are those that the units name, and one that none names.
var deviceNodes = []string{"xen/gntalloc", "xen/gntdev", "xen/evtchn", "xen/xenbus", "net/tun", "kmsg"}

var hardenings = [...]hardening{
	{"barevif-serve@0", "barevif", "0000000000000000", []string{"xen/gntalloc", "xen/evtchn", "xen/xenbus"}},
	{"barevif-attach@1", "barevif", "0000000000001000", []string{"xen/gntalloc", "xen/evtchn", "xen/xenbus", "net/tun"}},
	{"barevif-back", "barevif", "000000c000003000", []string{"xen/gntdev", "xen/evtchn", "xen/xenbus", "net/tun"}},
	{"barevif-stat", "root", "", nil},
}

// units installs the files of tools/barevif/deploy in a guest that systemd runs, and requires of the units
// what they say. Then it starts the guest again, with what is in its /etc: the units start by themselves.
func units(t *T) {
	t.loadNetback(true)
	t.Dom0().Sh("cat %s %s >%s", image.GuestImage, image.SystemdLayer, unitsImage)
	defer func() { t.Dom0().Try("rm", unitsImage) }()
	guest := t.createUnits(nil)
	defer func() { t.saveJournal(guest) }()
	guest.Run("depmod") // as the installation of a kernel does
	guest.Sh(`mkdir /etc/barevif; cd /etc/barevif; echo "OPTIONS=--addr %s/24 --log json" >serve-0; echo "OPTIONS=--addr 1=%s/24" >attach-1`, unitServeAddr, unitAttachAddr)
	guest.Sh(keepNetfrontAway)
	held := t.domainResources(guest)
	t.attachUnit(guest, 0)
	for _, line := range installUnits {
		guest.Sh("cd %s; %s", image.DeployDir, line)
	}
	t.requireNodes(guest)
	t.requireRestart(guest)
	t.requireReload(guest)
	t.requireJournal(guest)
	// A service waits for its vif however long that takes.
	guest.Sh("systemctl enable barevif-back barevif-stat barevif-attach@1; systemctl start --no-block barevif-back barevif-stat barevif-attach@1")
	guest.Await("attach to have been started again without its vif", `sleep 1; [ "$(systemctl show -P NRestarts barevif-attach@1)" -ge 1 ]`)
	t.attachUnit(guest, 1)
	t.requireUnits(guest)
	for _, h := range hardenings {
		t.requireHardening(guest, h)
	}
	t.requireOffers(guest)
	guest.Sh("journalctl -u barevif-attach@1 -t barevif -o cat | grep 'the kernel has it as xvif1'")
	t.requireStop(guest, held)

	overlay := guest.Sh("cd /; find etc lib/modules/*/modules.* | cpio -o -H newc 2>/dev/null | gzip | base64")
	t.Destroy(guest)
	t.Dom0().Put("/run/etc", []byte(overlay), 0o644)
	t.Dom0().Sh("base64 -d /run/etc | gunzip >>%s; rm /run/etc", unitsImage)
	guest = t.createUnits([]VIF{{}, {}})
	for vif := range 2 {
		t.addressUnit(guest, vif)
	}
	t.requireNodes(guest)
	t.requireUnits(guest)
	t.Note("started again with the guest")
}

// createUnits creates a guest that systemd runs. It may be a driver domain, so that "barevif back" has something to look at.
func (t *T) createUnits(vifs []VIF) *Domain {
	guest := t.Create(Guest{Name: "units", Type: PV, Systemd: unitsImage, VIFs: vifs, Config: []string{"driver_domain=1"}})
	guest.Await("systemd to have started", `sleep 1; [ "$(systemctl is-system-running)" = running ]`)
	return guest
}

// saveJournal keeps what the journal and the guest's processes say, which explains a failure.
func (t *T) saveJournal(guest *Domain) {
	if !guest.destroyed {
		said := guest.Try("sh", "-c", "journalctl -q -o short-monotonic --no-hostname; systemctl --no-pager status 'barevif-*'; top -b -n 1 | head -n 20")
		t.Save("units.journal", said.Stdout)
	}
}

// attachUnit gives the guest a vif.
func (t *T) attachUnit(guest *Domain, vif int) {
	t.dom0.Run(append([]string{"xl", "network-attach", guest.Name}, strings.Split(VIF{}.Spec(vif), ",")...)...)
	t.addressUnit(guest, vif)
}

func (t *T) addressUnit(guest *Domain, vif int) {
	t.Dom0().Sh("ip addr add 10.88.%d.1/24 dev %s", vif, guest.VIF(vif))
}

// requireNodes requires the modes that the udev rules and the file of tmpfiles.d give.
func (t *T) requireNodes(guest *Domain) {
	guest.Await("the modes of device nodes", `cd /dev/xen; [ "$(stat -c "%%a %%U %%G" gntalloc gntdev evtchn xenbus | sort -u)" = "660 root barevif" ]`)
	guest.Await("the directories of pins", `[ "$(stat -c "%%a %%U %%G" /sys/fs/bpf /sys/fs/bpf/barevif | tr '\n' ,)" = "711 root root,755 barevif barevif," ]`)
}

// requireUnits waits until all units are active, and requires that their vifs work.
func (t *T) requireUnits(guest *Domain) {
	for _, h := range hardenings {
		guest.Await(h.unit, "sleep 1; systemctl is-active --quiet %s", h.unit)
	}
	for vif, addr := range [...]string{unitServeAddr, unitAttachAddr} {
		t.Dom0().awaitCarrier(guest.VIF(vif))
		t.Ping(t.Dom0(), addr, 1472, 5)
	}
	t.fetchServed(t.Dom0(), unitServeAddr, 1<<20)
	guest.Sh(`curl -sSf --max-time 20 -H "Authorization: Bearer $(cat /etc/barevif/token)" http://127.0.0.1:9464/metrics | grep '^barevif_up{.*} 1'`)
}

// confined reports what a process of a unit has and may do. It looks from the unit's mount namespace, and from its control
// group, which decides about devices.
const confined = `
unit=$1; shift
pid=$(systemctl show -P MainPID $unit)
group=/sys/fs/cgroup$(systemctl show -P ControlGroup $unit)
stat -c 'user %U' /proc/$pid
sed -n 's/^CapEff:\t/caps /p; s/^CapBnd:\t/bounding /p; s/^NoNewPrivs:\t/privileges /p' /proc/$pid/status
for dir in /usr /etc /root /tmp; do
	nsenter -t $pid -m sh -c "echo x >$dir/written-from-a-unit" 2>/dev/null && echo may write $dir
done
[ -e /tmp/written-from-a-unit ] && echo its /tmp is that of all
for node; do
	(sh -c 'echo $PPID' >$group/cgroup.procs; exec 3</dev/$node) 2>/dev/null && echo opens $node
done
exit 0`

// requireHardening requires that a unit runs with what it asks for and no more.
func (t *T) requireHardening(guest *Domain, h hardening) {
	got := strings.Split(guest.Run(append([]string{"sh", "-c", confined, "sh", h.unit}, deviceNodes...)...).Text(), "\n")
	want := []string{"user " + h.user, "privileges 1", "may write /tmp"}
	if h.caps != "" {
		want = append(want, "caps "+h.caps, "bounding "+h.caps)
	} else {
		got = slices.DeleteFunc(got, func(line string) bool {
			return strings.HasPrefix(line, "caps ") || strings.HasPrefix(line, "bounding ")
		})
	}
	for _, node := range h.nodes {
		want = append(want, "opens "+node)
	}
	slices.Sort(got)
	slices.Sort(want)
	if d := difference(want, got); d != "" {
		t.Fatalf("%s: %s", h.unit, d)
	}
}

// requireOffers requires that a shell offers the vifs that there are to the user of the services.
func (t *T) requireOffers(guest *Domain) {
	for _, flags := range [...]string{"", "--xen"} {
		if got := guest.Sh("%s %s __complete attach %s --vif ''", asUser, image.InstalledBarevif, flags); got != "0\n1\n:4" {
			t.Fatalf("a shell offers %q as vifs", got)
		}
	}
}

// requireRestart kills a service, which systemd starts again.
func (t *T) requireRestart(guest *Domain) {
	before := guest.Sh("systemctl show -P MainPID barevif-serve@0")
	guest.Sh("systemctl kill -s KILL barevif-serve@0")
	t.awaitSuccessor(guest, before)
	if n := guest.Sh("systemctl show -P NRestarts barevif-serve@0"); n == "0" {
		t.Fatalf("the service runs again, and systemd has not started it")
	}
}

// requireReload reloads a service: another process takes its vif over, of which no frame is lost.
func (t *T) requireReload(guest *Domain) {
	before := guest.Sh("systemctl show -P MainPID barevif-serve@0; systemctl show -P NRestarts barevif-serve@0")
	pid, restarts, _ := strings.Cut(before, "\n")
	guest.Sh("systemctl reload barevif-serve@0")
	t.awaitSuccessor(guest, pid)
	if n := guest.Sh("systemctl show -P NRestarts barevif-serve@0"); n != restarts {
		t.Fatalf("the service ended when it was reloaded: %s starts before, now %s", restarts, n)
	}
	guest.Sh(`tr '\0' ' ' </proc/$(systemctl show -P MainPID barevif-serve@0)/cmdline | grep -e '--take-over'; [ ! -e /proc/%s ]`, pid)
}

// awaitSuccessor waits until another process than pid is the service's, and its vif works.
func (t *T) awaitSuccessor(guest *Domain, pid string) {
	guest.Await("another process", `sleep 1; [ "$(systemctl show -P ActiveState barevif-serve@0)" = active ]; [ "$(systemctl show -P MainPID barevif-serve@0)" != %s ]; [ ! -e /proc/%[1]s ]`, pid)
	t.Dom0().Await("the service's vif", "ping -c 1 -W 1 %s", unitServeAddr)
	t.fetchServed(t.Dom0(), unitServeAddr, 1<<20)
}

// requireJournal requires that the journal has the lines of the service, of each of its processes, and nothing else.
func (t *T) requireJournal(guest *Domain) {
	guest.Run("journalctl", "--sync")
	said := guest.Sh(readJournal)
	for line := range strings.Lines(said) {
		var record struct{ Time, Level, Msg string }
		if err := json.Unmarshal([]byte(line), &record); err != nil || record.Time == "" || record.Level == "" || record.Msg == "" {
			t.Fatalf("no record of --log json is %q: %v", line, err)
		}
	}
	if n := strings.Count(said, "serving http"); n != 3 { // the first, that after the kill, and that after the reload
		t.Fatalf("%d of 3 processes have said in the journal that they serve:\n%s", n, said)
	}
}

// requireStop stops all units, which give back all that they had.
func (t *T) requireStop(guest *Domain, held []string) {
	for _, h := range hardenings {
		guest.Sh(`systemctl stop %s; [ "$(systemctl show -P Result %[1]s)" = success ]; [ ! -e /run/%[2]s ]`, h.unit, strings.ReplaceAll(h.unit, "@", "-"))
	}
	for vif := range 2 {
		t.Dom0().Await("the backend to see it close", `[ "$(xenstore-read %s/state)" = 6 ]`, guest.Backend(t.Dom0(), vif))
	}
	guest.Sh(`! ip link show xvif1 2>/dev/null; [ -z "$(ls /sys/fs/bpf/barevif)" ]`)
	for vif := range 2 {
		t.Dom0().Run("xl", "network-detach", guest.Name, fmt.Sprint(vif))
	}
	t.requireResources(guest, held)
	guest.Sh("systemctl is-system-running")
}
