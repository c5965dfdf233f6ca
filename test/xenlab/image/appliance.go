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

// Directories in dom0 with an image of Config.Appliance, unpacked and as it is by default.
const (
	Appliance       = "/lab/appliance"
	PackedAppliance = "/lab/appliance-packed"
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

// addAppliance runs "barevif image" twice, as a user does, and puts what it makes into dom0.
func (d *distribution) addAppliance(ctx context.Context, dom0 *guestimage.Tree, barevif string, cfg Config) error {
	i := slices.IndexFunc(d.debs, func(p guestimage.Package) bool { return strings.HasPrefix(p.File, "linux-image-") })
	if i < 0 {
		return fmt.Errorf("no kernel among the packages")
	}
	if err := guestimage.Download(ctx, d.debDir, d.debs[i:i+1]); err != nil {
		return err
	}
	for _, at := range [...]string{Appliance, PackedAppliance} {
		out := filepath.Join(cfg.Dir, filepath.Base(at))
		args := []string{
			"image", "-o", out, "--deb", filepath.Join(d.debDir, d.debs[i].File), "--dir", at, "--name", ApplianceName,
			"--vif", "mac=" + ApplianceMAC + ",script=" + VifScript, fmt.Sprintf("--uncompressed=%v", at == Appliance),
		}
		for _, word := range ApplianceLinux {
			args = append(args, "--kernel-arg", word)
		}
		args = append(args, cfg.Appliance, "--")
		if _, err := guestimage.Output(ctx, "", barevif, append(args, ApplianceWords...)...); err != nil {
			return err
		}
		for _, name := range [...]string{"kernel", "initramfs", "xl.cfg", "xl-pv.cfg"} {
			dom0.File(at+"/"+name, 0o644, filepath.Join(out, name))
		}
	}
	// It is as large as all else that dom0 has, and there already.
	if err := sameFile(filepath.Join(cfg.Dir, filepath.Base(Appliance), "kernel"), d.vmlinux); err != nil {
		return err
	}
	dom0.Link(Appliance+"/kernel", GuestKernel)
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
