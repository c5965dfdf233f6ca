package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"barevif/tools/guestimage"
)

// metaPackages depend on the newest kernel and Xen of the release. The wanted packages are the
// dependencies with these prefixes.
var metaPackages = [...]struct{ meta, prefix string }{
	{"linux-image-amd64", "linux-image-"},
	{"xen-system-amd64", "xen-hypervisor-"},
	{"xen-system-amd64", "xen-utils-"},
}

// toolPackages have no version in their names. apt's dependencies add their libraries, except
// libgcc-s1: glibc opens it at run time when a thread is cancelled.
var toolPackages = [...]string{
	"busybox-static", "dash", "bash", "xen-utils-common", "xenstore-utils", "libgcc-s1",
	"iproute2", "iputils-ping", "iperf3", "tcpdump", "ethtool", "bpftool", "curl",
	"util-linux", "libcap2-bin", "systemd", "udev", "kmod",
}

// resolve asks apt which packages the images need today.
func resolve(ctx context.Context) ([]guestimage.Package, error) {
	names := slices.Clone(toolPackages[:])
	for _, m := range metaPackages {
		name, err := guestimage.Versioned(ctx, m.meta, m.prefix)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	for frontier := names; len(frontier) > 0; {
		next, err := guestimage.Depends(ctx, frontier...)
		if err != nil {
			return nil, err
		}
		frontier = nil
		for _, n := range next {
			if isLibrary(n) && !slices.Contains(names, n) {
				names = append(names, n)
				frontier = append(frontier, n)
			}
		}
	}
	slices.Sort(names)
	return guestimage.Resolve(ctx, names...)
}

func isLibrary(name string) bool { return strings.HasPrefix(name, "lib") || name == "zlib1g" }

// key names a set of packages: it changes with any version.
func key(debs []guestimage.Package) string {
	h := sha256.New()
	for _, d := range debs {
		fmt.Fprintln(h, d.File, d.SHA256)
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

func unpack(ctx context.Context, debDir, root string, debs []guestimage.Package) error {
	for _, d := range debs {
		if _, err := guestimage.Output(ctx, "", "dpkg-deb", "-x", filepath.Join(debDir, d.File), root); err != nil {
			return err
		}
	}
	return nil
}

// hostTools are the programs that the lab needs on this machine, and their packages.
var hostTools = [...]struct{ program, pkg string }{
	{"qemu-system-x86_64", "qemu-system-x86"},
	{"xz", "xz-utils"},
}

// installTools installs the missing host tools, if it may.
func installTools(ctx context.Context) error {
	for _, tool := range [...]string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("the images are made from Debian packages, and this machine has no %s", tool)
		}
	}
	var pkgs []string
	for _, t := range hostTools {
		if _, err := exec.LookPath(t.program); err != nil {
			pkgs = append(pkgs, t.pkg)
		}
	}
	if len(pkgs) == 0 {
		return nil
	}
	install := append([]string{"-o", "DPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends"}, pkgs...)
	if os.Geteuid() != 0 {
		return fmt.Errorf("missing on this machine: as root, run apt-get %s", strings.Join(install, " "))
	}
	if _, err := guestimage.Output(ctx, "", "apt-get", install...); err == nil {
		return nil
	}
	if err := updateIndex(ctx); err != nil {
		return err
	}
	_, err := guestimage.Output(ctx, "", "apt-get", install...)
	return err
}

// updateIndex updates apt's index, which may be missing or old.
func updateIndex(ctx context.Context) error {
	_, err := guestimage.Output(ctx, "", "apt-get", "-o", "DPkg::Lock::Timeout=300", "update")
	return err
}
