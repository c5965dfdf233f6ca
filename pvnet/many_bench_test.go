package pvnet

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/telemetry"
)

// BenchmarkManyVifs moves frames of 64 bytes through one ring after another, of one vif
// or of many, in one goroutine that alternates between sender and receiver. Compare
// ns/frame with one vif.
func BenchmarkManyVifs(b *testing.B) {
	for _, dir := range []string{"front→back", "back→front"} {
		for _, batch := range []int{32, 8} {
			for _, n := range []int{1, 64} {
				b.Run(fmt.Sprintf("%s/b%d/vifs=%d", dir, batch, n), func(b *testing.B) {
					benchVifs(b, n, batch, dir == "back→front", false, false)
				})
			}
		}
	}
	for _, n := range []int{1, 64} { // into the same frames for all vifs
		b.Run(fmt.Sprintf("front→back/into/b32/vifs=%d", n), func(b *testing.B) { benchVifs(b, n, 32, false, false, true) })
	}
	b.Run("poller/idle=63", func(b *testing.B) { benchVifs(b, 64, 32, false, true, false) })
}

func benchVifs(b *testing.B, n, batch int, back, poller, into bool) {
	var txs []*TX
	var rxs []*RX
	var lastBack *Device
	m, err := emu.New(emu.Config{Mapped: true})
	if errors.Is(err, errors.ErrUnsupported) {
		b.Skip("this system maps no file:", err)
	}
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	bdom, err := m.NewDomain(1)
	if err != nil {
		b.Fatal(err)
	}
	for i := range n {
		fdom, err := m.NewDomain(hypercall.DomID(2 + i))
		if err != nil {
			b.Fatal(err)
		}
		p := &pair{m: m, fdom: fdom, bdom: bdom}
		p.front = newDevice("0", telemetry.Frontend, fdom, Config{})
		p.back = newDevice("0", telemetry.Backend, bdom, Config{})
		p.connect(b, plain)
		lastBack = p.back
		defer p.disconnect()
		from, to := p.front, p.back
		if back {
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
		txs, rxs = append(txs, tx), append(rxs, rx)
	}
	var p *Poller
	if poller {
		if p, err = NewPoller(bdom, PollerConfig{}); err != nil {
			b.Fatal(err)
		}
		defer p.Close()
		for _, rx := range rxs {
			if err := p.Add(rx, nil); err != nil {
				b.Fatal(err)
			}
		}
		p.SetDeadline(time.Now().Add(10 * time.Millisecond))
		for _, err := p.Wait(); err == nil; _, err = p.Wait() {
		}
		p.SetDeadline(time.Time{})
		txs = txs[:1]
	}
	out, in := make([]Frame, batch), make([]Frame, batch)
	sink := make([]byte, 64)
	if into {
		own, err := lastBack.OwnTX(0)
		if err != nil {
			b.Fatal(err)
		}
		if own.AllocSize(in, 64) != batch {
			b.Fatal("no frames")
		}
		defer releaseAll(in)
	}
	moved := 0
	round := func() {
		for _, tx := range txs {
			k := tx.AllocSize(out, 64)
			for j := range out[:k] {
				copy(out[j].Bytes(), sink)
			}
			if k, err = tx.Send(out[:k]); k == 0 || err != nil {
				b.Fatal(k, err)
			}
			if poller {
				for left := k; left > 0; {
					ready, err := p.Wait()
					if err != nil {
						b.Fatal(err)
					}
					for _, r := range ready {
						got, _ := r.RX.Poll(in)
						for j := range in[:got] {
							in[j].CopyTo(sink)
						}
						r.RX.Release(in[:got])
						left -= got
					}
				}
				moved += k
				continue
			}
		}
		if poller {
			return
		}
		for _, rx := range rxs {
			if into {
				got, err := rx.PollInto(in)
				if got == 0 || err != nil {
					b.Fatal(got, err)
				}
				for j := range in[:got] {
					in[j].CopyTo(sink)
				}
				moved += got
				continue
			}
			got, err := rx.Poll(in)
			if got == 0 || err != nil {
				b.Fatal(got, err)
			}
			for j := range in[:got] {
				in[j].CopyTo(sink)
			}
			rx.Release(in[:got])
			moved += got
		}
	}
	for range 50 { // touches all memory of every link
		round()
	}
	moved = 0
	for b.Loop() {
		round()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(moved), "ns/frame")
	b.ReportMetric(0, "ns/op")
}
