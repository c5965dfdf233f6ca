//go:build linux

package inspect

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/hypercall/emu/emutest"
	"barevif/hypercall/userdir"
)

// squatted makes paths of another user, one of each kind that this user could make under the name
// of our directory before we do.
func squatted(t *testing.T) (paths []string) {
	t.Helper()
	if os.Geteuid() != 0 {
		return []string{"/usr"} // root's
	}
	const stranger = 65534
	dir := emutest.SocketDir(t)
	for kind, make := range map[string]func(string) error{
		"directory": func(p string) error { return os.Mkdir(p, 0o700) },
		"open":      func(p string) error { return errors.Join(os.Mkdir(p, 0o700), os.Chmod(p, 0o777)) },
		"file":      func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"link":      func(p string) error { return os.Symlink(t.TempDir(), p) },
		"fifo":      func(p string) error { return unix.Mkfifo(p, 0o600) },
	} {
		path := filepath.Join(dir, kind)
		if err := errors.Join(make(path), os.Lchown(path, stranger, stranger)); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}

// If another user has taken the directory in /tmp, List returns no error while our processes have
// another directory for their sockets. Without another, the error names the path and its consequence.
func TestASquattedPlaceMattersOnlyToWhoHasNoOther(t *testing.T) {
	me := os.Geteuid()
	parent := emutest.SocketDir(t)
	ours := filepath.Join(parent, "barevif")
	for _, strange := range squatted(t) {
		look := func(dirs ...string) (asked []string, err error) {
			err = eachOf(dirs, me, func(path string, _ int) error { asked = append(asked, path); return nil })
			return asked, err
		}
		if asked, err := look(ours, strange); err != nil || asked != nil {
			t.Errorf("%s, and a place that can be made: %v, %v", strange, asked, err)
		}
		if _, err := look(strange); err == nil || !strings.HasPrefix(err.Error(), strange+" is another user's") {
			t.Errorf("%s, which was named: %v", strange, err)
		}
		_, err := look("/proc/barevif", strange)
		if err == nil || !strings.Contains(err.Error(), strange+" is another user's") || !strings.Contains(err.Error(), "have no place to be looked into") {
			t.Errorf("%s, and no other place: %v", strange, err)
		}
		if dir, err := place([]string{strange}); err == nil || !errors.Is(err, errStranger) {
			t.Errorf("%s is our place: %s, %v", strange, dir, err)
		}
		if dir, err := place([]string{strange, ours}); err != nil || dir != ours {
			t.Errorf("%s, and then a place of ours: %s, %v", strange, dir, err)
		}
		s, err := Listen(Config{Dir: ours})
		if err != nil {
			t.Fatal(err)
		}
		for _, dirs := range [][]string{{ours, strange}, {strange, ours}} {
			if asked, err := look(dirs...); err != nil || len(asked) != 1 || asked[0] != s.Path() {
				t.Errorf("%q: %v, %v", dirs, asked, err)
			}
		}
		s.Close()
		if err := os.Remove(ours); err != nil {
			t.Fatal(err)
		}
	}
}

// A directory of ours that is open to others is one all the same, and not to be trusted.
func TestAnOpenPlaceIsAlwaysSaid(t *testing.T) {
	parent := emutest.SocketDir(t)
	open, ours := filepath.Join(parent, "open"), filepath.Join(parent, "ours")
	if err := errors.Join(os.Mkdir(ours, 0o700), os.Mkdir(open, 0o700), os.Chmod(open, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := eachOf([]string{ours, open}, os.Geteuid(), nil); err == nil || !strings.Contains(err.Error(), "open to others") {
		t.Error(err)
	}
}

func TestAPlaceThatIsTooLongIsNamed(t *testing.T) {
	long := filepath.Join(emutest.SocketDir(t), strings.Repeat("long", 20))
	_, err := Listen(Config{Dir: long})
	if err == nil || !strings.Contains(err.Error(), long+" is too long for a directory of sockets") {
		t.Error(err)
	}
	if _, err := os.Lstat(long); err == nil {
		t.Error("it was made")
	}
	// The longest that will do does.
	fits := filepath.Join(emutest.SocketDir(t), "x")
	fits += strings.Repeat("x", 107-len("/inspect-4194304-123456.sock")-len(fits))
	s, err := Listen(Config{Dir: fits})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := Listen(Config{Dir: fits + "x"}); err == nil {
		t.Error("a byte more will do")
	}
}

// Processes are looked for where they are, which in a user namespace is not where root's are.
func TestTheDirectoriesOfAUser(t *testing.T) {
	if _, err := os.Stat("/proc/self/uid_map"); err != nil {
		t.Skip("no table of user namespaces: ", err)
	}
	for _, uid := range []int{0, 1234, os.Geteuid()} {
		dirs := Dirs(uid)
		if dirs[0] == "/run/barevif" != (uid == 0) {
			t.Errorf("%d: %q", uid, dirs)
		}
		n := userdir.Outside(uid)
		if run := "/run/user/" + strconv.Itoa(n) + "/barevif"; n != 0 && dirs[len(places(uid))-2] != run {
			t.Errorf("%d has no %s: %q", uid, run, dirs)
		}
		if last := places(uid); last[len(last)-1] != userdir.Temp(uid) {
			t.Errorf("%d: %q", uid, last)
		}
	}
}
