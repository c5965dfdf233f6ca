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

// tampered runs f while one in so many loads of shared memory returns another value. In
// this build a second load of a slot's word panics.
func tampered(rate uint64, f func()) {
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
	for round, end := 0, time.Now().Add(spell(t)); time.Now().Before(end); round++ {
		g := l.attack()
		tampered([]uint64{1, 3, 20, 200}[round%4], func() {
			for i := range 50 {
				reqs, _ := g.chain(0, 60, 200, 300)
				for _, r := range reqs {
					g.Put(r.Words())
				}
				for k, r := range g.cut(blank, partial|raw.TxExtra) {
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
		g.close()
	}
	honest := l.attack()
	honest.works()
	honest.leave()
}

func TestT03EveryLoadDiffersForTheFrontend(t *testing.T) {
	l := newLab(t, emu.Config{})
	for round, end := 0, time.Now().Add(spell(t)); time.Now().Before(end); round++ {
		h := l.lure(pvnet.Config{LendRx: round%2 == 0, Offload: round%4 < 2})
		tampered([]uint64{1, 3, 20, 200}[round%4], func() {
			for i := range 50 {
				h.PutRx([2]uint32{h.RxProd % 256, 200 << 16}, [2]uint32{(h.RxProd + 1) % 256, 300 << 16})
				gso := raw.GSO(100, 1).Words()
				h.PutRx([2]uint32{h.RxProd % 256, 400<<16 | raw.RxExtra | raw.RxBlank}, [2]uint32{gso[0], gso[1]})
				h.PushRx()
				h.dev.SetWriteDeadline(time.Now().Add(200 * time.Microsecond))
				h.dev.Write(pattern(5000, i))
			}
		})
		go h.dev.Disconnect()
		l.await(h.v.FrontDir()+"/state", "5")
		h.gone()
	}
	if l.log.count(slog.LevelError) == 0 {
		t.Error("nothing was ever taken for a violation")
	}
}

// close closes a guest whose backend may have ended.
func (g *guest) close() {
	g.state("5")
	g.l.await(g.v.BackDir()+"/state", "5", "6")
	g.state("6")
	g.l.await(g.v.BackDir()+"/state", "6")
	g.gone()
}
