//go:build linux

package privcmd

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func openFiles(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func TestOpenLeavesNothingOpenWhenItFails(t *testing.T) {
	before := openFiles(t)
	dir := t.TempDir()
	if _, err := Open(dir); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "privcmd") {
		t.Errorf("no nodes: %v", err)
	}
	for _, name := range []string{"privcmd", "hypercall"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if name == "privcmd" {
			if _, err := Open(dir); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "hypercall") {
				t.Errorf("no hypercall node: %v", err)
			}
		}
	}
	// No driver is behind these files: an empty one can be mapped, and a hypercall on it
	// is an unknown ioctl.
	c, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Version(); !errors.Is(err, unix.ENOTTY) || !strings.HasPrefix(err.Error(), "XENVER_version: ") {
		t.Errorf("a hypercall through a plain file: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error("second Close:", err)
	}
	if _, _, err := c.Version(); err == nil {
		t.Error("a hypercall after Close")
	}
	if n := openFiles(t); n != before {
		t.Errorf("%d files open before, %d after", before, n)
	}
}

func TestRefusedCallSaysWhatToLoad(t *testing.T) {
	err := explain("GNTTABOP_query_size", unix.EPERM)
	if !errors.Is(err, ErrRestricted) || !errors.Is(err, fs.ErrPermission) || !errors.Is(err, unix.EPERM) {
		t.Errorf("%v is none of what it should be", err)
	}
	for _, part := range []string{"GNTTABOP_query_size", "xen-privcmd", "unrestricted=1"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %s", err, part)
		}
	}
	if err := explain("X", unix.EINVAL); errors.Is(err, ErrRestricted) || !errors.Is(err, unix.EINVAL) {
		t.Errorf("%v", err)
	}
}
