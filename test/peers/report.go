package main

import (
	"fmt"
	"io"
	"math"
	"strings"
)

// report prints the table of all rows, in the order in which they were measured.
func (r *Result) report(w io.Writer, t *table) {
	m := r.Machine
	fmt.Fprintf(w, "%s, %s, %d CPUs, %s, Linux %s; %s, commit %s; windows of %s\n\n", m.CPU, m.Arch, m.CPUs, m.Go, m.Kernel, r.Date, r.Commit, r.Window)
	if math.IsInf(t.boundary, 1) {
		fmt.Fprintf(w, "The CPUs stayed as near to each other as they were: there is one regime.\n\n")
	} else {
		fmt.Fprintf(w, "near: a line round trip of less than %.0f ns between the CPUs; far: of more.\n\n", t.boundary)
	}
	columns := []string{"row", "bytes", "kind", "near ns (runs)", "far ns (runs)", "p99 ns", "M/s", "Gbit/s", "CPU ns",
		"allocs", "notifies", "lost %", "spread %", "line ns", "runs", "note"}
	fmt.Fprintf(w, "| %s |\n|---|---:|---|%s---|\n", strings.Join(columns, " | "), strings.Repeat("---:|", len(columns)-4))
	seen := map[key]bool{}
	for _, run := range r.Runs {
		if k := run.key(); !seen[k] {
			seen[k] = true
			fmt.Fprintln(w, t.line(k))
		}
	}
	for _, g := range r.Gaps {
		if k := g.key(); !seen[k] {
			seen[k] = true
			fmt.Fprintf(w, "| %s | %d | %s |%s %s |\n", k.row, k.bytes, k.kind, strings.Repeat(" |", len(columns)-4), g.Reason)
		}
	}
	fmt.Fprintln(w)
}

// line formats the row of one cell: the times per regime, and other figures as medians of all
// runs.
func (t *table) line(k key) string {
	c := t.cells[k]
	all := func(of func(Run) float64) float64 { return median(values(c.runs, of)) }
	num := func(x float64, digits int) string {
		if x == 0 {
			return ""
		}
		return fmt.Sprintf("%.*f", digits, x)
	}
	cols := []string{k.row, fmt.Sprint(k.bytes), k.kind}
	for _, where := range []regime{near, far} {
		s := ""
		if runs := t.runsIn(k, where); len(runs) > 0 {
			digits := 1
			if k.kind == counters {
				digits = 4
			}
			s = fmt.Sprintf("%.*f (%d)", digits, median(values(runs, ns)), len(runs))
		}
		cols = append(cols, s)
	}
	cols = append(cols, num(all(func(r Run) float64 { return r.P99 }), 0))
	if k.kind == stream {
		each := all(ns)
		cols = append(cols, num(1e3/each, 3), num(8*float64(k.bytes)/each, 2))
	} else {
		cols = append(cols, "", "")
	}
	cols = append(cols,
		num(all(func(r Run) float64 { return r.CPU }), 1),
		fmt.Sprintf("%.3f", all(func(r Run) float64 { return r.Allocs })),
		num(all(func(r Run) float64 { return r.Notifies }), 4),
		num(100*all(func(r Run) float64 { return r.Lost }), 1),
		num(100*spread(values(c.runs, ns)), 0),
		num(all(func(r Run) float64 { return r.Line }), 0),
		fmt.Sprintf("%d/%d", len(c.runs), c.made))
	note := ""
	if c.disturbed {
		note = "disturbed: other work took CPU time"
	}
	if k.kind == counters {
		note = strings.TrimPrefix(note+fmt.Sprintf("; a ratio; that of two vifs without is %.4f", all(func(r Run) float64 { return r.Noise })), "; ")
	}
	return "| " + strings.Join(append(cols, note), " | ") + " |"
}

// oneLine fits an error into a cell of a table.
func oneLine(err error) string {
	return strings.NewReplacer("\n", "; ", "|", "/").Replace(err.Error())
}
