package pvnet_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// resume does what "xl save" and "xl restore" do to domain from with its vif v, but in another
// order: a program in an emulated domain cannot be stopped, so the new domain's vif is there
// first.
func (l *lab) resume(v toolstack.Vif, to hypercall.DomID) toolstack.Vif {
	l.t.Helper()
	old := v
	l.Store.Introduce(to)
	if err := toolstack.Home(ctx(l.t), l.tools, to); err != nil {
		l.t.Fatal(err)
	}
	v.Front = to
	l.add(v)
	if err := l.Resume(old.Front, to); err != nil {
		l.t.Fatal(err)
	}
	if err := toolstack.Remove(ctx(l.t), l.tools, old); err != nil {
		l.t.Fatal(err)
	}
	return v
}

// moves waits until both ends have received more frames.
func moves(t *testing.T, fronts, backs *ledger) {
	t.Helper()
	f, b := fronts.received.Load()+200, backs.received.Load()+200
	for end := time.Now().Add(labtest.Limit); fronts.received.Load() < f || backs.received.Load() < b; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no frames move")
		}
	}
}

// The frontend's domain is saved and restored. The frontend goes on as the same device within a
// second, and the backend serves the new domain instead of the old.
func TestAFrontendGoesOnWithinASecondOfAResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		v := l.add(toolstack.Vif{Front: 1, Back: 2})
		devs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
		front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		back := wait(t, devs)
		heard := make(chan int, 1)
		listen := func(d *pvnet.Device) {
			go d.Listen(context.Background(), func(f pvnet.Frame) { heard <- f.Len() })
		}
		listen(front)
		links := make(chan bool, 16)
		go func() {
			for ev := range front.Links(context.Background()) {
				links <- ev.Up
			}
		}()
		if !wait(t, links) {
			t.Fatal("the link is down")
		}
		for to := hypercall.DomID(3); ; to++ {
			listen(back)
			for i, d := range []*pvnet.Device{front, back} {
				if _, err := d.Write(make([]byte, 60+i)); err != nil {
					t.Fatal(err)
				}
				if n := wait(t, heard); n != 60+i {
					t.Errorf("a frame of %d bytes", n)
				}
			}
			if now := l.Ledger(); now.Grants != 514 || now.Ports > 5 {
				t.Errorf("held: %+v", now)
			}
			if to == 8 {
				break
			}
			began, old := time.Now(), back
			v = l.resume(v, to)
			back = wait(t, devs)
			if wait(t, links) || !wait(t, links) {
				t.Fatal("the link did not go down and come up")
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("connected again as domain %d after %v", to, took)
			}
			if fdom.ID() != to || back.ID() != "0" || back.Peer() != to {
				t.Errorf("the frontend is in domain %d, the backend's peer is %d, want %d", fdom.ID(), back.Peer(), to)
			}
			<-old.Done()
		}
		front.Disconnect()
		stop()
	})
}

// The same with frames under way on several queues, from the start of a connection on.
// Some of them are lost, but no page and no port is.
func TestResumesUnderTraffic(t *testing.T) {
	l := newLabOn(t, emu.Config{Grants: 4096})
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	var fronts, backs ledger
	cfg := pvnet.Config{Queues: 2}
	c, cancel := context.WithCancelCause(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- pvnet.Serve(c, bdom, pvnet.ServeConfig{Hotplug: true, Config: cfg}, func(d *pvnet.Device) { backs.carry(t, d, 2) })
	}()
	front, err := pvnet.Connect(ctx(t), fdom, "0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	fronts.carry(t, front, 1)
	moves(t, &fronts, &backs)
	held := l.Ledger()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 4))
	for to := hypercall.DomID(3); to < 13; to++ {
		if rng.IntN(2) == 0 {
			moves(t, &fronts, &backs)
		} else { // somewhere in the next connection's set-up
			time.Sleep(time.Duration(rng.IntN(5000)) * time.Microsecond)
		}
		v = l.resume(v, to)
	}
	moves(t, &fronts, &backs)
	if err := labtest.Comes(func() error {
		if now := l.Ledger(); now.Grants != held.Grants || now.Ports != held.Ports || now.Mappings != held.Mappings || now.Waiters != held.Waiters {
			return fmt.Errorf("held before: %+v; now: %+v", held, now)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	front.Disconnect()
	cancel(context.Canceled)
	<-served
	fronts.traffic.Wait()
	backs.traffic.Wait()
}

// A guest dies, or is saved, before the backend has looked at its vif, and nothing is left of the
// frontend in xenstore. The toolstack can take the vif away all the same: the backend closes it.
func TestAVifWhoseGuestDiedUnseenIsTakenAway(t *testing.T) {
	l := newLab(t)
	l.domain(1)
	bdom := l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	if err := l.Destroy(1); err != nil {
		t.Fatal(err)
	}
	_, stop := l.serve(bdom, pvnet.ServeConfig{})
	if err := toolstack.Remove(ctx(t), l.tools, v); err != nil {
		t.Error(err)
	}
	stop()
}
