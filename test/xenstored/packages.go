//go:build linux

package xenstored

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
)

// packages are what xenstored 4.17 and its clients are made of in Debian 12.
var packages = [...]string{
	"xen-utils-4.17", "xenstore-utils", "libxenstore4", "libxenevtchn1", "libxengnttab1",
	"libxentoollog1", "libxentoolcore1", "libxencall1", "libxenforeignmemory1",
	"libxendevicemodel1", "libxenmisc4.17",
}

// unpacked is where the packages are unpacked; nothing is installed. They are
// fetched once for all tests, into $BAREVIF_CACHE or barevif in the user's cache.
var unpacked = sync.OnceValues(func() (string, error) {
	cache := os.Getenv("BAREVIF_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(dir, "barevif")
	}
	root := filepath.Join(cache, "xenstore-4.17-"+runtime.GOARCH)
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	for _, tool := range []string{"apt-get", "dpkg"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", err
		}
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, "unpack")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	get := exec.Command("apt-get", append([]string{"download"}, packages[:]...)...)
	get.Dir = tmp
	if out, err := get.CombinedOutput(); err != nil {
		return "", fmt.Errorf("apt-get download %v: %w: %s", packages, err, lastLine(out))
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return "", err
	}
	files := filepath.Join(tmp, "root")
	for _, deb := range debs {
		if out, err := exec.Command("dpkg", "-x", deb, files).CombinedOutput(); err != nil {
			return "", fmt.Errorf("unpack %s: %w: %s", filepath.Base(deb), err, lastLine(out))
		}
	}
	// Another process may have been faster; what it has is as good.
	if err := os.Rename(files, root); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return root, nil
})
