package bridge

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/xenbus/xenstore/server/labtest"
)

// A talker is a guest's two halves, for one goroutine.
type talker struct {
	b       *testing.B
	tx      *pvnet.TX
	rx      *pvnet.RX
	out, in [32]pvnet.Frame
}

func newTalker(b *testing.B, dev *pvnet.Device) *talker {
	tx, err := dev.OwnTX(0)
	if err != nil {
		b.Fatal(err)
	}
	rx, err := dev.OwnRX(0)
	if err != nil {
		b.Fatal(err)
	}
	limit := time.Now().Add(labtest.Limit)
	tx.SetDeadline(limit)
	rx.SetDeadline(limit)
	return &talker{b: b, tx: tx, rx: rx}
}

// send sends n frames as one batch; wait: after there is room for all.
func (k *talker) send(sample []byte, n int, wait bool) (sent int) {
	if wait {
		n, _ = k.tx.AllocWait(k.out[:n], len(sample))
	} else {
		n = k.tx.AllocSize(k.out[:n], len(sample))
	}
	for i := range k.out[:n] {
		k.out[i].CopyFrom(sample)
	}
	if wait {
		sent, _ = k.tx.SendWait(k.out[:n])
	} else {
		sent, _ = k.tx.Send(k.out[:n])
	}
	for i := sent; i < n; i++ {
		k.out[i].Release()
	}
	return sent
}

// receive waits for frames and shows each, and returns how many there were; 0 at the deadline.
func (k *talker) receive(show func([]byte)) int {
	n, _ := k.rx.Receive(k.in[:])
	for i := range k.in[:n] {
		if show != nil {
			show(k.in[i].Bytes())
		}
	}
	k.rx.Release(k.in[:n])
	return n
}

// BenchmarkBridge moves frames of 64 bytes through a bridge between guests in pairs, each of
// which has 128 frames under way. ns/frame is the time by all frames of all pairs.
func BenchmarkBridge(b *testing.B) {
	for _, guests := range []int{2, 16} {
		for _, pooled := range []bool{false, true} {
			b.Run(fmt.Sprintf("vifs=%d/pool=%t", guests, pooled), func(b *testing.B) { benchBridge(b, guests, pooled) })
		}
	}
}

func benchBridge(b *testing.B, guests int, pooled bool) {
	l := newLANOf(b, pooled, Config{}, pvnet.ServeConfig{}, same(guests, PortConfig{}), seq(guests)...)
	talkers := make([]*talker, guests)
	for i := range talkers {
		talkers[i] = newTalker(b, l.Fronts[i])
		talkers[i].send(frame(pvnet.MAC{1, 0x80, 0xc2}, mac(i), 0)[:64], 1, true) // a reserved group: the bridge learns the guest
	}
	until(b, "all stations", func() bool { return len(l.Stations()) == guests })
	const window, rounds = 4, 100 // batches
	moved := 0
	for b.Loop() {
		var wg sync.WaitGroup
		for i := 0; i < guests; i += 2 {
			from, to := talkers[i], talkers[i+1]
			sample := frame(mac(i+1), mac(i), 0)[:64]
			wg.Go(func() {
				left, under := rounds*32, 0
				for left > 0 || under > 0 {
					for left > 0 && under < window*32 {
						n := from.send(sample, min(32, left), true)
						left -= n
						under += n
					}
					n := to.receive(nil)
					if under -= n; n == 0 {
						b.Error("a frame was lost")
						return
					}
				}
			})
		}
		wg.Wait()
		moved += guests / 2 * rounds * 32
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(moved), "ns/frame")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkFlooder measures what one guest that floods leaves to others, which send to the
// same guest: 14 of them a batch of 8 frames every 2 ms, and then as much as they can with 32
// frames under way. Both first without the flooder and then beside it.
//
//   - delivered: frames of the paced guests that arrive beside the flooder, in those that do without
//   - p99-x: the 99th percentile of their time on the way, in that without the flooder
//   - p99-busy-x: the same percentile, divided by the percentile beside a goroutine that only computes.
//     Both loads take as much processor time, so a quotient above 1 is delay that the bridge adds
//   - share: what the guest that gets least has, in an equal part of all that arrives, when all send what they can
//   - share-kept: frames of the guest that gets least beside the flooder, divided by frames of the guest that
//     gets least when the flooder, too, has at most 32 frames under way. A guest that waits until its frames
//     have arrived cannot use an equal part of the bridge's capacity, even without a flooder. share counts
//     that loss against the bridge, share-kept does not
//
// The guests run on the bridge's processors. With fewer of these than there are busy guests,
// the figures say how Go and the system share them out.
func BenchmarkFlooder(b *testing.B) {
	for _, pooled := range []bool{false, true} {
		b.Run(fmt.Sprintf("pool=%t", pooled), func(b *testing.B) { benchFlooder(b, pooled) })
	}
}

func benchFlooder(b *testing.B, pooled bool) {
	const others = 14
	l := newLANOf(b, pooled, Config{}, pvnet.ServeConfig{}, same(others+2, PortConfig{}), seq(others+2)...)
	talkers := make([]*talker, others+2)
	for i := range talkers {
		talkers[i] = newTalker(b, l.Fronts[i])
		talkers[i].send(frame(pvnet.MAC{1, 0x80, 0xc2}, mac(i), 0)[:64], 1, true)
	}
	until(b, "all stations", func() bool { return len(l.Stations()) == others+2 })
	sink, flooder := talkers[others], talkers[others+1]
	start := time.Now()
	const phase = 400 * time.Millisecond

	type load int
	const (
		nothing load = iota
		flood
		compute
		alike // the flooder sends as the others do
	)
	// run has the others send for one phase, and returns how many frames of each arrived, the
	// flooder's last, and how long those of the others took, sorted.
	run := func(beside load, paced bool) (arrived [others + 2]int, took []time.Duration) {
		end := time.Now().Add(phase)
		var under [others + 2]atomic.Int64
		var sending, flooding, receiving sync.WaitGroup
		var over atomic.Bool
		receiving.Go(func() {
			sink.rx.SetDeadline(time.Time{})
			for {
				now := time.Duration(0)
				n := sink.receive(func(f []byte) {
					if now == 0 {
						now = time.Since(start)
					}
					from := int(f[11])
					arrived[from]++
					under[from].Add(-1)
					if from < others {
						took = append(took, now-time.Duration(binary.BigEndian.Uint64(f[18:])))
					}
				})
				if n == 0 && over.Load() {
					return
				}
				runtime.Gosched() // the guests share the bridge's processors here
			}
		})
		if beside != nothing {
			sample := frame(mac(others), mac(others+1), 0)[:64]
			flooding.Go(func() {
				for at := time.Now(); at.Before(end); at = time.Now() {
					switch {
					case beside == flood:
						flooder.send(sample, 32, true)
					case beside == compute:
						for time.Since(at) < 5*time.Microsecond { // about what a batch takes
						}
					case under[others+1].Load() <= 24:
						under[others+1].Add(int64(flooder.send(sample, 8, true)))
					default:
						time.Sleep(20 * time.Microsecond)
						continue
					}
					runtime.Gosched()
				}
			})
		}
		for i := range others {
			sending.Go(func() {
				sample := frame(mac(others), mac(i), 0)[:64]
				for at := time.Now(); at.Before(end); at = time.Now() {
					binary.BigEndian.PutUint64(sample[18:], uint64(time.Since(start)))
					switch {
					case paced:
						talkers[i].send(sample, 8, true)
						time.Sleep(2*time.Millisecond - time.Since(at))
					case under[i].Load() <= 24:
						under[i].Add(int64(talkers[i].send(sample, 8, true)))
					default:
						time.Sleep(20 * time.Microsecond)
					}
				}
			})
		}
		sending.Wait()
		flooding.Wait()
		until(b, "an idle bridge", func() bool {
			return l.ports[others].Stats().Out.Waiting == 0
		})
		time.Sleep(20 * time.Millisecond) // what is in the ring arrives
		over.Store(true)
		sink.rx.SetDeadline(time.Unix(1, 0))
		receiving.Wait()
		slices.Sort(took)
		return arrived, took
	}
	p99 := func(took []time.Duration) float64 { return float64(took[len(took)*99/100]) }
	var delivered, slower, slowerBusy, share, kept float64
	n := 0
	for b.Loop() {
		_, without := run(nothing, true)
		_, beside := run(flood, true)
		_, busy := run(compute, true)
		if len(without) == 0 || len(beside) == 0 || len(busy) == 0 {
			b.Fatal("nothing arrived")
		}
		delivered += float64(len(beside)) / float64(len(without))
		slower += p99(beside) / p99(without)
		slowerBusy += p99(beside) / p99(busy)
		all, _ := run(flood, false)
		total := 0
		for _, k := range all {
			total += k
		}
		share += float64(slices.Min(all[:others])) / (float64(total) / (others + 1))
		equals, _ := run(alike, false)
		kept += float64(slices.Min(all[:others])) / float64(slices.Min(equals[:others]))
		n++
	}
	b.ReportMetric(delivered/float64(n), "delivered")
	b.ReportMetric(slower/float64(n), "p99-x")
	b.ReportMetric(slowerBusy/float64(n), "p99-busy-x")
	b.ReportMetric(share/float64(n), "share")
	b.ReportMetric(kept/float64(n), "share-kept")
	b.ReportMetric(0, "ns/op")
}

func seq(n int) []int {
	list := make([]int, n)
	for i := range list {
		list[i] = i
	}
	return list
}
