//go:build linux

// Mutate breaks checks in the code, one at a time, and runs the tests to see whether one
// notices: a refusing if never holds, a bound is off by one, one side of && is omitted,
// an error is not returned. It lays each mutant over the tree with go test -overlay, and
// writes nothing in the tree.
//
//	go run ./test/mutate -packages arena,pvnet/ring      # all mutants of two packages
//	go run ./test/mutate -n 300 -results nightly.jsonl   # a sample of all packages
//	go run ./test/mutate -results nightly.jsonl          # go on to the rest
//	go run ./test/mutate -list -packages xenbus/xenstore/server    # only list the mutants
//
// A surviving mutant shows a check without a test, an unnecessary check, or a change
// without effect. The last kind is listed in equivalent.txt with the reason. The exit
// status is 1 if a mutant survives that is not listed, or if a listed mutant no longer
// exists.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "mutate:", err)
		}
		os.Exit(1)
	}
}

type options struct {
	root     string
	packages []string
	kinds    []string
	match    *regexp.Regexp
	n        int
	seed     uint64
	results  string
	retry    bool
	budget   time.Duration
	list     bool
	asJSON   bool
}

func parseOptions(args []string, errs io.Writer) (options, error) {
	var o options
	var packages, kind, match string
	fset := flag.NewFlagSet("mutate", flag.ContinueOnError)
	fset.SetOutput(errs)
	fset.StringVar(&o.root, "root", ".", "the `folder` of the tree")
	fset.StringVar(&packages, "packages", "", "only these, as `a,b`; all by default")
	fset.StringVar(&kind, "kinds", "", "only these, of "+strings.Join(kinds, ", "))
	fset.StringVar(&match, "match", "", "only those whose line in -list matches this `regexp`")
	fset.IntVar(&o.n, "n", 0, "only a sample of this `many`; 0 for all")
	fset.Uint64Var(&o.seed, "seed", 1, "which sample")
	fset.StringVar(&o.results, "results", "", "go on from this `file`, and add to it")
	fset.BoolVar(&o.retry, "retry", false, "run once more what survived before")
	fset.DurationVar(&o.budget, "for", 0, "begin no mutant after this `long`; 0 for no limit")
	fset.BoolVar(&o.list, "list", false, "only list the mutants")
	fset.BoolVar(&o.asJSON, "json", false, "write results as JSON, one a line, and no table")
	if err := fset.Parse(args); err != nil {
		return o, err
	}
	if fset.NArg() > 0 {
		return o, fmt.Errorf("unknown argument %q: packages go after -packages", fset.Arg(0))
	}
	if o.n < 0 {
		return o, fmt.Errorf("-n %d: a sample has at least one, and 0 is for all", o.n)
	}
	var err error
	if o.match, err = regexp.Compile(match); err != nil {
		return o, fmt.Errorf("-match: %w", err)
	}
	o.packages, o.kinds = split(packages), split(kind)
	for _, k := range o.kinds {
		if !slices.Contains(kinds, k) {
			return o, fmt.Errorf("-kinds %s: there are %s", k, strings.Join(kinds, ", "))
		}
	}
	for i, p := range o.packages {
		p = strings.Trim(strings.TrimPrefix(filepath.ToSlash(p), "./"), "/")
		o.packages[i] = p
		if !slices.ContainsFunc(plans, func(pl plan) bool { return pl.dir == p }) {
			var dirs []string
			for _, pl := range plans {
				dirs = append(dirs, pl.dir)
			}
			return o, fmt.Errorf("-packages %s: no tests are known for it, but for %s", p, strings.Join(dirs, ", "))
		}
	}
	return o, nil
}

func split(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

var (
	errSurvivors  = errors.New("mutants survived: add a test that notices, delete what nothing needs, or give equivalent.txt the reason")
	errStale      = errors.New("equivalent.txt names what is not there any more: delete the entries")
	errUnfinished = errors.New("ended before all mutants were run: the same -results goes on from here")
)

func run(ctx context.Context, args []string, out, errs io.Writer) error {
	o, err := parseOptions(args, errs)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(o.root, "go.mod")); err != nil {
		return fmt.Errorf("%w (run it in the folder of go.mod, or give -root)", err)
	}
	known, err := parseKnown(equivalent)
	if err != nil {
		return err
	}
	// All packages, so that the whole list of equivalents is checked.
	var all, chosen []*mutant
	for _, p := range plans {
		found, err := mutantsOf(o.root, p.dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		all = append(all, found...)
		if len(o.packages) > 0 && !slices.Contains(o.packages, p.dir) {
			continue
		}
		for _, m := range found {
			if (len(o.kinds) == 0 || slices.Contains(o.kinds, m.Kind)) && o.match.MatchString(m.line()) {
				chosen = append(chosen, m)
			}
		}
	}
	stales := staleEntries(known, all)
	for _, k := range stales {
		fmt.Fprintln(errs, "stale:", k)
	}
	if len(stales) > 0 {
		return errStale
	}
	chosen = sample(chosen, o.n, o.seed)
	if o.list {
		for _, m := range chosen {
			fmt.Fprintln(out, m.line())
		}
		return nil
	}
	return runAll(ctx, o, chosen, known, out, errs)
}

// runAll runs the mutants without a result of an earlier run, and reports.
func runAll(ctx context.Context, o options, chosen []*mutant, known map[key]string, out, errs io.Writer) error {
	file, err := openResults(o.results)
	if err != nil {
		return err
	}
	defer file.close()
	tmp, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	root, err := filepath.Abs(o.root)
	if err != nil {
		return err
	}
	r := &runner{root: root, tmp: tmp, limits: make(map[suite]time.Duration), failed: make(map[suite]error)}
	began := time.Now()
	untried := make(map[string]error) // packages whose tests fail without a mutant
	var results []result
	var ended error
	for i, m := range chosen {
		res, found := file.lookup(m, o.retry)
		switch {
		case known[m.key] != "":
			res = result{key: m.key, Line: m.Line, Sum: m.sum, Status: listed}
		case found:
		case ended != nil || untried[m.dir] != nil:
			continue
		case o.budget > 0 && time.Since(began) > o.budget:
			ended = errUnfinished
			continue
		default:
			suites := suitesOf(m.dir)
			for _, s := range suites {
				if err := r.baseline(ctx, s); err != nil {
					untried[m.dir] = fmt.Errorf("%s: %w", m.dir, err)
					break
				}
			}
			if untried[m.dir] == nil {
				res, err = r.mutate(ctx, m, suites)
			}
			if ctx.Err() != nil {
				delete(untried, m.dir)
				ended = errUnfinished
				continue
			}
			if untried[m.dir] != nil {
				continue
			}
			if err == nil {
				err = file.add(res)
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(errs, "%d/%d %s: %s %s\n", i+1, len(chosen), m.line(), res.Status, res.By)
		}
		results = append(results, res)
	}
	survivors, err := report(out, results, o.asJSON)
	all := []error{err}
	if survivors > 0 {
		all = append(all, errSurvivors)
	}
	for _, dir := range slices.Sorted(maps.Keys(untried)) {
		all = append(all, untried[dir])
	}
	return errors.Join(append(all, ended)...)
}

func suitesOf(dir string) []suite {
	return plans[slices.IndexFunc(plans, func(p plan) bool { return p.dir == dir })].suites
}

// report writes the table, then the survivors.
func report(out io.Writer, results []result, asJSON bool) (survivors int, err error) {
	type row struct{ total, killed, hung, listed, broken, survived int }
	rows := make(map[string]*row)
	var sum row
	for _, res := range results {
		dir := pathDir(res.File)
		if rows[dir] == nil {
			rows[dir] = new(row)
		}
		for _, r := range []*row{rows[dir], &sum} {
			r.total++
			switch res.Status {
			case killed:
				r.killed++
			case hung:
				r.hung++
			case listed:
				r.listed++
			case broken:
				r.broken++
			default:
				r.survived++
			}
		}
		if asJSON {
			text, err := json.Marshal(res)
			if err != nil {
				return 0, err
			}
			if _, err := fmt.Fprintf(out, "%s\n", text); err != nil {
				return 0, err
			}
		}
	}
	if asJSON {
		return sum.survived, nil
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "package\tmutants\tkilled\thung\tequivalent\tsurvived\tdo not compile\t")
	line := func(name string, r *row) {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t\n", name, r.total-r.broken, r.killed, r.hung, r.listed, r.survived, r.broken)
	}
	for _, p := range plans {
		if r := rows[p.dir]; r != nil {
			line(p.dir, r)
		}
	}
	line("all", &sum)
	if err := w.Flush(); err != nil {
		return 0, err
	}
	for _, res := range results {
		if res.Status == survived {
			nth := ""
			if res.Nth > 0 {
				nth = fmt.Sprintf(" #%d", res.Nth+1)
			}
			// The form of equivalent.txt, after the line number.
			if _, err := fmt.Fprintf(out, "\nsurvived, line %d:\n%s %s %s%s\n%s -> %s\n",
				res.Line, res.File, res.Func, res.Kind, nth, res.From, res.To); err != nil {
				return 0, err
			}
		}
	}
	return sum.survived, nil
}

func pathDir(file string) string { return file[:strings.LastIndexByte(file, '/')] }
