//go:build linux

package bpf

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/telemetry"
	"barevif/telemetry/bpf/bpftest"
)

// BenchmarkPublish counts one batch of frames as the owner of a queue does, with every
// kind of mirror.
func BenchmarkPublish(b *testing.B) {
	for _, batch := range []int{1, 8, 32} {
		for _, kind := range []string{"heap", KindMemfd, withPins()} {
			b.Run(fmt.Sprintf("%s/batch=%d", kind, batch), func(b *testing.B) {
				set := telemetry.NewSet(1)
				info := telemetry.Info{Handle: 1, Queues: 1}
				switch kind {
				case KindMemfd:
					m := &mirror{name: info.Name(), base: make([][]uint64, 2)}
					if err := m.makeMemfd(1); err != nil {
						b.Fatal(err)
					}
					if err := set.Attach(m); err != nil {
						b.Fatal(err)
					}
				case withPins():
					bpftest.Need(b)
					open(b, &Store{}, telemetry.Info{Handle: 2}, 1, kind)
					set = open(b, &Store{}, info, 1, kind)
				}
				blk := set.TX(0)
				for b.Loop() {
					for range batch {
						blk.Observe(telemetry.FrameSize, 60)
					}
					blk.Add(telemetry.Packets, uint64(batch))
					blk.Add(telemetry.Bytes, uint64(60*batch))
					blk.Add(telemetry.Slots, uint64(batch))
					blk.Add(telemetry.NotifiesSpared, 1)
					blk.Observe(telemetry.BatchSize, uint64(batch))
					blk.Set(telemetry.RingUsed, uint64(batch))
					blk.Publish()
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/frame")
				set.Close()
			})
		}
	}
}

func BenchmarkOpenClose(b *testing.B) {
	bpftest.Need(b)
	for b.Loop() {
		set := telemetry.NewSet(2)
		set.Open(&Store{}, telemetry.Info{Handle: 3})
		set.Close()
	}
}

// BenchmarkCat reads the metrics as a monitoring agent does.
func BenchmarkCat(b *testing.B) {
	bpftest.NeedIterator(b)
	for _, queues := range []int{1, 8} {
		b.Run(fmt.Sprintf("queues=%d", queues), func(b *testing.B) {
			info := telemetry.Info{Handle: 4}
			open(b, &Store{}, info, queues, KindIterator)
			path := filepath.Join(DefaultRoot, info.Name(), pinMetrics)
			buf := make([]byte, 64<<10)
			for b.Loop() {
				fd, err := unix.Open(path, os.O_RDONLY, 0)
				if err != nil {
					b.Fatal(err)
				}
				for {
					n, err := unix.Read(fd, buf)
					if err != nil {
						b.Fatal(err)
					}
					if n == 0 {
						break
					}
				}
				unix.Close(fd)
			}
		})
	}
}
