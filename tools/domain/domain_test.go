package domain

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"barevif/hypercall/anyxen"
	"barevif/hypercall/emu"
	"barevif/tools/cli"
	"barevif/tools/cli/clitest"

	"github.com/spf13/cobra"
)

// joins runs a command that is a domain with the flags args, for a moment.
func joins(t *testing.T, args ...string) (code int, stderr string) {
	t.Helper()
	code, _, stderr = clitest.Build(func(*cli.Program) *cobra.Command {
		var f Flags
		cmd := &cobra.Command{Use: "join", RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := f.Open(cmd.Context())
			if err == nil {
				d.End()
			}
			return err
		}}
		f.Register(cmd, 1)
		return cmd
	}).Run(t, args...)
	return code, stderr
}

// listens makes another user listen at path, where a host would. told is set once a domain
// has sent a byte there.
func listens(t *testing.T, path string) (told *atomic.Bool) {
	t.Helper()
	told = new(atomic.Bool)
	var l *net.UnixListener
	clitest.AsStranger(t, func() (err error) {
		if err = os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		l, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
		return err
	})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			if n, _ := c.Read(make([]byte, 1)); n > 0 {
				told.Store(true)
			}
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	return told
}

func TestAPlaceThatAStrangerPreparedIsRefused(t *testing.T) {
	dir := clitest.TempDir(t)
	socket := anyxen.Socket(os.Geteuid())
	if !strings.HasPrefix(socket, dir) {
		t.Fatal(socket)
	}
	told := listens(t, socket)
	code, stderr := joins(t)
	if want := filepath.Dir(socket) + " belongs to user nobody (65534), not to you"; code != cli.ExitRefused ||
		!strings.Contains(stderr, want) || !strings.Contains(stderr, "next: remove it, or") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	// The host is refused, too, by whatever path.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(socket, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir + "/./" + strings.TrimPrefix(socket, dir), link} {
		code, stderr = joins(t, "--emu", path)
		if code != cli.ExitRefused || !strings.Contains(stderr, "belongs to user nobody (65534), not to you") || !strings.Contains(stderr, "--emu-user 65534") {
			t.Errorf("%s: exit %d, %s", path, code, stderr)
		}
	}
	if code, stderr = joins(t, "--emu", link, "--emu-user", "no such user"); code != cli.ExitUsage || !strings.Contains(stderr, "a user of this machine") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if told.Load() {
		t.Error("a domain told a clitest.Stranger's host who it is")
	}
	// With sudo, root does not trust its own place either, if a stranger made it.
	t.Setenv("SUDO_UID", "4321")
	if socket, owner := joinPlace(); owner != 4321 || socket != anyxen.Socket(4321) {
		t.Errorf("the place is %s of %d", socket, owner)
	}
}

// With sudo, both the place and its host must belong to the user who ran sudo.
func TestThePlaceOfSudoIsChecked(t *testing.T) {
	clitest.TempDir(t)
	listens(t, anyxen.Socket(4321))
	t.Setenv("SUDO_UID", "4321")
	place := filepath.Dir(anyxen.Socket(4321))
	code, stderr := joins(t)
	if code != cli.ExitRefused || !strings.Contains(stderr, place+" belongs to user nobody (65534), not to uid 4321") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if err := os.Chown(place, 4321, 4321); err != nil {
		t.Fatal(err)
	}
	code, stderr = joins(t)
	if code != cli.ExitRefused || !strings.Contains(stderr, "the host at "+anyxen.Socket(4321)+" belongs to user nobody") {
		t.Errorf("a host that is another user's than the place: exit %d, %s", code, stderr)
	}
	if err := os.Chmod(place, 0o755); err != nil {
		t.Fatal(err)
	}
	code, stderr = joins(t)
	if code != cli.ExitRefused || !strings.Contains(stderr, "open to others") {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

func TestAHostOfANamedUserIsJoined(t *testing.T) {
	clitest.TempDir(t)
	path := filepath.Join(os.TempDir(), "x", "host.sock")
	told := listens(t, path)
	f := Flags{Socket: path, User: "nobody", Dom: 1}
	_, err := f.Open(t.Context())
	var foreign *emu.ForeignHostError
	if err == nil || errors.As(err, &foreign) {
		t.Errorf("a clitest.Stranger that is named is refused, or is a host: %v", err)
	}
	t.Setenv("SUDO_UID", fmt.Sprint(clitest.Stranger))
	f.User = ""
	if _, err := f.Open(t.Context()); err == nil || errors.As(err, &foreign) || !told.Load() {
		t.Errorf("who became root is refused: %v", err)
	}
}

// Without --emu a host of a named user is looked for where one of that user listens, and that
// place is checked, too.
func TestANamedUsersHostIsFoundAtItsPlace(t *testing.T) {
	clitest.TempDir(t)
	place := filepath.Dir(anyxen.Socket(clitest.Stranger))
	told := listens(t, anyxen.Socket(clitest.Stranger))
	if err := os.Chmod(place, 0o755); err != nil {
		t.Fatal(err)
	}
	code, stderr := joins(t, "--emu-user", fmt.Sprint(clitest.Stranger))
	if code != cli.ExitRefused || !strings.Contains(stderr, place+" is open to others") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if told.Load() {
		t.Error("a domain told a host in an open place who it is")
	}
	if err := os.Chmod(place, 0o700); err != nil {
		t.Fatal(err)
	}
	if code, stderr = joins(t, "--emu-user", fmt.Sprint(clitest.Stranger)); !told.Load() {
		t.Errorf("the host of a user who is named is not asked: exit %d, %s", code, stderr)
	}
}

// freePath does not remove a live socket that this user may not use.
func TestASocketOfAnotherUserIsNotTaken(t *testing.T) {
	dir := clitest.TempDir(t)
	path := filepath.Join(dir, "root", "host.sock")
	if err := os.Mkdir(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	h, err := emu.Listen(path, emu.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	clitest.AsStranger(t, func() error {
		if err := FreePath(path); err == nil || !strings.Contains(err.Error(), "may not use") {
			return fmt.Errorf("freePath: %v", err)
		}
		return nil
	})
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}
