package hostile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
)

// MSA02, XSA-396: a page whose grant could not be ended is never used again.
func TestT18BackendKeepsRingsMapped(t *testing.T) {
	l := newLab(t, emu.Config{})
	h := l.lure(pvnet.Config{})
	h.works()
	for round := range 3 {
		kept := h.Back
		h.state("5")
		l.await(h.v.FrontDir()+"/state", "6")
		h.state("6") // a lie: the backend keeps the rings mapped
		l.await(h.v.FrontDir()+"/state", "1")
		if q := l.Ledger().Quarantined; q != 2 {
			t.Errorf("%d pages in quarantine, want 2", q)
		}
		if n := l.log.count(slog.LevelWarn); n != round+1 || !strings.Contains(l.log.String(), "quarantined") {
			t.Errorf("%d warnings\n%s", n, l.log)
		}
		h.refs = nil
		h.offer()
		eventually(t, "the link", func() bool { return h.dev.Budget() != (pvnet.Budget{}) })
		for i := range kept.Tx.Bytes() { // the peer can still write the page, which must have no effect
			kept.Tx.Bytes()[i], kept.Rx.Bytes()[i] = 0xff, 0xff
		}
		kept.TxPort.Notify()
		h.works()
		if err := kept.Close(); err != nil {
			t.Error(err)
		}
		if q := l.Ledger().Quarantined; q != 0 {
			t.Errorf("%d pages in quarantine after they were let go", q)
		}
	}
	h.leave()
}

func TestT18GrantsThatNeverEnd(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.Dirty = true
	h := l.lure(pvnet.Config{})
	h.works()
	shared := h.dev.Budget().SharedPages
	lift := l.guest.Fail(emu.Fault{Op: emu.OpEnd, Times: -1})
	h.state("5")
	l.await(h.v.FrontDir()+"/state", "6")
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	h.state("6")
	l.await(h.v.FrontDir()+"/state", "1")
	if q := l.Ledger().Quarantined; q != shared {
		t.Errorf("%d pages in quarantine, want %d", q, shared)
	}
	lift()
	h.refs = nil
	h.offer()
	eventually(t, "the link", func() bool { return h.dev.Budget() != (pvnet.Budget{}) })
	h.works()
	h.base.Quarantined = shared
	h.base.Pages += l.Ledger().Pages - h.dev.Budget().SharedPages - 512 // the emulator counts these pages so
	h.leave()
}

// After a failed open the ledger is the same as without the attempt.
func TestT30EveryCallFailsOnceDuringConnect(t *testing.T) {
	l := newLab(t, emu.Config{})
	failures := []error{syscall.ENOMEM, syscall.EAGAIN, syscall.EPERM, hypercall.ErrNoGrants}
	ops := map[string]emu.Op{
		"Memory": emu.OpMemory, "Share": emu.OpShare, "Waiter": emu.OpWaiter,
		"Unbound": emu.OpUnbound, "Store": emu.OpStore,
	}
	for name, op := range ops {
		for k := 1; k <= 4; k++ {
			for _, failure := range failures {
				v := l.vif()
				base := l.Ledger()
				lift := l.guest.Fail(emu.Fault{Op: op, K: k, Err: failure})
				l.write(l.dc, v.BackDir(), raw.BackKeys(), "2")
				c, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				done := make(chan error, 1)
				var d *pvnet.Device
				go func() {
					var err error
					d, err = pvnet.Connect(c, l.guest, fmt.Sprint(v.ID), pvnet.Config{})
					done <- err
				}()
				if s := l.awaitOr(v.FrontDir()+"/state", done, "4"); s == "4" {
					l.write(l.dc, v.BackDir(), nil, "4") // it got as far as Connected
				}
				err := wait(t, done)
				lift()
				cancel()
				if err == nil {
					l.write(l.dc, v.BackDir(), nil, "5")
					go d.Disconnect()
					l.await(v.FrontDir()+"/state", "6")
					l.write(l.dc, v.BackDir(), nil, "6")
					wait(t, d.Done())
				} else if !errors.Is(err, failure) {
					t.Errorf("%s %d, %v: %v", name, k, failure, err)
				}
				l.write(l.dc, v.BackDir(), nil, "6")
				eventually(t, "everything back", func() bool { return l.Ledger() == base })
				l.remove(v)
			}
		}
	}
}

// awaitOr is await, but it returns "" when done has a value, which it leaves in the
// channel.
func (l *lab) awaitOr(path string, done chan error, value string) (s string) {
	l.t.Helper()
	eventually(l.t, path, func() bool {
		s, _ = l.store.Read(path)
		return s == value || len(done) > 0
	})
	if s != value {
		s = ""
	}
	return s
}

func TestT30EveryCallFailsOnceDuringServe(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{})
	honest := l.attack()
	for name, op := range map[string]emu.Op{
		"Memory": emu.OpMemory, "Map": emu.OpMap, "Waiter": emu.OpWaiter, "Bind": emu.OpBind,
	} {
		for k := 1; k <= 3; k++ {
			for _, f := range []emu.Fault{
				{Err: syscall.ENOMEM}, {Err: syscall.EINTR}, {Err: hypercall.ErrNoPorts}, {Status: hypercall.BadGntref},
			} {
				if f.Err == nil && op != emu.OpMap {
					continue
				}
				g := l.knock()
				before := l.Ledger()
				f.Op, f.K = op, k
				lift := l.drv.Fail(f)
				l.write(l.gc, g.v.FrontDir(), g.Keys(), "4")
				s := l.await(g.v.BackDir()+"/state", "4", "5")
				lift()
				if s == "4" { // there is no kth call
					up(t, g.dev)
					g.sink = listen(g.dev)
					g.works()
					g.leave()
					continue
				}
				if now := l.Ledger(); now != before {
					t.Errorf("%s %d: it holds %+v, before: %+v", name, k, now, before)
				}
				g.retry()
			}
		}
	}
	honest.works()
	honest.leave()
}

// A failed grant copy costs its frame.
func TestT30CopiesThatFail(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{})
	g := l.attack()
	reqs, want := g.chain(0, 100, 200, 300)
	for k := 1; k <= 3; k++ {
		for _, st := range []hypercall.Status{hypercall.GeneralError, hypercall.BadGntref, hypercall.TryAgain, hypercall.BadCopyArg} {
			lift := l.drv.Fail(emu.Fault{Op: emu.OpCopyGrant, K: k, Status: st})
			g.send(reqs, nil, refuse, telemetry.DropBadGref, nil)
			lift()
			g.send(reqs, nil, pass, 0, want)
		}
	}
	lift := l.drv.Fail(emu.Fault{Op: emu.OpCopy, Times: 3, Err: syscall.EINTR})
	for range 3 {
		g.send(reqs, nil, refuse, telemetry.DropBadGref, nil)
	}
	lift()
	g.send(reqs, nil, pass, 0, want)
	// Refs that are not granted, or do not permit the operation.
	for _, ref := range []uint32{0, 7, 4095, 1 << 20, ^uint32(0)} {
		bad := g.Req(0, 0, 60, 0)
		bad.Ref = ref
		g.send([]raw.TxReq{bad}, nil, refuse, telemetry.DropBadGref, nil)
	}
	// Towards the guest: the response has an error status, and the next frame passes.
	g.Rx.Put(g.RxProd, g.RxProd%raw.Size, uint32(g.Pages.Refs[0])) // the backend may only read this page
	g.RxProd++
	g.Rx.Put(g.RxProd, g.RxProd%raw.Size, 1<<30)
	g.RxProd++
	g.Post(1)
	for range 3 {
		if _, err := g.dev.Write(pattern(77, 0)); err != nil {
			t.Fatal(err)
		}
	}
	rsp, err := g.Received(3, soon())
	if err != nil || rsp[0].Status != raw.Error || rsp[1].Status != raw.Error || rsp[2].Status != 77 {
		t.Errorf("%+v, %v", rsp, err)
	}
	g.works()
	g.leave()
	if l.log.count(slog.LevelError)+l.log.count(slog.LevelWarn) != 0 {
		t.Error(l.log)
	}
}

// The tick finds work for which a notification failed.
func TestT30NotifiesThatFail(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{})
	g := l.attack()
	lift := l.drv.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Err: syscall.EBADF})
	g.Post(1)
	if _, err := g.dev.Write(pattern(60, 0)); err != nil {
		t.Error(err)
	}
	lift()
	g.Received(1, time.Now())
	g.leave()
}

func TestT31NoGrants(t *testing.T) {
	for _, grants := range []int{1, 2, 63, 64, 65, 66} {
		l := newLab(t, emu.Config{Grants: grants})
		v := l.vif()
		l.write(l.dc, v.BackDir(), raw.BackKeys(), "2")
		base := l.Ledger()
		c, cancel := context.WithTimeout(context.Background(), time.Second)
		done := make(chan error, 1)
		var d *pvnet.Device
		go func() {
			var err error
			d, err = pvnet.Connect(c, l.guest, "0", pvnet.Config{})
			done <- err
		}()
		if s := l.awaitOr(v.FrontDir()+"/state", done, "4"); s == "4" {
			if grants < 66 {
				t.Errorf("%d grants: Connected was written, with nothing attached", grants)
			}
			l.write(l.dc, v.BackDir(), nil, "4")
		}
		err := wait(t, done)
		cancel()
		if (err == nil) != (grants >= 66) || err != nil && !errors.Is(err, hypercall.ErrNoGrants) {
			t.Errorf("%d grants: %v", grants, err)
		}
		l.write(l.dc, v.BackDir(), nil, "6")
		if err == nil {
			d.Disconnect()
		}
		eventually(t, "everything back", func() bool { return l.Ledger() == base })
		l.remove(v)
	}
}

func TestT33LostEventIsFoundByTheTick(t *testing.T) { virtually(t, testT33LostEventIsFoundByTheTick) }

func testT33LostEventIsFoundByTheTick(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{})
	g := l.attack()
	g.works()
	eventually(t, "the device rests", func() bool {
		st := g.dev.Stats()
		return st.RX.Get(telemetry.Parks) >= 2 && g.Tx.Load(raw.ReqEvent) == g.TxProd+1
	})
	time.Sleep(20 * time.Millisecond) // give the armed owner time to wait
	lift := l.guest.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
	start := time.Now()
	g.Put(g.Req(0, 0, 60, 0).Words())
	g.Push()
	if _, err := g.Answers(1, soon()); err != nil {
		t.Fatal(err)
	}
	lift()
	if d := time.Since(start); d > 2500*time.Millisecond {
		t.Errorf("found after %v", d)
	}
	eventually(t, "a rescue", func() bool {
		st := g.dev.Stats()
		return st.RX.Get(telemetry.RescuedWakeups) == 1
	})
	g.works()
	g.leave()
}

// XSA-322: a domid is not an identity.
func TestT27DomainDiesAndItsNumberComesAgain(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{})
	for range 4 {
		g := l.attack()
		g.works()
		g.Put(g.Req(1, 0, 60, 0).Words(), g.Req(2, 0, 60, 0).Words())
		g.Push()
		l.gc.Close()
		if err := l.Destroy(frontID); err != nil {
			t.Fatal(err)
		}
		l.guest = l.domain(frontID)
		l.gc = l.client(l.guest)
		l.remove(g.v)
		wait(t, g.dev.Done())
		wait(t, g.sink.ended)
		g.Front.Close()
		if n := l.Ledger(); n.Mappings != 0 || n.Grants != 0 || n.Ports != 1 { // the port is the backend's presence
			t.Errorf("%+v", n)
		}
	}
	g := l.attack()
	g.works()
	g.leave()
}

// The backend's domain dies at any moment, and another takes its place.
func TestT29BackendDomainDiesAtAnyMoment(t *testing.T) {
	l := newLab(t, emu.Config{})
	rng := rand.New(rand.NewPCG(5, 6))
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	h := l.lure(pvnet.Config{})
	for i := range rounds {
		// The connection gets less far each round: with traffic, then through less of the
		// handshake.
		if i > 0 {
			l.ids = 0
			h.v, h.refs = l.vif(), nil
			at := i % 4
			if at > 0 {
				l.write(l.dc, h.v.BackDir(), raw.BackKeys(), "2")
			}
			if at > 1 {
				l.await(h.v.FrontDir()+"/state", "4")
			}
			if at > 2 {
				h.offer()
				eventually(t, "the link", func() bool { return h.dev.Budget() != (pvnet.Budget{}) })
				h.works()
			}
		}
		stop, moved := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(moved)
			for {
				select {
				case <-stop:
					return
				default:
				}
				h.dev.SetWriteDeadline(time.Now().Add(5 * time.Millisecond))
				h.dev.Write(pattern(60, 0))
			}
		}()
		time.Sleep(time.Duration(rng.IntN(4000)) * time.Microsecond)
		l.dc.Close()
		if err := l.Destroy(backID); err != nil {
			t.Fatal(err)
		}
		h.Close()
		l.drv = l.domain(backID)
		l.dc = l.client(l.drv)
		l.write(l.tools, h.v.BackDir(), nil, "6") // its toolstack cleans up
		l.remove(h.v)
		close(stop)
		wait(t, moved)
		eventually(t, "everything back", func() bool {
			now := l.Ledger()
			return now.Grants == 0 && now.Ports == 0 && now.Quarantined == 0
		})
	}
	l.ids = 0
	h.v, h.refs = l.vif(), nil
	h.offer()
	eventually(t, "the link", func() bool { return h.dev.Budget() != (pvnet.Budget{}) })
	h.dev.SetWriteDeadline(time.Time{})
	h.works()
	h.leave()
}

// A connect gives everything back, whichever step fails: with the rx pages posted, with
// one queue complete and the next not, with nothing published.
func TestT30ConnectFailsAfterPagesWerePosted(t *testing.T) {
	l := newLab(t, emu.Config{})
	try := func(what string, queues string, prepare func(v toolstack.Vif) (undo func())) {
		t.Helper()
		v := l.vif()
		keys := raw.BackKeys()
		keys["multi-queue-max-queues"] = queues
		l.write(l.dc, v.BackDir(), keys, "2")
		base := l.Ledger()
		undo := prepare(v)
		d, err := pvnet.Connect(ctx(t), l.guest, fmt.Sprint(v.ID), pvnet.Config{Queues: 2})
		undo()
		if err == nil {
			d.Disconnect()
			t.Errorf("%s: connected", what)
		}
		if now := l.Ledger(); now != base {
			t.Errorf("%s: it holds %+v, before: %+v (%v)", what, now, base, err)
		}
		l.write(l.dc, v.BackDir(), nil, "6")
		l.remove(v)
	}
	try("publish", "1", func(v toolstack.Vif) func() {
		path := v.FrontDir() + "/request-rx-copy"
		if err := l.tools.Write(ctx(t), path, "0"); err != nil {
			t.Fatal(err)
		}
		if err := l.tools.SetPerms(ctx(t), path, xenstore.Perm{Dom: 0, Access: xenstore.None}); err != nil {
			t.Fatal(err)
		}
		return func() {}
	})
	for k := 1; k <= 8; k++ {
		for _, op := range []emu.Op{emu.OpShare, emu.OpMemory, emu.OpWaiter, emu.OpUnbound} {
			if k > 6 || op != emu.OpShare && k > 2 {
				continue // there is no such call
			}
			try(fmt.Sprint("call ", k, " of ", op), "2", func(toolstack.Vif) func() {
				return l.guest.Fail(emu.Fault{Op: op, K: k, Times: -1, Err: syscall.ENOMEM}) // a single failure only costs a queue
			})
		}
	}
}
