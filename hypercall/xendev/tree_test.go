//go:build linux

package xendev

// Machines made of plain files.

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/xendev/xendevtest"
)

func tree(t testing.TB, files map[string]string) Config {
	t.Helper()
	return Config{Root: xendevtest.Tree(t, files)}
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
	xendevtest.CheckFiles(t)
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
	xendevtest.CheckFiles(t)
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
	cfg := tree(t, map[string]string{limitFile: "1024\n"})
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
