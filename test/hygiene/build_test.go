package hygiene_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// runGo runs the go command at the root of the tree.
func runGo(t *testing.T, env []string, args ...string) (out string, err error) {
	t.Helper()
	bin, err := exec.LookPath("go")
	if err != nil {
		t.Skip("the go command is not installed: ", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), env...)
	var diagnostics strings.Builder
	cmd.Stderr = &diagnostics
	text, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, &diagnostics)
	}
	return string(text), err
}

// portablePackages returns the portable packages that exist, as patterns for the go command.
func portablePackages(t *testing.T) []string {
	t.Helper()
	dirs := map[string]bool{}
	for _, f := range tree(t) {
		if f.isGo() && !f.isTest() {
			dirs[f.dir()] = true
		}
	}
	var all []string
	for _, dir := range portable {
		if dirs[dir] {
			all = append(all, "./"+dir)
		}
	}
	if len(all) == 0 {
		t.Fatal("no portable package was found")
	}
	return all
}

// notPortable are the packages of list, one a line, that a portable package must
// not reach: device nodes, emulators, eBPF, whatever another module holds.
func notPortable(list string) (complaints []string) {
	for _, imported := range strings.Fields(list) {
		dir, ours := cutModule(imported)
		if !ours || !slices.Contains(portable[:], dir) {
			complaints = append(complaints, imported)
		}
	}
	return complaints
}

func TestPortablePackagesReachOnlyEachOther(t *testing.T) {
	for _, pkg := range portablePackages(t) {
		for _, goos := range []string{"linux", "freebsd"} {
			list, err := runGo(t, []string{"CGO_ENABLED=0", "GOOS=" + goos},
				"list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", pkg)
			if err != nil {
				t.Error(err)
				continue
			}
			if !strings.Contains(list, module+strings.TrimPrefix(pkg, ".")) {
				t.Errorf("%s is not among what it reaches: %q", pkg, list)
			}
			for _, s := range notPortable(list) {
				t.Errorf("%s reaches %s on %s", pkg, s, goos)
			}
		}
	}
}

func TestAnImportThatIsNotPortableIsFound(t *testing.T) {
	wantComplaints(t, notPortable("barevif/arena\nbarevif/hypercall/xendev\nbarevif/hypercall/emu\n"+
		"barevif/telemetry/bpf\ngithub.com/cilium/ebpf\nbarevif/pvnet\n"),
		"hypercall/xendev", "hypercall/emu", "telemetry/bpf", "cilium/ebpf")
}

func TestNothingLinkedUsesCgo(t *testing.T) {
	list, err := runGo(t, []string{"CGO_ENABLED=1"},
		"list", "-deps", "-test", "-f", "{{if .CgoFiles}}{{.Standard}} {{.ImportPath}}{{end}}", "./...")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(list, "true runtime/cgo\n") {
		t.Errorf("the standard library's own cgo was not found in %q", list)
	}
	for line := range strings.Lines(list) {
		if pkg, ok := strings.CutPrefix(line, "false "); ok {
			t.Errorf("%s uses cgo", strings.TrimSpace(pkg))
		}
	}
}

func TestPortablePackagesBuildElsewhere(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the standard library for other systems: not with -short")
	}
	pkgs := portablePackages(t)
	for _, target := range [][2]string{{"freebsd", "arm64"}, {"darwin", "arm64"}} {
		_, err := runGo(t, []string{"CGO_ENABLED=0", "GOOS=" + target[0], "GOARCH=" + target[1]},
			append([]string{"build"}, pkgs...)...)
		if err != nil {
			t.Errorf("%s/%s: %v", target[0], target[1], err)
		}
	}
}

// Everything that touches shared memory is built on arena/shm, which says by the name
// of what is missing where it does not work.
func TestMachinesThatDoNotWorkAreRefusedByName(t *testing.T) {
	for _, pkg := range []string{"./arena", "./hypercall/xendev", "./hypercall/emu", "./pvnet/netif", "./pvnet", "./tools/barevif"} {
		deps, err := runGo(t, []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=386"}, "list", "-e", "-deps", pkg)
		if err != nil || !slices.Contains(strings.Fields(deps), module+"/arena/shm") {
			t.Errorf("%s is not built on arena/shm: %v", pkg, err)
		}
	}
	if testing.Short() {
		t.Skip("builds the standard library for other machines: not with -short")
	}
	for _, goarch := range []string{"386", "arm", "s390x"} {
		_, err := runGo(t, []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + goarch}, "build", "./arena/shm")
		if err == nil || !strings.Contains(err.Error(), "barevif_needs_a_64_bit_little_endian_GOARCH") {
			t.Errorf("arena/shm on %s: %v", goarch, err)
		}
	}
}
