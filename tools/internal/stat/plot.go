package stat

import (
	"fmt"
	"math"
	"strings"

	"github.com/guptarohit/asciigraph"
)

// Plot draws the rates and the ring occupancy of every device, width columns wide and
// each plot height lines high. Without colours, which a file must not contain, letters
// draw the lines.
func Plot(h *History, width, height int, colour bool) string {
	var b strings.Builder
	for i := range h.series {
		s := &h.series[i]
		if s.Queue != All {
			continue
		}
		if len(s.Samples) < 2 {
			fmt.Fprintf(&b, "%s: not enough seen yet for a plot\n", s.Vif)
			continue
		}
		span := Age(s.Samples[len(s.Samples)-1].Time.Sub(s.Samples[0].Time))
		draw := func(caption string, top float64, a, z func(*Sample) float64) {
			data := [][]float64{make([]float64, len(s.Samples)), make([]float64, len(s.Samples))}
			var most float64
			for k := range s.Samples {
				data[0][k], data[1][k] = a(&s.Samples[k]), z(&s.Samples[k])
				most = max(most, data[0][k], data[1][k])
			}
			if top == 0 {
				top = float64(height) * round(most/float64(height))
			}
			key := ""
			if !colour {
				key = "; r rx, t tx"
			}
			opts := []asciigraph.Option{
				asciigraph.Height(height), asciigraph.Width(max(width-12, 10)), asciigraph.LowerBound(0),
				asciigraph.UpperBound(top),
				asciigraph.Caption(fmt.Sprintf("%s: %s, last %s%s", s.Vif, caption, span, key)),
				asciigraph.YAxisValueFormatter(func(f float64) string { return fmt.Sprintf("%6s", SI(f)) }),
			}
			if colour {
				opts = append(opts, asciigraph.SeriesColors(asciigraph.DodgerBlue, asciigraph.Orange),
					asciigraph.SeriesLegends("rx", "tx"))
			} else {
				// Without colours the lines differ by their letters.
				opts = append(opts, asciigraph.SeriesChars(asciigraph.CreateCharSet("r"), asciigraph.CreateCharSet("t")))
			}
			b.WriteString(asciigraph.PlotMany(data, opts...))
			b.WriteString("\n\n")
		}
		draw("frames/s", 0, func(s *Sample) float64 { return s.RxFrames }, func(s *Sample) float64 { return s.TxFrames })
		if !s.Ring {
			fmt.Fprintf(&b, "%s: what its rings hold has not been measured yet\n\n", s.Vif)
			continue
		}
		draw("ring slots in use, mean", float64(max(s.RxSize, s.TxSize)),
			func(s *Sample) float64 { return s.RxUsed }, func(s *Sample) float64 { return s.TxUsed })
	}
	return b.String()
}

// round returns the next readable step for an axis.
func round(step float64) float64 {
	if step <= 1 {
		return 1
	}
	unit := math.Pow(10, math.Floor(math.Log10(step)))
	for _, n := range [...]float64{1, 1.5, 2, 2.5, 3, 4, 5, 6, 8} {
		if step <= n*unit {
			return n * unit
		}
	}
	return 10 * unit
}
