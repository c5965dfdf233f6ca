package guestimage

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
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

// A program that is ended in the middle of its work removes what it has made, and the error says that it
// was ended.
func TestAProgramIsInterruptedAndNotKilled(t *testing.T) {
	bin, work := t.TempDir(), t.TempDir()
	script := "#!/bin/sh\ntrap 'rm -r \"$W/made\"; exit 1' INT\nmkdir \"$W/made\"\nwhile :; do sleep 0.05; done\n"
	if err := os.WriteFile(filepath.Join(bin, "go"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("W", work)
	made := filepath.Join(work, "made")
	for name, run := range map[string]func(context.Context) error{
		"go":  func(ctx context.Context) error { _, err := runGo(ctx, work, nil, "build"); return err },
		"apt": func(ctx context.Context) error { _, err := Output(ctx, work, "go", "download"); return err },
	} {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- run(ctx) }()
		for _, err := os.Stat(made); err != nil; _, err = os.Stat(made) {
			select {
			case err := <-ended:
				t.Fatalf("%s has ended: %v", name, err)
			case <-time.After(time.Millisecond):
			}
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(made); err == nil {
			t.Errorf("%s leaves what it has made", name)
		}
	}
	// The go command leaves its files where GOTMPDIR says, which is removed.
	temp := t.TempDir()
	t.Setenv("GOTMPDIR", temp)
	script = "#!/bin/sh\nmkdir \"$GOTMPDIR/build\" && echo there\n"
	if err := os.WriteFile(filepath.Join(bin, "go"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := runGo(t.Context(), work, nil, "build"); out != "there\n" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
	if left, err := os.ReadDir(temp); len(left) > 0 || err != nil {
		t.Errorf("%v is left, %v", left, err)
	}
	if err := (Program{Package: "x"}).explain(canceled(t), context.Canceled); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "go build") {
		t.Errorf("%v", err)
	}
}

func canceled(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}
