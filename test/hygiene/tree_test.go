// Package hygiene_test holds the source tree to the project's own rules: which
// package imports which, where unsafe may be, what builds where, what no file
// says.
//
// Each rule is a function from files to complaints. Rules that read files are
// tried on sources that break them before they are trusted with the tree. The
// package has no code but tests.
package hygiene_test

import (
	"bytes"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

const (
	module = "barevif"
	root   = "../.."
)

// A file is one file of the tree. Its path is relative to the root, with slashes.
type file struct {
	path string
	text []byte
	pos  *token.FileSet // nil unless the file is Go
	ast  *ast.File
}

func (f file) dir() string  { return path.Dir(f.path) }
func (f file) isGo() bool   { return f.ast != nil }
func (f file) isTest() bool { return strings.HasSuffix(f.path, "_test.go") }

// at is where p is, for a complaint.
func (f file) at(p token.Pos) string {
	at := f.pos.Position(p)
	at.Filename = f.path
	return at.String()
}

// imports are the paths the file imports.
func (f file) imports() []string {
	var all []string
	for _, spec := range f.ast.Imports {
		all = append(all, strings.Trim(spec.Path.Value, "`\""))
	}
	return all
}

func newFile(name string, text []byte) (file, error) {
	f := file{path: name, text: text}
	if !strings.HasSuffix(name, ".go") {
		return f, nil
	}
	f.pos = token.NewFileSet()
	var err error
	f.ast, err = parser.ParseFile(f.pos, name, text, parser.ParseComments|parser.SkipObjectResolution)
	return f, err
}

// paths lists the tree without what git ignores. It walks, and asks git only what
// to leave out, because the go command sees a walk and runs the test again when a
// directory has changed.
func paths(t *testing.T) []string {
	t.Helper()
	ignored := map[string]bool{}
	if _, err := os.Stat(filepath.Join(root, ".git")); err == nil {
		git := exec.CommandContext(t.Context(), "git", "ls-files", "-z", "--others", "--ignored", "--exclude-standard")
		git.Dir = root
		if out, err := git.Output(); err == nil {
			for name := range strings.SplitSeq(string(out), "\x00") {
				ignored[name] = true
			}
		}
	}
	var all []string
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone while we walked
		}
		if err != nil {
			return err
		}
		if d.Name() == ".git" {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		rel, err := filepath.Rel(root, name)
		if rel = filepath.ToSlash(rel); err == nil && !d.IsDir() && !ignored[rel] {
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// tree is every text file of the project.
func tree(t *testing.T) []file {
	t.Helper()
	var files []file
	for _, name := range paths(t) {
		text, err := os.ReadFile(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone since, or a link to nowhere
		}
		if err != nil {
			t.Fatal(err)
		}
		if !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0 {
			continue
		}
		f, err := newFile(name, text)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	if !slices.ContainsFunc(files, func(f file) bool { return f.path == "go.mod" }) {
		t.Fatal("the tree was not found")
	}
	return files
}

// sources are files made up to break a rule: a name, its text, the next name.
func sources(t *testing.T, nameAndText ...string) []file {
	t.Helper()
	var files []file
	for i := 0; i < len(nameAndText); i += 2 {
		f, err := newFile(nameAndText[i], []byte(nameAndText[i+1]))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	return files
}

// reportComplaints fails the test with every complaint.
func reportComplaints(t *testing.T, complaints []string) {
	t.Helper()
	for _, c := range complaints {
		t.Error(c)
	}
}

// wantComplaints fails the test unless there is one complaint a part, in order,
// that holds it.
func wantComplaints(t *testing.T, complaints []string, parts ...string) {
	t.Helper()
	if len(complaints) != len(parts) {
		t.Errorf("%d complaints, want %d: %q", len(complaints), len(parts), complaints)
		return
	}
	for i, part := range parts {
		if !strings.Contains(complaints[i], part) {
			t.Errorf("complaint %q does not hold %q", complaints[i], part)
		}
	}
}
