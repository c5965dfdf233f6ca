package main

import (
	"math"
	"slices"
)

// quantile returns the value below which the share q of v lies, interpolated between the two
// nearest values. v is not empty.
func quantile(v []float64, q float64) float64 {
	s := slices.Sorted(slices.Values(v))
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 == len(s) {
		return s[i]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}

func median(v []float64) float64 { return quantile(v, 0.5) }

// spread returns the distance between the quartiles, as a share of the median.
func spread(v []float64) float64 {
	return (quantile(v, 0.75) - quantile(v, 0.25)) / median(v)
}

// A regime says how close the two CPUs were: near or far.
type regime int

const (
	near regime = iota
	far
)

func (r regime) String() string { return [...]string{"near", "far"}[r] }

// boundary returns the line round trip that separates near runs from far ones: the one that
// divides the line round trips into the two most different groups. It is infinite if their
// medians differ by less than a factor of 1.3; then all runs are near.
func boundary(lines []float64) float64 {
	s := slices.Sorted(slices.Values(lines))
	var sum, left float64
	for _, x := range s {
		sum += math.Log(x)
	}
	cut, best := 0, 0.0
	for i := 1; i < len(s); i++ {
		left += math.Log(s[i-1])
		a, b := left/float64(i), (sum-left)/float64(len(s)-i)
		if between := float64(i) * float64(len(s)-i) * (a - b) * (a - b); between > best && s[i] > s[i-1] {
			cut, best = i, between
		}
	}
	if cut == 0 || median(s[cut:]) < 1.3*median(s[:cut]) {
		return math.Inf(1)
	}
	return s[cut]
}

// A run is clean if other work took less than this share of the CPUs.
const cleanShare = 0.12

// minRuns is how many runs a figure needs to be compared with another.
const minRuns = 3

// A cell is all runs of a row at one size.
type cell struct {
	runs      []Run // clean, or all if fewer than enough are
	made      int
	disturbed bool // some runs are not clean
}

// A key names a cell.
type key struct {
	row   string
	kind  string
	bytes int
}

// A table holds all runs, by cell.
type table struct {
	cells    map[key]*cell
	boundary float64
}

func newTable(runs []Run, boundary float64) *table {
	t := &table{cells: map[key]*cell{}, boundary: boundary}
	for _, r := range runs {
		c := t.cells[r.key()]
		if c == nil {
			c = &cell{}
			t.cells[r.key()] = c
		}
		c.runs = append(c.runs, r)
		c.made++
	}
	for _, c := range t.cells {
		var quiet []Run
		for _, r := range c.runs {
			if r.Others < cleanShare {
				quiet = append(quiet, r)
			}
		}
		if len(quiet) >= min(minRuns, c.made) {
			c.runs = quiet
		} else {
			c.disturbed = true
		}
	}
	return t
}

func lineTimes(runs []Run) []float64 {
	return values(runs, func(r Run) float64 { return r.Line })
}

func values(runs []Run, of func(Run) float64) []float64 {
	v := make([]float64, len(runs))
	for i, r := range runs {
		v[i] = of(r)
	}
	return v
}

func ns(r Run) float64 { return r.Ns }

func (t *table) regime(r Run) regime {
	if r.Line < t.boundary {
		return near
	}
	return far
}

// runsIn returns the runs of a cell in one regime; none if there is no such cell.
func (t *table) runsIn(k key, where regime) (runs []Run) {
	if c := t.cells[k]; c != nil {
		for _, r := range c.runs {
			if t.regime(r) == where {
				runs = append(runs, r)
			}
		}
	}
	return runs
}

// A ratio is the time of a frame, or of a round trip, in one row, in multiples of that in
// another row, in one regime. lo and hi are its bounds by the quartiles of both rows.
type ratio struct {
	mid, lo, hi float64
	runs        int // of the row with fewer
	where       regime
}

// ratio compares two rows in the regime in which both have more runs. ok is false if they
// have no regime in common.
func (t *table) ratio(a, b key) (best ratio, ok bool) {
	for _, where := range []regime{near, far} {
		if r := t.ratioIn(a, b, where); r.runs > best.runs {
			best = r
		}
	}
	return best, best.runs > 0
}

func (t *table) ratioIn(a, b key, where regime) ratio {
	va, vb := values(t.runsIn(a, where), ns), values(t.runsIn(b, where), ns)
	if len(va) == 0 || len(vb) == 0 {
		return ratio{}
	}
	return ratio{
		mid:   median(va) / median(vb),
		lo:    quantile(va, 0.25) / quantile(vb, 0.75),
		hi:    quantile(va, 0.75) / quantile(vb, 0.25),
		runs:  min(len(va), len(vb)),
		where: where,
	}
}
