//go:build linux

package image

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"barevif/tools/guestimage"
)

// SystemdLayer is a file in dom0. Appended to GuestImage it makes the image of a guest with Debian's systemd:
// the kernel unpacks one archive over the other. DeployDir is the directory in that guest with the files that
// an operator installs. The guest has no user barevif.
const (
	SystemdLayer = "/lab/systemd.cpio"
	DeployDir    = "/lab/deploy"
)

// SystemdInit is process 1 of that guest, for rdinit= on its kernel's command line.
const SystemdInit = "/lib/systemd/systemd"

// InstalledBarevif is where the guest has the program: the units name it there.
const InstalledBarevif = "/usr/local/bin/barevif"

var systemdTools = [...]string{
	"kmod", "systemctl", "journalctl", "udevadm", "systemd-sysusers", "systemd-tmpfiles",
}

// systemdDaemons are in /lib/systemd.
var systemdDaemons = [...]string{"systemd", "systemd-journald", "systemd-modules-load", "systemd-cgroups-agent"}

// systemdDirs are copied as the packages have them.
var systemdDirs = [...]string{"lib/systemd/system", "lib/udev/rules.d", "usr/lib/tmpfiles.d", "usr/lib/sysusers.d", "etc/systemd", "etc/udev"}

// wantedUnits are those of Debian's units that the guest starts. The others are for disks, terminals and
// file systems that it does not have.
var wantedUnits = [...]string{
	"kmod-static-nodes.service", "systemd-modules-load.service", "systemd-sysusers.service",
	"systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket", "systemd-journal-flush.service",
	"systemd-tmpfiles-setup-dev.service", "systemd-tmpfiles-setup.service",
	"systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket", "systemd-udev-trigger.service",
}

// agentUnit runs the lab's agent, which is process 1 of the other guests.
const agentUnit = `[Unit]
Description=agent of the lab
[Service]
ExecStart=/init
StandardOutput=journal+console
StandardError=journal+console
`

// systemd returns the files that a guest with systemd has in addition to base, or in place of base's.
func (d *distribution) systemd(ctx context.Context) (*guestimage.Tree, error) {
	t := guestimage.NewTree()
	if err := d.install(t, systemdTools[:]...); err != nil {
		return nil, err
	}
	t.Data("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	t.Data("/etc/group", 0o644, []byte("root:x:0:\n"))
	t.Data("/etc/machine-id", 0o444, []byte(strings.Repeat("1a", 16)+"\n")) // without it systemd enables all units that there are
	t.Dir("/etc/modprobe.d", 0o755)                                         // udev looks for changes in it if it was there in the beginning
	t.Link(InstalledBarevif, ProgramDir+"/barevif")
	for _, name := range [...]string{"depmod", "modprobe", "kmod"} { // systemd's libkmod and the kernel want those of kmod
		t.Link("/bin/"+name, "/usr/sbin/kmod")
		t.Link("/sbin/"+name, "/usr/sbin/kmod")
	}
	for _, dir := range systemdDirs {
		if err := d.copyUnits(t, dir); err != nil {
			return nil, err
		}
	}
	for _, name := range systemdDaemons {
		file := filepath.Join(d.root, "lib/systemd", name)
		t.File("/lib/systemd/"+name, 0o755, file)
		if err := d.installLibraries(t, file); err != nil {
			return nil, err
		}
	}
	t.Link("/lib/systemd/systemd-udevd", "/usr/sbin/udevadm")
	const units = "/etc/systemd/system/"
	t.Link(units+"default.target", "/lib/systemd/system/multi-user.target")
	t.Data(units+"xenlab-agent.service", 0o644, []byte(agentUnit))
	t.Link(units+"multi-user.target.wants/xenlab-agent.service", units+"xenlab-agent.service")
	deploy, err := deployDir(ctx, "barevif")
	if err != nil {
		return nil, err
	}
	return t, copyDir(t, DeployDir+"/etc", filepath.Join(deploy, "etc"), func(string) bool { return true })
}

// copyUnits copies a directory of the packages, which may not exist. Of the links in directories *.wants it
// copies only those to wantedUnits.
func (d *distribution) copyUnits(t *guestimage.Tree, dir string) error {
	return copyDir(t, "/"+dir, filepath.Join(d.root, dir), func(name string) bool {
		return !strings.HasSuffix(path.Dir(name), ".wants") || slices.Contains(wantedUnits[:], path.Base(name))
	})
}

// copyDir copies those files and links of a directory of the host that are wanted, by their paths in the guest.
func copyDir(t *guestimage.Tree, at, dir string, wanted func(name string) bool) error {
	return filepath.WalkDir(dir, func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		name := path.Join(at, filepath.ToSlash(rel))
		switch {
		case e.IsDir():
			t.Dir(name, 0o755)
		case !wanted(name):
		case e.Type() == fs.ModeSymlink:
			target, err := os.Readlink(file)
			if err != nil {
				return err
			}
			t.Link(name, target)
		default:
			info, err := e.Info()
			if err != nil {
				return err
			}
			t.File(name, info.Mode().Perm(), file)
		}
		return nil
	})
}

// deployDir returns the directory of a command's files that operators install.
func deployDir(ctx context.Context, command string) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-f", "{{.Dir}}", "barevif/tools/"+command).Output()
	if err != nil {
		return "", fmt.Errorf("go list: %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "deploy"), nil
}
