package telemetry

import (
	"fmt"
	"testing"
)

var frames = 0

//go:noinline
func move(n int) int { return n + 1 }

// BenchmarkFrame counts as for one frame, and publishes once per batch. "off" is the loop
// without counters, "private" counts without publishing.
func BenchmarkFrame(b *testing.B) {
	for _, batch := range []int{1, 8, 32} {
		for _, mode := range []string{"off", "private", "heap", "mirror"} {
			b.Run(fmt.Sprintf("%s/batch=%d", mode, batch), func(b *testing.B) {
				s := NewSet(1)
				if mode == "mirror" {
					if err := s.Attach(newHeapMirror(1)); err != nil {
						b.Fatal(err)
					}
				}
				blk := s.TX(0)
				for b.Loop() {
					var n, bytes uint64
					for range batch {
						frames = move(frames)
						if mode == "off" {
							continue
						}
						n++
						bytes += 60
						blk.Observe(FrameSize, 60)
					}
					if mode == "off" {
						continue
					}
					blk.Add(Packets, n)
					blk.Add(Bytes, bytes)
					blk.Add(Slots, n)
					blk.Add(NotifiesSpared, 1)
					blk.Observe(BatchSize, n)
					blk.Set(RingUsed, n)
					if mode != "private" {
						blk.Publish()
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/frame")
			})
		}
	}
}

func BenchmarkPublish(b *testing.B) {
	for _, words := range []int{0, 1, 4, 16} {
		for _, mirror := range []bool{false, true} {
			b.Run(fmt.Sprintf("words=%d/mirror=%v", words, mirror), func(b *testing.B) {
				s := NewSet(1)
				if mirror {
					if err := s.Attach(newHeapMirror(1)); err != nil {
						b.Fatal(err)
					}
				}
				blk := s.TX(0)
				for b.Loop() {
					for c := range words {
						blk.Add(Counter(c*2+1), 1)
					}
					blk.Publish()
				}
			})
		}
	}
}

func BenchmarkSnapshot(b *testing.B) {
	for _, queues := range []int{1, 8} {
		b.Run(fmt.Sprintf("queues=%d", queues), func(b *testing.B) {
			s := NewSet(queues)
			for b.Loop() {
				s.Snapshot()
			}
		})
	}
}

func BenchmarkRefresh(b *testing.B) {
	s := NewSet(1)
	if err := s.Attach(newHeapMirror(1)); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s.RX(0).Refresh()
	}
}
