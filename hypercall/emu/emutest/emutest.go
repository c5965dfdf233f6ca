// Package emutest helps with tests that put an emulated machine behind a socket.
package emutest

import (
	"os"
	"testing"
)

// longest is how long a directory may be in which a test puts a socket. The path of
// one has at most 107 bytes (sun_path of unix(7)), and the names below it some.
const longest = 60

// SocketDir makes a directory whose path is short, whatever the test's name is and
// wherever TMPDIR points, and removes it when the test ends.
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
