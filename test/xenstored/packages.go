//go:build linux

package xenstored

import (
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// packages are what xenstored 4.17 and its clients are made of in Debian 12. They
// have one source, so one version.
var packages = [...]string{
	daemonPackage, "xenstore-utils", "libxenstore4", "libxenevtchn1", "libxengnttab1",
	"libxentoollog1", "libxentoolcore1", "libxencall1", "libxenforeignmemory1",
	"libxendevicemodel1", "libxenmisc4.17",
}

const (
	daemonPackage = "xen-utils-4.17"

	// wantEnv says which version to take: oldest, newest or the version itself.
	// Without it the newest is taken.
	wantEnv = "BAREVIF_XENSTORED"

	// fresh is how long it is believed what an index of packages offered.
	fresh = 24 * time.Hour

	aptLimit = 4 * time.Minute
)

// A release is a version of the packages, unpacked. Nothing is installed.
type release struct{ root, version string }

// unpacked is the release that the tests of this process use. It is fetched once
// for all, into $BAREVIF_CACHE or barevif in the user's cache.
var unpacked = sync.OnceValues(func() (release, error) {
	cache := os.Getenv("BAREVIF_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return release{}, err
		}
		cache = filepath.Join(dir, "barevif")
	}
	return find(filepath.Join(cache, "xenstored-"+runtime.GOARCH), os.Getenv(wantEnv))
})

// find gives the release that want names, from the cache if it is there.
//
// The cache holds a directory for each version. The index of packages of a machine
// may be weeks old and name a version with defects that are mended since: find
// fetches one of its own, uses the machine's if it cannot, and without either what
// was cached earlier.
func find(cache, want string) (release, error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return release{}, err
	}
	unlock, err := lock(cache)
	if err != nil {
		return release{}, err
	}
	defer unlock()
	cached, err := list(cache)
	if err != nil {
		return release{}, err
	}
	at := func(version string) (release, error) { return release{filepath.Join(cache, version), version}, nil }

	note := filepath.Join(cache, "offered")
	if offered := recall(note); len(offered) > 0 || !relative(want) {
		if version := pick(want, offered, cached); slices.Contains(cached, version) {
			return at(version)
		}
	}
	version, err := fetch(cache, note, want, cached)
	if err == nil {
		return at(version)
	}
	if version := pick(want, nil, cached); slices.Contains(cached, version) {
		return at(version)
	}
	return release{}, err
}

// lock keeps other processes out until it is undone.
func lock(cache string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", cache, err)
		}
	}
}

// list gives the versions that the cache holds, oldest first.
func list(cache string) (versions []string, err error) {
	entries, err := os.ReadDir(cache)
	for _, e := range entries {
		if e.IsDir() && isVersion(e.Name()) {
			versions = append(versions, e.Name())
		}
	}
	slices.SortFunc(versions, compare)
	return versions, err
}

// isVersion says whether s may name a version and a directory of the cache.
func isVersion(s string) bool {
	return s != "" && s[0] >= '0' && s[0] <= '9' && !strings.Contains(s, "/")
}

// recall gives what was offered the last time, if that was lately.
func recall(note string) []string {
	info, err := os.Stat(note)
	if err != nil || time.Since(info.ModTime()) > fresh {
		return nil
	}
	text, err := os.ReadFile(note)
	if err != nil {
		return nil
	}
	return strings.Fields(string(text))
}

// relative says whether want depends on what is offered.
func relative(want string) bool { return want == "" || want == "oldest" || want == "newest" }

// pick chooses a version, or none if nothing is offered. The cached ones count
// where nothing is offered, and as offers of the newest: no mirror takes away what
// is mended.
func pick(want string, offered, cached []string) string {
	switch want {
	case "oldest":
		if len(offered) == 0 {
			offered = cached
		}
		if len(offered) == 0 {
			return ""
		}
		return slices.MinFunc(offered, compare)
	case "", "newest":
		if all := slices.Concat(offered, cached); len(all) > 0 {
			return slices.MaxFunc(all, compare)
		}
		return ""
	}
	return want
}

// fetch finds out which versions are offered, and unpacks the one that want names
// into the cache.
func fetch(cache, note, want string, cached []string) (version string, err error) {
	for _, tool := range []string{"apt-get", "apt-cache", "dpkg"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", err
		}
	}
	tmp, err := os.MkdirTemp(cache, "fetch")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	a := apt{dir: tmp}
	updated := a.update()
	offered, err := a.offered()
	if err != nil {
		return "", errors.Join(updated, err)
	}
	if updated == nil {
		if err := os.WriteFile(note, []byte(strings.Join(offered, "\n")+"\n"), 0o644); err != nil {
			return "", err
		}
	}
	version = pick(want, offered, cached)
	if slices.Contains(cached, version) {
		return version, nil
	}
	if !isVersion(version) || !slices.Contains(offered, version) {
		return "", errors.Join(updated, fmt.Errorf("apt offers %s of %s, not %q", daemonPackage, strings.Join(offered, " and "), version))
	}
	files, err := a.unpack(version)
	if err != nil {
		return "", errors.Join(updated, err)
	}
	return version, os.Rename(files, filepath.Join(cache, version))
}

// An apt is apt-get and its relatives with an index of their own below dir, so that
// they need no root and change nothing of the machine.
type apt struct {
	dir     string
	options []string // none: the machine's index
}

func (a *apt) run(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), aptLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, append(slices.Clone(a.options), args...)...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, args[0], err, lastLine(out))
	}
	return string(out), nil
}

// update fetches the index. If that fails the machine's is used instead.
func (a *apt) update() error {
	lists, cache := filepath.Join(a.dir, "lists"), filepath.Join(a.dir, "cache")
	if err := errors.Join(os.MkdirAll(filepath.Join(lists, "partial"), 0o755), os.MkdirAll(filepath.Join(cache, "archives/partial"), 0o755)); err != nil {
		return err
	}
	a.options = []string{
		"-o", "Dir::State::Lists=" + lists, "-o", "Dir::Cache=" + cache,
		"-o", "Acquire::Languages=none", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30",
		"-o", "APT::Get::List-Cleanup=0", "-o", "APT::Update::Error-Mode=any",
	}
	if os.Geteuid() == 0 {
		a.options = append(a.options, "-o", "APT::Sandbox::User=root") // no other user can enter dir
	}
	_, err := a.run("apt-get", "update")
	if err == nil {
		return nil
	}
	// A source that has nothing to do with Debian may have failed.
	if versions, asked := a.offered(); asked == nil && len(versions) > 0 {
		return nil
	}
	a.options = nil
	return err
}

// offered gives the versions that the index names, oldest first.
func (a *apt) offered() ([]string, error) {
	out, err := a.run("apt-cache", "madison", daemonPackage)
	if err != nil {
		return nil, err
	}
	versions := madison(out)
	if len(versions) == 0 {
		return nil, fmt.Errorf("apt knows no package %s", daemonPackage)
	}
	return versions, nil
}

// madison gives the versions that "apt-cache madison" prints, oldest first.
func madison(out string) (versions []string) {
	for line := range strings.Lines(out) {
		if columns := strings.Split(line, "|"); len(columns) == 3 && isVersion(strings.TrimSpace(columns[1])) {
			versions = append(versions, strings.TrimSpace(columns[1]))
		}
	}
	slices.SortFunc(versions, compare)
	return slices.Compact(versions)
}

// unpack fetches a version and gives the directory its files are in.
func (a *apt) unpack(version string) (files string, err error) {
	args := []string{"download"}
	for _, name := range packages {
		args = append(args, name+"="+version)
	}
	if _, err := a.run("apt-get", args...); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(a.dir, "*.deb"))
	if err == nil && len(debs) != len(packages) {
		err = fmt.Errorf("apt-get download gave %d packages of %d", len(debs), len(packages))
	}
	if err != nil {
		return "", err
	}
	files = filepath.Join(a.dir, "root")
	for _, deb := range debs {
		if out, err := exec.Command("dpkg", "-x", deb, files).CombinedOutput(); err != nil {
			return "", fmt.Errorf("unpack %s: %w: %s", filepath.Base(deb), err, lastLine(out))
		}
	}
	return files, nil
}

// mends says whether the changelog of the release names an advisory as mended.
func (r release) mends(advisory string) (bool, error) {
	f, err := os.Open(filepath.Join(r.root, "usr/share/doc", daemonPackage, "changelog.Debian.gz"))
	if err != nil {
		return false, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return false, err
	}
	text, err := io.ReadAll(z)
	if err != nil {
		return false, err
	}
	return slices.Contains(strings.Fields(string(text)), advisory), nil
}

// compare orders versions as dpkg does (Debian Policy, 5.6.12).
func compare(a, b string) int {
	epoch := func(s string) (int, string) {
		if before, after, ok := strings.Cut(s, ":"); ok {
			n, _ := strconv.Atoi(before)
			return n, after
		}
		return 0, s
	}
	revision := func(s string) (string, string) {
		if i := strings.LastIndexByte(s, '-'); i >= 0 {
			return s[:i], s[i+1:]
		}
		return s, ""
	}
	ea, a := epoch(a)
	eb, b := epoch(b)
	ua, ra := revision(a)
	ub, rb := revision(b)
	return cmp.Or(cmp.Compare(ea, eb), compareParts(ua, ub), compareParts(ra, rb))
}

// compareParts compares texts and numbers in turns. In a text a tilde comes before
// the end, and letters before all other characters.
func compareParts(a, b string) int {
	digit := func(s string, i int) bool { return i < len(s) && s[i] >= '0' && s[i] <= '9' }
	rank := func(s string, i int) int {
		switch {
		case i >= len(s) || digit(s, i):
			return 0
		case s[i] == '~':
			return -1
		case s[i]|0x20 >= 'a' && s[i]|0x20 <= 'z':
			return int(s[i])
		}
		return int(s[i]) + 256
	}
	number := func(s string) (digits, rest string) {
		i := 0
		for digit(s, i) {
			i++
		}
		return strings.TrimLeft(s[:i], "0"), s[i:]
	}
	for a != "" || b != "" {
		i := 0
		for ; i < len(a) && !digit(a, i) || i < len(b) && !digit(b, i); i++ {
			if c := cmp.Compare(rank(a, i), rank(b, i)); c != 0 {
				return c
			}
		}
		var x, y string
		x, a = number(a[min(i, len(a)):])
		y, b = number(b[min(i, len(b)):])
		if c := cmp.Or(cmp.Compare(len(x), len(y)), cmp.Compare(x, y)); c != 0 {
			return c
		}
	}
	return 0
}
