package forward_test

import (
	"fmt"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/forward"
)

// BenchmarkJoin moves batches of 32 frames from one guest to another through a sender, as Join
// does, in one goroutine. Beside it, in turns, batches move over one hop: from a guest to its
// backend, and from a backend to its guest. x-hop is the time of the way through both
// backends, in means of these two.
func BenchmarkJoin(b *testing.B) {
	for _, size := range []int{64, 1514} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) { benchJoin(b, size) })
	}
}

func benchJoin(b *testing.B, size int) {
	h := newHub(b, 4, pvnet.Config{}, pvnet.ServeConfig{})
	in := newInput(b, newSender(b, h.Backs[1], forward.Config{Full: forward.Wait}), forward.NewSource(0))
	fromGuest, toBack := ownTX(b, h.Fronts[0], 0), ownRX(b, h.Backs[0], 0)
	toGuest := ownRX(b, h.Fronts[1], 0)
	upTX, upRX := ownTX(b, h.Fronts[2], 0), ownRX(b, h.Backs[2], 0)
	downTX, downRX := ownTX(b, h.Backs[3], 0), ownRX(b, h.Fronts[3], 0)
	sample := packet(size, 1)
	var frames, got [forward.Batch]pvnet.Frame
	send := func(tx *pvnet.TX) {
		n := tx.AllocSize(frames[:], size)
		for i := range frames[:n] {
			frames[i].CopyFrom(sample)
		}
		if k, err := tx.Send(frames[:n]); k != len(frames) || err != nil {
			b.Fatal(k, err)
		}
	}
	receive := func(rx *pvnet.RX, take func([]pvnet.Frame)) {
		for left := len(frames); left > 0; {
			n, err := rx.Poll(got[:])
			if err != nil {
				b.Fatal(err)
			}
			take(got[:n])
			left -= n
		}
	}
	release := func(rx *pvnet.RX) func([]pvnet.Frame) { return func(f []pvnet.Frame) { rx.Release(f) } }
	upDone, downDone, outDone := release(upRX), release(downRX), release(toGuest)
	forwardAll := func(f []pvnet.Frame) {
		if lost, err := in.Send(f); lost != 0 || err != nil {
			b.Fatal(lost, err)
		}
	}
	ways := [3]func(){
		func() { send(upTX); receive(upRX, upDone) },
		func() { send(downTX); receive(downRX, downDone) },
		func() { send(fromGuest); receive(toBack, forwardAll); receive(toGuest, outDone) },
	}
	var took [3]time.Duration
	const rounds = 200
	moved := 0
	for range 50 { // touches all memory
		for _, way := range ways {
			way()
		}
	}
	for b.Loop() {
		for i, way := range ways {
			start := time.Now()
			for range rounds {
				way()
			}
			took[i] += time.Since(start)
		}
		moved += rounds * len(frames)
	}
	hop := (took[0] + took[1]) / 2
	b.ReportMetric(float64(took[2])/float64(hop), "x-hop")
	b.ReportMetric(float64(took[2])/float64(moved), "ns/frame")
	b.ReportMetric(float64(hop)/float64(moved), "ns/hop")
	b.ReportMetric(0, "ns/op")
}
