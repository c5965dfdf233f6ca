package emu_test

import (
	"fmt"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
)

func BenchmarkCopy(b *testing.B) {
	for _, size := range []int{64, 1500} {
		b.Run(fmt.Sprintf("size=%d/batch=32", size), func(b *testing.B) {
			m := machine(b, emu.Config{})
			front, back := domain(b, m, 1), domain(b, m, 2)
			benchmarkCopy(b, front, back, size)
		})
	}
}

func benchmarkCopy(b *testing.B, front, back hypercall.Domain, size int) {
	const batch = 32
	s := share(b, front, back.ID(), batch, hypercall.ReadOnly)
	mem, err := back.Memory(batch)
	if err != nil {
		b.Fatal(err)
	}
	ops := make([]hypercall.CopyOp, batch)
	for i := range ops {
		ops[i] = hypercall.CopyOp{
			Src: hypercall.Area{Dom: front.ID(), Ref: s.Refs[i]},
			Dst: hypercall.Area{Local: mem.Page(i)}, Len: uint32(size),
		}
	}
	for b.Loop() {
		if err := back.Copy(ops); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batch, "ns/frame")
	for _, op := range ops {
		if op.Status != hypercall.OK {
			b.Fatal(op.Status)
		}
	}
	release(b, mem)
	end(b, s)
}

func BenchmarkRoundTrip(b *testing.B) {
	m := machine(b, emu.Config{})
	benchmarkRoundTrip(b, domain(b, m, 1), domain(b, m, 2))
}

// benchmarkRoundTrip parks both ends for each event.
func benchmarkRoundTrip(b *testing.B, front, back hypercall.Domain) {
	wa, wb, pa, pb := channel(b, front, back)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for wb.Wait(time.Time{}, true) == nil && pb.Notify() == nil {
		}
	}()
	for b.Loop() {
		if pa.Notify() != nil || wa.Wait(time.Time{}, true) != nil {
			b.Fatal("no round trip")
		}
	}
	_ = wb.Close()
	<-done
	_ = wa.Close()
}
