package pvnet

import (
	"fmt"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"
)

// BenchmarkFeatures compares frames of a connection that uses nothing with those of one that
// uses a feature of the backend, or has a tap, in one goroutine.
func BenchmarkFeatures(b *testing.B) {
	nothing := func(*testing.B, *pair) {}
	for _, row := range []struct {
		dir, name string
		on        func(b *testing.B, p *pair)
	}{
		{"front-to-back", "nothing", nothing},
		{"front-to-back", "rate", func(_ *testing.B, p *pair) { p.back.limiter.set(rate{1 << 30, time.Microsecond}) }},
		{"front-to-back", "tap that drops all", func(b *testing.B, p *pair) { benchTap(b, p.back) }},
		{"back-to-front", "nothing", nothing},
		{"back-to-front", "multicast filter", func(_ *testing.B, p *pair) { p.back.groups.clear(true) }},
		{"back-to-front", "drain and stall times", func(_ *testing.B, p *pair) { p.back.tx[0].drain.reset(linux) }},
		{"back-to-front", "tap that drops all", func(b *testing.B, p *pair) { benchTap(b, p.back) }},
		{"back-to-front", "hash", benchHash},
	} {
		b.Run(fmt.Sprintf("%s/%s", row.dir, row.name), func(b *testing.B) {
			f := plain
			f.queues = 2 // a frontend with one queue is sent no hash
			p := join(b, emu.Config{}, f, Config{})
			from, to := p.front, p.back
			if row.dir == "back-to-front" {
				from, to = to, from
			}
			row.on(b, p)
			tx, _ := own(b, from)
			_, rx := own(b, to)
			fillAll(b, tx)
			moveInOne(b, tx, rx, 64, 32)
		})
	}
}

func benchTap(b *testing.B, d *Device) {
	t, err := d.Tap(TapConfig{Filter: func([]byte) bool { return false }})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { t.Close() })
}

func benchHash(_ *testing.B, p *pair) {
	for _, q := range p.conns[1].queues {
		q.tx.(*backTX).steer = &p.back.steer
	}
	p.back.steer.Store(&steering{table: toeplitz.NewTable([]byte{1, 2, 3}), flags: netif.HashFlagsAll, mapping: []uint32{0}})
}

// fillAll writes the headers of a TCP packet into every buffer of the half. moveInOne sends
// buffers as they are.
func fillAll(b *testing.B, tx *TX) {
	var all []Frame
	for {
		f := make([]Frame, 32)
		n := tx.AllocSize(f, 64)
		all = append(all, f[:n]...)
		if n < len(f) {
			break
		}
	}
	for i := range all {
		tcp4(all[i].Bytes())
		all[i].Release()
	}
}
