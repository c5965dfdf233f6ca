package forward_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/forward"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// A nudgedDomain counts how often its waiters are nudged.
type nudgedDomain struct {
	*emu.Domain
	nudges *atomic.Int32
}

func (d nudgedDomain) Waiter() (hypercall.Waiter, error) {
	w, err := d.Domain.Waiter()
	return nudgedWaiter{w, d.nudges}, err
}

func (d nudgedDomain) Group(onThread bool) (hypercall.Group, error) {
	g, err := d.Domain.Group(onThread)
	return nudgedGroup{g}, err
}

type nudgedWaiter struct {
	hypercall.Waiter
	nudges *atomic.Int32
}

func (w nudgedWaiter) Nudge() {
	w.nudges.Add(1)
	w.Waiter.(hypercall.Nudger).Nudge()
}

type nudgedGroup struct{ hypercall.Group }

func (g nudgedGroup) Add(w hypercall.Waiter, tag int) error {
	return g.Group.Add(w.(nudgedWaiter).Waiter, tag)
}

func (g nudgedGroup) Remove(w hypercall.Waiter) { g.Group.Remove(w.(nudgedWaiter).Waiter) }

func (g nudgedGroup) Rearm(w hypercall.Waiter, worked bool) error {
	return g.Group.Rearm(w.(nudgedWaiter).Waiter, worked)
}

// While a guest sends, a worker nudges the goroutine that waits for the room of another one, which has posted
// pages and whose event does not come.
func TestAPoolNudgesWhoWaits(t *testing.T) {
	l := labtest.New(t, emu.Config{})
	driver, from, to := l.Domain(1), l.Domain(2), l.Domain(3)
	l.Add(toolstack.Vif{Front: 2, Back: 1})
	l.Add(toolstack.Vif{Front: 3, Back: 1})
	var nudges atomic.Int32
	domain := nudgedDomain{driver, &nudges}
	backs, served := make(chan *pvnet.Device, 2), make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		served <- pvnet.Serve(ctx, domain, pvnet.ServeConfig{Hotplug: true, DrainTimeout: -1}, func(d *pvnet.Device) { backs <- d })
	}()
	t.Cleanup(func() {
		stop()
		next(t, served)
	})
	ends := map[hypercall.DomID]*pvnet.Device{}
	fronts := map[hypercall.DomID]*pvnet.Device{}
	for _, guest := range []*emu.Domain{from, to} {
		dev, err := pvnet.Connect(t.Context(), guest, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(dev.Disconnect)
		fronts[guest.ID()] = dev
		back := next(t, backs)
		ends[back.Peer()] = back
	}
	pool, err := forward.NewPool(domain, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pool.Close() })
	sender := newSender(t, ends[3], forward.Config{Pool: pool})
	in := newInput(t, sender, forward.NewSource(0))
	go pool.Receive(ctx, ends[2], func(_ int, frames []pvnet.Frame) (int, error) { return in.Send(frames) })
	flood := func() bool {
		for i := range 64 {
			if _, err := fronts[2].Write(packet(100, i)); err != nil {
				t.Fatal(err)
			}
		}
		return sender.Stats().Waiting > 0
	}
	rx, err := fronts[3].OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	lift := to.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
	defer lift()
	until(t, "a nudge", func() bool {
		if !flood() {
			return false
		}
		time.Sleep(5 * time.Millisecond) // the worker leaves the queue to its goroutine
		var frames [64]pvnet.Frame
		for n := 1; n > 0; rx.Release(frames[:n]) {
			if n, err = rx.Poll(frames[:]); err != nil {
				t.Fatal(err)
			}
		}
		flood()
		return nudges.Load() > 0
	})
}
