package main

import (
	"fmt"
	"io"

	"barevif/pvnet"
)

// A goal is a bound that a run must meet. Its figure is computed from the table.
type goal struct {
	about  string
	want   float64
	least  bool // want is the least value, not the largest
	figure func(t *table) (value float64, how string, err error)
}

var ends = []struct {
	back bool
	name string
}{{false, "front→back"}, {true, "back→front"}}

// polled is the row of an owner that polls, to compare with peers that poll.
func polled(back bool, batch, size int) key {
	return key{vifOptions{Back: back, Batch: batch, Poll: true}.name(), stream, size}
}

// goals returns the project's goals, for both directions of a vif if there are rows for
// both.
func goals(rows []*row) []goal {
	var all []goal
	for _, end := range ends {
		about := func(format string, a ...any) string { return end.name + ": " + fmt.Sprintf(format, a...) }
		memif := func(size int) key { return key{nameMemif, stream, size} }
		all = append(all,
			goal{about("64 B, b32, frames/s against gomemif, polled"), 2, true, timesAsFast(polled(end.back, 32, sizeSmall), memif(sizeSmall))},
			goal{about("64 B, b32, frames/s against gVisor's endpoint"), 8, true, timesAsFast(polled(end.back, 32, sizeSmall),
				key{nameEndpoint(1), stream, sizeSmall}, key{nameEndpoint(32), stream, sizeSmall})},
			goal{about("64 B, b32, frames/s against the best way through the kernel"), 25, true,
				timesAsFast(polled(end.back, 32, sizeSmall), ofClass(rows, kernel, stream, sizeSmall)...)},
			goal{about("64 B, b32, ns/frame against the raw ring with the same copies"), 2.5, false,
				timesAsLong(polled(end.back, 32, sizeSmall), key{nameRaw(end.back, 32), stream, sizeSmall})},
			goal{about("64 B, b1, ns/frame against the raw ring with the same copies"), 2, false,
				timesAsLong(polled(end.back, 1, sizeSmall), key{nameRaw(end.back, 1), stream, sizeSmall})},
			goal{about("64 B, b1, frames/s against gomemif, polled"), 1, true, timesAsFast(polled(end.back, 1, sizeSmall), memif(sizeSmall))},
			goal{about("1500 B, b32, frames/s against gomemif, polled"), 1.3, true, timesAsFast(polled(end.back, 32, sizeMTU), memif(sizeMTU))},
			goal{about("64 KiB, b8, bytes/s against gomemif, polled"), 0.8, true, timesAsFast(polled(end.back, 8, sizeGSO), memif(sizeGSO))})
	}
	// A copy is not worth a page that has to be lent and taken back if the frame is short.
	for _, g := range []struct {
		size int
		lend bool
	}{{sizeSmall, false}, {sizeMTU, true}} {
		copies := polled(false, 32, g.size)
		if g.lend {
			copies = key{vifOptions{InPlace: true, Batch: 32, Poll: true}.name(), stream, g.size}
		}
		static := key{vifOptions{Static: true, Lend: g.lend, InPlace: g.lend, Batch: 32, Poll: true}.name(), stream, g.size}
		all = append(all, goal{fmt.Sprintf("static grants, %d B, b32, frames/s against grant copies", g.size), 1.3, true, timesAsFast(static, copies)})
	}
	for _, o := range []vifOptions{{Wait: pvnet.Busy}, {Wait: pvnet.Adaptive}} {
		k := key{namePing(o, false), pingpong, sizeSmall}
		all = append(all, goal{"ping-pong, " + k.row + ", against the raw ring, polled", 2, false,
			timesAsLong(k, key{nameRawPing, pingpong, sizeSmall})})
	}
	for _, g := range []struct {
		free  bool
		floor string
		want  float64
	}{{false, nameEventfd, 1.3}, {true, nameNetpoller, 1.1}} {
		for _, two := range []bool{false, true} {
			if g.free && two {
				continue // this floor has one process, and its poller wakes no other process
			}
			k := key{namePing(vifOptions{Wait: pvnet.Park, Two: two}, g.free), pingpong, sizeSmall}
			all = append(all, goal{"ping-pong, " + k.row + ", against " + g.floor, g.want, false,
				timesAsLong(k, key{g.floor, pingpong, sizeSmall})})
		}
	}
	var owners []key
	for _, r := range rows {
		if o, ok := r.peer.(vifOptions); ok && r.kind == stream && !o.Two {
			for _, size := range r.sizes {
				owners = append(owners, key{r.name, stream, size})
			}
		}
	}
	all = append(all, goal{"allocations/frame, the most of all streams in one process", 0, false,
		largestMedian(owners, "%.3f", func(r Run) float64 { return r.Allocs })})
	for _, end := range ends {
		for _, o := range []vifOptions{{Wait: pvnet.Adaptive}, {Wait: pvnet.Park}} { // the modes that park
			o.Back, o.Batch = end.back, 32
			all = append(all, goal{o.name() + ", 64 B, notifies/frame while frames move", 0.02, false,
				largestMedian([]key{{o.name(), stream, sizeSmall}}, "%.4f", func(r Run) float64 { return r.Notifies })})
		}
	}
	return append(all, goal{"counters on against off, time of a frame", 1.01, false,
		largestMedian([]key{{nameCounters, counters, sizeSmall}}, "%.4f", ns)})
}

func ofClass(rows []*row, class, kind string, size int) (keys []key) {
	for _, r := range rows {
		if r.class == class && r.kind == kind {
			keys = append(keys, key{r.name, kind, size})
		}
	}
	return keys
}

// timesAsLong computes the time of a, in multiples of the time of b.
func timesAsLong(a, b key) func(*table) (float64, string, error) {
	return func(t *table) (float64, string, error) {
		for _, k := range []key{a, b} {
			if t.cells[k] == nil {
				return 0, "", fmt.Errorf("%s was not measured", k.row)
			}
		}
		r, ok := t.ratio(a, b)
		if !ok {
			return 0, "", fmt.Errorf("%s and %s were never measured in one regime", a.row, b.row)
		}
		return r.mid, fmt.Sprintf("%s, %d runs, %.2f to %.2f", r.where, r.runs, r.lo, r.hi), nil
	}
}

// timesAsFast computes the speed of a, in multiples of the speed of the fastest peer.
func timesAsFast(a key, peers ...key) func(*table) (float64, string, error) {
	return func(t *table) (value float64, how string, err error) {
		err = fmt.Errorf("%s was not measured", a.row)
		for _, b := range peers {
			if t.cells[a] == nil || t.cells[b] == nil {
				continue
			}
			if r, ok := t.ratio(b, a); ok && (err != nil || r.mid < value) {
				value, how, err = r.mid, fmt.Sprintf("%s; %s, %d runs, %.2f to %.2f", b.row, r.where, r.runs, r.lo, r.hi), nil
			}
		}
		if err != nil && t.cells[a] != nil {
			err = fmt.Errorf("no peer to compare with was measured")
		}
		return value, how, err
	}
}

// largestMedian computes the largest median of those cells that were measured.
func largestMedian(keys []key, format string, of func(Run) float64) func(*table) (float64, string, error) {
	return func(t *table) (value float64, how string, err error) {
		err = fmt.Errorf("%s was not measured", keys[0].row)
		for _, k := range keys {
			if c := t.cells[k]; c != nil {
				if v := median(values(c.runs, of)); err != nil || v > value {
					value, how, err = v, fmt.Sprintf("%s, %d B: "+format, k.row, k.bytes, v), nil
				}
			}
		}
		return value, how, err
	}
}

// noAllocs is the number of allocations per frame that counts as none: the runtime and the
// harness allocate now and then.
const noAllocs = 0.001

func (g goal) met(value float64) bool {
	if g.least {
		return value >= g.want
	}
	return value <= max(g.want, noAllocs)
}

func reportGoals(w io.Writer, t *table, all []goal) {
	fmt.Fprint(w, "| goal | want | measured | | from |\n|---|---:|---:|---|---|\n")
	for _, g := range all {
		want := fmt.Sprintf("≤ %v", g.want)
		if g.least {
			want = fmt.Sprintf("≥ %v", g.want)
		}
		value, how, err := g.figure(t)
		switch {
		case err != nil:
			fmt.Fprintf(w, "| %s | %s | | not measured | %v |\n", g.about, want, err)
		case g.met(value):
			fmt.Fprintf(w, "| %s | %s | %s | met | %s |\n", g.about, want, fmt.Sprintf("%.4g", value), how)
		default:
			fmt.Fprintf(w, "| %s | %s | %s | **missed** | %s |\n", g.about, want, fmt.Sprintf("%.4g", value), how)
		}
	}
	fmt.Fprintln(w)
}
