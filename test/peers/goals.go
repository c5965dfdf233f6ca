package main

import (
	"fmt"
	"io"
	"slices"

	"barevif/pvnet"
)

// A goal is a bound that a run must meet. Its figure is computed from the table.
type goal struct {
	about  string
	want   float64
	least  bool // want is the least value, not the largest
	figure figure
	floor  figure // the same of the raw ring instead of the vif: what nobody can better; may be nil
}

// A figure is computed from the table, and says of what.
type figure func(t *table) (value float64, how string, err error)

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
		add := func(about string, want float64, least bool, with func(key, ...key) figure, batch, size int, peers ...key) {
			g := goal{about: end.name + ": " + about, want: want, least: least, figure: with(polled(end.back, batch, size), peers...)}
			raw := key{nameRaw(end.back, batch), stream, size}
			if size == sizeGSO { // whose row has the batch that fits: see job.limitBatch
				raw.row = nameRaw(end.back, 32)
			}
			if !slices.Contains(peers, raw) {
				g.floor = with(raw, peers...)
			}
			all = append(all, g)
		}
		memif := func(size int) key { return key{nameMemif, stream, size} }
		raw := func(batch int) key { return key{nameRaw(end.back, batch), stream, sizeSmall} }
		add("64 B, b32, frames/s against gomemif, polled", 2, true, timesAsFast, 32, sizeSmall, memif(sizeSmall))
		add("64 B, b32, frames/s against gVisor's endpoint", 8, true, timesAsFast, 32, sizeSmall,
			key{nameEndpoint(1), stream, sizeSmall}, key{nameEndpoint(32), stream, sizeSmall})
		add("64 B, b32, frames/s against the best way through the kernel", 25, true, timesAsFast, 32, sizeSmall,
			ofClass(rows, kernel, stream, sizeSmall)...)
		add("64 B, b32, ns/frame against the raw ring with the same copies", 2.5, false, timesAsLong, 32, sizeSmall, raw(32))
		add("64 B, b1, ns/frame against the raw ring with the same copies", 2, false, timesAsLong, 1, sizeSmall, raw(1))
		add("64 B, b1, frames/s against gomemif, polled", 1, true, timesAsFast, 1, sizeSmall, memif(sizeSmall))
		add("1500 B, b32, frames/s against gomemif, polled", 1.3, true, timesAsFast, 32, sizeMTU, memif(sizeMTU))
		add("64 KiB, b8, bytes/s against gomemif, polled", 0.8, true, timesAsFast, 8, sizeGSO, memif(sizeGSO))
		many := manyVifs[len(manyVifs)-1]
		all = append(all, goal{about: fmt.Sprintf("%s: %d vifs, 64 B, b32, polled, ns/frame against one", end.name, many), want: 1.1,
			figure: timesAsLong(key{vifOptions{Back: end.back, Batch: 32, Poll: true, Vifs: many}.name(), stream, sizeSmall}, polled(end.back, 32, sizeSmall)),
			floor:  timesAsLong(key{nameRawMany(end.back, 32, many), stream, sizeSmall}, raw(32))})
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
		all = append(all, goal{about: fmt.Sprintf("static grants, %d B, b32, frames/s against grant copies", g.size), want: 1.3, least: true, figure: timesAsFast(static, copies)})
	}
	for _, o := range []vifOptions{{Wait: pvnet.Busy}, {Wait: pvnet.Adaptive}} {
		k := key{namePing(o, false), pingpong, sizeSmall}
		all = append(all, goal{about: "ping-pong, " + k.row + ", against the raw ring, polled", want: 2,
			figure: timesAsLong(k, key{nameRawPing, pingpong, sizeSmall})})
	}
	for _, g := range []struct {
		two, free bool
		floor     string
		want      float64
	}{{false, false, nameEventfd, 1.3}, {true, false, nameEventfdTwo, 1.3}, {false, true, nameNetpoller, 1.1}} {
		k := key{namePing(vifOptions{Wait: pvnet.Park, Two: g.two}, g.free), pingpong, sizeSmall}
		all = append(all, goal{about: "ping-pong, " + k.row + ", against " + g.floor, want: g.want,
			figure: timesAsLong(k, key{g.floor, pingpong, sizeSmall})})
	}
	var owners, raw []key
	for _, r := range rows {
		o, vif := r.peer.(vifOptions)
		for _, size := range r.sizes {
			switch {
			case r.kind != stream:
			case vif && !o.Two:
				owners = append(owners, key{r.name, stream, size})
			case r.class == floor:
				raw = append(raw, key{r.name, stream, size})
			}
		}
	}
	allocs := func(r Run) float64 { return r.Allocs }
	all = append(all, goal{about: "allocations/frame, the most of all streams in one process",
		figure: largestMedian(owners, "%.3f", allocs), floor: largestMedian(raw, "%.3f", allocs)})
	for _, end := range ends {
		for _, o := range []vifOptions{{Wait: pvnet.Adaptive}, {Wait: pvnet.Park}} { // the modes that park
			o.Back, o.Batch = end.back, 32
			all = append(all, goal{about: o.name() + ", 64 B, notifies/frame while frames move", want: 0.02,
				figure: largestMedian([]key{{o.name(), stream, sizeSmall}}, "%.4f", func(r Run) float64 { return r.Notifies })})
		}
	}
	return append(all, goal{about: "counters on against off, time of a frame", want: 1.01,
		figure: largestMedian([]key{{nameCounters, counters, sizeSmall}}, "%.4f", ns)})
}

func ofClass(rows []*row, class, kind string, size int) (keys []key) {
	for _, r := range rows {
		if r.class == class && r.kind == kind {
			keys = append(keys, key{r.name, kind, size})
		}
	}
	return keys
}

// timesAsLong computes the time of a, in multiples of the time of the one peer.
func timesAsLong(a key, peers ...key) figure {
	b := peers[0]
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
func timesAsFast(a key, peers ...key) figure {
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
func largestMedian(keys []key, format string, of func(Run) float64) figure {
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

// reportGoals prints a table of the goals. Its column of the raw ring holds the floor's figure: if that
// misses the goal too, the ring's format and this machine's memory do not allow it.
func reportGoals(w io.Writer, t *table, all []goal) {
	fmt.Fprint(w, "| goal | want | measured | | the raw ring itself | from |\n|---|---:|---:|---|---:|---|\n")
	for _, g := range all {
		want := fmt.Sprintf("≤ %v", g.want)
		if g.least {
			want = fmt.Sprintf("≥ %v", g.want)
		}
		floor := ""
		if g.floor != nil {
			if value, _, err := g.floor(t); err == nil {
				floor = fmt.Sprintf("%.4g", value)
			}
		}
		value, how, err := g.figure(t)
		switch {
		case err != nil:
			fmt.Fprintf(w, "| %s | %s | | not measured | %s | %v |\n", g.about, want, floor, err)
		case g.met(value):
			fmt.Fprintf(w, "| %s | %s | %.4g | met | %s | %s |\n", g.about, want, value, floor, how)
		default:
			fmt.Fprintf(w, "| %s | %s | %.4g | **missed** | %s | %s |\n", g.about, want, value, floor, how)
		}
	}
	fmt.Fprintln(w)
}
