package guestimage

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
	"syscall"
	"time"
)

// A Package is one package in the version that apt would fetch now.
type Package struct {
	File   string // name_version_architecture.deb
	SHA256 string
}

// CacheDir returns the folder of fetched kernels, in $BAREVIF_CACHE or in the user's cache folder.
func CacheDir() (string, error) {
	if dir := os.Getenv("BAREVIF_CACHE"); dir != "" {
		return filepath.Join(dir, "image"), nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "barevif", "image"), err
}

// Versioned returns the name of the package with a version in its name that a meta-package depends
// on, such as linux-image-6.1.0-9-amd64 for linux-image-amd64 with the prefix "linux-image-".
func Versioned(ctx context.Context, meta, prefix string) (string, error) {
	direct, err := Depends(ctx, meta)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(direct, func(n string) bool {
		return strings.HasPrefix(n, prefix) && len(n) > len(prefix) && n[len(prefix)] >= '0' && n[len(prefix)] <= '9'
	})
	if i < 0 {
		return "", fmt.Errorf("%s depends on no package %s*", meta, prefix)
	}
	return direct[i], nil
}

// Resolve asks apt which packages it would fetch now for these names.
func Resolve(ctx context.Context, names ...string) ([]Package, error) {
	out, err := Output(ctx, "", "apt-get", append([]string{"download", "--print-uris"}, names...)...)
	if err != nil {
		return nil, err
	}
	return parseURIs(out)
}

// Depends returns the names of the packages on which the named ones depend directly.
func Depends(ctx context.Context, names ...string) ([]string, error) {
	out, err := Output(ctx, "", "apt-cache", append([]string{"depends", "--important"}, names...)...)
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
func parseURIs(out []byte) ([]Package, error) {
	var packages []Package
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 4 || !strings.HasPrefix(f[0], "'") {
			continue
		}
		digest, ok := strings.CutPrefix(f[3], "SHA256:")
		if !ok || f[1] != filepath.Base(f[1]) {
			return nil, fmt.Errorf("apt-get download --print-uris: unexpected %q", s.Text())
		}
		packages = append(packages, Package{File: f[1], SHA256: digest})
	}
	if len(packages) == 0 {
		return nil, errors.New("apt-get download --print-uris named no package")
	}
	return packages, nil
}

// verify reports whether dir has the package with the right digest.
func (d Package) verify(dir string) bool {
	f, err := os.Open(filepath.Join(dir, d.File))
	if err != nil {
		return false
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return false
	}
	return hex.EncodeToString(h.Sum(nil)) == d.SHA256
}

// Download fetches the packages that dir does not have yet. apt checks them against its signed
// index; Download checks the packages that were there against the same digests.
func Download(ctx context.Context, dir string, packages []Package) error {
	var missing []string
	for _, d := range packages {
		if !d.verify(dir) {
			os.Remove(filepath.Join(dir, d.File))
			missing = append(missing, packageOf(d.File))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if _, err := Output(ctx, dir, "apt-get", append([]string{"download"}, missing...)...); err != nil {
		return err
	}
	for _, d := range packages {
		if !d.verify(dir) {
			return fmt.Errorf("%s: not as apt's index describes it", filepath.Join(dir, d.File))
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

// patience is how long a program that was interrupted may take to remove what it has made.
const patience = 10 * time.Second

// command is exec.CommandContext with an interrupt in place of a kill, after which apt would leave its temporary
// files behind, and for the programs that it has started, too.
func command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = patience
	return cmd
}

// Output runs a program and returns its standard output. The error holds the end of its
// standard error.
func Output(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := command(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s %s: %w", name, args[0], context.Cause(ctx))
	}
	if err != nil {
		said := bytes.TrimSpace(stderr.Bytes())
		return nil, fmt.Errorf("%s %s: %w: %s", name, args[0], err, said[max(0, len(said)-600):])
	}
	return out, nil
}
