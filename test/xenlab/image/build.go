//go:build linux

// Package image builds the files from which a lab machine boots: Xen, a Linux kernel, an
// initramfs for dom0, and one for the other domains.
//
// Everything but the project's own programs comes from Debian packages, in the versions that
// apt resolves on that day. apt downloads them, and the package keeps them in a cache by their
// digest. It unpacks them there and never installs them, and runs no program of them except
// busybox, to list its applets. It needs apt and dpkg-deb, and the network for packages that
// are not in the cache.
package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"barevif/tools/guestimage"
)

// A Program is a program of this project. It is built without cgo and is at /barevif/Name in
// every domain.
type Program struct {
	Name    string
	Package string // an import path
	Test    bool   // the package's test binary instead of its command
}

// Config describes the images.
type Config struct {
	Programs   []Program    // "barevif" among them
	Appliance  string       // the package of tools/hello, of which "barevif image" makes guests, in dom0
	Router     string       // the package of tools/vifrouter, of which it makes another
	RouterConf string       // the text of that router's configuration
	Dir        string       // existing directory for the archives
	Logger     *slog.Logger // nil: silent
}

// A Set has the files from which a machine boots.
type Set struct {
	Xen, Kernel, Dom0 string // files: two ELF images and an archive
	XenPackage        string // name_version of the packages they came from
	KernelPackage     string
}

// Paths in a domain's root.
const (
	ProgramDir  = "/barevif"
	GuestKernel = "/lab/vmlinux" // in dom0, for xl create
	GuestImage  = "/lab/domu.cpio"
	VifScript   = "vif-xenlab" // in /etc/xen/scripts
)

// CacheDir returns the lab's cache folder, in $BAREVIF_CACHE or in the user's cache folder.
func CacheDir() (string, error) {
	if dir := os.Getenv("BAREVIF_CACHE"); dir != "" {
		return filepath.Join(dir, "xenlab"), nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "barevif", "xenlab"), err
}

// Build makes the images. As root it installs missing host programs; otherwise its error names
// them. The first call fetches some 90 MB. The caller must keep other processes out of the
// cache meanwhile.
func Build(ctx context.Context, cfg Config) (*Set, error) {
	if runtime.GOARCH != "amd64" {
		return nil, errors.New("xenlab: the lab is an amd64 machine, built on one")
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	if err := installTools(ctx); err != nil {
		return nil, err
	}
	d, err := prepare(ctx, cache, log)
	if err != nil && os.Geteuid() == 0 && ctx.Err() == nil {
		log.Info("once more with a fresh package index", "after", err)
		if err = updateIndex(ctx); err == nil {
			d, err = prepare(ctx, cache, log)
		}
	}
	if err != nil {
		return nil, err
	}

	programs := append([]Program{{Name: "agent", Package: agentPackage}}, cfg.Programs...)
	built := map[string]string{}
	for _, p := range programs {
		log.Info("build", "package", p.Package)
		file := filepath.Join(cfg.Dir, p.Name)
		if err := p.build(ctx, file); err != nil {
			return nil, err
		}
		built[p.Name] = file
	}
	guest, err := d.base(built)
	if err != nil {
		return nil, err
	}
	guestImage := filepath.Join(cfg.Dir, "domu.cpio")
	if err := guest.WriteFile(guestImage); err != nil {
		return nil, err
	}
	systemd, err := d.systemd(ctx)
	if err != nil {
		return nil, err
	}
	systemdLayer := filepath.Join(cfg.Dir, filepath.Base(SystemdLayer))
	if err := systemd.WriteFile(systemdLayer); err != nil {
		return nil, err
	}
	dom0, err := d.base(built)
	if err != nil {
		return nil, err
	}
	if err := d.addToolstack(ctx, dom0); err != nil {
		return nil, err
	}
	dom0.File(GuestImage, 0o644, guestImage)
	dom0.File(SystemdLayer, 0o644, systemdLayer)
	dom0.File(GuestKernel, 0o644, d.vmlinux)
	log.Info("make images", "packages", cfg.Appliance+" "+cfg.Router)
	if err := d.addAppliances(ctx, dom0, built["barevif"], cfg); err != nil {
		return nil, err
	}
	set := &Set{
		Xen: d.xen, Kernel: d.vmlinux, Dom0: filepath.Join(cfg.Dir, "dom0.cpio"),
		XenPackage: d.version("xen-hypervisor-"), KernelPackage: d.version("linux-image-"),
	}
	return set, dom0.WriteFile(set.Dom0)
}

const agentPackage = "barevif/test/xenlab/agent"

func (p Program) build(ctx context.Context, file string) error {
	args := []string{"build"}
	if p.Test {
		args = []string{"test", "-c"}
	}
	args = append(args, "-trimpath", "-ldflags=-s -w", "-o", file, p.Package)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	if _, err := os.Stat(file); err != nil {
		return fmt.Errorf("go test -c %s made nothing: the package has no tests", p.Package)
	}
	return nil
}

// A distribution is one set of unpacked packages in the cache.
type distribution struct {
	root         string // the packages' files
	debDir       string // the packages
	xen, vmlinux string
	kernel       string // its version, as uname -r has it
	debs         []guestimage.Package
}

// prepare brings the current packages into the cache.
func prepare(ctx context.Context, cache string, log *slog.Logger) (*distribution, error) {
	debs, err := resolve(ctx)
	if err != nil {
		return nil, err
	}
	dir, debDir := filepath.Join(cache, key(debs)), filepath.Join(cache, "debs")
	if _, err := os.Stat(dir); err != nil {
		if err := os.MkdirAll(debDir, 0o755); err != nil {
			return nil, err
		}
		log.Info("fetch", "packages", len(debs), "to", debDir)
		if err := guestimage.Download(ctx, debDir, debs); err != nil {
			return nil, err
		}
		log.Info("unpack", "to", dir)
		if err := populate(ctx, debDir, dir, debs); err != nil {
			return nil, err
		}
		prune(cache, filepath.Base(dir), debs)
	}
	d := &distribution{
		root: filepath.Join(dir, "root"), debDir: debDir, xen: filepath.Join(dir, "xen"), vmlinux: filepath.Join(dir, "vmlinux"), debs: debs,
	}
	image, err := one(d.root, "boot/vmlinuz-*")
	if err != nil {
		return nil, err
	}
	d.kernel = strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
	return d, nil
}

// populate fills a folder beside dir and renames it to dir, so that dir is complete if it
// exists.
func populate(ctx context.Context, debDir, dir string, debs []guestimage.Package) error {
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	root := filepath.Join(tmp, "root")
	if err := unpack(ctx, debDir, root, debs); err != nil {
		return err
	}
	xen, err := one(root, "boot/xen-*.gz")
	if err != nil {
		return err
	}
	if err := guestimage.UnpackXen(xen, filepath.Join(tmp, "xen")); err != nil {
		return err
	}
	kernel, err := one(root, "boot/vmlinuz-*")
	if err != nil {
		return err
	}
	if err := guestimage.UnpackKernel(kernel, filepath.Join(tmp, "vmlinux")); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// prune leaves one set of packages in the cache. Errors do not matter: the next
// call tries again.
func prune(cache, keep string, debs []guestimage.Package) {
	old, _ := filepath.Glob(filepath.Join(cache, "????????????????"))
	for _, dir := range old {
		if filepath.Base(dir) != keep {
			os.RemoveAll(dir)
		}
	}
	files, _ := os.ReadDir(filepath.Join(cache, "debs"))
	for _, f := range files {
		if !slices.ContainsFunc(debs, func(d guestimage.Package) bool { return d.File == f.Name() }) {
			os.Remove(filepath.Join(cache, "debs", f.Name()))
		}
	}
}

func one(root, pattern string) (string, error) {
	found, err := filepath.Glob(filepath.Join(root, pattern))
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		return "", fmt.Errorf("no %s in the packages", pattern)
	}
	return found[len(found)-1], nil
}

func (d *distribution) version(prefix string) string {
	for _, deb := range d.debs {
		if strings.HasPrefix(deb.File, prefix) {
			return strings.TrimSuffix(deb.File, "_amd64.deb")
		}
	}
	return ""
}

// moduleNames are the modules that are loaded by name or at the kernel's request. Every domain
// has all of them, since any domain may be a driver domain.
var moduleNames = [...]string{
	"xen-evtchn", "xen-gntalloc", "xen-gntdev", "xen-privcmd", "xenfs",
	"xen-netback", "xen-netfront", "virtio_pci", "virtio_console",
	"af_packet", "tun", "veth", "bridge", "pktgen",
}

var commonTools = [...]string{"dash", "ip", "ping", "iperf3", "tcpdump", "ethtool", "bpftool", "curl", "setpriv", "setcap"}

var xenTools = [...]string{
	"bash", "xl", "libxl-save-helper", "xenstored", "oxenstored", "xenconsoled", "xenconsole", "xen-init-dom0", "lsevtchn",
	"xenstore-ls", "xenstore-list", "xenstore-read", "xenstore-write", "xenstore-rm",
	"xenstore-chmod", "xenstore-exists", "xenstore-watch",
}

// base returns the part of the root that all domains have.
func (d *distribution) base(programs map[string]string) (*guestimage.Tree, error) {
	t := guestimage.NewTree()
	for _, dir := range [...]string{"/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/var/log", "/var/lib", "/lab", ProgramDir} {
		t.Dir(dir, 0o755)
	}
	t.Link("/var/run", "/run")
	t.Link("/var/lock", "/run/lock")
	t.Data("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nbarevif:x:990:990::/nonexistent:/usr/sbin/nologin\n"))
	t.Data("/etc/group", 0o644, []byte("root:x:0:\ntcpdump:x:100:\nbarevif:x:990:\n"))
	t.Data("/etc/hosts", 0o644, []byte("127.0.0.1 localhost\n"))
	for name, file := range programs {
		if name != "agent" {
			t.File(ProgramDir+"/"+name, 0o755, file)
		}
	}
	t.File("/init", 0o755, programs["agent"])

	if err := d.install(t, commonTools[:]...); err != nil {
		return nil, err
	}
	// glibc opens it with dlopen, so no binary names it.
	if err := d.installLibrary(t, "libgcc_s.so.1"); err != nil {
		return nil, err
	}
	// Not busybox's shell, which prefers its own applets to the programs in PATH.
	t.Link("/bin/sh", "/usr/sbin/dash")
	if err := d.installBusybox(t); err != nil {
		return nil, err
	}
	source, err := guestimage.FindModules(d.root, d.kernel)
	if err != nil {
		return nil, err
	}
	modules, err := guestimage.CollectModules(source, moduleNames[:]...)
	if err != nil {
		return nil, err
	}
	modules.Install(t, "/lib/modules/"+d.kernel)
	modules.Index(t, "/lib/modules/"+d.kernel)
	return t, nil
}

// addToolstack makes the root that of dom0.
func (d *distribution) addToolstack(ctx context.Context, t *guestimage.Tree) error {
	if err := d.install(t, xenTools[:]...); err != nil {
		return err
	}
	if err := d.addScripts(ctx, t); err != nil {
		return err
	}
	conf, err := one(d.root, "etc/xen/oxenstored.conf")
	if err != nil {
		return err
	}
	t.File("/etc/xen/oxenstored.conf", 0o644, conf)
	t.Data("/etc/xen/xl.conf", 0o644, []byte("autoballoon=\"off\"\n"))
	t.Data("/etc/xen/scripts/"+VifScript, 0o755, []byte(vifScript))
	t.Dir("/var/lib/xen", 0o755)
	t.Dir("/var/log/xen/console", 0o755)
	return nil
}

// addScripts adds the hotplug scripts of Debian for vifs, and this project's, as an
// administrator installs them.
func (d *distribution) addScripts(ctx context.Context, t *guestimage.Tree) error {
	const dir = "/etc/xen/scripts/"
	for _, pattern := range [...]string{"vif-*", "*.sh"} {
		files, err := filepath.Glob(filepath.Join(d.root, dir, pattern))
		if err != nil {
			return err
		}
		for _, file := range files {
			t.File(dir+filepath.Base(file), 0o755, file)
		}
	}
	t.Link("/bin/bash", "/usr/sbin/bash") // the path that they begin with
	deploy, err := deployDir(ctx, "barevif")
	if err != nil {
		return err
	}
	t.File(dir+"vif-barevif", 0o755, filepath.Join(deploy, "vif-barevif"))
	t.Link(dir+"vif-barevif-route", "vif-barevif")
	return nil
}

// vifScript is the minimal hotplug script for libxl and netback. The scenarios set addresses
// themselves.
const vifScript = `#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec >>/var/log/xen/vif.log 2>&1
echo "$* vif=$vif $XENBUS_PATH"
case "$1" in
online|add)
	mtu=$(xenstore-read "$XENBUS_PATH/mtu" 2>/dev/null) && ip link set "$vif" mtu "$mtu"
	ip link set "$vif" up
	xenstore-write "$XENBUS_PATH/hotplug-status" connected ;;
offline|remove)
	ip link set "$vif" down
	xenstore-rm "$XENBUS_PATH/hotplug-status" ;;
esac
exit 0
`

// install puts programs of the packages into /usr/sbin, with their libraries.
func (d *distribution) install(t *guestimage.Tree, names ...string) error {
	for _, name := range names {
		file, err := d.program(name)
		if err != nil {
			return err
		}
		t.File("/usr/sbin/"+name, 0o755, file)
		if err := d.installLibraries(t, file); err != nil {
			return err
		}
	}
	return nil
}

// installLibraries puts the libraries of a program into the tree.
func (d *distribution) installLibraries(t *guestimage.Tree, file string) error {
	libs := map[string]string{}
	if err := libraries(d.root, file, libs); err != nil {
		return err
	}
	for lib := range libs {
		if err := d.installLibrary(t, lib); err != nil {
			return err
		}
	}
	return nil
}

func (d *distribution) program(name string) (string, error) {
	for _, dir := range [...]string{"usr/lib/xen-*/bin", "usr/sbin", "usr/bin", "sbin", "bin"} {
		if file, err := one(d.root, filepath.Join(dir, name)); err == nil {
			// Debian links some tools absolutely, which would lead out of root.
			if target, err := os.Readlink(file); err == nil && filepath.IsAbs(target) {
				file = filepath.Join(d.root, target)
			}
			return file, nil
		}
	}
	return "", fmt.Errorf("no program %s in the packages", name)
}

func (d *distribution) installLibrary(t *guestimage.Tree, name string) error {
	file, err := findLibrary(d.root, name)
	if err != nil {
		return err
	}
	dst := "/lib/x86_64-linux-gnu/" + name
	if strings.HasPrefix(name, "ld-linux") { // every binary names it with this path
		dst = "/lib64/" + name
	}
	t.File(dst, 0o755, file)
	return nil
}

// installBusybox links the applets of busybox that no real tool provides.
func (d *distribution) installBusybox(t *guestimage.Tree) error {
	busybox, err := d.program("busybox")
	if err != nil {
		return err
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return fmt.Errorf("%s --list: %w", busybox, err)
	}
	t.File("/bin/busybox", 0o755, busybox)
	for _, name := range strings.Fields(string(applets)) {
		if name != "busybox" && !t.Has("/usr/sbin/"+name) && !t.Has("/bin/"+name) {
			t.Link("/bin/"+name, "/bin/busybox")
		}
	}
	t.Link("/sbin/modprobe", "/bin/busybox") // the path that the kernel uses for its requests
	return nil
}
