package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"

	"golang.org/x/sys/unix"
)

// stranger is the number of a user other than the one that runs the tests.
const stranger = 65534

// asStranger runs do on a thread of another user. The thread ends with do.
func asStranger(t *testing.T, do func() error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocks: nothing else runs on this thread
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), stranger, ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		done <- do()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// temporary makes dir the directory for temporary files, which every user may write.
func temporary(t *testing.T) (dir string) {
	t.Helper()
	dir = emutest.SocketDir(t)
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", dir)
	t.Setenv("SUDO_UID", "")
	return dir
}

func joins(t *testing.T, args ...string) (code int, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), append([]string{"serve", "--addr", "10.9.0.2/24"}, args...), &out, &errs)
	return code, errs.String()
}

// listens makes another user listen at path, where a host would. told is set once a domain
// has sent a byte there.
func listens(t *testing.T, path string) (told *atomic.Bool) {
	t.Helper()
	told = new(atomic.Bool)
	var l *net.UnixListener
	asStranger(t, func() (err error) {
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
	dir := temporary(t)
	socket := hostSocket(fmt.Sprint(os.Geteuid()))
	if !strings.HasPrefix(socket, dir) {
		t.Fatal(socket)
	}
	told := listens(t, socket)
	code, stderr := joins(t)
	if want := filepath.Dir(socket) + " belongs to user nobody (65534), not to you"; code != exitRefused ||
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
		if code != exitRefused || !strings.Contains(stderr, "belongs to user nobody (65534), not to you") || !strings.Contains(stderr, "--emu-user 65534") {
			t.Errorf("%s: exit %d, %s", path, code, stderr)
		}
	}
	if code, stderr = joins(t, "--emu", link, "--emu-user", "no such user"); code != exitUsage || !strings.Contains(stderr, "a user of this machine") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if told.Load() {
		t.Error("a domain told a stranger's host who it is")
	}
	// With sudo, root does not trust its own place either, if a stranger made it.
	t.Setenv("SUDO_UID", "4321")
	if socket, owner := joinPlace(); owner != 4321 || socket != hostSocket("4321") {
		t.Errorf("the place is %s of %d", socket, owner)
	}
}

// With sudo, both the place and its host must belong to the user who ran sudo.
func TestThePlaceOfSudoIsChecked(t *testing.T) {
	temporary(t)
	listens(t, hostSocket("4321"))
	t.Setenv("SUDO_UID", "4321")
	place := filepath.Dir(hostSocket("4321"))
	code, stderr := joins(t)
	if code != exitRefused || !strings.Contains(stderr, place+" belongs to user nobody (65534), not to uid 4321") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if err := os.Chown(place, 4321, 4321); err != nil {
		t.Fatal(err)
	}
	code, stderr = joins(t)
	if code != exitRefused || !strings.Contains(stderr, "the host at "+hostSocket("4321")+" belongs to user nobody") {
		t.Errorf("a host that is another user's than the place: exit %d, %s", code, stderr)
	}
	if err := os.Chmod(place, 0o755); err != nil {
		t.Fatal(err)
	}
	code, stderr = joins(t)
	if code != exitRefused || !strings.Contains(stderr, "open to others") {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

func TestAHostOfANamedUserIsJoined(t *testing.T) {
	temporary(t)
	path := filepath.Join(os.TempDir(), "x", "host.sock")
	told := listens(t, path)
	f := domainFlags{socket: path, user: "nobody", dom: 1}
	_, err := f.open(t.Context())
	var foreign *emu.ForeignHostError
	if err == nil || errors.As(err, &foreign) {
		t.Errorf("a stranger that is named is refused, or is a host: %v", err)
	}
	t.Setenv("SUDO_UID", fmt.Sprint(stranger))
	f.user = ""
	if _, err := f.open(t.Context()); err == nil || errors.As(err, &foreign) || !told.Load() {
		t.Errorf("who became root is refused: %v", err)
	}
}

// freePath does not remove a live socket that this user may not use.
func TestASocketOfAnotherUserIsNotTaken(t *testing.T) {
	dir := temporary(t)
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
	asStranger(t, func() error {
		if err := freePath(path); err == nil || !strings.Contains(err.Error(), "may not use") {
			return fmt.Errorf("freePath: %v", err)
		}
		return nil
	})
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

// A client at the xenstore's socket is domain 0. So only this user may use the socket,
// whatever the umask is.
func TestHostsSocketsArePrivate(t *testing.T) {
	for _, mask := range []int{0, 0o077} {
		dir := temporary(t)
		old := unix.Umask(mask)
		ctx, cancel := context.WithCancel(t.Context())
		r, w := io.Pipe()
		ended := make(chan int, 1)
		go func() {
			ended <- run(ctx, []string{"host"}, w, io.Discard)
			w.Close()
		}()
		for lines := bufio.NewScanner(r); lines.Scan() && !strings.HasPrefix(lines.Text(), "look inside"); {
		}
		unix.Umask(old)
		go io.Copy(io.Discard, r)
		place := filepath.Join(dir, fmt.Sprintf("barevif-%d", os.Geteuid()))
		for _, name := range []string{"host.sock", "xenstored.sock"} {
			if st, err := os.Lstat(filepath.Join(place, name)); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("umask %#o: %s: %v, %v", mask, name, st, err)
			}
		}
		c, err := net.Dial("unix", filepath.Join(place, "xenstored.sock"))
		if err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		cancel()
		if code := <-ended; code != exitOK {
			t.Errorf("exit %d", code)
		}
		if err := os.RemoveAll(place); err != nil {
			t.Error(err)
		}
	}
}
