//go:build linux

// Package xenhost describes the Xen domain a program runs in to people, and moves vifs
// between the kernel's driver and programs. It reads sysfs, and asks through the device
// nodes of [xendev].
//
// Each function takes a [xendev.Config], of which it uses Root: another root directory
// stands for another machine.
package xenhost

import (
	"cmp"
	"os"
	"path/filepath"
	"strings"

	"barevif/hypercall/xendev"
)

// path returns the path of a file below the root of cfg.
func path(cfg xendev.Config, elem ...string) string {
	return filepath.Join(cmp.Or(cfg.Root, "/"), filepath.Join(elem...))
}

// onXen asks the kernel whether it runs on Xen.
func onXen(cfg xendev.Config) bool {
	b, err := os.ReadFile(path(cfg, "sys/hypervisor/type"))
	return err == nil && strings.TrimSpace(string(b)) == "xen"
}
