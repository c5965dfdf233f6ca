//go:build linux

// Package xendevtest has helpers for tests of code that opens the device nodes of Xen, on
// a real Xen and on machines made of plain files.
package xendevtest

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// goneLimit bounds the wait for goroutines that end by themselves.
const goneLimit = 2 * time.Minute

// Tree makes a root directory. Each name in files becomes a file with that content; "->
// x" makes a link to x.
func Tree(t testing.TB, files map[string]string) (root string) {
	t.Helper()
	root = t.TempDir()
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
	return root
}

// OnXen skips the test if this machine is no Xen domain. Otherwise it is [CheckFiles].
func OnXen(t testing.TB) {
	t.Helper()
	if b, err := os.ReadFile("/sys/hypervisor/type"); err != nil || strings.TrimSpace(string(b)) != "xen" {
		t.Skip("/sys/hypervisor/type says no Xen: this machine is not a Xen domain")
	}
	CheckFiles(t)
}

// CheckFiles fails the test if it leaves a descriptor or a goroutine behind.
func CheckFiles(t testing.TB) {
	t.Helper()
	files := func() (list []string) {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all {
			to, err := os.Readlink("/proc/self/fd/" + e.Name())
			if err == nil && !strings.HasPrefix(to, "anon_inode:") && !strings.HasPrefix(to, "/proc/") {
				list = append(list, to)
			}
		}
		return list
	}
	before, goroutines := files(), runtime.NumGoroutine()
	t.Cleanup(func() {
		end := time.Now().Add(goneLimit)
		for runtime.NumGoroutine() > goroutines && time.Now().Before(end) {
			runtime.Gosched()
		}
		if after := files(); len(after) > len(before) {
			t.Errorf("open files before: %q, after: %q", before, after)
		}
		if n := runtime.NumGoroutine(); n > goroutines {
			t.Errorf("%d goroutines before, %d after", goroutines, n)
		}
	})
}
