//go:build linux

package image

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"barevif/tools/guestimage"
)

// NotInAppliance are the modules that the image in Appliance is without. All other images have them.
var NotInAppliance = []string{"xen-gntdev", "xen-privcmd", "xenfs", "tun"}

// Directories in dom0 with an image of Config.Appliance, unpacked and as it is by default, and with a guest of the
// same name, vif and kernel whose process 1 is a shell that gives the address of the appliance to the kernel's
// netfront: what a guest takes at least until it answers.
const (
	Appliance       = "/lab/appliance"
	PackedAppliance = "/lab/appliance-packed"
	KernelAppliance = "/lab/appliance-kernel"
)

// What the appliance is told: its name in xl, its vif, the parameters of its kernel, which are those of the
// lab's other guests, and its environment and arguments.
const (
	ApplianceName = "appliance"
	ApplianceMAC  = "00:16:3e:77:00:01"
	ApplianceAddr = "10.88.0.2"
)

var (
	ApplianceLinux = []string{"loglevel=5", "mitigations=off"}
	ApplianceWords = []string{"MSG=it's me", "-addr", ApplianceAddr + "/24", "two words"}
)

// RouterAppliance is the directory in dom0 with an image of Config.Router, unpacked. RouterName is the guest's name in
// xl, RouterMAC that of its vif, RouterConf the path of its configuration in the guest, and RouterReload the program by
// which dom0 hands it another one.
const (
	RouterAppliance = "/lab/router"
	RouterName      = "router"
	RouterMAC       = "00:16:3e:77:00:11"
	RouterConf      = "/etc/vifrouter/router.conf"
	RouterReload    = "vifrouter-reload" // in dom0's PATH
)

// addAppliances runs "barevif image" for each image that the lab boots, with the arguments that a user
// would give, and adds the kernels, initramfs and configurations to dom0's file system.
func (d *distribution) addAppliances(ctx context.Context, dom0 *guestimage.Tree, barevif string, cfg Config) error {
	i := slices.IndexFunc(d.debs, func(p guestimage.Package) bool { return strings.HasPrefix(p.File, "linux-image-") })
	if i < 0 {
		return fmt.Errorf("no kernel among the packages")
	}
	if err := guestimage.Download(ctx, d.debDir, d.debs[i:i+1]); err != nil {
		return err
	}
	conf := filepath.Join(cfg.Dir, "router.conf")
	if err := os.WriteFile(conf, []byte(cfg.RouterConf), 0o600); err != nil {
		return err
	}
	var without []string // hello is a frontend alone
	for _, module := range NotInAppliance {
		without = append(without, "--without", module)
	}
	hello := append([]string{"--name", ApplianceName, "--vif", "mac=" + ApplianceMAC + ",script=" + VifScript, cfg.Appliance, "--"}, ApplianceWords...)
	router := []string{
		"--name", RouterName, "--vif", "mac=" + RouterMAC + ",script=" + VifScript, "--config", "driver_domain=1", "--file", conf + ":" + RouterConf,
		cfg.Router, "--", "run", "--xen", "--store", "data/vifrouter", RouterConf,
	}
	deploy, err := deployDir(ctx, "vifrouter")
	if err != nil {
		return err
	}
	dom0.File("/usr/sbin/"+RouterReload, 0o755, filepath.Join(deploy, RouterReload))
	for _, one := range [...]struct {
		at     string
		packed bool
		args   []string
	}{{Appliance, false, append(without, hello...)}, {PackedAppliance, true, hello}, {RouterAppliance, false, router}} {
		out := filepath.Join(cfg.Dir, filepath.Base(one.at))
		args := []string{"image", "-o", out, "--deb", filepath.Join(d.debDir, d.debs[i].File), "--dir", one.at, fmt.Sprintf("--uncompressed=%v", !one.packed)}
		for _, word := range ApplianceLinux {
			args = append(args, "--kernel-arg", word)
		}
		if _, err := guestimage.Output(ctx, "", barevif, append(args, one.args...)...); err != nil {
			return err
		}
		for _, name := range [...]string{"kernel", "initramfs", "xl.cfg", "xl-pv.cfg"} {
			dom0.File(one.at+"/"+name, 0o644, filepath.Join(out, name))
		}
		if one.packed {
			continue
		}
		// The kernel is as large as all else in dom0's image, which has it as GuestKernel already.
		if err := sameFile(filepath.Join(out, "kernel"), d.vmlinux); err != nil {
			return err
		}
		dom0.Link(one.at+"/kernel", GuestKernel)
	}
	return d.addKernelAppliance(dom0, cfg.Dir)
}

// kernelInit is process 1 of KernelAppliance.
const kernelInit = `#!/bin/busybox sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec >/dev/hvc0 2>&1
read up idle </proc/uptime
modprobe xen-netfront
until [ -e /sys/class/net/eth0 ]; do sleep 0.01; done
ip link set eth0 up
ip addr add ` + ApplianceAddr + `/24 dev eth0
now() { adjtimex | sed -n 's/.*time.tv_sec: *//p; s/.*time.tv_usec: *//p'; }
read late idle </proc/uptime
set -- $(now)
echo "` + KernelServing + ` $up $late $1 $2"
while :; do sleep 1000; done
`

// KernelServing begins the last line that the guest of KernelAppliance prints. Then come how long the kernel had run
// when process 1 started and how long it has run now, in seconds, and what time it is now: seconds and microseconds.
const KernelServing = "init: eth0 has its address"

func (d *distribution) addKernelAppliance(dom0 *guestimage.Tree, dir string) error {
	t := guestimage.NewTree()
	for _, dir := range [...]string{"/proc", "/sys", "/dev", "/bin"} {
		t.Dir(dir, 0o755)
	}
	busybox, err := d.program("busybox")
	if err != nil {
		return err
	}
	if err := d.installLibraries(t, busybox); err != nil {
		return err
	}
	if err := d.installBusybox(t); err != nil {
		return err
	}
	source, err := guestimage.FindModules(d.root, d.kernel)
	if err != nil {
		return err
	}
	modules, err := guestimage.CollectModules(source, "xen-netfront")
	if err != nil {
		return err
	}
	modules.Install(t, "/lib/modules/"+d.kernel)
	modules.Index(t, "/lib/modules/"+d.kernel)
	t.Data("/init", 0o755, []byte(kernelInit))
	initramfs := filepath.Join(dir, "appliance-kernel.cpio")
	if err := t.WriteFile(initramfs); err != nil {
		return err
	}
	dom0.File(KernelAppliance+"/initramfs", 0o644, initramfs)
	for kind, name := range map[guestimage.GuestType]string{guestimage.PV: "xl-pv.cfg", guestimage.PVH: "xl.cfg"} {
		config, err := guestimage.Domain{
			Name: ApplianceName, Type: kind, Kernel: GuestKernel, Ramdisk: KernelAppliance + "/initramfs", Memory: 128, VCPUs: 1,
			Linux: ApplianceLinux, VIFs: []string{"mac=" + ApplianceMAC + ",script=" + VifScript},
		}.Config()
		if err != nil {
			return err
		}
		dom0.Data(KernelAppliance+"/"+name, 0o644, []byte(config))
	}
	return nil
}

func sameFile(a, b string) error {
	x, err := os.ReadFile(a)
	if err != nil {
		return err
	}
	y, err := os.ReadFile(b)
	if err != nil {
		return err
	}
	if !bytes.Equal(x, y) {
		return fmt.Errorf("%s and %s are not the same kernel", a, b)
	}
	return nil
}
