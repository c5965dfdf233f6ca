//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// writeTree writes files to a new directory and returns it.
func writeTree(t *testing.T, files map[string]string) (root string) {
	t.Helper()
	root = t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// replacePlans makes the program use other plans and another list of equivalents.
func replacePlans(t *testing.T, with []plan, known string) {
	t.Helper()
	oldPlans, oldKnown := plans, equivalent
	plans, equivalent = with, known
	t.Cleanup(func() { plans, equivalent = oldPlans, oldKnown })
}

func TestMutantsOfEveryKind(t *testing.T) {
	root := writeTree(t, map[string]string{"p/p.go": `package p

import "barevif/q"

const most = 8

type T[V any] struct{ n int }

func (t *T[V]) take(b []byte) (int, error) {
	if len(b) > most || t.n < 0 {
		return 0, errShort
	}
	for t.n < len(b) && ready() {
		if b[t.n] != 7 { continue }
	}
	if t.n == 0 {
		return 0, nil
	}
	switch {
	case t.n >= q.Limit:
		fail(t)
	case t.n&4 != 0:
	}
	f := func() error { return errShort }
	return min(t.n, most), f()
}

func (t *T[V]) String() string {
	if t.n < 5 { return "few" }
	return ""
}
`,
		"q/q.go":      "package q\n\nconst Limit = 3\n\nvar Other = 4\n",
		"p/p_test.go": "package p\n\nfunc f() bool { return 1 < 2 }\n",
		"p/other.go":  "//go:build plan9\n\npackage p\n\nfunc g() bool { return 1 < 2 }\n",
	})
	all, err := mutantsOf(root, "p")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range all {
		if m.File != "p/p.go" || m.Func != "T.take" {
			t.Errorf("mutant of %s %s", m.File, m.Func)
		}
		got = append(got, m.Kind+" "+m.From+" -> "+m.To)
	}
	want := []string{
		"check len(b) > most || t.n < 0 -> false",
		"operand len(b) > most || t.n < 0 -> t.n < 0",
		"bound len(b) > most -> len(b) >= most",
		"constant len(b) > most -> len(b) > (most+1)",
		"operand len(b) > most || t.n < 0 -> len(b) > most",
		"bound t.n < 0 -> t.n <= 0",
		"nil return 0, errShort -> return 0, nil",
		"operand t.n < len(b) && ready() -> ready()",
		"bound t.n < len(b) -> t.n <= len(b)",
		"operand t.n < len(b) && ready() -> t.n < len(b)",
		"check b[t.n] != 7 -> false",
		"constant b[t.n] != 7 -> b[t.n] != (7+1)",
		"constant b[t.n] != 7 -> b[t.n] != (7-1)",
		"check t.n >= q.Limit -> false",
		"bound t.n >= q.Limit -> t.n > q.Limit",
		"constant t.n >= q.Limit -> t.n >= (q.Limit-1)",
		"nil return errShort -> return nil",
		"minmax min(t.n, most) -> (most)",
		"minmax min(t.n, most) -> (t.n)",
		"nil return min(t.n, most), f() -> return min(t.n, most), nil",
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestAMutantChangesOneExpression(t *testing.T) {
	const src = `package p

func f(n int) error {
	if n > 3 || n < 0 {
		return errBad
	}
	if n > 3 {
		return errBad
	}
	return nil
}
`
	root := writeTree(t, map[string]string{"p/p.go": src})
	all, err := mutantsOf(root, "p")
	if err != nil {
		t.Fatal(err)
	}
	texts := make(map[string]bool)
	keys := make(map[key]bool)
	for _, m := range all {
		text := string(m.text())
		if text == src || texts[text] || keys[m.key] {
			t.Errorf("%v: no change, or one that was there", m.key)
		}
		texts[text], keys[m.key] = true, true
		same := 0
		was := strings.Split(src, "\n")
		for i, line := range strings.Split(text, "\n") {
			if line == was[i] {
				same++
			} else if i+1 != m.Line {
				t.Errorf("%v: line %d is another", m.key, i+1)
			}
		}
		if same != len(was)-1 {
			t.Errorf("%v: %d of %d lines are the same", m.key, same, len(was))
		}
	}
	if !slices.ContainsFunc(all, func(m *mutant) bool { return m.Nth == 1 && m.From == "n > 3" }) {
		t.Error("the second of two comparisons that are alike has no number")
	}
}

func TestASampleOutlivesChangesElsewhere(t *testing.T) {
	var all []*mutant
	for i := range 100 {
		all = append(all, &mutant{key: key{File: "p/p.go", Func: fmt.Sprint("f", i)}})
	}
	ten := sample(all, 10, 1)
	if len(ten) != 10 || len(sample(all, 0, 1)) != 100 || len(sample(all, 200, 1)) != 100 {
		t.Fatal(len(ten))
	}
	if slices.Equal(ten, sample(all, 10, 2)) {
		t.Error("another seed gives the same sample")
	}
	fewer := slices.DeleteFunc(slices.Clone(all), func(m *mutant) bool {
		return !slices.Contains(ten, m) && m.Func > "f5"
	})
	if !slices.Equal(ten, sample(fewer, 10, 1)) {
		t.Error("mutants that went away changed the sample of those that stay")
	}
}

func TestTheListOfEquivalents(t *testing.T) {
	known, err := parseKnown("# a comment\n\np/p.go T.f bound\na < b -> a <= b\nnever equal\n\np/p.go f check #2\nx -> false\nreason")
	if err != nil {
		t.Fatal(err)
	}
	a := key{File: "p/p.go", Func: "T.f", Kind: "bound", From: "a < b", To: "a <= b"}
	b := key{File: "p/p.go", Func: "f", Kind: "check", From: "x", To: "false", Nth: 1}
	if len(known) != 2 || known[a] != "never equal" || known[b] != "reason" {
		t.Error(known)
	}
	if gone := staleEntries(known, []*mutant{{key: a}}); len(gone) != 1 || gone[0] != b {
		t.Errorf("stale: %v", gone)
	}
	for _, bad := range []string{
		"p/p.go f check\nx -> false",
		"p/p.go f check\nx -> false\nreason\nmore",
		"p/p.go f\nx -> false\nreason",
		"p/p.go f check\nx\nreason",
		"p/p.go f check #1\nx -> false\nreason",
		"p/p.go f check two\nx -> false\nreason",
		"p/p.go f check\nx -> false\nreason\n\np/p.go f check\nx -> false\nreason",
	} {
		if known, err := parseKnown(bad); err == nil {
			t.Errorf("%q: %v", bad, known)
		}
	}
}

func TestTheLedgerGoesOnFromACutLine(t *testing.T) {
	name := filepath.Join(t.TempDir(), "results")
	m := &mutant{key: key{File: "p/p.go", Func: "f"}, sum: "1", Line: 4}
	other := &mutant{key: key{File: "p/p.go", Func: "g"}, sum: "1"}
	write := func(res ...result) *resultFile {
		t.Helper()
		l, err := openResults(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range res {
			if err := l.add(r); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.close(); err != nil {
			t.Fatal(err)
		}
		return l
	}
	write(result{key: m.key, Line: 3, Sum: "1", Status: killed}, result{key: other.key, Sum: "1", Status: survived})
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, text[:len(text)-9], 0o644); err != nil {
		t.Fatal(err)
	}
	l := write(result{key: other.key, Sum: "1", Status: survived})
	if res, ok := l.lookup(m, false); !ok || res.Status != killed || res.Line != 4 {
		t.Error(res, ok)
	}
	if _, ok := l.lookup(other, false); ok {
		t.Error("the cut line was read")
	}
	l = write()
	if res, ok := l.lookup(other, false); !ok || res.Status != survived {
		t.Error(res, ok)
	}
	if _, ok := l.lookup(other, true); ok {
		t.Error("-retry does not run a survivor again")
	}
	if _, ok := l.lookup(&mutant{key: m.key, sum: "2"}, false); ok {
		t.Error("the result of another text of the file was taken")
	}
	if err := os.WriteFile(name, []byte("no result\n"+string(text)), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := openResults(name); err == nil || !strings.Contains(err.Error(), ":1:") {
		t.Errorf("a file of something else: %v", err)
	}
	if kept, err := os.ReadFile(name); err != nil || !strings.HasPrefix(string(kept), "no result\n") {
		t.Errorf("it was changed: %q, %v", kept, err)
	}
}

// module is a module whose tests notice some mutants.
var moduleFiles = map[string]string{
	"go.mod": "module barevif\n\ngo 1.26\n",
	"p/p.go": `package p

import "errors"

var ErrLong = errors.New("long")

func Check(n int) error {
	if n > 3 {
		return ErrLong
	}
	for i := 0; ; i++ {
		if i >= n {
			break
		}
	}
	return nil
}
`,
	"p/p_test.go": `package p

import "testing"

func TestCheck(t *testing.T) {
	if Check(1) != nil || Check(9) == nil {
		t.Error("wrong")
	}
}
`,
}

func TestARunOfAModule(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the go command is not installed: ", err)
	}
	root := writeTree(t, moduleFiles)
	results := filepath.Join(t.TempDir(), "results")
	limit := suite{pkg: "./p", limit: 1e9}
	replacePlans(t, []plan{{"p", []suite{limit}}, {"gone", []suite{limit}}}, "")

	var out, errs strings.Builder
	args := []string{"-root", root, "-results", results}
	err := run(t.Context(), args, &out, &errs)
	if !errors.Is(err, errSurvivors) || errors.Is(err, errUnfinished) {
		t.Errorf("%v\n%s%s", err, &out, &errs)
	}
	for _, want := range []string{
		"p.go:8: Check check: n > 3 -> false: killed ./p",
		"p.go:8: Check bound: n > 3 -> n >= 3: survived",
		"p.go:8: Check constant: n > 3 -> n > (3+1): survived",
		"p.go:9: Check nil: return ErrLong -> return nil: killed ./p",
		"p.go:12: Check check: i >= n -> false: hung ./p",
		"p.go:12: Check bound: i >= n -> i > n: survived",
	} {
		if !strings.Contains(errs.String(), want) {
			t.Errorf("no %q in\n%s", want, &errs)
		}
	}
	const table = "        p        6       2     1           0         3               0"
	if !strings.Contains(out.String(), table) {
		t.Errorf("no %q in\n%s", table, &out)
	}
	if changed, err := os.ReadFile(filepath.Join(root, "p/p.go")); err != nil || string(changed) != moduleFiles["p/p.go"] {
		t.Error("the tree was written to: ", err)
	}

	// Listed survivors do not count, and nothing is run twice.
	replacePlans(t, plans, `p/p.go Check bound
n > 3 -> n >= 3
for the test

p/p.go Check constant
n > 3 -> n > (3+1)
for the test

p/p.go Check bound
i >= n -> i > n
for the test
`)
	out.Reset()
	errs.Reset()
	if err := run(t.Context(), args, &out, &errs); err != nil || errs.Len() != 0 {
		t.Errorf("%v\n%s%s", err, &out, &errs)
	}

	// Tests that fail without a mutant tell nothing.
	failing := strings.Replace(moduleFiles["p/p_test.go"], "Check(1) != nil", "true", 1)
	if err := os.WriteFile(filepath.Join(root, "p/p_test.go"), []byte(failing), 0o644); err != nil {
		t.Fatal(err)
	}
	err = run(t.Context(), []string{"-root", root}, &out, &errs)
	if err == nil || !strings.Contains(err.Error(), "does not pass without a mutant") {
		t.Error(err)
	}

	// A listed mutant must exist.
	replacePlans(t, plans, "p/p.go Check bound\nn > 4 -> n >= 4\nit was\n")
	if err := run(t.Context(), args, io.Discard, io.Discard); !errors.Is(err, errStale) {
		t.Error(err)
	}
}

func TestAMutantThatDoesNotCompileIsNotCounted(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the go command is not installed: ", err)
	}
	root := writeTree(t, map[string]string{
		"go.mod":      "module barevif\n\ngo 1.26\n",
		"p/p.go":      "package p\n\nfunc Few(n uint, least uint) bool { return n == 4 && least == 18446744073709551615 }\n",
		"p/p_test.go": "package p\n\nimport \"testing\"\n\nfunc TestFew(t *testing.T) {\n\tif !Few(4, 1<<64-1) || Few(5, 1<<64-1) || Few(3, 1<<64-1) || Few(4, 1<<64-2) {\n\t\tt.Error(\"few\")\n\t}\n}\n",
	})
	replacePlans(t, []plan{{"p", []suite{{pkg: "./p"}}}}, "")
	var out strings.Builder
	if err := run(t.Context(), []string{"-root", root}, &out, io.Discard); err != nil {
		t.Errorf("%v\n%s", err, &out)
	}
	const table = "        p        5       5     0           0         0               1"
	if !strings.Contains(out.String(), table) {
		t.Errorf("no %q in\n%s", table, &out)
	}
}

func TestBadArgumentsAreExplained(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"pvnet"}, "-packages"},
		{[]string{"-packages", "tools"}, "no tests are known"},
		{[]string{"-kinds", "typo"}, "there are check"},
		{[]string{"-match", "("}, "-match"},
		{[]string{"-n", "-1"}, "-n"},
		{[]string{"-root", "."}, "go.mod"},
	} {
		if err := run(t.Context(), c.args, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want %q in it", c.args, err, c.want)
		}
	}
}

func TestTheTreesOwnListAndPlansHold(t *testing.T) {
	for _, p := range plans {
		if len(p.suites) == 0 {
			t.Errorf("%s: no suite", p.dir)
		}
		for _, s := range p.suites {
			if _, err := os.Stat(filepath.Join("../..", s.pkg)); err != nil && s.pkg != "./"+p.dir {
				t.Errorf("%s: %v", p.dir, err)
			}
		}
	}
	var out strings.Builder
	if err := run(t.Context(), []string{"-root", "../..", "-list"}, &out, io.Discard); err != nil {
		t.Error(err)
	}
	if n := strings.Count(out.String(), "\n"); n < 1000 {
		t.Errorf("only %d mutants", n)
	}
}
