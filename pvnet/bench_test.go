package pvnet

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"barevif/arena/shm"
	"barevif/hypercall/emu"
)

// BenchmarkDevice moves frames from one owner to the other: in one goroutine, which shows
// the cost of the code, and between two, which adds the cost of cache lines and wake-ups.
func BenchmarkDevice(b *testing.B) {
	for _, dir := range []string{"front-to-back", "back-to-front"} {
		for _, size := range []int{64, 1500, 65535} {
			for _, batch := range []int{1, 32} {
				if size > shm.PageSize && batch > 8 {
					batch = 8 // 8 frames of 17 slots
				}
				b.Run(fmt.Sprintf("%s/size=%d/batch=%d/one", dir, size, batch), func(b *testing.B) {
					tx, rx := benchPair(b, dir)
					moveInOne(b, tx, rx, size, batch)
				})
				b.Run(fmt.Sprintf("%s/size=%d/batch=%d/two", dir, size, batch), func(b *testing.B) {
					tx, rx := benchPair(b, dir)
					b.ReportAllocs()
					var total atomic.Int64 // how many frames the receiver gets; -1 while the sender still runs
					total.Store(-1)
					done := make(chan struct{})
					go func() {
						defer close(done)
						frames := make([]Frame, batch)
						for got := int64(0); got != total.Load(); {
							n, err := rx.Receive(frames)
							if err != nil {
								continue // woken to look at total
							}
							rx.Release(frames[:n])
							got += int64(n)
						}
					}()
					sent := 0
					frames := make([]Frame, batch)
					for b.Loop() {
						n, err := tx.AllocWait(frames, size)
						if err != nil {
							b.Fatal(err)
						}
						if _, err := tx.SendWait(frames[:n]); err != nil {
							b.Fatal(err)
						}
						sent += n
					}
					total.Store(int64(sent))
					rx.SetDeadline(time.Now().Add(time.Millisecond))
					<-done
					report(b, sent, size)
				})
			}
		}
	}
}

// moveInOne moves batches of frames in one goroutine.
func moveInOne(b *testing.B, tx *TX, rx *RX, size, batch int) {
	frames := make([]Frame, batch)
	b.ReportAllocs()
	for b.Loop() {
		n := tx.AllocSize(frames, size)
		if k, err := tx.Send(frames[:n]); k != batch {
			b.Fatal(k, err)
		}
		for n > 0 {
			k, err := rx.Receive(frames[:n])
			if err != nil {
				b.Fatal(err)
			}
			rx.Release(frames[:k])
			n -= k
		}
	}
	report(b, b.N*batch, size)
}

func benchPair(b *testing.B, dir string) (*TX, *RX) {
	p := join(b, emu.Config{}, plain, Config{})
	from, to := p.front, p.back
	if dir == "back-to-front" {
		from, to = to, from
	}
	tx, err := from.OwnTX(0)
	if err != nil {
		b.Fatal(err)
	}
	rx, err := to.OwnRX(0)
	if err != nil {
		b.Fatal(err)
	}
	return tx, rx
}

func report(b *testing.B, frames, size int) {
	ns := float64(b.Elapsed().Nanoseconds()) / float64(frames)
	b.ReportMetric(ns, "ns/frame")
	b.ReportMetric(1e9/ns, "frames/s")
	b.ReportMetric(float64(size)*8/ns, "Gbit/s")
}

// BenchmarkStaticGrants compares three ways for the same frames in one goroutine: grant
// copies, a mapped page that is copied, and a mapped page that is lent.
func BenchmarkStaticGrants(b *testing.B) {
	for _, dir := range []string{"front-to-back", "back-to-front"} {
		for _, size := range []int{64, 1500, 65535} {
			for _, way := range []string{"copied", "mapped", "lent"} {
				if way == "lent" && dir == "back-to-front" {
					continue // a frontend lends with and without static grants
				}
				b.Run(fmt.Sprintf("%s/size=%d/%s", dir, size, way), func(b *testing.B) {
					p := join(b, emu.Config{}, plain, Config{LendRx: way == "lent"})
					if way != "copied" {
						static(b, p)
					}
					from, to := p.front, p.back
					if dir == "back-to-front" {
						from, to = to, from
					}
					tx, _ := from.OwnTX(0)
					rx, _ := to.OwnRX(0)
					batch := 32
					if size > shm.PageSize {
						batch = 4
					}
					moveInOne(b, tx, rx, size, batch)
				})
			}
		}
	}
}
