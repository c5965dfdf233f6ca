//go:build linux

package xenstored

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// Tool is one of Debian's clients, "xenstore-ls" for instance, for the xenstore
// that listens at socket. It skips the test if there is none, and says why.
func Tool(t testing.TB, socket, name string, args ...string) *exec.Cmd {
	t.Helper()
	r, err := unpacked()
	if err != nil {
		t.Skip("no xenstore clients of Debian: ", err)
	}
	libs, err := filepath.Glob(filepath.Join(r.root, "usr/lib/*-linux-gnu"))
	if err != nil || len(libs) != 1 {
		t.Fatalf("libraries of %s: %v, %v", name, libs, err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(r.root, "usr/bin", name), args...)
	cmd.Env = []string{"LD_LIBRARY_PATH=" + libs[0], "XENSTORED_PATH=" + socket}
	return cmd
}
