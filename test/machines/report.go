//go:build linux

package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// A result is one run of the suite.
type result struct {
	name, about string
	took        time.Duration
	status      error // exit status of go test
	passed      int
	failures    []failure
	skips       map[string][]string // skipped tests, by the reason
}

// A failure is a failed test, or a failed package without a failed test.
type failure struct{ test, output string }

func (r result) failed() bool { return r.status != nil || len(r.failures) > 0 }

// An event is a line of the output of "go test -json".
type event struct {
	Action, Package, Test, Output string
	ImportPath                    string // of a package that does not compile
}

// summarize reads the output of "go test -json".
func summarize(r io.Reader) (res result, err error) {
	res.skips = map[string][]string{}
	outputs := map[string]*strings.Builder{}
	parents := map[string]bool{} // tests and packages with a failure below them
	var failed []string
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(line) == 0 {
			break
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return res, err
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			e = event{Action: "output", Output: string(line)} // output of the go command itself
		}
		pkg := e.Package
		if pkg == "" {
			pkg, _, _ = strings.Cut(e.ImportPath, " ") // [of its test]
		}
		name := strings.TrimSuffix(pkg+"."+e.Test, ".")
		switch e.Action {
		case "output", "build-output":
			if outputs[name] == nil {
				outputs[name] = &strings.Builder{}
			}
			outputs[name].WriteString(e.Output)
		case "pass":
			if e.Test != "" {
				res.passed++
			}
		case "fail", "build-fail":
			failed = append(failed, name)
			for i := strings.LastIndexByte(e.Test, '/'); i > 0; i = strings.LastIndexByte(e.Test[:i], '/') {
				parents[pkg+"."+e.Test[:i]] = true
			}
			if e.Test != "" {
				parents[pkg] = true
			}
		case "skip":
			if e.Test != "" {
				why := reason(text(outputs[name]))
				res.skips[why] = append(res.skips[why], name)
			}
		}
	}
	slices.Sort(failed) // a package that does not compile is named twice
	for _, name := range slices.Compact(failed) {
		if !parents[name] {
			res.failures = append(res.failures, failure{name, text(outputs[name])})
		}
	}
	return res, nil
}

func text(b *strings.Builder) string {
	if b == nil {
		return ""
	}
	return b.String()
}

// reason returns why a test was skipped: its last line of output except the verdict.
func reason(output string) (why string) {
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ") {
			continue
		}
		why = line
	}
	// Omit the position in the source.
	if at, rest, ok := strings.Cut(why, ": "); ok && strings.Contains(at, ".go:") {
		why = rest
	}
	if why == "" {
		return "(nothing said)"
	}
	return why
}

// keptLines is how many lines of a failure the report shows; the file has all of them.
const keptLines = 25

// table returns the report.
func table(results []result) string {
	var b strings.Builder
	b.WriteString("| machine | is | result | s | passed | failed | skipped |\n|---|---|---|---|---|---|---|\n")
	for _, r := range results {
		verdict, skipped := "pass", 0
		if r.failed() {
			verdict = "FAIL"
		}
		for _, tests := range r.skips {
			skipped += len(tests)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %.0f | %d | %d | %d |\n", r.name, r.about, verdict, r.took.Seconds(), r.passed, len(r.failures), skipped)
	}
	for _, r := range results {
		if !r.failed() && len(r.skips) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n%s:\n", r.name)
		for _, f := range r.failures {
			fmt.Fprintf(&b, "  FAIL %s\n", f.test)
			lines := strings.Split(strings.TrimSpace(f.output), "\n")
			if len(lines) > keptLines {
				lines = append([]string{"…"}, lines[len(lines)-keptLines:]...)
			}
			for _, line := range lines {
				fmt.Fprintf(&b, "       %s\n", line)
			}
		}
		if exit := (*exec.ExitError)(nil); r.status != nil && (len(r.failures) == 0 || !errors.As(r.status, &exit)) {
			fmt.Fprintf(&b, "  FAIL go test: %v\n", r.status)
		}
		for _, why := range slices.Sorted(maps.Keys(r.skips)) {
			tests := r.skips[why]
			fmt.Fprintf(&b, "  skip %d (%s): %s\n", len(tests), shorten(tests), why)
		}
	}
	if counts := countFailures(results); len(results) > 1 && len(counts) > 0 {
		b.WriteString("\nfailures of all runs:\n")
		for _, name := range slices.SortedFunc(maps.Keys(counts), func(x, y string) int {
			return cmp.Or(counts[y]-counts[x], strings.Compare(x, y))
		}) {
			fmt.Fprintf(&b, "  %d of %d: %s\n", counts[name], len(results), name)
		}
	}
	return b.String()
}

func countFailures(results []result) map[string]int {
	counts := map[string]int{}
	for _, r := range results {
		for _, f := range r.failures {
			counts[f.test]++
		}
	}
	return counts
}

// shorten names the first of several tests.
func shorten(tests []string) string {
	if len(tests) == 1 {
		return tests[0]
	}
	return tests[0] + ", …"
}
