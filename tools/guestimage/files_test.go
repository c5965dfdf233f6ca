//go:build linux

package guestimage

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"barevif/tools/guestimage/guestinit"
)

// writeFiles makes files in a new directory, which becomes the current one. A name that ends with "/" is a
// directory.
func writeFiles(t *testing.T, names ...string) {
	t.Helper()
	t.Chdir(t.TempDir())
	for _, name := range names {
		err := os.MkdirAll(filepath.Dir(name), 0o755)
		if err == nil && !strings.HasSuffix(name, "/") {
			err = os.WriteFile(name, []byte("of "+name), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// added returns the tree of an image to which the specs are added.
func added(specs ...string) (*Tree, error) {
	list, err := hostFiles(specs)
	if err != nil {
		return nil, err
	}
	cfg := &Config{}
	k := &Kernel{Release: "6.1.0-9"}
	m := &Modules{infos: map[string]moduleInfo{"tun": {object: []byte("module")}}}
	return cfg.tree(k, m, "out/web", "out/.init", list)
}

func TestFilesThatAreAdded(t *testing.T) {
	writeFiles(t, "router.conf", "www/index.html", "www/more/x", "www/none/", "etc/hosts", "out/web", "out/.init")
	if err := os.Chmod("www/more/x", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../router.conf", "www/link"); err != nil {
		t.Fatal(err)
	}
	tree, err := added("router.conf:/etc/router/../router/router.conf", "www:/srv/www", "etc:/etc", "www/none:/", "www/none:/run", "www/more:/srv/www/more2")
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := tree.Write(&archive); err != nil {
		t.Fatal(err)
	}
	got := readCPIO(t, archive.Bytes())
	for _, want := range []string{
		`etc/router/router.conf 100644 "of router.conf"`, `srv/www/index.html 100644 "of www/index.html"`, `srv/www/more/x 100744 "of www/more/x"`,
		`srv/www/more2/x 100744 "of www/more/x"`, `srv/www/none 40755 ""`, `srv/www/link 100644 "of router.conf"`, `etc/hosts 100644 "of etc/hosts"`,
		`app/web 100755 "of out/web"`, `init 100755 "of out/.init"`,
	} {
		if !slices.Contains(got, want) {
			t.Errorf("no %s in %q", want, got)
		}
	}
	if slices.ContainsFunc(got, func(line string) bool { return strings.HasPrefix(line, " ") }) {
		t.Errorf("an entry without a name: %q", got)
	}
	if _, err := added(); err != nil {
		t.Error(err)
	}
}

// Each file that would not be in the guest as it was asked for is refused, with the reason.
func TestFilesThatCannotBeAddedAreNamed(t *testing.T) {
	writeFiles(t, "a", "b", "dir/a", "out/web", "out/.init")
	if err := os.Symlink("dir", "link"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("huge", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate("huge", maxAdded); err != nil { // sparse
		t.Skip("no sparse files here: ", err)
	}
	for _, c := range []struct{ specs, cause, next string }{
		{"x", `--file "x": not HOST:GUEST`, "--file ./public:/srv/www"},
		{":/x", "not HOST:GUEST", "--file"},
		{"a:y", "not HOST:GUEST", "--file"},
		{"none:/x", `--file "none:/x": lstat none: no such file`, "this user can read"},
		{"/dev/null:/x", "/dev/null is no file", "this user can read"},
		{"link:/x", "link is a link to a directory", "this user can read"},
		{"dir:/x link:/y", `--file "link:/y": link is a link`, "this user can read"},
		{"huge:/x a:/y", `--file "a:/y": with a there are 1.0 GiB to add, and an image takes 1 GiB`, "leave out"},
		{"a:/", "/ is a directory", "HOST:/NAME"},
		{"a:/etc", "/etc cannot be put there: it is a directory of the image", "HOST:/etc/a"},
		{"a:/etc/../etc/", "/etc cannot be put there", "HOST:/etc/a"},
		{"a:/x b:/x", `--file "b:/x": /x cannot be put there: --file "a:/x" is there`, "leave one of them out"},
		{"a:/x a:/x", `/x cannot be put there: it is given twice`, "leave one of them out"},
		{"a:/srv/a dir:/srv", `--file "dir:/srv": /srv/a cannot be put there: --file "a:/srv/a" is there`, "choose another place"},
		{"a:/x b:/x/y", `/x/y cannot be below /x: --file "a:/x" is there`, "another place"},
		{"a:/x/y b:/x", `/x cannot be put there: it is a directory`, "HOST:/x/b"},
		{"dir:/x b:/x", `/x cannot be put there: --file "dir:/x" is there`, "another place"},
		{"a:/init", "/init cannot be put there: the image needs it for itself", "another place"},
		{"a:/sbin/poweroff", "the image needs it for itself", "another place"},
		{"dir:/sbin/reboot", "the image needs it for itself", "another place"},
		{"a:/app/web", "the image needs it for itself", "another place"},
		{"a:/app/web/a", "/app/web/a cannot be below /app/web: the image needs it", "another place"},
		{"a:" + guestinit.ImageFile, "the image needs it for itself", "another place"},
		{"a:" + guestinit.ModuleDir + "/tun.ko", "the image needs it for itself", "another place"},
		{"a:/run/a", "/run/a would not be seen: a file system is mounted on /run", "/etc or /srv"},
		{"dir:/tmp", "/tmp/a would not be seen", "/etc or /srv"},
		{"a:/sys", "/sys would not be seen", "/etc or /srv"},
		{"a:/srv/../dev/x/y", "/dev/x/y would not be seen", "/etc or /srv"},
		{"a:/" + strings.Repeat("x/", 2047) + "yz", "has 4097 bytes, and Linux leaves out what has more than 4095", "shorter"},
	} {
		_, err := added(strings.Fields(c.specs)...)
		requireAdvice(t, err, c.cause, c.next)
	}
	if os.Geteuid() != 0 {
		if err := os.Chmod("a", 0o200); err != nil {
			t.Fatal(err)
		}
		_, err := added("a:/x")
		requireAdvice(t, err, "permission denied", "this user can read")
	}
	if _, err := added("huge:/x"); err != nil {
		t.Error(err)
	}
}

// A guest with too little memory for its files would not start.
func TestMemoryForTheFiles(t *testing.T) {
	for _, c := range []struct {
		memory, want int
	}{{0, 336}, {200, 200}, {201, 201}, {199, 0}} {
		cfg := &Config{Out: "out", Domain: Domain{Memory: c.memory}}
		r := &Result{Unpacked: 100<<20 - 1}
		err := cfg.addConfigs(map[string][]byte{}, r, "web")
		if c.want == 0 {
			requireAdvice(t, err, "--memory 199: the initramfs has 100.0 MiB, for which the guest needs 200 MiB", "which gives the guest 336")
		} else if err != nil || r.Memory != c.want {
			t.Errorf("--memory %d: %d MiB, %v", c.memory, r.Memory, err)
		}
	}
}
