package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// metaPackages depend on the newest kernel and Xen of the release. The wanted packages are the
// dependencies with these prefixes.
var metaPackages = [...]struct{ meta, prefix string }{
	{"linux-image-amd64", "linux-image-"},
	{"xen-system-amd64", "xen-hypervisor-"},
	{"xen-system-amd64", "xen-utils-"},
}

// toolPackages have no version in their names. apt's dependencies add their libraries, except
// libgcc-s1: glibc opens it at run time when a thread is cancelled.
var toolPackages = [...]string{
	"busybox-static", "dash", "xen-utils-common", "xenstore-utils", "libgcc-s1",
	"iproute2", "iputils-ping", "iperf3", "tcpdump", "ethtool", "bpftool", "curl",
	"util-linux", "libcap2-bin",
}

// A deb is one package in the version that apt would fetch now.
type deb struct {
	file   string // name_version_architecture.deb
	sha256 string
}

// resolve asks apt which packages the images need today.
func resolve(ctx context.Context) ([]deb, error) {
	names := slices.Clone(toolPackages[:])
	for _, m := range metaPackages {
		direct, err := depends(ctx, m.meta)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(direct, func(n string) bool {
			return strings.HasPrefix(n, m.prefix) && n[len(m.prefix)] >= '0' && n[len(m.prefix)] <= '9'
		})
		if i < 0 {
			return nil, fmt.Errorf("%s depends on no package %s*", m.meta, m.prefix)
		}
		names = append(names, direct[i])
	}
	for frontier := names; len(frontier) > 0; {
		next, err := depends(ctx, frontier...)
		if err != nil {
			return nil, err
		}
		frontier = nil
		for _, n := range next {
			if isLibrary(n) && !slices.Contains(names, n) {
				names = append(names, n)
				frontier = append(frontier, n)
			}
		}
	}
	slices.Sort(names)
	out, err := output(ctx, "", "apt-get", append([]string{"download", "--print-uris"}, names...)...)
	if err != nil {
		return nil, err
	}
	return parseURIs(out)
}

func isLibrary(name string) bool { return strings.HasPrefix(name, "lib") || name == "zlib1g" }

func depends(ctx context.Context, names ...string) ([]string, error) {
	out, err := output(ctx, "", "apt-cache", append([]string{"depends", "--important"}, names...)...)
	if err != nil {
		return nil, err
	}
	return parseDepends(out), nil
}

// parseDepends returns the names in the indented lines of apt-cache's output: the dependencies,
// and the packages that provide a virtual one. Lines that are not indented are headings.
func parseDepends(out []byte) []string {
	var names []string
	for line := range strings.Lines(string(out)) {
		if line[0] != ' ' {
			continue
		}
		name := strings.TrimSpace(line)
		if _, after, ok := strings.Cut(name, "Depends: "); ok {
			name = after
		}
		name, _, _ = strings.Cut(name, ":") // an architecture, as in python3:any
		if !strings.HasPrefix(name, "<") && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// parseURIs reads lines of 'uri' file size SHA256:digest.
func parseURIs(out []byte) ([]deb, error) {
	var debs []deb
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 4 || !strings.HasPrefix(f[0], "'") {
			continue
		}
		digest, ok := strings.CutPrefix(f[3], "SHA256:")
		if !ok || f[1] != filepath.Base(f[1]) {
			return nil, fmt.Errorf("apt-get download --print-uris: unexpected %q", s.Text())
		}
		debs = append(debs, deb{file: f[1], sha256: digest})
	}
	if len(debs) == 0 {
		return nil, errors.New("apt-get download --print-uris named no package")
	}
	return debs, nil
}

// key names a set of packages: it changes with any version.
func key(debs []deb) string {
	h := sha256.New()
	for _, d := range debs {
		fmt.Fprintln(h, d.file, d.sha256)
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// verify reports whether dir has the package with the right digest.
func (d deb) verify(dir string) bool {
	f, err := os.Open(filepath.Join(dir, d.file))
	if err != nil {
		return false
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return false
	}
	return hex.EncodeToString(h.Sum(nil)) == d.sha256
}

// download fetches the packages that dir does not have yet. apt checks them against its signed
// index; download checks the packages that were there against the same digests.
func download(ctx context.Context, dir string, debs []deb) error {
	var missing []string
	for _, d := range debs {
		if !d.verify(dir) {
			os.Remove(filepath.Join(dir, d.file))
			missing = append(missing, packageOf(d.file))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if _, err := output(ctx, dir, "apt-get", append([]string{"download"}, missing...)...); err != nil {
		return err
	}
	for _, d := range debs {
		if !d.verify(dir) {
			return fmt.Errorf("%s: not as apt's index describes it", filepath.Join(dir, d.file))
		}
	}
	return nil
}

// packageOf turns name_version_arch.deb into name=version, so that apt fetches the resolved
// version.
func packageOf(file string) string {
	f := strings.SplitN(file, "_", 3)
	return f[0] + "=" + strings.ReplaceAll(f[1], "%3a", ":")
}

func unpack(ctx context.Context, debDir, root string, debs []deb) error {
	for _, d := range debs {
		if _, err := output(ctx, "", "dpkg-deb", "-x", filepath.Join(debDir, d.file), root); err != nil {
			return err
		}
	}
	return nil
}

// hostTools are the programs that the lab needs on this machine, and their packages.
var hostTools = [...]struct{ program, pkg string }{
	{"qemu-system-x86_64", "qemu-system-x86"},
	{"xz", "xz-utils"},
}

// installTools installs the missing host tools, if it may.
func installTools(ctx context.Context) error {
	for _, tool := range [...]string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("the images are made from Debian packages, and this machine has no %s", tool)
		}
	}
	var pkgs []string
	for _, t := range hostTools {
		if _, err := exec.LookPath(t.program); err != nil {
			pkgs = append(pkgs, t.pkg)
		}
	}
	if len(pkgs) == 0 {
		return nil
	}
	install := append([]string{"-o", "DPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends"}, pkgs...)
	if os.Geteuid() != 0 {
		return fmt.Errorf("missing on this machine: as root, run apt-get %s", strings.Join(install, " "))
	}
	if _, err := output(ctx, "", "apt-get", install...); err == nil {
		return nil
	}
	if err := updateIndex(ctx); err != nil {
		return err
	}
	_, err := output(ctx, "", "apt-get", install...)
	return err
}

// updateIndex updates apt's index, which may be missing or old.
func updateIndex(ctx context.Context) error {
	_, err := output(ctx, "", "apt-get", "-o", "DPkg::Lock::Timeout=300", "update")
	return err
}

// output runs a program and returns its standard output. The error holds the end of its
// standard error.
func output(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		said := bytes.TrimSpace(stderr.Bytes())
		return nil, fmt.Errorf("%s %s: %w: %s", name, args[0], err, said[max(0, len(said)-600):])
	}
	return out, nil
}
