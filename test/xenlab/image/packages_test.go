//go:build linux

package image

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"barevif/tools/guestimage"
)

func TestProgramsComeWithTheirLibraries(t *testing.T) {
	shell, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no dynamically linked program to look at: ", err)
	}
	found := map[string]string{}
	if err := libraries("/", shell, found); err != nil {
		t.Fatal(err)
	}
	if found["libc.so.6"] == "" || found["ld-linux-x86-64.so.2"] == "" {
		t.Errorf("found %v", found)
	}
	if err := libraries(t.TempDir(), shell, map[string]string{}); err == nil || !strings.Contains(err.Error(), shell) {
		t.Errorf("no libraries: %v", err)
	}
}

func TestKeyChangesWithAnyPackage(t *testing.T) {
	packages := []guestimage.Package{{File: "a_1_all.deb", SHA256: "00"}, {File: "b_1_all.deb", SHA256: "11"}}
	other := slices.Clone(packages)
	other[1].SHA256 = "12"
	if key(packages) == key(other) {
		t.Error("another package, the same key")
	}
}
