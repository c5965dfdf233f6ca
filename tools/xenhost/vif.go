//go:build linux

package xenhost

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"barevif/hypercall/xendev"
	"barevif/pvnet/netif"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
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

// Release binds the frontend of vif number id to the kernel's xen-netfront. It needs root, and
// no program may have the vif. If the module is not loaded, Release fails after it has made
// the vif ready for it.
//
// What an earlier program left in xenstore goes first. xen-netfront removes no keys: with
// that of a control ring, netback would refuse the vif. And Linux writes no state that it
// believes the vif to be in: a module loaded for a vif that it has never had waits for netback
// without end, which waits for the state to leave Closed.
func Release(cfg xendev.Config, id string) error {
	return release(cfg, id, func(node string) error { return resetFrontend(cfg, node) })
}

func release(cfg xendev.Config, id string, reset func(node string) error) error {
	v, err := Frontend(cfg, id)
	if err != nil || v.Driver != "" {
		return err
	}
	if err := reset(v.Node); err != nil {
		return fmt.Errorf("release %s to xen-netfront: reset what its last program left: %w", v.Name, err)
	}
	err = v.write(path(cfg, v.bus(), "drivers/vif/bind"))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release %s to xen-netfront, which is not loaded and can be now (modprobe xen-netfront): %w", v.Name, err)
	}
	if err != nil {
		return fmt.Errorf("release %s to xen-netfront: %w", v.Name, err)
	}
	return nil
}

// resetFrontend removes what a frontend left in its directory of xenstore, node, and writes
// the state that the toolstack made it with.
func resetFrontend(cfg xendev.Config, node string) error {
	ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
	defer cancel()
	domain, err := xendev.Open(cfg)
	if err != nil {
		return err
	}
	defer domain.Close()
	store, err := xenstore.Dial(ctx, domain.Store, xenstore.Config{})
	if err != nil {
		return err
	}
	defer store.Close()
	if err := closeFrontend(ctx, store, node); err != nil {
		return err
	}
	there, err := store.Directory(ctx, node)
	if err != nil {
		return err
	}
	for _, key := range netif.StaleKeys(there) {
		if err := store.Remove(ctx, node+"/"+key); err != nil {
			return err
		}
	}
	return store.Write(ctx, node+"/"+netif.KeyState, strconv.Itoa(int(xenbus.Initialising)))
}

// closeFrontend closes the vif of a program that was killed, and waits until its backend has
// closed it, too. netback would else let go of the rings while xen-netfront makes others.
func closeFrontend(ctx context.Context, store *xenstore.Client, node string) error {
	keys, err := store.ReadKeys(ctx, node, netif.KeyState, netif.KeyBackend)
	if err != nil || keys[netif.KeyState] != strconv.Itoa(int(xenbus.Connected)) {
		return err
	}
	if err := store.Write(ctx, node+"/"+netif.KeyState, strconv.Itoa(int(xenbus.Closed))); err != nil {
		return err
	}
	for {
		state, err := store.Read(ctx, keys[netif.KeyBackend]+"/"+netif.KeyState)
		if err != nil || state == strconv.Itoa(int(xenbus.Closed)) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the backend does not close the vif: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// storeTimeout bounds what Release asks of xenstore. A running one answers in milliseconds.
const storeTimeout = 10 * time.Second

// write writes the vif's name to an existing file of sysfs.
func (v Vif) write(file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(v.Name)
	return errors.Join(err, f.Close())
}
