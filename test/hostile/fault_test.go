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
	drv := l.attackFrontend(pvnet.Config{})
	drv.requireTraffic()
	for round := range 3 {
		kept := drv.Back
		drv.setState("5")
		drv.awaitFrontend("6")
		drv.setState("6") // a lie: the backend keeps the rings mapped
		drv.awaitFrontend("1")
		if q := l.Ledger().Quarantined; q != 2 {
			t.Errorf("%d pages in quarantine, want 2", q)
		}
		if n := l.log.count(slog.LevelWarn); n != round+1 || !strings.Contains(l.log.String(), "quarantined") {
			t.Errorf("%d warnings\n%s", n, l.log)
		}
		drv.reconnect()
		for i := range kept.Tx.Bytes() { // the peer can still write the page, which must have no effect
			kept.Tx.Bytes()[i], kept.Rx.Bytes()[i] = 0xff, 0xff
		}
		kept.TxPort.Notify()
		drv.requireTraffic()
		if err := kept.Close(); err != nil {
			t.Error(err)
		}
		if q := l.Ledger().Quarantined; q != 0 {
			t.Errorf("%d pages in quarantine after they were let go", q)
		}
	}
	drv.disconnect()
}

func TestT18GrantsThatNeverEnd(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.Dirty = true
	drv := l.attackFrontend(pvnet.Config{})
	drv.requireTraffic()
	shared := drv.dev.Budget().SharedPages
	lift := l.guest.Fail(emu.Fault{Op: emu.OpEnd, Times: -1})
	drv.closeHandshake()
	if q := l.Ledger().Quarantined; q != shared {
		t.Errorf("%d pages in quarantine, want %d", q, shared)
	}
	lift()
	drv.reconnect()
	drv.requireTraffic()
	drv.before.Quarantined = shared
	drv.before.Pages += l.Ledger().Pages - drv.dev.Budget().SharedPages - 512 // the emulator counts these pages so
	drv.disconnect()
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
				v := l.addVif()
				base := l.Ledger()
				lift := l.guest.Fail(emu.Fault{Op: op, K: k, Err: failure})
				l.write(l.drvStore, v.BackDir(), raw.BackKeys(), "2")
				c, cancel := context.WithTimeout(context.Background(), waitLimit)
				front := l.startConnect(c, v, pvnet.Config{})
				if s := l.awaitOr(v.FrontDir()+"/state", front.done, "4"); s == "4" {
					l.write(l.drvStore, v.BackDir(), nil, "4") // it got as far as Connected
				}
				err := wait(t, front.done)
				lift()
				cancel()
				if err == nil {
					l.write(l.drvStore, v.BackDir(), nil, "5")
					go front.dev.Disconnect()
					l.await(v.FrontDir()+"/state", "6")
					l.write(l.drvStore, v.BackDir(), nil, "6")
					wait(t, front.dev.Done())
				} else if !errors.Is(err, failure) {
					t.Errorf("%s %d, %v: %v", name, k, failure, err)
				}
				l.write(l.drvStore, v.BackDir(), nil, "6")
				eventually(t, "everything back", func() bool { return l.Ledger() == base })
				l.removeVif(v)
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
	l := newServingLab(t)
	honest := l.attackBackend()
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
				g := l.newGuest()
				before := l.Ledger()
				f.Op, f.K = op, k
				lift := l.drv.Fail(f)
				l.write(l.guestStore, g.v.FrontDir(), g.Keys(), "4")
				s := g.awaitBackend("4", "5")
				lift()
				if s == "4" { // there is no kth call
					waitLinkUp(t, g.dev)
					g.sink = listen(g.dev)
					g.requireTraffic()
					g.disconnect()
					continue
				}
				if now := l.Ledger(); now != before {
					t.Errorf("%s %d: it holds %+v, before: %+v", name, k, now, before)
				}
				g.retryAfterRefusal()
			}
		}
	}
	honest.requireTraffic()
	honest.disconnect()
}

// A failed grant copy costs its frame.
func TestT30CopiesThatFail(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
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
	rsp, err := g.Received(3, deadline())
	if err != nil || rsp[0].Status != raw.Error || rsp[1].Status != raw.Error || rsp[2].Status != 77 {
		t.Errorf("%+v, %v", rsp, err)
	}
	g.requireTraffic()
	g.disconnect()
	if l.log.count(slog.LevelError)+l.log.count(slog.LevelWarn) != 0 {
		t.Error(l.log)
	}
}

// The tick finds work for which a notification failed.
func TestT30NotifiesThatFail(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	lift := l.drv.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Err: syscall.EBADF})
	g.Post(1)
	if _, err := g.dev.Write(pattern(60, 0)); err != nil {
		t.Error(err)
	}
	lift()
	g.Received(1, time.Now())
	g.disconnect()
}

func TestT31NoGrants(t *testing.T) {
	for _, grants := range []int{1, 2, 63, 64, 65, 66} {
		l := newLab(t, emu.Config{Grants: grants})
		v := l.addVif()
		l.write(l.drvStore, v.BackDir(), raw.BackKeys(), "2")
		base := l.Ledger()
		c, cancel := context.WithTimeout(context.Background(), waitLimit)
		front := l.startConnect(c, v, pvnet.Config{})
		if s := l.awaitOr(v.FrontDir()+"/state", front.done, "4"); s == "4" {
			if grants < 66 {
				t.Errorf("%d grants: Connected was written, with nothing attached", grants)
			}
			l.write(l.drvStore, v.BackDir(), nil, "4")
		}
		err := wait(t, front.done)
		cancel()
		if (err == nil) != (grants >= 66) || err != nil && !errors.Is(err, hypercall.ErrNoGrants) {
			t.Errorf("%d grants: %v", grants, err)
		}
		l.write(l.drvStore, v.BackDir(), nil, "6")
		if err == nil {
			front.dev.Disconnect()
		}
		eventually(t, "everything back", func() bool { return l.Ledger() == base })
		l.removeVif(v)
	}
}

func TestT33LostEventIsFoundByTheTick(t *testing.T) {
	inVirtualTime(t, testT33LostEventIsFoundByTheTick)
}

func testT33LostEventIsFoundByTheTick(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	g.requireTraffic()
	eventually(t, "the device rests", func() bool {
		st := g.dev.Stats()
		return st.RX.Get(telemetry.Parks) >= 2 && g.Tx.Load(raw.ReqEvent) == g.TxProd+1
	})
	time.Sleep(20 * time.Millisecond) // give the armed owner time to wait
	lift := l.guest.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
	start := time.Now()
	g.Put(g.Req(0, 0, 60, 0).Words())
	g.Push()
	g.awaitAnswers(1)
	lift()
	if d := time.Since(start); d > 2500*time.Millisecond {
		t.Errorf("found after %v", d)
	}
	if frame := wait(t, g.sink.frames); len(frame) != 60 {
		t.Errorf("60 bytes arrived as %d", len(frame))
	}
	eventually(t, "a rescue", func() bool {
		st := g.dev.Stats()
		return st.RX.Get(telemetry.RescuedWakeups) == 1
	})
	g.requireTraffic()
	g.disconnect()
}

// XSA-322: a domid is not an identity.
func TestT27DomainDiesAndItsNumberComesAgain(t *testing.T) {
	l := newServingLab(t)
	for range 4 {
		g := l.attackBackend()
		g.requireTraffic()
		g.Put(g.Req(1, 0, 60, 0).Words(), g.Req(2, 0, 60, 0).Words())
		g.Push()
		l.guestStore.Close()
		if err := l.Destroy(frontID); err != nil {
			t.Fatal(err)
		}
		l.guest = l.domain(frontID)
		l.guestStore = l.client(l.guest)
		l.removeVif(g.v)
		wait(t, g.dev.Done())
		wait(t, g.sink.ended)
		g.Front.Close()
		if n := l.Ledger(); n.Mappings != 0 || n.Grants != 0 || n.Ports != 1 { // the port is the backend's presence
			t.Errorf("%+v", n)
		}
	}
	g := l.attackBackend()
	g.requireTraffic()
	g.disconnect()
}

// The backend's domain dies at any moment, and another takes its place.
func TestT29BackendDomainDiesAtAnyMoment(t *testing.T) {
	l := newLab(t, emu.Config{})
	rng := rand.New(rand.NewPCG(5, 6))
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	drv := l.attackFrontend(pvnet.Config{})
	for i := range rounds {
		// The connection gets less far each round: with traffic, then through less of the
		// handshake.
		if i > 0 {
			l.nextVif = 0
			drv.v = l.addVif()
			at := i % 4
			if at > 0 {
				l.write(l.drvStore, drv.v.BackDir(), raw.BackKeys(), "2")
			}
			if at > 1 {
				drv.awaitFrontend("4")
			}
			if at > 2 {
				drv.reconnect()
				drv.requireTraffic()
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
				drv.dev.SetWriteDeadline(time.Now().Add(5 * time.Millisecond))
				drv.dev.Write(pattern(60, 0))
			}
		}()
		time.Sleep(time.Duration(rng.IntN(4000)) * time.Microsecond)
		l.drvStore.Close()
		if err := l.Destroy(backID); err != nil {
			t.Fatal(err)
		}
		drv.Close()
		l.drv = l.domain(backID)
		l.drvStore = l.client(l.drv)
		l.write(l.tools, drv.v.BackDir(), nil, "6") // its toolstack cleans up
		l.removeVif(drv.v)
		close(stop)
		wait(t, moved)
		eventually(t, "everything back", func() bool {
			now := l.Ledger()
			return now.Grants == 0 && now.Ports == 0 && now.Quarantined == 0
		})
	}
	l.nextVif = 0
	drv.v = l.addVif()
	drv.reconnect()
	drv.dev.SetWriteDeadline(time.Time{})
	drv.requireTraffic()
	drv.disconnect()
}

// A connect gives everything back, whichever step fails: with the rx pages posted, with
// one queue complete and the next not, with nothing published.
func TestT30ConnectFailsAfterPagesWerePosted(t *testing.T) {
	l := newLab(t, emu.Config{})
	try := func(what string, queues string, prepare func(v toolstack.Vif) (undo func())) {
		t.Helper()
		v := l.addVif()
		keys := raw.BackKeys()
		keys["multi-queue-max-queues"] = queues
		l.write(l.drvStore, v.BackDir(), keys, "2")
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
		l.write(l.drvStore, v.BackDir(), nil, "6")
		l.removeVif(v)
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
