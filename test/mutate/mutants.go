//go:build linux

package main

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Kinds of mutants.
const (
	kindCheck    = "check"    // a refusing condition never holds
	kindBound    = "bound"    // < for <=, > for >=, and back
	kindOperand  = "operand"  // one side of && or || is omitted
	kindConstant = "constant" // a compared constant is one more or one less
	kindNil      = "nil"      // an error is not returned
	kindMinMax   = "minmax"   // min or max is replaced by one of its arguments
)

var kinds = []string{kindCheck, kindBound, kindOperand, kindConstant, kindNil, kindMinMax}

// A key names a mutant by its change, without line numbers, so that it survives changes
// elsewhere in the file.
type key struct {
	File string `json:"file"` // relative to the root, with slashes
	Func string `json:"func"` // "name" or "Type.name"
	Kind string `json:"kind"`
	From string `json:"from"`          // the expression, with white space collapsed
	To   string `json:"to"`            // the replacement
	Nth  int    `json:"nth,omitempty"` // index among equal changes in the function, from 0
}

func (k key) String() string {
	s := fmt.Sprintf("%s %s %s: %s -> %s", k.File, k.Func, k.Kind, k.From, k.To)
	if k.Nth > 0 {
		s += fmt.Sprintf(" #%d", k.Nth+1)
	}
	return s
}

// A mutant is one change to one file.
type mutant struct {
	key
	Line int    `json:"line"`
	dir  string // directory of the package
	src  []byte // content of the file
	at   [2]int // range of bytes of src to replace
	with string
	sum  string // hash of src
}

// line returns the mutant's line in a list.
func (m *mutant) line() string {
	return fmt.Sprintf("%s:%d: %s %s: %s -> %s", m.File, m.Line, m.Func, m.Kind, m.From, m.To)
}

// text returns the whole file with the change in it.
func (m *mutant) text() []byte {
	return slices.Concat(m.src[:m.at[0]], []byte(m.with), m.src[m.at[1]:])
}

// rank orders mutants for a sample: randomly, but independently of the other mutants.
func (m *mutant) rank(seed uint64) uint64 {
	h := sha256.New()
	binary.Write(h, binary.LittleEndian, seed)
	h.Write([]byte(m.key.String()))
	return binary.LittleEndian.Uint64(h.Sum(nil))
}

// sample returns n of all, in the order of all; all of them if n is 0.
func sample(all []*mutant, n int, seed uint64) []*mutant {
	if n <= 0 || n >= len(all) {
		return all
	}
	ranked := slices.Clone(all)
	slices.SortFunc(ranked, func(a, b *mutant) int {
		if a.rank(seed) < b.rank(seed) {
			return -1
		}
		return 1
	})
	chosen := make(map[*mutant]bool, n)
	for _, m := range ranked[:n] {
		chosen[m] = true
	}
	return slices.DeleteFunc(slices.Clone(all), func(m *mutant) bool { return !chosen[m] })
}

// mutantsOf returns the mutants of the package in dir below root, in source order.
func mutantsOf(root, dir string) ([]*mutant, error) {
	entries, err := os.ReadDir(filepath.Join(root, filepath.FromSlash(dir)))
	if err != nil {
		return nil, err
	}
	g := &generator{root: root, dir: dir, fset: token.NewFileSet(), consts: make(map[string]map[string]bool)}
	var all []*mutant
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			continue
		}
		if match, err := build.Default.MatchFile(filepath.Join(root, filepath.FromSlash(dir)), name); err != nil || !match {
			continue
		}
		src, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(dir), name))
		if err != nil {
			return nil, err
		}
		found, err := g.file(name, src)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

type generator struct {
	root, dir string
	fset      *token.FileSet
	consts    map[string]map[string]bool // by directory

	// State for one file.
	name    string
	src     []byte
	sum     string
	base    int
	imports map[string]string // directory, by the package's name
	out     []*mutant

	// State for one function.
	fn string
}

func (g *generator) file(name string, src []byte) ([]*mutant, error) {
	f, err := parser.ParseFile(g.fset, name, src, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(src)
	g.name, g.src, g.sum, g.out = path.Join(g.dir, name), src, fmt.Sprintf("%x", sum[:8]), nil
	g.base = g.fset.File(f.Pos()).Base()
	g.imports = make(map[string]string)
	for _, spec := range f.Imports {
		dir, ours := strings.CutPrefix(strings.Trim(spec.Path.Value, `"`), module+"/")
		if !ours {
			continue
		}
		as := path.Base(dir)
		if spec.Name != nil {
			as = spec.Name.Name
		}
		g.imports[as] = dir
	}
	for _, decl := range f.Decls {
		fn, ok := decl.(*ast.FuncDecl)
		if !ok || fn.Body == nil || fn.Name.Name == "String" || fn.Name.Name == "Error" {
			continue
		}
		g.fn = funcName(fn)
		g.body(fn.Body, fn.Type)
	}
	slices.SortStableFunc(g.out, func(a, b *mutant) int { return a.at[0] - b.at[0] })
	seen := make(map[key]int)
	for _, m := range g.out {
		k := m.key
		m.Nth = seen[k]
		seen[k]++
	}
	return g.out, nil
}

func funcName(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return fn.Name.Name
	}
	t := fn.Recv.List[0].Type
	for {
		switch u := t.(type) {
		case *ast.StarExpr:
			t = u.X
		case *ast.IndexExpr:
			t = u.X
		case *ast.IndexListExpr:
			t = u.X
		case *ast.Ident:
			return u.Name + "." + fn.Name.Name
		default:
			return fn.Name.Name
		}
	}
}

// body finds the mutants of one function. It handles function literals separately,
// because they have their own results.
func (g *generator) body(body *ast.BlockStmt, sig *ast.FuncType) {
	loops := make(map[ast.Expr]bool) // conditions of for statements
	ast.Inspect(body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			g.body(n.Body, n.Type)
			return false
		case *ast.ForStmt:
			if n.Cond != nil {
				loops[n.Cond] = true
			}
		case *ast.IfStmt:
			if refuses(n.Body.List, sig) {
				g.check(n.Cond)
			}
		case *ast.SwitchStmt:
			if n.Tag == nil {
				for _, c := range n.Body.List {
					if c := c.(*ast.CaseClause); refuses(c.Body, sig) {
						for _, e := range c.List {
							g.check(e)
						}
					}
				}
			}
		case *ast.ReturnStmt:
			g.result(n, sig)
		case *ast.CallExpr:
			g.minmax(n)
		case *ast.BinaryExpr:
			switch n.Op {
			case token.LAND, token.LOR:
				g.operand(n)
			case token.LSS, token.LEQ, token.GTR, token.GEQ, token.EQL, token.NEQ:
				if !loops[n] { // the loop's body would run once too often, or endlessly
					g.comparison(n)
				}
			}
		}
		return true
	})
}

func (g *generator) offset(p token.Pos) int { return int(p) - g.base }

func (g *generator) textOf(n ast.Node) string {
	return string(g.src[g.offset(n.Pos()):g.offset(n.End())])
}

// add adds a mutant that replaces n by with. from and to are its display form.
func (g *generator) add(kind string, n ast.Node, with, from, to string) {
	g.out = append(g.out, &mutant{
		key:  key{File: g.name, Func: g.fn, Kind: kind, From: oneLine(from), To: oneLine(to)},
		Line: g.fset.Position(n.Pos()).Line,
		dir:  g.dir,
		src:  g.src,
		at:   [2]int{g.offset(n.Pos()), g.offset(n.End())},
		with: with,
		sum:  g.sum,
	})
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// blames matches names of functions that report or handle a failure.
var blames = regexp.MustCompile(`(?i)fail|fatal|violat|refus|drop|corrupt|bad|err|reject|ignore|abort|panic|discard|kill`)

// refuses reports whether statements end the normal flow because something is wrong: they
// return an error or false, leave the loop iteration, panic, or call a function with such
// a name.
func refuses(list []ast.Stmt, sig *ast.FuncType) bool {
	if len(list) == 0 {
		return false
	}
	switch last := list[len(list)-1].(type) {
	case *ast.BranchStmt:
		return last.Tok != token.FALLTHROUGH
	case *ast.ReturnStmt:
		if n := len(last.Results); n > 0 {
			id, ok := last.Results[n-1].(*ast.Ident)
			return !ok || id.Name != "nil" && id.Name != "true"
		}
		return sig.Results != nil || blamed(list)
	case *ast.ExprStmt:
		return blamed(list)
	}
	return false
}

func blamed(list []ast.Stmt) (found bool) {
	for _, s := range list {
		ast.Inspect(s, func(n ast.Node) bool {
			if id, ok := n.(*ast.Ident); ok && blames.MatchString(id.Name) {
				found = true
			}
			return !found
		})
	}
	return found
}

func (g *generator) check(cond ast.Expr) {
	text := g.textOf(cond)
	g.add(kindCheck, cond, "false && ("+text+")", text, "false")
}

func (g *generator) operand(n *ast.BinaryExpr) {
	rest := "true || (" // in place of the omitted side of &&
	if n.Op == token.LOR {
		rest = "false && ("
	}
	x, y := g.textOf(n.X), g.textOf(n.Y)
	g.add(kindOperand, n.X, "("+rest+x+"))", g.textOf(n), y)
	g.add(kindOperand, n.Y, "("+rest+y+"))", g.textOf(n), x)
}

// boundaries maps a comparison to its neighbour, and to the step of a constant on its
// right that differs from that change.
var boundaries = map[token.Token]struct {
	op   token.Token
	step string
}{
	token.LSS: {token.LEQ, "-"},
	token.LEQ: {token.LSS, "+"},
	token.GTR: {token.GEQ, "+"},
	token.GEQ: {token.GTR, "-"},
}

func (g *generator) comparison(n *ast.BinaryExpr) {
	from, x, y := g.textOf(n), g.textOf(n.X), g.textOf(n.Y)
	b, ordered := boundaries[n.Op]
	if ordered {
		to := x + " " + b.op.String() + " " + y
		g.add(kindBound, n, to, from, to)
	}
	step := func(side ast.Expr, sign string) {
		if lit, ok := side.(*ast.BasicLit); ok && lit.Value == "0" && sign == "-" {
			return
		}
		changed := "(" + g.textOf(side) + sign + "1)"
		to := x + " " + n.Op.String() + " " + changed
		if side == n.X {
			to = changed + " " + n.Op.String() + " " + y
		}
		g.add(kindConstant, side, changed, from, to)
	}
	if ordered {
		if g.constant(n.Y) {
			step(n.Y, b.step)
		}
		if g.constant(n.X) {
			step(n.X, opposite[b.step])
		}
		return
	}
	// For == and != only counts are bounds: a flag or a name with one more is not.
	if lit, ok := n.Y.(*ast.BasicLit); ok && lit.Kind == token.INT && lit.Value != "0" && !masks(n.X) {
		step(n.Y, "+")
		step(n.Y, "-")
	}
}

var opposite = map[string]string{"-": "+", "+": "-"}

func masks(e ast.Expr) bool {
	if p, ok := e.(*ast.ParenExpr); ok {
		e = p.X
	}
	b, ok := e.(*ast.BinaryExpr)
	return ok && b.Op == token.AND
}

// constant reports whether e is a number or the name of a constant of this module.
func (g *generator) constant(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.BasicLit:
		return e.Kind == token.INT
	case *ast.Ident:
		return g.constsOf(g.dir)[e.Name]
	case *ast.SelectorExpr:
		if pkg, ok := e.X.(*ast.Ident); ok && g.imports[pkg.Name] != "" {
			return g.constsOf(g.imports[pkg.Name])[e.Sel.Name]
		}
	}
	return false
}

// constsOf returns the names of a package's constants.
func (g *generator) constsOf(dir string) map[string]bool {
	if names, ok := g.consts[dir]; ok {
		return names
	}
	names := make(map[string]bool)
	g.consts[dir] = names
	files, _ := filepath.Glob(filepath.Join(g.root, filepath.FromSlash(dir), "*.go"))
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil || strings.HasSuffix(file, "_test.go") {
			continue // the compiler reports the error better
		}
		for _, decl := range f.Decls {
			d, ok := decl.(*ast.GenDecl)
			if !ok || d.Tok != token.CONST {
				continue
			}
			for _, spec := range d.Specs {
				for _, name := range spec.(*ast.ValueSpec).Names {
					names[name.Name] = true
				}
			}
		}
	}
	return names
}

// result makes a return statement return no error; the error's expression is still
// evaluated.
func (g *generator) result(n *ast.ReturnStmt, sig *ast.FuncType) {
	if len(n.Results) == 0 || sig.Results == nil {
		return
	}
	count := 0
	for _, f := range sig.Results.List {
		count += max(1, len(f.Names))
	}
	last := sig.Results.List[len(sig.Results.List)-1]
	if id, ok := last.Type.(*ast.Ident); !ok || id.Name != "error" || count != len(n.Results) {
		return
	}
	value := n.Results[len(n.Results)-1]
	if id, ok := value.(*ast.Ident); ok && id.Name == "nil" {
		return
	}
	from := g.textOf(n)
	to := from[:len(from)-len(g.textOf(value))] + "nil"
	g.add(kindNil, value, "func() error { _ = "+g.textOf(value)+"; return nil }()", from, to)
}

func (g *generator) minmax(n *ast.CallExpr) {
	id, ok := n.Fun.(*ast.Ident)
	if !ok || id.Name != "min" && id.Name != "max" || len(n.Args) < 2 || n.Ellipsis.IsValid() {
		return
	}
	for i := range n.Args {
		var rest []string
		for j, arg := range n.Args {
			if j != i {
				rest = append(rest, g.textOf(arg))
			}
		}
		to := "(" + rest[0] + ")"
		if len(rest) > 1 {
			to = id.Name + "(" + strings.Join(rest, ", ") + ")"
		}
		g.add(kindMinMax, n, to, g.textOf(n), to)
	}
}
