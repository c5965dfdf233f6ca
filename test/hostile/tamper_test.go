//go:build shmdebug

package hostile

import (
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"barevif/arena/shm"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/test/hostile/raw"
)

// withTamperedLoads runs f while one in so many loads of shared memory returns another value. In
// this build a second load of a slot's word panics.
func withTamperedLoads(rate uint64, f func()) {
	var n atomic.Uint64
	restore := shm.Tamper(func(w uint32) uint32 {
		k := n.Add(1)
		if k%rate != 0 {
			return w
		}
		switch x := rand.Uint32(); k / rate % 3 {
		case 0:
			return w ^ 1<<(x&31)
		case 1:
			return w + x%300
		default:
			return x
		}
	})
	defer restore()
	f()
}

// T03 made certain: no two loads agree, and no word is loaded twice.
func TestT03EveryLoadDiffersForTheBackend(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Offload: true}})
	blank, _ := packet(0, false, false, 3000, 1)
	for round, end := 0, time.Now().Add(attackTime(t)); time.Now().Before(end); round++ {
		g := l.attackBackend()
		withTamperedLoads([]uint64{1, 3, 20, 200}[round%4], func() {
			for i := range 50 {
				reqs, _ := g.chain(0, 60, 200, 300)
				for _, r := range reqs {
					g.Put(r.Words())
				}
				for k, r := range g.split(blank, partial|raw.TxExtra) {
					g.Put(r.Words())
					if k == 0 {
						g.Put(raw.GSO(1448, 1).Words())
					}
				}
				g.Push()
				g.Post(2)
				g.dev.SetWriteDeadline(time.Now().Add(200 * time.Microsecond))
				g.dev.Write(pattern(100, i))
			}
		})
		g.disconnect()
	}
	honest := l.attackBackend()
	honest.requireTraffic()
	honest.disconnect()
}

func TestT03EveryLoadDiffersForTheFrontend(t *testing.T) {
	l := newLab(t, emu.Config{})
	for round, end := 0, time.Now().Add(attackTime(t)); time.Now().Before(end); round++ {
		drv := l.attackFrontend(pvnet.Config{LendRx: round%2 == 0, Offload: round%4 < 2})
		withTamperedLoads([]uint64{1, 3, 20, 200}[round%4], func() {
			for i := range 50 {
				drv.PutRx([2]uint32{drv.RxProd % 256, 200 << 16}, [2]uint32{(drv.RxProd + 1) % 256, 300 << 16})
				gso := raw.GSO(100, 1).Words()
				drv.PutRx([2]uint32{drv.RxProd % 256, 400<<16 | raw.RxExtra | raw.RxBlank}, [2]uint32{gso[0], gso[1]})
				drv.PushRx()
				drv.dev.SetWriteDeadline(time.Now().Add(200 * time.Microsecond))
				drv.dev.Write(pattern(5000, i))
			}
		})
		go drv.dev.Disconnect()
		drv.awaitFrontend("5")
		drv.finishClose()
	}
	if l.log.count(slog.LevelError) == 0 {
		t.Error("nothing was ever taken for a violation")
	}
}
