//go:build linux

package guestinit

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// Paths of the kernel.
const (
	hypervisorType = "/sys/hypervisor/type"
	grantLimit     = "/sys/module/xen_gntalloc/parameters/limit"
	xenDevices     = "/sys/bus/xen/devices"
	netfrontVifs   = "/sys/bus/xen/drivers/vif"
	xenFiles       = "/proc/xen"
)

// Pages that a frontend grants: see "How much memory may be granted" in tools/barevif/DEPLOYING.md.
const (
	pagesPerQueue   = 514
	pagesPerVif     = 2
	maxQueues       = 8
	ordinaryGrants  = 1024 // the limit of gntalloc unless told otherwise
	roomToReconnect = 2    // a connection that ended may still have its pages
)

// gntalloc is the module through which programs grant pages.
const gntalloc = "xen-gntalloc"

// devices are the nodes that programs open, and the modules that make them.
var devices = [...]struct{ node, module string }{
	{"/dev/xen/evtchn", "xen-evtchn"}, {"/dev/xen/gntalloc", gntalloc}, {"/dev/xen/gntdev", "xen-gntdev"},
	{"/dev/xen/xenbus", "a kernel with CONFIG_XEN_XENBUS_FRONTEND"},
}

// prepareXen loads the modules, raises the limit of grants, and says what is missing for a
// program that wants a vif.
func (p *initProcess) prepareXen() {
	if kind := p.text(hypervisorType); kind != "xen" {
		p.say("this is no guest of Xen, so there is no vif: %s says %q", hypervisorType, kind)
		return
	}
	p.loadModules()
	if p.image.has("xenfs") {
		if err := p.mountOne(fileSystem{kind: "xenfs", dir: xenFiles}); err != nil {
			p.say("xenfs is not mounted on %s: %v", xenFiles, err)
		}
	}
	for _, d := range devices {
		if _, err := os.Stat(p.path(d.node)); err != nil && p.image.has(d.module) {
			p.say("%s is missing: it needs %s", d.node, d.module)
		}
	}
	vifs := p.vifs(xenDevices)
	if len(vifs) == 0 {
		p.say("this guest has no vif: does its configuration have vif=[...]?")
	}
	for _, v := range p.vifs(netfrontVifs) {
		p.say("%s belongs to the kernel's xen-netfront, so the program cannot have it", v)
	}
	if p.image.has(gntalloc) {
		p.raiseGrants(len(vifs))
	}
}

// vifs returns the names of the vifs in a directory of sysfs, which is missing if there are none.
func (p *initProcess) vifs(dir string) (names []string) {
	all, _ := os.ReadDir(p.path(dir))
	for _, e := range all {
		if strings.HasPrefix(e.Name(), "vif-") {
			names = append(names, e.Name())
		}
	}
	return names
}

// loadModules loads the image's modules.
func (p *initProcess) loadModules() {
	release := p.text("/proc/sys/kernel/osrelease")
	if release != p.image.Kernel {
		p.say("the kernel is %s and the modules are for %s: kernel= and ramdisk= are not of one image", release, p.image.Kernel)
	}
	var loaded []string
	for _, file := range p.image.Modules {
		if err := p.loadModule(file); err != nil {
			p.say("module %s is not loaded: %v", ModuleName(file), err)
			continue
		}
		loaded = append(loaded, ModuleName(file))
	}
	if len(loaded) > 0 {
		p.say("loaded %s", strings.Join(loaded, " "))
	}
}

func (p *initProcess) loadModule(file string) error {
	module, err := os.ReadFile(p.path(ModuleDir + "/" + file))
	if err != nil {
		return err
	}
	if err := p.load(module); err != nil && !errors.Is(err, syscall.EEXIST) {
		return err
	}
	return nil
}

// raiseGrants sets how many pages programs may grant: what the settings say, or enough for
// all vifs with a queue for each processor.
func (p *initProcess) raiseGrants(vifs int) {
	pages := p.settings.Grants
	if pages == 0 {
		queues := min(p.processors, maxQueues)
		pages = max(ordinaryGrants, roomToReconnect*(pagesPerQueue*queues+pagesPerVif)*max(1, vifs))
	}
	if now, err := strconv.Atoi(p.text(grantLimit)); err == nil && p.settings.Grants == 0 && now >= pages {
		return
	}
	if err := os.WriteFile(p.path(grantLimit), []byte(strconv.Itoa(pages)), 0); err != nil {
		p.say("the limit of pages to grant stays as it is: %v", err)
		return
	}
	p.say("up to %s may be granted", counted(pages, "page"))
}

func counted(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
