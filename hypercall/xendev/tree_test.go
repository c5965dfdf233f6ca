//go:build linux

package xendev

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

	"golang.org/x/sys/unix"

	"barevif/hypercall"
)

// tree makes a root directory. Each name in files becomes a file with that content; "->
// x" makes a link to x.
func tree(t testing.TB, files map[string]string) Config {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if to, ok := strings.CutPrefix(content, "-> "); ok && err == nil {
			err = os.Symlink(to, path)
		} else if err == nil {
			err = os.WriteFile(path, []byte(content), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return Config{Root: root}
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

func TestMissingNodeNamesItsModule(t *testing.T) {
	cfg := tree(t, map[string]string{"sys/hypervisor/type": "xen\n"})
	d := newDomain(cfg, 1)
	defer d.Close()
	_, shareErr := d.Share(2, 1, hypercall.ReadOnly)
	_, mapErr := d.Map(2, []hypercall.GrantRef{9}, hypercall.ReadOnly)
	copyErr := d.Copy(make([]hypercall.CopyOp, 1))
	_, waiterErr := d.Waiter()
	_, storeErr := d.Store(context.Background())
	_, openErr := Open(cfg)
	_, callErr := d.hypercalls()
	for _, c := range []struct {
		err          error
		node, advice string
	}{
		{shareErr, "gntalloc", "modprobe xen-gntalloc"},
		{mapErr, "gntdev", "modprobe xen-gntdev"},
		{copyErr, "gntdev", "modprobe xen-gntdev"},
		{waiterErr, "evtchn", "modprobe xen-evtchn"},
		{storeErr, "xenbus", "mount -t xenfs xenfs /proc/xen"},
		{openErr, "xenbus", "mount -t xenfs xenfs /proc/xen"},
		{callErr, "privcmd", "modprobe xen-privcmd"},
	} {
		var e *NodeError
		if !errors.As(c.err, &e) || !errors.Is(c.err, fs.ErrNotExist) || errors.Is(c.err, ErrNotXen) {
			t.Errorf("%s: %v", c.node, c.err)
			continue
		}
		if !strings.HasSuffix(e.Node, "/dev/xen/"+c.node) || !strings.HasSuffix(e.Error(), c.advice) {
			t.Errorf("%s: %v", c.node, e)
		}
	}
}

func TestNoXenIsSaidSo(t *testing.T) {
	cfg := tree(t, nil)
	for name, open := range map[string]func() error{
		"Open":   func() error { _, err := Open(cfg); return err },
		"Waiter": func() error { _, err := newDomain(cfg, 0).Waiter(); return err },
		"Vifs":   func() error { _, err := Vifs(cfg); return err },
		"Take":   func() error { return Take(cfg, "0") },
	} {
		err := open()
		if !errors.Is(err, ErrNotXen) || strings.Contains(err.Error(), "modprobe") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestForbiddenNodeShowsAUdevRule(t *testing.T) {
	cfg := Config{}
	err := cfg.explain("/dev/xen/evtchn", "xen-evtchn", &fs.PathError{Op: "open", Path: "/dev/xen/evtchn", Err: unix.EACCES})
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), `KERNEL=="xen/evtchn"`) {
		t.Error(err)
	}
	if strings.Count(err.Error(), "open /dev/xen/evtchn") != 1 {
		t.Errorf("said twice: %v", err)
	}
}

func TestOpenChecksItsConfig(t *testing.T) {
	if _, err := Open(Config{GrantLimit: -1}); err == nil {
		t.Error("negative limit")
	}
}

// TestOpenRefusesAForeignAnswer replaces xenstore by a FIFO, which answers each request
// with itself.
func TestOpenRefusesAForeignAnswer(t *testing.T) {
	checkFiles(t)
	cfg := tree(t, map[string]string{"dev/xen/other": ""})
	if err := unix.Mkfifo(cfg.path("dev/xen/xenbus"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), `"domid\x00"`) {
		t.Errorf("Open: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := newDomain(cfg, 1).Store(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Store: %v", err)
	}
}

func TestFailedCallsGiveEverythingBack(t *testing.T) {
	checkFiles(t)
	cfg := tree(t, map[string]string{"dev/xen/gntalloc": "", "dev/xen/gntdev": "", "dev/xen/evtchn": ""})
	d := newDomain(cfg, 1)
	for _, pages := range []int{1, 2, 3, 500} {
		if _, err := d.Share(2, pages, hypercall.ReadWrite); !errors.Is(err, unix.ENOTTY) {
			t.Errorf("share %d pages of a plain file: %v", pages, err)
		}
		if _, err := d.Map(2, make([]hypercall.GrantRef, pages), hypercall.ReadWrite); !errors.Is(err, unix.ENOTTY) {
			t.Errorf("map %d pages of a plain file: %v", pages, err)
		}
		ops := make([]hypercall.CopyOp, pages)
		if err := d.Copy(ops); !errors.Is(err, unix.ENOTTY) {
			t.Errorf("copy %d pages of a plain file: %v", pages, err)
		}
		for _, op := range ops {
			if op.Status != hypercall.GeneralError {
				t.Fatalf("status after a failed call: %v", op.Status)
			}
		}
	}
	if _, err := d.Waiter(); err == nil {
		t.Error("a plain file to wait on")
	}
	for _, pages := range []int{0, -1, maxPages + 1} {
		if _, err := d.Share(2, pages, hypercall.ReadWrite); err == nil {
			t.Errorf("share %d pages", pages)
		}
		if _, err := d.Memory(pages); err == nil {
			t.Errorf("memory of %d pages", pages)
		}
	}
	if _, err := d.Map(2, nil, hypercall.ReadOnly); err == nil {
		t.Error("map nothing")
	}
	if err := d.NotifyOnEnd(&hypercall.Share{Refs: []hypercall.GrantRef{8}}, nil); err == nil {
		t.Error("notify on end of a foreign share")
	}
	if err := errors.Join(d.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

func TestCopyChecksBeforeItCalls(t *testing.T) {
	d := newDomain(tree(t, map[string]string{"dev/xen/gntdev": ""}), 1)
	defer d.Close()
	local := hypercall.Area{Local: make([]byte, 8)}
	ops := []hypercall.CopyOp{
		{Src: hypercall.Area{Ref: 9}, Dst: local, Len: 8, Status: 77},
		{Src: local, Dst: local, Len: 8, Status: 77},
	}
	if err := d.Copy(ops); err != errLocalCopy || ops[0].Status != 77 {
		t.Errorf("local to local: %v, %v", err, ops[0].Status)
	}
	for _, c := range []struct {
		a  hypercall.Area
		n  uint32
		ok bool
	}{
		{hypercall.Area{Offset: 0}, 4096, true},
		{hypercall.Area{Offset: 1}, 4096, false},
		{hypercall.Area{Offset: 4096}, 0, true},
		{hypercall.Area{Offset: 4096}, 1, false},
		{hypercall.Area{Offset: 65535}, 1<<32 - 1, false},
		{hypercall.Area{Offset: 4095}, 1, true},
		{local, 8, true},
		{local, 9, false},
		{hypercall.Area{Local: []byte{}}, 0, true},
		{local, 1<<32 - 1, false},
	} {
		if holds(&c.a, c.n) != c.ok {
			t.Errorf("%d bytes at %d of %d", c.n, c.a.Offset, len(c.a.Local))
		}
	}
	if got := end(&hypercall.Area{Ref: 0x01020304, Offset: 0x0506, Dom: 0x0708}); got != 0x0708_0506_0102_0304 {
		t.Errorf("foreign end %#x", got)
	}
}

func TestCopyDoesNotAllocate(t *testing.T) {
	d := newDomain(tree(t, map[string]string{"dev/xen/gntdev": ""}), 1)
	defer d.Close()
	mem, err := d.Memory(1)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Release()
	fd, err := d.gntdev.enter(&d.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer d.gntdev.leave()
	for _, n := range []int{1, fewCopies, copyBatch} {
		ops := make([]hypercall.CopyOp, n)
		for i := range ops {
			ops[i] = hypercall.CopyOp{Src: hypercall.Area{Ref: 9, Dom: 1}, Dst: hypercall.Area{Local: mem.Page(0)}, Len: 100}
		}
		do := copyMany
		if n <= fewCopies {
			do = copyFew
		}
		if a := testing.AllocsPerRun(100, func() {
			if err := do(fd, ops); err != unix.ENOTTY {
				t.Fatal(err)
			}
		}); a != 0 {
			t.Errorf("%d operations: %v allocations", n, a)
		}
	}
}

func TestMemoryIsZeroLockedAndReleased(t *testing.T) {
	locked := func() string {
		b, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(b), "VmLck:")
		line, _, _ := strings.Cut(rest, "\n")
		return strings.TrimSpace(line)
	}
	d := newDomain(Config{LockMemory: true}, 1)
	before := locked()
	m, err := d.Memory(3)
	if err != nil {
		t.Fatal(err)
	}
	if m.Pages() != 3 || slices.ContainsFunc(m.Bytes(), func(b byte) bool { return b != 0 }) {
		t.Errorf("%d pages, or not zero", m.Pages())
	}
	if locked() == before {
		t.Errorf("locked %s before and after", before)
	}
	m.Bytes()[0] = 1
	if err := errors.Join(m.Release(), m.Release()); err != nil {
		t.Error(err)
	}
	if now := locked(); now != before {
		t.Errorf("locked %s before, %s after", before, now)
	}
}

func TestOverTheLimitSaysHowToRaiseIt(t *testing.T) {
	cfg := tree(t, xenTree)
	cfg.GrantLimit = 4096
	d := newDomain(cfg, 1)
	d.held.Store(1000)
	d.raiseErr = unix.EACCES
	err := d.noGrants(514)
	if !errors.Is(err, hypercall.ErrNoGrants) || !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v is not what it should be", err)
	}
	for _, part := range []string{"514", "1000", "1024", "4096", "/sys/module/xen_gntalloc/parameters/limit"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %s", err, part)
		}
	}
	if err := cfg.raiseLimit(); err != nil {
		t.Fatal(err)
	}
	if n, err := GrantLimit(cfg); err != nil || n != 4096 {
		t.Errorf("raised to %d, %v", n, err)
	}
	cfg.GrantLimit = 100
	if err := cfg.raiseLimit(); err != nil {
		t.Fatal(err)
	}
	if n, err := GrantLimit(cfg); err != nil || n != 4096 {
		t.Errorf("lowered to %d, %v", n, err)
	}
	if err := (Config{Root: t.TempDir(), GrantLimit: 1}).raiseLimit(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no knob: %v", err)
	}
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
		b, err := os.ReadFile(cfg.path("sys/bus/xen/drivers/vif", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if err := errors.Join(Take(cfg, "12"), Release(cfg, "0")); err != nil || written("bind")+written("unbind") != "" {
		t.Errorf("nothing to do, but %v, %q, %q", err, written("bind"), written("unbind"))
	}
	if err := Take(cfg, "0"); err != nil || written("unbind") != "vif-0" {
		t.Errorf("%v, %q", err, written("unbind"))
	}
	if err := Release(cfg, "12"); err != nil || written("bind") != "vif-12" {
		t.Errorf("%v, %q", err, written("bind"))
	}
	if err := os.RemoveAll(cfg.path("sys/bus/xen/drivers/vif")); err != nil {
		t.Fatal(err)
	}
	if err := Release(cfg, "12"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "not loaded") {
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

func TestReportOfATree(t *testing.T) {
	checkFiles(t)
	cfg := tree(t, xenTree)
	r := Inspect(context.Background(), cfg)
	if r.Xen.Value != "4.17.7" || r.Guest.Value != "PVH" || r.Control.Value || r.GrantLimit.Value != 1024 ||
		r.MapLimit.Value != 65536 || r.Capabilities.Value != "xen-3.0-x86_64 hvm-3.0-x86_64" || len(r.Vifs.Value) != 3 {
		t.Errorf("%+v", r)
	}
	if err := errors.Join(r.Xen.Err, r.Kernel.Err, r.Guest.Err, r.Control.Err, r.Capabilities.Err, r.GrantLimit.Err, r.MapLimit.Err, r.Vifs.Err); err != nil {
		t.Error(err)
	}
	var missing *NodeError
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
		if !errors.Is(err, ErrNotXen) {
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
