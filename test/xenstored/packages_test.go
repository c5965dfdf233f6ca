//go:build linux

package xenstored

import (
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestVersionsAreOrderedAsDpkgDoes(t *testing.T) {
	ordered := []string{
		"4.17~rc1-1", "4.17-1~deb12u1", "4.17-1", "4.17-1+deb12u1", "4.17.0-1",
		"4.17.5+23-ga4e5191dc0-1", "4.17.5+23-ga4e5191dc0-1+deb12u1", "4.17.5+72-g01140da4e8-1",
		"4.17.7-0+deb12u1", "4.17.7+13-g2445b30a44-0+deb12u1", "4.17.10-1", "4.20.0-1", "1:0.1-1",
	}
	for i, a := range ordered {
		for j, b := range ordered {
			if got, want := compare(a, b), min(max(i-j, -1), 1); got != want {
				t.Errorf("compare(%q, %q) = %d, want %d", a, b, got, want)
			}
		}
	}
	if compare("1.01-1", "1.1-1") != 0 {
		t.Error("leading zeros count")
	}
}

// A mirror is what fake apt programs know. They fail where the machine's own would.
type mirror struct {
	dir string // of the programs and what they read
}

func fakeMirror(t *testing.T) mirror {
	t.Helper()
	m := mirror{t.TempDir()}
	for name, text := range map[string]string{
		// Options come first. Only an index of one's own needs an update to be there.
		"apt-get": `lists= ; while [ "$1" = -o ]; do case $2 in Dir::State::Lists=*) lists=${2#*=};; esac; shift 2; done
			case $1 in
			update) echo update >>"$0.log"; [ -e "$0.online" ] || { echo "E: no network"; exit 100; }; cp "$0.served" "$lists/index";;
			download) echo "download $2" >>"$0.log"; [ -e "$0.online" ] || { echo "E: no network"; exit 100; }
				shift; for p; do : >"${p%%=*}_${p#*=}_all.deb"; done;;
			esac`,
		"apt-cache": `index='` + filepath.Join(m.dir, "machine") + `'; while [ "$1" = -o ]; do case $2 in Dir::State::Lists=*) index=${2#*=}/index;; esac; shift 2; done
			cat "$index" 2>/dev/null; true`,
		"dpkg": `mkdir -p "$3"; basename "$2" >>"$3/files"`,
	} {
		if err := os.WriteFile(filepath.Join(m.dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", m.dir+":"+os.Getenv("PATH"))
	return m
}

// set writes the index of the mirror ("apt-get.served") or of the machine.
func (m mirror) set(t *testing.T, index string, versions ...string) {
	t.Helper()
	var b strings.Builder
	for _, v := range versions {
		fmt.Fprintf(&b, "%s | %s | http://mirror.example bookworm/main amd64 Packages\n", daemonPackage, v)
	}
	if err := os.WriteFile(filepath.Join(m.dir, index), []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (m mirror) online(t *testing.T, yes bool) {
	t.Helper()
	path := filepath.Join(m.dir, "apt-get.online")
	if yes {
		m.set(t, "apt-get.online")
	} else if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

// asked gives what was asked of apt-get since the last time.
func (m mirror) asked(t *testing.T) (calls []string) {
	t.Helper()
	log := filepath.Join(m.dir, "apt-get.log")
	text, err := os.ReadFile(log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	os.Remove(log)
	return strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' })
}

const (
	stale = "4.17.5+72-g01140da4e8-1"
	newer = "4.17.7+13-g2445b30a44-0+deb12u1"
)

func finds(t *testing.T, cache, want, version string) {
	t.Helper()
	r, err := find(cache, want)
	if err != nil || r.version != version {
		t.Fatalf("find %q: %q, %v; want %s", want, r.version, err, version)
	}
	text, err := os.ReadFile(filepath.Join(r.root, "files"))
	if n := strings.Count(string(text), "_"+version+"_"); err != nil || n != len(packages) {
		t.Errorf("%d packages of version %s in %s, %v", n, version, r.root, err)
	}
}

// The machine's index is old: what it names is not taken while a mirror has better,
// and what was cached of it is not kept.
func TestStaleIndexDoesNotDecide(t *testing.T) {
	m, cache := fakeMirror(t), filepath.Join(t.TempDir(), "cache")
	m.set(t, "machine", stale)
	m.set(t, "apt-get.served", newer, stale)

	// Without a network there is nothing to be had.
	if r, err := find(cache, ""); err == nil || !strings.Contains(err.Error(), "no network") {
		t.Fatal(r, err)
	}
	m.online(t, true)
	finds(t, cache, "oldest", stale)
	m.asked(t)
	finds(t, cache, "", newer) // and not what the cache has already
	finds(t, cache, "oldest", stale)
	finds(t, cache, "newest", newer)
	finds(t, cache, stale, stale)
	if calls := m.asked(t); !slices.Equal(calls, []string{"update", "download " + daemonPackage + "=" + newer}) {
		t.Errorf("asked %q", calls)
	}
	left, err := filepath.Glob(filepath.Join(cache, "fetch*"))
	if err != nil || len(left) != 0 {
		t.Error(left, err)
	}
}

// A day later the mirror is asked again; if it cannot be reached the cache will do.
func TestCachedReleaseIsUsedWithoutANetwork(t *testing.T) {
	m, cache := fakeMirror(t), filepath.Join(t.TempDir(), "cache")
	m.set(t, "apt-get.served", stale)
	m.online(t, true)
	finds(t, cache, "", stale)
	m.set(t, "apt-get.served", newer, stale)
	finds(t, cache, "", stale) // the mirror was asked just now
	yesterday := time.Now().Add(-fresh - time.Hour)
	if err := os.Chtimes(filepath.Join(cache, "offered"), yesterday, yesterday); err != nil {
		t.Fatal(err)
	}
	m.online(t, false)
	finds(t, cache, "", stale)
	finds(t, cache, "oldest", stale)
	if _, err := find(cache, "4.16.0-1"); err == nil {
		t.Error("a version that is nowhere was found")
	}
	m.online(t, true)
	finds(t, cache, "", newer)
	if _, err := find(cache, "4.16.0-1"); err == nil || !strings.Contains(err.Error(), stale+" and "+newer) {
		t.Error("a version that is not offered:", err)
	}
}

// The machine's index will do if no newer one can be had but packages can.
func TestMachinesIndexIsTheSecondChoice(t *testing.T) {
	m, cache := fakeMirror(t), filepath.Join(t.TempDir(), "cache")
	m.set(t, "machine", stale)
	m.online(t, true) // but it serves no index
	finds(t, cache, "", stale)
	if _, err := os.Stat(filepath.Join(cache, "offered")); err == nil {
		t.Error("what an old index offered is believed for a day")
	}
}

func TestChangelogNamesWhatIsMended(t *testing.T) {
	r := release{root: t.TempDir()}
	dir := filepath.Join(r.root, "usr/share/doc", daemonPackage)
	if _, err := r.mends("CVE-1"); err == nil {
		t.Error("a release without a changelog mends something")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "changelog.Debian.gz"))
	if err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(f)
	fmt.Fprintln(z, "xen (4.17.7-0+deb12u1) bookworm-security\n    - Xenstored DoS\n      XSA-484 CVE-2026-23557")
	if err := errors.Join(z.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	for advisory, want := range map[string]bool{"CVE-2026-23557": true, "CVE-2026-2355": false, "XSA-484": true} {
		if got, err := r.mends(advisory); got != want || err != nil {
			t.Errorf("%s: %v, %v", advisory, got, err)
		}
	}
}
