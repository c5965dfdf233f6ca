//go:build linux

package guestimage

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// mirrorCache names the directory for the kernel to the test's second process.
const mirrorCache = "GUESTIMAGE_TEST_MIRROR_CACHE"

const nobody = 65534

// The kernel of images comes from the mirror of this machine's apt, for a user without rights too: root's
// apt fetches as another user, and with other directories.
func TestAnyUserGetsTheKernelFromAMirror(t *testing.T) {
	if cache := os.Getenv(mirrorCache); cache != "" {
		fetchFromMirror(t, cache)
		return
	}
	requireMirror(t)
	dir, err := os.MkdirTemp("", "guestimage") // not TempDir, which others may not enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "test"), "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), mirrorCache+"="+filepath.Join(dir, "home", "cache"), "HOME="+filepath.Join(dir, "home"))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(cmd.Path, program, 0o755)
	}
	if err == nil {
		err = os.Chmod(cmd.Path, 0o755) // whatever the umask is
	}
	if err == nil {
		err = os.Mkdir(filepath.Join(dir, "home"), 0o700)
	}
	if err == nil && os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		if err = os.Chmod(dir, 0o755); err == nil {
			err = os.Chown(filepath.Join(dir, "home"), nobody, nobody)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	} else if !strings.Contains(string(out), "--- PASS") {
		t.Errorf("nothing was tested:\n%s", out)
	}
}

// requireMirror skips the test where apt has no index, or the mirror of that index does not answer.
func requireMirror(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("fetches a kernel, some 70 MB")
	}
	if _, err := exec.LookPath("xz"); err != nil {
		t.Skip("xz is not installed, with which kernels are packed: ", err)
	}
	name, err := Versioned(t.Context(), kernelPackage, "linux-image-")
	if err != nil {
		t.Skip("apt knows no kernel: ", err)
	}
	out, err := Output(t.Context(), "", "apt-get", "download", "--print-uris", name)
	if err != nil {
		t.Skip("apt has no mirror of the kernel: ", err)
	}
	// As apt does, through the proxy of the environment if there is one.
	at, _, _ := strings.Cut(strings.TrimPrefix(string(out), "'"), "'")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodHead, at, nil)
	if err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	r, err := (&http.Client{Timeout: time.Minute}).Do(req)
	if err != nil {
		t.Skip("no network to apt's mirror: ", err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusOK {
		t.Skipf("apt's index is old, or its mirror out of order: %s: %s", at, r.Status)
	}
}

// fetchFromMirror fetches the kernel as "barevif image" does, which finds it there the next time.
func fetchFromMirror(t *testing.T, cache string) {
	var said []string
	say := func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) }
	file, err := FetchKernel(t.Context(), cache, say)
	if err != nil {
		t.Fatal(err)
	}
	if len(said) != 1 || !strings.HasPrefix(said[0], "fetching linux-image-") {
		t.Errorf("it says %q", said)
	}
	if again, err := FetchKernel(t.Context(), cache, say); again != file || err != nil || len(said) != 1 {
		t.Errorf("the second time %q, %v, and it says %q", again, err, said[1:])
	}
	kernel, err := KernelOfPackages(t.Context(), []string{file}, BaseModules)
	if err != nil {
		t.Fatal(err)
	}
	modules, err := CollectModules(kernel.Modules, BaseModules...)
	if err != nil {
		t.Fatal(err)
	}
	if names := modules.Names(); !slices.Contains(names, "xen_gntalloc") || slices.Contains(names, netfront) {
		t.Errorf("modules %q", names)
	}
}
