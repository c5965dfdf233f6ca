package main

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"barevif/hypercall/emu/emutest"
	"barevif/xenbus/toolstack"
)

func TestVifsAreReadStrictly(t *testing.T) {
	for s, want := range map[string]toolstack.Vif{
		"front=1": {Front: 1, Back: 2, MAC: [6]byte{0, 0x16, 0x3e, 0, 1, 0}},
		"front=300,back=7,id=65535,mtu=9000,type=barevif": {
			Front: 300, Back: 7, ID: 65535, MTU: 9000, Type: "barevif", MAC: [6]byte{0, 0x16, 0x3e, 1, 44, 255},
		},
		"mac=02:00:00:00:00:01,front=1": {Front: 1, Back: 2, MAC: [6]byte{2, 0, 0, 0, 0, 1}},
	} {
		if got, err := parseVif(s); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
	for s, says := range map[string]string{
		"":                              "KEY=VALUE",
		"1":                             "KEY=VALUE",
		"front":                         "KEY=VALUE",
		"front=1,front=3":               "each key once",
		"back=2":                        "front is missing",
		"front=2":                       "between two domains",
		"front=0":                       "valid front",
		"front=-1":                      "valid front",
		"front=32752":                   "valid front",
		"front=1,back=x":                "valid back",
		"front=1,id=65536":              "valid id",
		"front=1,id=../../0":            "valid id",
		"front=1,mac=1":                 "valid mac",
		"front=1,mac=01:00:00:00:00:00": "odd",
		"front=1,mtu=67":                "MTU",
		"front=1,mtu=65522":             "MTU",
		"front=1,mtu=x":                 "valid mtu",
		"front=1,type=":                 "backend type",
		"front=1,type=a/b":              "backend type",
		"front=1,colour=red":            "of the keys",
	} {
		_, err := parseVif(s)
		var a *advice
		if !errors.As(err, &a) || !a.usage || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want %q", s, err, says)
		}
	}
}

func TestASocketLeftBehindIsNoObstacle(t *testing.T) {
	dir := emutest.SocketDir(t)
	path := filepath.Join(dir, "host.sock")
	if err := freePath(path); err != nil {
		t.Error("nothing there: ", err)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	if err := freePath(path); err == nil || !strings.Contains(err.Error(), "listens") {
		t.Error("somebody listens: ", err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := freePath(path); err != nil {
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
	if err := freePath(path); err == nil || !strings.Contains(err.Error(), "another program") {
		t.Error("a stream socket: ", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := freePath(file); err == nil {
		t.Error("a file was taken for a socket")
	}
	if b, err := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file is gone: ", err)
	}
}

func TestSocketsAreInDirectoriesOfOurOwn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	for range 2 {
		if err := privateDir(dir); err != nil {
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
		if err := privateDir(bad); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
	if err := privateDir(filepath.Join(dir, "a", "b")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
