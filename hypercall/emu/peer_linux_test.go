package emu_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
)

// stranger is a user other than the one who runs the test.
const stranger = 65534

// asStranger runs a child as another user.
func asStranger(t testing.TB) *syscall.SysProcAttr {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: stranger, Gid: stranger}}
}

// openDir makes a directory in which every user may make sockets.
func openDir(t testing.TB) string {
	t.Helper()
	dir := emutest.SocketDir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

// childPrivate makes a host and a private listener under one umask, and prints the modes
// of both sockets.
func childPrivate(dir, umask string) error {
	mask, err := strconv.ParseUint(umask, 8, 16)
	if err != nil {
		return err
	}
	unix.Umask(int(mask))
	host, other := filepath.Join(dir, "host"), filepath.Join(dir, "other")
	h, err := emu.Listen(host, emu.Config{})
	if err != nil {
		return err
	}
	l, err := emu.ListenPrivate("unix", other)
	if err != nil {
		return err
	}
	for _, path := range []string{host, other} {
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		fmt.Println(st.Mode().Perm())
	}
	return errors.Join(l.Close(), h.Close())
}

// childVisit joins the host at path, and returns the error if the host or Join refuses.
func childVisit(path string) error {
	d, err := emu.Join(context.Background(), path, 1)
	if err != nil {
		fmt.Println(err)
		return nil
	}
	d.Destroy() // first: whoever hears that it joined may want the domain's number
	fmt.Println("joined")
	return nil
}

// childKnock connects to the socket at path and returns the result of the first read.
func childKnock(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(soon))
	n, err := c.Read(make([]byte, 1))
	fmt.Println(n, err)
	return nil
}

func TestSocketsArePrivateWhateverTheUmask(t *testing.T) {
	for _, umask := range []string{"000", "022", "077"} {
		p := spawn(t, "private", emutest.SocketDir(t), umask)
		for range 2 {
			if mode := p.says(t); mode != "-rw-------" {
				t.Errorf("umask %s: a socket of mode %s", umask, mode)
			}
		}
		if err := p.Wait(); err != nil {
			t.Error(err)
		}
	}
	if _, err := emu.ListenPrivate("tcp", "127.0.0.1:0"); err == nil {
		t.Error("a private socket that every machine reaches")
	}
}

// The path of a socket does not tell who listens there.
func TestJoinAsksWhoTheHostIs(t *testing.T) {
	attr := asStranger(t)
	dir := openDir(t)
	path := filepath.Join(dir, "xen")
	spawnWith(t, attr, "host", path).says(t)
	link := filepath.Join(emutest.SocketDir(t), "xen")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	abstract := fmt.Sprintf("@barevif-test-%d", os.Getpid())
	spawnWith(t, attr, "host", abstract).says(t)
	for _, where := range []string{path, link, abstract} {
		_, err := emu.Join(t.Context(), where, 1)
		foreign, ok := errors.AsType[*emu.ForeignHostError](err)
		if !ok || foreign.UID != stranger || foreign.Path != where {
			t.Errorf("%s: %v", where, err)
		}
		if _, err := emu.Join(t.Context(), where, 1, stranger+1); !errors.As(err, &foreign) {
			t.Errorf("%s, though only another user was named: %v", where, err)
		}
		d, err := emu.Join(t.Context(), where, 1, 7, stranger)
		if err != nil {
			t.Errorf("%s, though its user was named: %v", where, err)
			continue
		}
		d.Destroy()
	}
}

// The check of credentials disconnects a user whom the socket's mode lets in.
func TestListenersAskWhoConnects(t *testing.T) {
	attr := asStranger(t)
	dir := openDir(t)
	path := filepath.Join(dir, "xen")
	h, err := emu.Listen(path, emu.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if says := spawnWith(t, attr, "visit", path).says(t); says == "joined" {
		t.Error("another user joined through a socket of mode 0600")
	}
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	if says := spawnWith(t, attr, "visit", path).says(t); says == "joined" {
		t.Error("another user joined through a socket of mode 0777")
	}
	if d, err := h.NewDomain(1); err != nil {
		t.Errorf("a stranger left something: %v", err)
	} else {
		d.Destroy()
	}
	if says := spawn(t, "visit", path).says(t); says != "joined" {
		t.Errorf("our own user: %s", says)
	}

	l, err := emu.ListenPrivate("unix", "@"+path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			select {
			case accepted <- c:
			case <-t.Context().Done():
				c.Close()
				return
			}
		}
	}()
	// The stranger's connection is first in the queue.
	if says := spawnWith(t, attr, "knock", "@"+path).says(t); says != "0 EOF" {
		t.Errorf("another user hears %s", says)
	}
	c, err := net.Dial("unix", "@"+path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got := <-accepted
	defer got.Close()
	if _, err := got.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(soon))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("the first connection accepted is not ours: %v", err)
	}
}

// A user namespace that maps nothing shows its own uid as the overflow uid, as it does
// every unknown user's.
func TestUserNamespacesDoNotMixUsersUp(t *testing.T) {
	probe := exec.Command("/proc/self/exe", "-test.list=^$")
	probe.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER}
	if err := probe.Run(); err != nil {
		t.Skip("needs user namespaces: ", err)
	}
	_, path := host(t, emu.Config{})
	visit := func(attr *syscall.SysProcAttr) string {
		t.Helper()
		attr.Cloneflags = unix.CLONE_NEWUSER
		return spawnWith(t, attr, "visit", path).says(t)
	}
	if says := visit(&syscall.SysProcAttr{UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}}); says != "joined" {
		t.Errorf("a namespace that maps the host's user: %s", says)
	}
	want := (&emu.ForeignHostError{Path: path, UID: -1}).Error()
	if says := visit(&syscall.SysProcAttr{}); says != want {
		t.Errorf("a namespace that maps no user: %s", says)
	}
	if d, err := emu.Join(t.Context(), path, hypercall.DomID(1)); err != nil {
		t.Error(err)
	} else {
		d.Destroy()
	}
}
