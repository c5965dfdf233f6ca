package domain

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"barevif/hypercall/emu/emutest"
)

func TestASocketLeftBehindIsNoObstacle(t *testing.T) {
	dir := emutest.SocketDir(t)
	path := filepath.Join(dir, "host.sock")
	if err := FreePath(path); err != nil {
		t.Error("nothing there: ", err)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	if err := FreePath(path); err == nil || !strings.Contains(err.Error(), "listens") {
		t.Error("somebody listens: ", err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := FreePath(path); err != nil {
		t.Error("left behind: ", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("it is still there")
	}
	s, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := FreePath(path); err == nil || !strings.Contains(err.Error(), "another program") {
		t.Error("a stream socket: ", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := FreePath(file); err == nil {
		t.Error("a file was taken for a socket")
	}
	if b, err := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file is gone: ", err)
	}
}

func TestSocketsAreInDirectoriesOfOurOwn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	for range 2 {
		if err := PrivateDir(dir); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Error(st.Mode(), err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	link := dir + "-link"
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{dir, link} {
		if err := PrivateDir(bad); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
	if err := PrivateDir(filepath.Join(dir, "a", "b")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
