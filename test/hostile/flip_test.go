package hostile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
)

// A peer that reads the pages we share with it finds only what was sent to it, and zeros.
func TestT19OnlyWhatWasSentIsThere(t *testing.T) {
	l := newLab(t, emu.Config{})
	drv := l.attackFrontend(pvnet.Config{})
	const ours, theirs = 0xa5, 0x5a // every byte of a frame from us, and of one to us
	for round := range 2 {
		rng := rand.New(rand.NewPCG(7, uint64(round)))
		for i := range 300 {
			n := 14 + rng.IntN(9000)
			if _, err := drv.dev.Write(bytes.Repeat([]byte{ours}, n)); err != nil {
				t.Fatal(err)
			}
			for left := n; left > 0; {
				reqs := drv.awaitRequests(1)
				r := reqs[0]
				size := int(r.Size)
				if left == n {
					rest := 0
					for more := r.Flags&raw.TxMore != 0; more; {
						next := drv.awaitRequests(1)
						rest += int(next[0].Size)
						more = next[0].Flags&raw.TxMore != 0
						drv.Answer(raw.TxRsp{ID: next[0].ID})
					}
					size -= rest
					left -= rest
				}
				page := make([]byte, 4096)
				if err := drv.Read(hypercall.GrantRef(r.Ref), 0, page); err != nil {
					t.Fatal(err)
				}
				for at, c := range page {
					in := at >= int(r.Offset) && at < int(r.Offset)+size
					if in && c != ours || c != ours && c != 0 {
						t.Fatalf("frame %d: byte %d of a page with %d at %d is %#x", i, at, size, r.Offset, c)
					}
				}
				left -= size
				drv.Answer(raw.TxRsp{ID: r.ID})
			}
			drv.awaitPosted(3)
			k := 14 + rng.IntN(4000)
			drv.deliverSlots(drv.fillSlot(uint16(rng.IntN(4096-k)), 0, bytes.Repeat([]byte{theirs}, k)))
			wait(t, drv.sink.frames)
		}
		for at, c := range drv.Tx.Bytes()[16:raw.Slots] {
			if c != 0 || drv.Rx.Bytes()[16+at] != 0 {
				t.Errorf("byte %d of a ring page is %#x", 16+at, c)
			}
		}
		for at := raw.Slots + raw.Size*12; at < 4096; at++ {
			if drv.Tx.Bytes()[at] != 0 {
				t.Errorf("byte %d behind the slots is %#x", at, drv.Tx.Bytes()[at])
			}
		}
		for i := range uint32(raw.Size) { // whole requests are defined, including padding
			if w := drv.Rx.Get(drv.RxCons + i); w[0]>>16 != 0 && drv.Rx.Load(raw.ReqProd)-drv.RxCons > i {
				t.Errorf("rx request %d has padding %#x", i, w[0]>>16)
			}
		}
		if round == 0 { // the next connection's pages hold nothing of this one
			drv.closeHandshake()
			drv.reconnect()
		}
	}
	drv.disconnect()
}

// XSA-216: whole responses are defined, and a page that the guest posted gets the frame's
// bytes and no others.
func TestT19ResponsesAndPostedPages(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	for i := range g.Rx.Bytes()[raw.Slots:] {
		g.Rx.Bytes()[raw.Slots+i], g.Tx.Bytes()[raw.Slots+i] = 0xee, 0xee
	}
	reqs, want := g.chain(raw.TxExtra, 100, 100)
	g.Put(reqs[0].Words(), raw.Extra{Type: 4, Flags: 0, Body: [6]byte{1, 2, 3, 4, 5, 6}}.Words(), reqs[1].Words())
	g.Push()
	rsp, err := g.Answers(3, deadline())
	if err != nil || rsp[1] != (raw.TxRsp{ID: 0, Status: raw.Null}) {
		t.Errorf("%v, %v", rsp, err)
	}
	g.sink.requireFrame(t, want)
	for _, n := range []int{14, 15, 60, 1514, 4095, 4096, 4097, 5000, 9000} {
		slots := (n + 4095) / 4096
		for i := range 32 {
			copy(g.Posted.Page(i), bytes.Repeat([]byte{0xee}, 4096))
		}
		first := int(g.RxProd % 32)
		g.Post(slots)
		frame := pattern(n, n)
		if _, err := g.dev.Write(frame); err != nil {
			t.Fatal(err)
		}
		in := g.awaitReceived(slots)
		at := 0 // how much of the frame the slots before have
		for i, r := range in {
			k := min(n-at, 4096)
			if i == 0 && slots > 1 {
				k = 4096 - 128 // as far as the device's own page goes, behind its headroom
			}
			want := raw.RxRsp{ID: uint16(g.RxProd-uint32(slots)+uint32(i)) % raw.Size, Status: int16(k)}
			if i < slots-1 {
				want.Flags = raw.RxMore
			}
			page := g.Posted.Page((first + i) % 32)
			if r != want || !bytes.Equal(page[:k], frame[at:at+k]) || bytes.Count(page[k:], []byte{0xee}) != 4096-k {
				t.Errorf("slot %d of %d bytes: %+v, want %+v", i, n, r, want)
			}
			at += k
		}
	}
	g.disconnect()
}

// corruptRing rewrites words of r until stop is closed: slots, and own indices once in rate
// times; 0 means never.
func corruptRing(r raw.Ring, pages []byte, prod, rate int, seed uint64, stop chan struct{}, wg *sync.WaitGroup) {
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 9))
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			for range 64 {
				i := rng.Uint32()
				switch rng.IntN(3) {
				case 0:
					w := r.Get(i)
					r.Put(i, w[0]^1<<(i>>8&31), w[1])
				case 1:
					r.Put(i, rng.Uint32(), rng.Uint32()&0xffff0fff)
				default:
					pages[int(i)%len(pages)] ^= byte(i >> 16)
				}
			}
			if rate > 0 && n%rate == rate-1 {
				r.Store(prod, r.Load(prod)+rng.Uint32N(300))
			}
			r.Store(raw.ReqEvent, rng.Uint32()) // the guest can write the backend's words too
			r.Store(raw.RspEvent, rng.Uint32())
			runtime.Gosched()
		}
	})
}

func attackTime(t *testing.T) time.Duration {
	if testing.Short() {
		return 300 * time.Millisecond
	}
	return 2 * time.Second
}

// Everything that the guest can write changes while the backend reads it. The memory is
// mapped, because the race detector must not report this.
func TestT20FrontendRewritesEverything(t *testing.T) {
	l := newLab(t, emu.Config{Mapped: true})
	l.serve(pvnet.ServeConfig{})
	honest := l.attackBackend()
	violations := 0
	for end, seed := time.Now().Add(attackTime(t)), uint64(1); time.Now().Before(end); seed++ {
		g := l.attackBackend()
		stop := make(chan struct{})
		var wg sync.WaitGroup
		corruptRing(g.Tx, g.Pages.Bytes(), raw.ReqProd, int(seed%3)*500, seed, stop, &wg)
		corruptRing(g.Rx, g.Posted.Bytes(), raw.ReqProd, int(seed%2)*900, seed+1000, stop, &wg)
		for i := 0; i < 300; i++ {
			select {
			case <-g.dev.Done():
				i = 300
			default:
			}
			reqs, _ := g.chain(0, 60, 200, 300)
			for _, r := range reqs {
				g.Put(r.Words())
			}
			g.Push()
			g.Post(2)
			g.dev.SetWriteDeadline(time.Now().Add(time.Millisecond))
			g.dev.Write(pattern(100, i))
			if s, _ := l.store.Read(g.v.BackDir() + "/state"); s != "4" {
				break
			}
		}
		close(stop)
		wg.Wait()
		honest.requireTraffic()
		g.closeHandshake()
		if n := l.log.count(slog.LevelError); n > violations {
			violations = n
		}
		g.removeVif()
	}
	honest.requireTraffic()
	honest.disconnect()
	t.Logf("%d devices ended", violations)
}

func TestT20BackendRewritesEverything(t *testing.T) {
	l := newLab(t, emu.Config{Mapped: true})
	for end, seed := time.Now().Add(attackTime(t)), uint64(1); time.Now().Before(end); seed++ {
		drv := l.attackFrontend(pvnet.Config{LendRx: seed%2 == 0})
		refs, err := drv.Posted(raw.Size, deadline())
		if err != nil {
			t.Fatal(err)
		}
		pages, err := l.drv.Map(frontID, refs, 1)
		if err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		corruptRing(drv.Tx, pages.Bytes(), raw.RspProd, int(seed%3)*500, seed, stop, &wg)
		corruptRing(drv.Rx, pages.Bytes(), raw.RspProd, int(seed%2)*900, seed+1000, stop, &wg)
		for i := range 300 {
			for range 3 {
				drv.PutRx(raw.RxRsp{ID: uint16(drv.RxProd), Offset: 4, Status: 200}.Words())
			}
			drv.PushRx()
			drv.dev.SetWriteDeadline(time.Now().Add(time.Millisecond))
			if _, err := drv.dev.Write(pattern(5000, i)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
		close(stop)
		wg.Wait()
		if err := pages.Release(); err != nil {
			t.Error(err)
		}
		go drv.dev.Disconnect()
		drv.awaitFrontend("5")
		drv.finishClose()
	}
}

// T26, T36: both ends are ours, with traffic both ways and readers of the counters that
// never stop.
func TestT26DisconnectUnderLoad(t *testing.T) {
	l := newLab(t, emu.Config{})
	cycles := 30
	if testing.Short() {
		cycles = 6
	}
	l.serve(pvnet.ServeConfig{})
	for i := range cycles {
		base := l.Ledger()
		v := l.addVif()
		front, err := pvnet.Connect(ctx(t), l.guest, fmt.Sprint(v.ID), pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		back := wait(t, l.devs)
		waitLinkUp(t, back)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for _, d := range []*pvnet.Device{front, back} {
			wg.Go(func() {
				// Disconnect may come before Listen does.
				if err := d.Listen(context.Background(), func(pvnet.Frame) {}); err != nil && !errors.Is(err, pvnet.ErrDisconnected) {
					t.Errorf("Listen: %v", err)
				}
			})
			wg.Go(func() {
				for n := 0; ; n++ {
					if _, err := d.Write(pattern(60+n%5000, n)); err != nil {
						if !errors.Is(err, pvnet.ErrDisconnected) {
							t.Errorf("Write: %v", err)
						}
						return
					}
				}
			})
			wg.Go(func() {
				for n := uint64(0); ; {
					select {
					case <-stop:
						return
					default:
					}
					st := d.Stats()
					if p := st.TX.Get(telemetry.Packets); p < n {
						t.Errorf("%d frames, %d before", p, n)
					} else {
						n = p
					}
					d.Budget()
					d.Counters().Snapshot()
					runtime.Gosched() // there may be one thread
				}
			})
		}
		time.Sleep(time.Duration(i%7) * time.Millisecond)
		ends := []*pvnet.Device{front, back}
		ended := make(chan struct{})
		go func() {
			ends[i%2].Disconnect()
			ends[1-i%2].Disconnect()
			close(ended)
		}()
		wait(t, ended)
		close(stop)
		wg.Wait()
		now := l.Ledger() // Serve has a connection by now, and its presence
		base.Connections, base.Ports, base.Waiters = now.Connections, 1, 1
		eventually(t, "everything back", func() bool { return l.Ledger() == base })
		l.removeVif(v)
	}
}

// T38: the worst behaviour of a guest while others work.
func TestT38OneHostileOfMany(t *testing.T) { inVirtualTime(t, testT38OneHostileOfMany) }

func testT38OneHostileOfMany(t *testing.T) {
	l := newLab(t, emu.Config{Grants: 2048})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Buffers: 64}})
	var honest []*guest
	for range 8 {
		honest = append(honest, l.attackBackend())
	}
	g := l.attackBackend()
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			var sizes [20]int // first refused, at the end with bad refs
			sizes[0] = 20
			reqs, _ := g.chain(0, sizes[:19+n%2]...)
			for i := range reqs {
				if n%3 == 0 {
					reqs[i].Ref = 1 << 20
				}
				g.Put(reqs[i].Words())
			}
			g.Push()
			if _, err := g.Answers(len(reqs), deadline()); err != nil {
				t.Error(err)
				return
			}
			for range 20 {
				g.TxPort.Notify()
				g.RxPort.Notify()
			}
		}
	}()
	worst := time.Duration(0)
	for range 50 {
		for _, h := range honest {
			start := time.Now()
			h.requireTraffic()
			worst = max(worst, time.Since(start))
		}
	}
	close(stop)
	wait(t, ended)
	if worst > 2*time.Second {
		t.Errorf("a neighbour waited %v", worst)
	}
	g.sink.drain()
	g.before.Grants, g.before.Pages = l.Ledger().Grants, 0
	g.requireTraffic()
	for i := range honest {
		h := honest[len(honest)-1-i]
		h.before = emu.Ledger{}
	}
	l.closeAll(append(honest, g))
}

// closeAll closes guests whose ledgers overlap.
func (l *lab) closeAll(all []*guest) {
	l.t.Helper()
	for _, g := range all {
		g.closeHandshake()
		l.removeVif(g.v)
		wait(l.t, g.dev.Done())
		wait(l.t, g.sink.ended)
		if err := g.Close(); err != nil {
			l.t.Error(err)
		}
	}
	if now := l.Ledger(); now.Grants+now.Mappings+now.Pages != 0 || now.Ports != 1 { // the port is the backend's presence
		l.t.Errorf("left behind: %+v", now)
	}
}

// T37: each change of state gives one log line, whatever the peer does.
func TestT37LogLinesAreBounded(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	eventually(t, "the link is up", func() bool { return strings.Contains(l.log.String(), "link up") })
	lines := l.log.total()
	for n := range 2000 {
		reqs, _ := g.chain(0, 3+n%9)
		g.send(reqs, nil, refuse, noReason, nil)
	}
	if n := l.log.total() - lines; n != 0 {
		t.Errorf("%d lines for 2000 bad frames\n%s", n, l.log)
	}
	changes := 500
	for n := range changes {
		g.setState([]string{"4", "6", "5", "1"}[n%4])
	}
	g.awaitBackend("2")
	if n := l.log.total() - lines; n > 2*changes {
		t.Errorf("%d lines for %d changes of state", n, changes)
	}
	g.setState("5")
	g.awaitBackend("5")
	g.setState("6")
	g.awaitBackend("6")
	g.removeVif()
}

// T40: a vif has one backend.
func TestT40SecondServeIsRefused(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	c, cancel := context.WithCancel(context.Background())
	second := new(journal)
	done := make(chan error, 1)
	got := make(chan *pvnet.Device, 1)
	go func() {
		done <- pvnet.Serve(c, l.drv, pvnet.ServeConfig{Config: pvnet.Config{Logger: slog.New(second)}}, func(d *pvnet.Device) { got <- d })
	}()
	eventually(t, "a refusal", func() bool { return second.count(slog.LevelWarn) > 0 })
	if len(got) > 0 {
		t.Error("two backends serve one vif")
	}
	g.requireTraffic()
	cancel()
	if err := wait(t, done); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	g.requireTraffic()
	g.before.Connections = l.Ledger().Connections
	g.disconnect()
}

func TestT41OpenAndClose(t *testing.T) {
	l := newLab(t, emu.Config{Mapped: true})
	l.serve(pvnet.ServeConfig{})
	for range 3 {
		l.attackBackend().disconnect()
	}
	goroutines, files := settledGoroutines(), openFiles(t)
	cycles := 200
	if testing.Short() {
		cycles = 20
	}
	for range cycles {
		l.attackBackend().disconnect()
	}
	requireNoLeaks(t, goroutines, files)
}
