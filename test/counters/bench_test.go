package counters

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/telemetry/bpf/bpftest"
)

// BenchmarkMirror moves frames over two vifs in turn, one with its counters
// mirrored and one without, in short windows side by side, so that what else the
// machine does falls on both. It reports the median of the windows' ratios, the
// difference per frame, and how far two vifs without mirrors are apart when they
// are measured in the same way: what that differs from 1 is the noise.
func BenchmarkMirror(b *testing.B) {
	for _, size := range []int{64, 1500} {
		for _, batch := range []int{1, 8, 32} {
			b.Run(fmt.Sprintf("size=%d/batch=%d", size, batch), func(b *testing.B) {
				with := newPathOf(b, &bpf.Store{}, batch)
				without, other := newPathOf(b, nil, batch), newPathOf(b, nil, batch)
				const frames = 4096 // a window
				window := func(p *path) float64 {
					start := time.Now()
					for range frames / batch {
						p.move(b, size)
					}
					return float64(time.Since(start).Nanoseconds()) / frames
				}
				for _, p := range []*path{with, without, other} {
					window(p)
				}
				var ratios, noise, costs, on, off []float64
				for i := 0; b.Loop(); i++ {
					// Whoever comes later in a round must not always be the same.
					order := [][3]*path{{with, without, other}, {without, other, with}, {other, with, without}}[i%3]
					var ns [3]float64
					for _, p := range order {
						t := window(p)
						switch p {
						case with:
							ns[0] = t
						case without:
							ns[1] = t
						default:
							ns[2] = t
						}
					}
					ratios = append(ratios, ns[0]/ns[1])
					noise = append(noise, ns[2]/ns[1])
					costs = append(costs, ns[0]-ns[1])
					on, off = append(on, ns[0]), append(off, ns[1])
				}
				b.ReportMetric(median(ratios), "ratio")
				b.ReportMetric(median(noise), "noise-ratio")
				b.ReportMetric(median(costs), "ns/frame-more")
				b.ReportMetric(median(off), "ns/frame")
				b.ReportMetric(slices.Min(on)/slices.Min(off), "best-ratio")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

func newPathOf(b *testing.B, s *bpf.Store, batch int) *path {
	cfg := pvnet.Config{}
	if s != nil {
		cfg.Counters = s
	}
	w := newWire(b, cfg, cfg)
	if kind, reason := w.Front.Counters().Backend(); (kind == "heap") != (s == nil) {
		b.Fatalf("counters are in %s (%s)", kind, reason)
	}
	return newPath(b, w.Front, w.Back, 0, batch)
}

func median(s []float64) float64 {
	s = slices.Sorted(slices.Values(s))
	return s[len(s)/2]
}

// TestMoveForCounting moves as many frames as the environment asks for, for tools
// that count the instructions of a whole process:
//
//	BAREVIF_MOVE=1000000,32,64,mirror perf stat -e instructions:u counters.test -test.run MoveForCounting
func TestMoveForCounting(t *testing.T) {
	frames, batch, size, mirror := 4096, 32, 64, true
	if s := os.Getenv("BAREVIF_MOVE"); s != "" {
		var where string
		if _, err := fmt.Sscanf(s, "%d,%d,%d,%s", &frames, &batch, &size, &where); err != nil {
			t.Fatal(strconv.Quote(s), err)
		}
		mirror = where == "mirror"
	}
	cfg := pvnet.Config{}
	if mirror {
		cfg.Counters = &bpf.Store{}
	}
	w := newWire(t, cfg, cfg)
	kind, reason := w.Front.Counters().Backend()
	t.Logf("counters are in %s %s", kind, reason)
	p := newPath(t, w.Front, w.Back, 0, batch)
	for range frames / batch {
		p.move(t, size)
	}
	want := uint64(frames / batch * batch)
	bpftest.Eventually(t, "the counts are published", func() bool {
		f, b := w.Front.Stats(), w.Back.Stats()
		return f.TX.Get(telemetry.Packets) == want && b.RX.Get(telemetry.Packets) == want
	})
}
