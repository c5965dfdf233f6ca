package guestimage

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestPackagesAreReadFromApt(t *testing.T) {
	names := parseDepends([]byte("curl\n  PreDepends: dpkg\n |Depends: libc6\n  Depends: <python3:any>\n    python3\n  Depends: libcurl4:any\n  Depends: libc6\n"))
	if want := []string{"dpkg", "libc6", "python3", "libcurl4"}; !slices.Equal(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
	packages, err := parseURIs([]byte("noise\n'http://x/a_1%3a2-3_amd64.deb' a_1%3a2-3_amd64.deb 100 SHA256:00ff\n'http://x/b' b_1_all.deb 7 SHA256:11\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(packages) != 2 || packages[0] != (Package{"a_1%3a2-3_amd64.deb", "00ff"}) {
		t.Errorf("got %+v", packages)
	}
	if got := packageOf(packages[0].File); got != "a=1:2-3" {
		t.Errorf("packageOf: %q", got)
	}
	for _, bad := range [...]string{"", "'u' ../x_1_all.deb 1 SHA256:00", "'u' x_1_all.deb 1 MD5Sum:00"} {
		if _, err := parseURIs([]byte(bad)); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestAlteredPackageIsNotUsed(t *testing.T) {
	dir := t.TempDir()
	d := Package{File: "a_1_all.deb", SHA256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"} // of "hello"
	file := filepath.Join(dir, d.File)
	for content, want := range map[string]bool{"hello": true, "hellO": false, "": false} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := d.verify(dir); got != want {
			t.Errorf("%q: %v", content, got)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if d.verify(dir) {
		t.Error("a missing package verified")
	}
}
