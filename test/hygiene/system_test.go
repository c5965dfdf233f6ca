package hygiene_test

import (
	"fmt"
	"go/ast"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"
)

// systemless packages are, beside the portable ones, those that a domain without an operating
// system is made of and tried with: the emulator as far as it runs in one process, and the
// suite. What they have for Linux is in files that other systems do not build.
var systemless = [...]string{"hypercall/internal/backoff", "hypercall/domaintest", "hypercall/emu", "telemetry/logtest"}

// namesOfSystem are the names, by file and import, that packages without an operating system
// take of packages that are one. All are values or types that a program compares or holds, and
// none calls anything: what waits and calls return here is what Go's own network and files
// return, so that errors.Is finds it, and a file passes between processes where there are
// processes.
var namesOfSystem = map[string]map[string][]string{
	"hypercall/system.go": {
		"net": {"ErrClosed"},
		"os":  {"ErrDeadlineExceeded", "File"},
	},
}

// unsafeWithoutSystem are the files that may import unsafe in these packages: the words of
// shared memory, and the asserts of netif.h's layout.
var unsafeWithoutSystem = [...]string{"arena/shm/slots.go", "arena/shm/word.go", "pvnet/netif/layout_unsafe.go"}

// ofSystem reports whether a package of the standard library is the operating system's: its
// files, calls, processes and network. net/netip is addresses as values.
func ofSystem(imported string) bool {
	first, _, _ := strings.Cut(imported, "/")
	switch imported {
	case "net/netip":
		return false
	case "C", "runtime/cgo", "log/syslog", "path/filepath":
		return true
	}
	return slices.Contains([]string{"os", "syscall", "net", "plugin"}, first)
}

// useOfSystem finds what files take of an operating system beyond namesOfSystem, of another
// module, or of unsafe. It adds what they take of namesOfSystem to used.
func useOfSystem(files []file, used map[string]bool) (complaints []string) {
	for _, f := range files {
		for _, spec := range f.ast.Imports {
			imported := strings.Trim(spec.Path.Value, "`\"")
			first, _, _ := strings.Cut(imported, "/")
			_, ours := cutModule(imported)
			switch {
			case imported == "unsafe":
				if !slices.Contains(unsafeWithoutSystem[:], f.path) {
					complaints = append(complaints, f.path+" imports unsafe")
				}
			case strings.Contains(first, "."):
				complaints = append(complaints, fmt.Sprintf("%s imports %s of another module", f.path, imported))
			case !ours && ofSystem(imported):
				complaints = append(complaints, namesTaken(f, spec, imported, used)...)
			}
		}
	}
	return complaints
}

// namesTaken finds the names that f takes of an import, other than those that it may.
func namesTaken(f file, spec *ast.ImportSpec, imported string, used map[string]bool) (complaints []string) {
	may := namesOfSystem[f.path][imported]
	local := path.Base(imported)
	if spec.Name != nil {
		local = spec.Name.Name
	}
	if may == nil || local == "." || local == "_" {
		return []string{fmt.Sprintf("%s imports %s", f.path, imported)}
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if id, ok := sel.X.(*ast.Ident); ok && id.Name == local {
			if used[f.path+" "+imported+"."+sel.Sel.Name] = true; !slices.Contains(may, sel.Sel.Name) {
				complaints = append(complaints, fmt.Sprintf("%s: takes %s.%s", f.at(sel.Pos()), imported, sel.Sel.Name))
			}
		}
		return true
	})
	return complaints
}

// filesWithoutSystem returns the files of the portable packages, whatever system they are for,
// and those of the systemless packages that are built where there is no system.
func filesWithoutSystem(t *testing.T) []file {
	t.Helper()
	args := []string{"list", "-f", `{{$p := .ImportPath}}{{range .GoFiles}}{{$p}}/{{.}}{{"\n"}}{{end}}`}
	for _, dir := range systemless {
		args = append(args, "./"+dir)
	}
	list, err := runGo(t, []string{"CGO_ENABLED=0", "GOOS=wasip1", "GOARCH=wasm"}, args...)
	if err != nil {
		t.Fatal(err)
	}
	built := map[string]bool{}
	for _, name := range strings.Fields(list) {
		built[strings.TrimPrefix(name, module+"/")] = true
	}
	var files []file
	for _, f := range tree(t) {
		if f.isGo() && !f.isTest() && (built[f.path] || slices.Contains(portable[:], f.dir())) {
			files = append(files, f)
			delete(built, f.path)
		}
	}
	if len(built) > 0 {
		t.Errorf("not found: %q", slices.Sorted(maps.Keys(built)))
	}
	for _, dir := range systemless {
		if !slices.ContainsFunc(files, func(f file) bool { return f.dir() == dir }) {
			t.Errorf("%s has no files", dir)
		}
	}
	return files
}

// A domain on a machine without an operating system needs one package, an implementation of
// hypercall.Domain: everything above it takes nothing of a system.
func TestPortablePackagesUseNoSystem(t *testing.T) {
	used := map[string]bool{}
	reportComplaints(t, useOfSystem(filesWithoutSystem(t), used))
	for name, imports := range namesOfSystem {
		for imported, names := range imports {
			for _, n := range names {
				if !used[name+" "+imported+"."+n] {
					t.Errorf("%s may take %s.%s and does not", name, imported, n)
				}
			}
		}
	}
}

func TestUseOfASystemIsFound(t *testing.T) {
	wantComplaints(t, useOfSystem(sources(t,
		"pvnet/a.go", `package pvnet; import ("net/netip"; "time"; "crypto/rand"; "barevif/arena")`,
		"pvnet/b.go", `package pvnet; import "net"; var x = net.ErrClosed`,
		"pvnet/c.go", `package pvnet; import "os/exec"`,
		"pvnet/d.go", `package pvnet; import _ "syscall"`,
		"pvnet/e.go", `package pvnet; import "golang.org/x/sys/unix"`,
		"pvnet/f.go", `package pvnet; import "unsafe"`,
		"pvnet/netif/layout_unsafe.go", `package netif; import "unsafe"`,
		"hypercall/system.go", `package hypercall; import ("net"; "os"); var a, b = net.ErrClosed, os.Getpid; type F = *os.File`,
		"hypercall/emu/g.go", `package emu; import "github.com/cilium/ebpf"`,
		"hypercall/emu/h.go", `package emu; import "net/http"`,
	), map[string]bool{}),
		"pvnet/b.go imports net", "pvnet/c.go imports os/exec", "pvnet/d.go imports syscall",
		"pvnet/e.go imports golang.org/x/sys/unix of another module", "pvnet/f.go imports unsafe",
		"hypercall/system.go:1:68: takes os.Getpid", "cilium/ebpf", "hypercall/emu/h.go imports net/http")
}

func TestARenamedImportOfTheSystemIsFound(t *testing.T) {
	for _, text := range []string{
		`package hypercall; import . "os"; var a = ErrDeadlineExceeded`,
		`package hypercall; import _ "os"`,
	} {
		wantComplaints(t, useOfSystem(sources(t, "hypercall/system.go", text), map[string]bool{}), "hypercall/system.go imports os")
	}
	wantComplaints(t, useOfSystem(sources(t, "hypercall/system.go",
		`package hypercall; import o "os"; var a = o.ErrDeadlineExceeded; var b = o.Exit`), map[string]bool{}), "takes os.Exit")
}

func TestPortablePackagesBuildWithoutSystem(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the standard library for other systems: not with -short")
	}
	pkgs := portablePackages(t)
	for _, dir := range systemless {
		pkgs = append(pkgs, "./"+dir)
	}
	for _, goos := range []string{"wasip1", "js"} {
		if _, err := runGo(t, []string{"CGO_ENABLED=0", "GOOS=" + goos, "GOARCH=wasm"}, append([]string{"build"}, pkgs...)...); err != nil {
			t.Errorf("%s/wasm: %v", goos, err)
		}
	}
}
