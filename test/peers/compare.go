package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
)

// worseFactor is the factor by which a ratio must have grown, beyond the noise, to count as worse.
const worseFactor = 1.05

// gotWorse reports whether a ratio grew beyond the noise of both results: the ranges between
// their quartiles do not overlap.
func gotWorse(before, now ratio) bool {
	return min(before.runs, now.runs) >= minRuns && now.lo > before.hi && now.mid > worseFactor*before.mid
}

// A change is a row of ours that got worse against a floor or a peer.
type change struct {
	ours, peer  key
	before, now ratio
}

// compare finds the rows of ours that got worse since before. A row counts as worse if most
// of its ratios did. If only the ratio against one floor or peer did, that floor or peer has
// changed.
func compare(before, now *Result) (changes []change, compared int) {
	// One boundary, so that near and far mean the same in both results.
	b := boundary(append(lineTimes(before.Runs), lineTimes(now.Runs)...))
	old, new := newTable(before.Runs, b), newTable(now.Runs, b)
	classes := map[key]string{}
	var keys []key
	for _, r := range now.Runs {
		if classes[r.key()] == "" {
			classes[r.key()] = r.Class
			keys = append(keys, r.key())
		}
	}
	for _, k := range keys {
		if classes[k] != ours {
			continue
		}
		var bad []change
		against := 0
		for _, p := range keys {
			if classes[p] == ours || p.kind != k.kind || p.bytes != k.bytes {
				continue
			}
			for _, where := range []regime{near, far} {
				was, is := old.ratioIn(k, p, where), new.ratioIn(k, p, where)
				if min(was.runs, is.runs) < minRuns {
					continue
				}
				against++
				if gotWorse(was, is) {
					bad = append(bad, change{k, p, was, is})
				}
			}
		}
		compared += against
		if 2*len(bad) > against {
			changes = append(changes, bad...)
		}
	}
	return changes, compared
}

// reportCompare prints what got worse, and reports whether anything did.
func reportCompare(w io.Writer, name string, before, now *Result) bool {
	changes, compared := compare(before, now)
	fmt.Fprintf(w, "Against %s, of commit %s and %s: %d ratios of the same regime with %d runs each.\n",
		name, before.Commit, before.Date, compared, minRuns)
	if before.Machine.CPU != now.Machine.CPU || before.Machine.Arch != now.Machine.Arch {
		fmt.Fprintf(w, "It is of another machine (%s, %s): ratios of one say little about the other.\n", before.Machine.CPU, before.Machine.Arch)
	}
	missing := map[string]bool{}
	for _, r := range before.Runs {
		missing[r.Row] = true
	}
	for _, r := range now.Runs {
		delete(missing, r.Row)
	}
	if len(missing) > 0 {
		fmt.Fprintf(w, "Not measured now: %d rows that are in it.\n", len(missing))
	}
	if len(changes) == 0 {
		fmt.Fprintf(w, "Nothing got worse beyond noise.\n\n")
		return false
	}
	slices.SortStableFunc(changes, func(a, b change) int {
		return cmp.Compare(b.now.mid/b.before.mid, a.now.mid/a.before.mid)
	})
	fmt.Fprintf(w, "\n| got worse | bytes | kind | against | ratio before | ratio now | regime |\n|---|---:|---|---|---:|---:|---|\n")
	for _, c := range changes {
		show := func(r ratio) string { return fmt.Sprintf("%.3g (%.3g to %.3g)", r.mid, r.lo, r.hi) }
		fmt.Fprintf(w, "| %s | %d | %s | %s | %s | %s | %s |\n", c.ours.row, c.ours.bytes, c.ours.kind, c.peer.row, show(c.before), show(c.now), c.now.where)
	}
	fmt.Fprintln(w)
	return true
}
