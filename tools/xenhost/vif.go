//go:build linux

package xenhost

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"barevif/hypercall/xendev"
)

// A Vif is a network device in the kernel's device tree, whether or not a kernel driver
// owns it.
type Vif struct {
	Name      string // "vif-0" of a frontend, "vif-3-0" of a backend
	Backend   bool
	Node      string // its directory in xenstore: "device/vif/0"
	Driver    string // the kernel driver that owns it; "": none, the device is free
	Interface string // the network interface that the driver made for it, if any
}

// module returns the kernel module of the driver; the driver has the same name at both
// ends.
func (v Vif) module() string {
	if v.Driver != "vif" {
		return v.Driver
	}
	if v.Backend {
		return "xen-netback"
	}
	return "xen-netfront"
}

// bus returns the directory of the vif's bus.
func (v Vif) bus() string {
	if v.Backend {
		return "sys/bus/xen-backend"
	}
	return "sys/bus/xen"
}

// An OwnedError is a vif that we cannot use, because a kernel driver owns it. Its text
// says how to release the vif.
type OwnedError struct {
	Vif Vif
}

func (e *OwnedError) Error() string {
	v := e.Vif
	as := ""
	if v.Interface != "" {
		as = " as " + v.Interface
	}
	return fmt.Sprintf("%s belongs to the kernel's %s%s: release it (echo %s > /%s/drivers/%s/unbind), or blacklist the module",
		v.Name, v.module(), as, v.Name, v.bus(), v.Driver)
}

// Vifs lists the network devices that the kernel knows, frontends first. The control
// domain knows only backends of vifs that it serves.
func Vifs(cfg xendev.Config) ([]Vif, error) {
	var all []Vif
	for _, v := range []Vif{{}, {Backend: true}} {
		names, err := filepath.Glob(path(cfg, v.bus(), "devices", "vif-*"))
		if err != nil {
			return nil, err
		}
		for _, dir := range names {
			v.Name = filepath.Base(dir)
			if err := v.read(dir); err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					continue // unplugged meanwhile
				}
				return nil, err
			}
			all = append(all, v)
		}
	}
	if all == nil {
		if _, err := os.Stat(path(cfg, "sys/bus/xen/devices")); err != nil {
			if !onXen(cfg) {
				return nil, xendev.ErrNotXen
			}
			return nil, err
		}
	}
	return all, nil
}

func (v *Vif) read(dir string) error {
	node, err := os.ReadFile(filepath.Join(dir, "nodename"))
	if err != nil {
		return err
	}
	v.Node = strings.TrimSpace(string(node))
	v.Driver, v.Interface = "", ""
	switch link, err := os.Readlink(filepath.Join(dir, "driver")); {
	case err == nil:
		v.Driver = filepath.Base(link)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if nets, err := os.ReadDir(filepath.Join(dir, "net")); err == nil && len(nets) > 0 {
		v.Interface = nets[0].Name()
	}
	return nil
}

// Frontend returns the frontend of vif number id ("0"). The error lists the vifs that
// exist.
func Frontend(cfg xendev.Config, id string) (Vif, error) {
	all, err := Vifs(cfg)
	if err != nil {
		return Vif{}, err
	}
	var known []string
	for _, v := range all {
		if v.Backend {
			continue
		}
		if v.Name == "vif-"+id {
			return v, nil
		}
		known = append(known, strings.TrimPrefix(v.Name, "vif-"))
	}
	if len(known) == 0 {
		return Vif{}, fmt.Errorf("no vif %s: this domain has none", strconv.Quote(id))
	}
	slices.Sort(known)
	return Vif{}, fmt.Errorf("no vif %s: this domain has %s", strconv.Quote(id), strings.Join(known, ", "))
}

// CheckFree returns an [*OwnedError] if a kernel driver owns the frontend of vif number
// id. If a vif has two owners both fail: call CheckFree before connecting.
func CheckFree(cfg xendev.Config, id string) error {
	v, err := Frontend(cfg, id)
	if err != nil {
		return err
	}
	if v.Driver != "" {
		return &OwnedError{Vif: v}
	}
	return nil
}

// Take unbinds the frontend of vif number id from its kernel driver, if it has one. The
// driver's network interface vanishes, and its connections with it. Take needs root. The
// driver first closes the device, for which it waits up to some seconds for the backend.
func Take(cfg xendev.Config, id string) error {
	v, err := Frontend(cfg, id)
	if err != nil || v.Driver == "" {
		return err
	}
	if err := v.write(path(cfg, v.bus(), "drivers", v.Driver, "unbind")); err != nil {
		return fmt.Errorf("take %s from %s: %w", v.Name, v.module(), err)
	}
	return nil
}

// Release binds the frontend of vif number id to the kernel's xen-netfront, which must be
// loaded. It needs root. The device must be closed.
func Release(cfg xendev.Config, id string) error {
	v, err := Frontend(cfg, id)
	if err != nil || v.Driver != "" {
		return err
	}
	err = v.write(path(cfg, v.bus(), "drivers/vif/bind"))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release %s to xen-netfront, which is not loaded: %w", v.Name, err)
	}
	if err != nil {
		return fmt.Errorf("release %s to xen-netfront: %w", v.Name, err)
	}
	return nil
}

// write writes the vif's name to an existing file of sysfs.
func (v Vif) write(file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(v.Name)
	return errors.Join(err, f.Close())
}
