//go:build linux

package userdir

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"barevif/hypercall/emu/emutest"
)

func TestANumberIsLookedUpInTheTable(t *testing.T) {
	const rootless = "         0       1001          1\n         1     100000      65536\n"
	for _, c := range []struct {
		ids       string
		uid, want int
	}{
		{"         0          0 4294967295\n", 0, 0},
		{"         0          0 4294967295\n", 1001, 1001},
		{"         0       1001          1\n", 0, 1001},
		{"         0       1001          1\n", 5, 5}, // nobody there
		{rootless, 0, 1001}, {rootless, 1, 100000}, {rootless, 65536, 165535}, {rootless, 65537, 65537},
		{"", 7, 7}, {"no table\n", 7, 7}, {"a b c\n7 8 1\n", 7, 8}, {"7 8 99999999999\n", 7, 7}, {"-1 8 9\n", 7, 7},
	} {
		if got := outside([]byte(c.ids), c.uid); got != c.want {
			t.Errorf("%q: %d is %d outside, want %d", c.ids, c.uid, got, c.want)
		}
	}
}

const inside = "BAREVIF_USERDIR_TEST_INSIDE"

// Root of a user namespace has the directory of the user that it is outside, and not root's.
func TestRootOfANamespaceHasItsUsersDirectory(t *testing.T) {
	if user := os.Getenv(inside); user != "" {
		want := filepath.Join(os.TempDir(), "barevif-"+user)
		if got := Temp(os.Geteuid()); os.Geteuid() != 0 || got != want {
			t.Errorf("as user %d: %s, want %s", os.Geteuid(), got, want)
		}
		former := filepath.Join(os.TempDir(), "barevif-0")
		if got := Former(0); got != "" {
			t.Errorf("a former one that is not there: %s", got)
		}
		if err := os.Mkdir(former, 0o700); errors.Is(err, fs.ErrPermission) {
			t.Skip("the directory for temporary files is not open to all: ", err)
		} else if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(former)
		if user == "0" {
			former = ""
		}
		if got := Former(0); got != former {
			t.Errorf("formerly %q, want %q", got, former)
		}
		return
	}
	tmp := emutest.SocketDir(t)
	if err := os.Chmod(tmp, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", tmp)
	me := os.Geteuid()
	user := Outside(me)
	if got, want := Temp(me), filepath.Join(os.TempDir(), "barevif-"+strconv.Itoa(user)); got != want {
		t.Errorf("outside: %s, want %s", got, want)
	}
	if got := Former(me); got != "" {
		t.Errorf("outside: formerly %s", got)
	}
	users := []int{me}
	if me == 0 {
		users = append(users, 65534) // whose number differs inside
	}
	for _, uid := range users {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"="+strconv.Itoa(uid))
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		}
		if me == 0 {
			cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 0, Gid: 0, NoSetGroups: true}
		}
		out, err := cmd.CombinedOutput()
		if err != nil && cmd.ProcessState == nil {
			t.Skip("this machine refuses a user namespace: ", err)
		}
		skipped := uid != me && strings.Contains(string(out), "--- SKIP: "+t.Name())
		if err != nil || !skipped && !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Errorf("user %d: %v\n%s", uid, err, out)
		}
	}
}
