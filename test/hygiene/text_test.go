package hygiene_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// forbiddenWords is what no file says: work left undone, and paths of one machine. The
// words are taken apart here so that this file does not say them either.
var forbiddenWords = regexp.MustCompile(`\b(?:TO` + `DO|FIX` + `ME)\b|(?:^|[^\w.])/(?:wo` + `rk|ro` + `ot|home/\w+|Users/\w+)/`)

func badWords(files []file) (complaints []string) {
	for _, f := range files {
		for i, line := range bytes.Split(f.text, []byte("\n")) {
			if word := forbiddenWords.Find(line); word != nil {
				complaints = append(complaints, fmt.Sprintf("%s:%d says %q", f.path, i+1, word))
			}
		}
	}
	return complaints
}

func TestNoFileIsUnfinishedOrTiedToAMachine(t *testing.T) {
	reportComplaints(t, badWords(tree(t)))
}

func TestForbiddenWordsAreFound(t *testing.T) {
	wantComplaints(t, badWords(sources(t,
		"a.go", "package a // TO"+"DO: more\n",
		"b.sh", "x=1 # FIX"+"ME\n",
		"c.md", "fine\nsee /ro"+"ot/notes\n",
		"d.txt", "cd /ho"+"me/ann/src\n",
		"e.txt", `open("/wo`+`rk/x")`,
		"f.txt", "autodo MASTO"+"DON a/ro"+"ot/b /ro"+"ot /home/ https://example.org/wo"+"rk/x\n",
	)),
		"a.go:1", "b.sh:1", "c.md:2", "d.txt:1", "e.txt:1")
}

func noPackageComment(files []file) (complaints []string) {
	type state struct{ code, said bool } // code: has files that are not tests
	dirs := map[string]state{}
	for _, f := range files {
		if !f.isGo() || inTestdata(f.path) {
			continue
		}
		s := dirs[f.dir()]
		if !f.isTest() && !s.code {
			s = state{code: true} // a comment in a test does not speak for the package
		}
		if f.isTest() != s.code {
			s.said = s.said || hasPackageComment(f.ast)
		}
		dirs[f.dir()] = s
	}
	for _, dir := range slices.Sorted(maps.Keys(dirs)) {
		if !dirs[dir].said {
			complaints = append(complaints, dir+" has no package comment")
		}
	}
	return complaints
}

// hasPackageComment reports whether the file has a package comment in godoc's form. A
// command's names the command, so its form is free.
func hasPackageComment(f *ast.File) bool {
	if f.Doc == nil {
		return false
	}
	return f.Name.Name == "main" && f.Doc.Text() != "" ||
		strings.HasPrefix(f.Doc.Text(), "Package "+f.Name.Name+" ")
}

func TestEveryPackageHasAComment(t *testing.T) {
	reportComplaints(t, noPackageComment(tree(t)))
}

func TestAMissingPackageCommentIsFound(t *testing.T) {
	wantComplaints(t, noPackageComment(sources(t,
		"a/a.go", "// Package a is.\npackage a",
		"a/b.go", "package a",
		"b/a_test.go", "// Package b is.\npackage b",
		"b/b.go", "package b",
		"c/c.go", "// Package c is detached.\n\npackage c",
		"d/d.go", "// Pack d.\npackage d",
		"e/e_test.go", "// Package e_test is.\npackage e_test",
		"f/main.go", "// Command f does.\npackage main",
		"g/main.go", "package main",
		"h/testdata/h.go", "package h",
	)),
		"b has", "c has", "d has", "g has")
}

// unconditionalSkips finds calls of Skip, Skipf and SkipNow that no condition known
// at run time guards.
func unconditionalSkips(files []file) (complaints []string) {
	for _, f := range files {
		if !f.isGo() {
			continue
		}
		for _, decl := range f.ast.Decls {
			var above []ast.Node
			ast.Inspect(decl, func(n ast.Node) bool {
				if n == nil {
					above = above[:len(above)-1]
					return true
				}
				above = append(above, n)
				if call, ok := n.(*ast.CallExpr); ok && isSkip(call, above) && !underCondition(above) {
					complaints = append(complaints, f.at(call.Pos())+": skips whatever the machine")
				}
				return true
			})
		}
	}
	return complaints
}

// isSkip reports whether call is of a Skip method of a *testing.T or the like,
// going by the parameters of the functions around it.
func isSkip(call *ast.CallExpr, above []ast.Node) bool {
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || !slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, method.Sel.Name) {
		return false
	}
	on, ok := method.X.(*ast.Ident)
	if !ok {
		return false
	}
	for _, n := range slices.Backward(above) {
		var params *ast.FieldList
		switch n := n.(type) {
		case *ast.FuncDecl:
			params = n.Type.Params
		case *ast.FuncLit:
			params = n.Type.Params
		default:
			continue
		}
		for _, p := range params.List {
			for _, name := range p.Names {
				if name.Name == on.Name {
					return ofTesting(p.Type)
				}
			}
		}
	}
	return false
}

func ofTesting(e ast.Expr) bool {
	if star, ok := e.(*ast.StarExpr); ok {
		e = star.X
	}
	sel, ok := e.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	pkg, ok := sel.X.(*ast.Ident)
	return ok && pkg.Name == "testing"
}

// underCondition reports whether a branch around the innermost node depends on more
// than literals.
func underCondition(above []ast.Node) bool {
	for i, n := range above[:len(above)-1] {
		switch n := n.(type) {
		case *ast.IfStmt:
			if next := above[i+1]; (next == n.Body || next == n.Else) && !literal(n.Cond) {
				return true
			}
		case *ast.CaseClause:
			if !slices.ContainsFunc(n.List, literalTrue) {
				return true
			}
		case *ast.CommClause:
			return true
		}
	}
	return false
}

// literal reports whether e names nothing but true and false.
func literal(e ast.Expr) bool {
	only := true
	ast.Inspect(e, func(n ast.Node) bool {
		if id, ok := n.(*ast.Ident); ok && id.Name != "true" && id.Name != "false" {
			only = false
		}
		return only
	})
	return only
}

func literalTrue(e ast.Expr) bool {
	id, ok := e.(*ast.Ident)
	return ok && id.Name == "true"
}

func TestEverySkipHasACause(t *testing.T) {
	reportComplaints(t, unconditionalSkips(tree(t)))
}

func TestASkipWithoutACauseIsFound(t *testing.T) {
	const head = "package a\nimport \"testing\"\n"
	wantComplaints(t, unconditionalSkips(sources(t,
		"a_test.go", head+`func TestA(t *testing.T) { t.Skip("later") }`,
		"b_test.go", head+`func TestB(t *testing.T) { if true { t.SkipNow() } }`,
		"c_test.go", head+`func BenchmarkC(b *testing.B) { if 1 < 2 || !false { b.Skipf("x") } }`,
		"d_test.go", head+`func need(tb testing.TB) { for { tb.Skip() } }`,
		"e_test.go", head+`func TestE(t *testing.T) { t.Run("", func(q *testing.T) { q.Skip("") }) }`,
		"f_test.go", head+`func TestF(t *testing.T) { switch { case true: t.Skip() } }`,
		"g_test.go", head+`func TestG(t *testing.T) { if t.Skip(); here() { } }`,
		"h_test.go", head+`func TestH(t *testing.T) { if !here() { t.Skip("no x") } }
			func TestI(t *testing.T) { switch err := try(); err { case nil: default: t.Skip(err) } }
			func TestJ(t *testing.T) { if here() { return } else { t.Skip() } }
			func TestK(t *testing.T) { s.Skip(1) }
			func TestL(t *testing.T) { if n == 0 { t.Run("", func(t *testing.T) { t.Skip("") }) } }
			func TestM(t scanner) { t.Skip() }`,
	)),
		"a_test.go:3", "b_test.go:3", "c_test.go:3", "d_test.go:3", "e_test.go:3", "f_test.go:3", "g_test.go:3")
}

// topLevel is what the root of the tree holds besides files whose name begins with a
// dot.
var topLevel = [...]string{
	"go.mod", "go.sum", "LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md",
	"arena", "pvnet", "xenbus", "hypercall", "telemetry", "tools", "test",
}

func badTopLevel(names []string) (complaints []string) {
	seen := map[string]bool{}
	for _, name := range names {
		first, _, _ := strings.Cut(path.Clean(name), "/")
		if !strings.HasPrefix(first, ".") && !slices.Contains(topLevel[:], first) && !seen[first] {
			complaints = append(complaints, first+" does not belong at the top")
		}
		seen[first] = true
	}
	return complaints
}

func TestTopLevelHoldsWhatItShould(t *testing.T) {
	reportComplaints(t, badTopLevel(paths(t)))
}

func TestAStrayTopLevelEntryIsFound(t *testing.T) {
	wantComplaints(t, badTopLevel([]string{
		"go.mod", ".ci/check", ".gitignore", "arena/shm/a.go", "testing/a.go", "Makefile", "testing/b.go",
	}), "testing", "Makefile")
}
