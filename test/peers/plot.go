package main

import (
	"fmt"
	"html"
	"math"
	"os"
	"strings"
)

// plot writes a drawing of every run: a panel for each kind and size, a line for each
// row, and on it a dot for each run, full if the CPUs were near and hollow if far.
// Time goes to the right, in powers of ten.
func (r *Result) plot(name string, t *table) error {
	const (
		labels = 420 // pixels
		width  = 1100
		line   = 15
		top    = 46
	)
	colour := map[string]string{ours: "#0b62a4", floor: "#777777", user: "#b5541c", kernel: "#3c8031"}
	type panel struct {
		kind  string
		bytes int
		keys  []key
	}
	var panels []*panel
	classes := map[key]string{}
	for _, run := range r.Runs {
		k := run.key()
		if classes[k] != "" || run.Kind == counters {
			continue
		}
		classes[k] = run.Class
		var p *panel
		for _, q := range panels {
			if q.kind == run.Kind && q.bytes == run.Bytes {
				p = q
			}
		}
		if p == nil {
			p = &panel{kind: run.Kind, bytes: run.Bytes}
			panels = append(panels, p)
		}
		p.keys = append(p.keys, k)
	}
	var b strings.Builder
	y := 30
	fmt.Fprintf(&b, `<text x="8" y="18" font-size="13">%s, %s, commit %s. Full: CPUs near; hollow: far.`, html.EscapeString(r.Machine.CPU), r.Date, r.Commit)
	b.WriteString("</text>\n")
	for _, p := range panels {
		lo, hi := math.Inf(1), math.Inf(-1)
		for _, k := range p.keys {
			for _, run := range t.cells[k].runs {
				lo, hi = min(lo, math.Log10(run.Ns)), max(hi, math.Log10(run.Ns))
			}
		}
		lo, hi = math.Floor(lo), max(math.Ceil(hi), math.Floor(lo)+1)
		x := func(ns float64) float64 { return labels + (math.Log10(ns)-lo)/(hi-lo)*(width-labels-20) }
		what := "ns a frame"
		if p.kind == pingpong {
			what = "ns a round trip"
		}
		fmt.Fprintf(&b, `<text x="8" y="%d" font-size="13" font-weight="bold">%s, %d bytes, %s</text>`+"\n", y+24, p.kind, p.bytes, what)
		bottom := y + top + line*len(p.keys)
		for d := lo; d <= hi; d++ {
			at := x(math.Pow(10, d))
			fmt.Fprintf(&b, `<path d="M%.1f %dV%d" stroke="#dddddd"/><text x="%.1f" y="%d" text-anchor="middle">%.0f</text>`+"\n",
				at, y+top-8, bottom, at, y+top-12, math.Pow(10, d))
		}
		for i, k := range p.keys {
			c, at := colour[classes[k]], y+top+line*i
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end" fill="%s">%s</text>`+"\n", labels-8, at+11, c, html.EscapeString(k.row))
			for _, run := range t.cells[k].runs {
				fill := c
				if t.regime(run) == far {
					fill = "none"
				}
				fmt.Fprintf(&b, `<circle cx="%.1f" cy="%d" r="3" stroke="%s" fill="%s" fill-opacity="0.6"/>`, x(run.Ns), at+7, c, fill)
			}
			b.WriteByte('\n')
		}
		y = bottom + 16
	}
	svg := fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n"+
		`<rect width="100%%" height="100%%" fill="white"/>`+"\n%s</svg>\n", width, y, b.String())
	return os.WriteFile(name, []byte(svg), 0o644)
}
