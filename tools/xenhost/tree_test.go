//go:build linux

package xenhost

// Machines made of plain files.

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"barevif/hypercall/xendev"
	"barevif/hypercall/xendev/xendevtest"
)

func tree(t testing.TB, files map[string]string) xendev.Config {
	t.Helper()
	return xendev.Config{Root: xendevtest.Tree(t, files)}
}

var xenTree = map[string]string{
	"sys/hypervisor/type":                           "xen\n",
	"sys/hypervisor/guest_type":                     "PVH\n",
	"sys/hypervisor/version/major":                  "4\n",
	"sys/hypervisor/version/minor":                  "17\n",
	"sys/hypervisor/version/extra":                  ".7\n",
	"sys/hypervisor/properties/capabilities":        "xen-3.0-x86_64 hvm-3.0-x86_64\n",
	"sys/module/xen_gntalloc/parameters/limit":      "1024\n",
	"sys/module/xen_gntdev/parameters/limit":        "65536\n",
	"sys/module/xen_evtchn/initstate":               "live\n",
	"proc/xen/capabilities":                         "",
	"dev/xen/evtchn":                                "",
	"dev/xen/gntalloc":                              "",
	"sys/bus/xen/devices/vif-0/nodename":            "device/vif/0\n",
	"sys/bus/xen/devices/vif-0/driver":              "-> ../../drivers/vif",
	"sys/bus/xen/devices/vif-0/net/eth0/mtu":        "1500\n",
	"sys/bus/xen/devices/vif-12/nodename":           "device/vif/12\n",
	"sys/bus/xen/devices/console-0/nodename":        "device/console/0\n",
	"sys/bus/xen/drivers/vif/unbind":                "",
	"sys/bus/xen/drivers/vif/bind":                  "",
	"sys/bus/xen-backend/devices/vif-3-1/nodename":  "backend/vif/3/1\n",
	"sys/bus/xen-backend/devices/vif-3-1/driver":    "-> ../../drivers/vif",
	"sys/bus/xen-backend/devices/vif-3-1/net/v/mtu": "1500\n",
	"sys/bus/xen-backend/drivers/vif/unbind":        "",
}

func TestVifsAndTheirOwners(t *testing.T) {
	cfg := tree(t, xenTree)
	got, err := Vifs(cfg)
	if err != nil {
		t.Fatal(err)
	}
	want := []Vif{
		{Name: "vif-0", Node: "device/vif/0", Driver: "vif", Interface: "eth0"},
		{Name: "vif-12", Node: "device/vif/12"},
		{Name: "vif-3-1", Backend: true, Node: "backend/vif/3/1", Driver: "vif", Interface: "v"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}

	var owned *OwnedError
	if err := CheckFree(cfg, "0"); !errors.As(err, &owned) || owned.Vif != want[0] {
		t.Errorf("vif 0: %v", err)
	} else if s := err.Error(); !strings.Contains(s, "xen-netfront as eth0") ||
		!strings.Contains(s, "echo vif-0 > /sys/bus/xen/drivers/vif/unbind") {
		t.Error(s)
	}
	if err := CheckFree(cfg, "12"); err != nil {
		t.Error(err)
	}
	for _, id := range []string{"3-1", "1", "", "../x", "console-0"} {
		if err := CheckFree(cfg, id); err == nil || !strings.Contains(err.Error(), "0, 12") {
			t.Errorf("vif %q: %v", id, err)
		}
	}
	if s := (&OwnedError{want[2]}).Error(); !strings.Contains(s, "xen-netback as v") || !strings.Contains(s, "/sys/bus/xen-backend/drivers/vif/unbind") {
		t.Error(s)
	}
}

func TestTakeAndRelease(t *testing.T) {
	cfg := tree(t, xenTree)
	written := func(name string) string {
		b, err := os.ReadFile(path(cfg, "sys/bus/xen/drivers/vif", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	var resets []string // and whether the driver was bound by then
	reset := func(node string) error {
		resets = append(resets, node+" "+written("bind"))
		return nil
	}
	refuse := errors.New("xenstore does not answer")
	if err := release(cfg, "12", func(string) error { return refuse }); !errors.Is(err, refuse) || written("bind") != "" {
		t.Errorf("%v, %q", err, written("bind"))
	}
	if err := errors.Join(Take(cfg, "12"), release(cfg, "0", reset)); err != nil || written("bind")+written("unbind") != "" {
		t.Errorf("nothing to do, but %v, %q, %q", err, written("bind"), written("unbind"))
	}
	if err := Take(cfg, "0"); err != nil || written("unbind") != "vif-0" {
		t.Errorf("%v, %q", err, written("unbind"))
	}
	if err := release(cfg, "12", reset); err != nil || written("bind") != "vif-12" || !slices.Equal(resets, []string{"device/vif/12 "}) {
		t.Errorf("%v, %q, %q", err, written("bind"), resets)
	}
	if err := os.RemoveAll(path(cfg, "sys/bus/xen/drivers/vif")); err != nil {
		t.Fatal(err)
	}
	if err := release(cfg, "12", func(string) error { return nil }); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "not loaded") {
		t.Error(err)
	}
	if err := Take(cfg, "0"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestNoVifIsNoError(t *testing.T) {
	cfg := tree(t, map[string]string{"sys/hypervisor/type": "xen\n", "sys/bus/xen/devices/console-0/nodename": ""})
	if got, err := Vifs(cfg); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
	if err := CheckFree(cfg, "0"); err == nil || !strings.Contains(err.Error(), "has none") {
		t.Error(err)
	}
}

func TestNoXenIsSaidSo(t *testing.T) {
	cfg := tree(t, nil)
	for name, call := range map[string]func() error{
		"Vifs": func() error { _, err := Vifs(cfg); return err },
		"Take": func() error { return Take(cfg, "0") },
	} {
		err := call()
		if !errors.Is(err, xendev.ErrNotXen) || strings.Contains(err.Error(), "modprobe") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReportOfATree(t *testing.T) {
	xendevtest.CheckFiles(t)
	cfg := tree(t, xenTree)
	r := Inspect(context.Background(), cfg)
	if r.Xen.Value != "4.17.7" || r.Guest.Value != "PVH" || r.Control.Value || r.GrantLimit.Value != 1024 ||
		r.MapLimit.Value != 65536 || r.Capabilities.Value != "xen-3.0-x86_64 hvm-3.0-x86_64" || len(r.Vifs.Value) != 3 {
		t.Errorf("%+v", r)
	}
	if err := errors.Join(r.Xen.Err, r.Kernel.Err, r.Guest.Err, r.Control.Err, r.Capabilities.Err, r.GrantLimit.Err, r.MapLimit.Err, r.Vifs.Err); err != nil {
		t.Error(err)
	}
	var missing *xendev.NodeError
	if !errors.As(r.Domain.Err, &missing) || !errors.As(r.GrantTable.Err, &missing) || !errors.As(r.Ports.Err, &missing) {
		t.Errorf("%v, %v, %v", r.Domain.Err, r.GrantTable.Err, r.Ports.Err)
	}
	usable := map[string]bool{}
	for _, n := range r.Nodes {
		usable[filepath.Base(n.Path)] = n.Err == nil
		if (n.Err == nil || n.Module == "xen-gntdev") && !n.Loaded {
			t.Errorf("%s: %s is not loaded", n.Path, n.Module)
		}
	}
	if !usable["evtchn"] || !usable["gntalloc"] || usable["gntdev"] || usable["xenbus"] || len(usable) != 6 {
		t.Errorf("usable: %v", usable)
	}
	text := r.String()
	for _, part := range []string{"4.17.7", "PVH", "1024 pages", "modprobe xen-gntdev", "vif-0 (device/vif/0) belongs to xen-netfront as eth0",
		"vif-12 (device/vif/12) free", "belongs to xen-netback as v"} {
		if !strings.Contains(text, part) {
			t.Errorf("the report does not say %q:\n%s", part, text)
		}
	}
}

func TestReportWithoutXen(t *testing.T) {
	r := Inspect(context.Background(), tree(t, nil))
	for name, err := range map[string]error{
		"xen": r.Xen.Err, "domain": r.Domain.Err, "guest": r.Guest.Err, "vifs": r.Vifs.Err, "ports": r.Ports.Err,
	} {
		if !errors.Is(err, xendev.ErrNotXen) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if r.Kernel.Err != nil || r.Kernel.Value == "" {
		t.Error(r.Kernel)
	}
	if text := r.String(); !strings.Contains(text, "not a Xen domain") {
		t.Error(text)
	}
}
