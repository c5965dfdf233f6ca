// Package emutest helps tests that put an emulated machine behind a socket.
package emutest

import (
	"os"
	"testing"
)

// longest is the greatest length of a directory for sockets. The path of a socket has at
// most 107 bytes (sun_path of unix(7)), and the name in the directory takes some of them.
const longest = 60

// SocketDir makes a directory with a short path, whatever the name of the test and TMPDIR
// are, and removes it when the test ends.
func SocketDir(t testing.TB) string {
	t.Helper()
	parent := os.TempDir()
	if len(parent)+len("/bv0123456789") > longest {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "bv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
