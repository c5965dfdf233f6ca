package shm

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// No use of the package can tell a second load of a word from the first: both give a
// plausible value. So loads are counted, in a build with -tags shmdebug, which requires
// that all of them are in the one function it observes.

func TestTheDebugBuildPasses(t *testing.T) {
	if Debug {
		t.Log("this is it")
		return
	}
	golang, err := exec.LookPath("go")
	if err != nil {
		t.Skip("the go command is not installed: ", err)
	}
	cmd := exec.CommandContext(t.Context(), golang, "test", "-tags", "shmdebug", ".")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("go test -tags shmdebug: %v\n%s", err, out)
	}
}

func TestSharedMemoryIsLoadedInOneFunction(t *testing.T) {
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") || strings.HasPrefix(name, "debug_") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok {
				for range loads(fn) {
					found = append(found, fn.Name.Name)
				}
			}
		}
	}
	if len(found) != 1 || found[0] != "load" {
		t.Errorf("shared memory is loaded in %q, want one load in \"load\"", found)
	}
}

func TestLoadsAreFound(t *testing.T) {
	for body, want := range map[string]int{
		"w.Load()":                             1,
		"_ = atomic.LoadUint32(p)":             1,
		"v = *(*uint32)(p)":                    1,
		"f(*(*T)(p))":                          1,
		"v := *p":                              1,
		"*(*T)(p) = v":                         0,
		"*(*uint32)(q) = *(*uint32)(p)":        1,
		"w.CompareAndSwap(0, 1); w.Add(0)":     2,
		"w.Store(v); load(w); copy(dst, page)": 0,
	} {
		f, err := parser.ParseFile(token.NewFileSet(), "", "package shm; func f() { "+body+" }", 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := loads(f.Decls[0].(*ast.FuncDecl)); len(got) != want {
			t.Errorf("%s: %d loads, want %d", body, len(got), want)
		}
	}
}

// loads returns the expressions of fn that read memory through a pointer: calls of
// sync/atomic, and stars that are not assigned to.
func loads(fn *ast.FuncDecl) (found []ast.Node) {
	assigned := make(map[ast.Expr]bool)
	ast.Inspect(fn.Body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			for _, to := range n.Lhs {
				assigned[to] = true
			}
		case *ast.SelectorExpr:
			for _, name := range []string{"Load", "CompareAndSwap", "Swap", "Add"} {
				if pkg, ok := n.X.(*ast.Ident); strings.HasPrefix(n.Sel.Name, name) && !(ok && pkg.Name == "unsafe") {
					found = append(found, n)
				}
			}
		case *ast.ParenExpr:
			if _, conversion := n.X.(*ast.StarExpr); conversion {
				return false // (*uint32)(p): a type
			}
		case *ast.StarExpr:
			if !assigned[n] {
				found = append(found, n)
			}
		}
		return true
	})
	return found
}
