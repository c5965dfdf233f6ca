package pvnet_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
)

// awaitStatic waits until a device has static grants.
func awaitStatic(t *testing.T, devices ...*pvnet.Device) {
	t.Helper()
	c := ctx(t)
	for _, d := range devices {
		for d.Features()&telemetry.FeatureStaticGrants == 0 {
			if c.Err() != nil {
				t.Fatalf("vif %s has no static grants", d.ID())
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// echo sends a frame each way, of every kind of size, and compares what arrives.
func echo(t *testing.T, from, to *pvnet.Device) {
	t.Helper()
	got := make(chan []byte, 1)
	c, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		to.Listen(c, func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			got <- b
		})
	}()
	defer func() { stop(); <-done }()
	for i, n := range []int{60, 1500, 4097, 60000} {
		want := frame(n, i)
		if _, err := from.Write(want); err != nil {
			t.Fatal(err)
		}
		if b := wait(t, got); string(b) != string(want) {
			t.Fatalf("%d bytes arrived as %d others", n, len(b))
		}
	}
}

func TestStaticGrantsAreAgreedOnByBothEnds(t *testing.T) {
	for _, tt := range []struct {
		name        string
		front, back bool
		queues      int
	}{
		{"both", true, true, 1}, {"both, four queues", true, true, 4}, {"frontend alone", true, false, 1},
		{"backend alone", false, true, 1}, {"frontend alone, four queues", true, false, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			fdom, bdom := l.domain(1), l.domain(2)
			l.add(toolstack.Vif{Front: 1, Back: 2})
			backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true,
				Config: pvnet.Config{StaticGrants: tt.back, LendRx: true, Queues: tt.queues}})
			front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{StaticGrants: tt.front, Queues: tt.queues})
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second time with another backend
				back := wait(t, backs)
				await(t, back, true)
				await(t, front, true)
				if tt.front && tt.back {
					awaitStatic(t, front, back)
				}
				before := bdom.Calls().CopyOps
				echo(t, front, back)
				echo(t, back, front)
				if n := bdom.Calls().CopyOps - before; (tt.front && tt.back) != (n == 0) {
					t.Errorf("%d grant copies", n)
				}
				if both := tt.front && tt.back; !both && (front.Features()|back.Features())&telemetry.FeatureStaticGrants != 0 {
					t.Error("static grants that only one end wants")
				}
				stop()
				await(t, front, false)
				backs, stop = l.serve(bdom, pvnet.ServeConfig{Hotplug: true,
					Config: pvnet.Config{StaticGrants: tt.back, LendRx: true, Queues: tt.queues}})
			}
			front.Disconnect()
			stop()
		})
	}
}

// A user of the backend that never gives back a lent frame costs its frontend the pages,
// and nobody else anything; the frame stays readable.
func TestALentFrameOutlivesItsConnection(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{StaticGrants: true, LendRx: true}})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{StaticGrants: true})
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, backs)
	await(t, back, true)
	awaitStatic(t, front, back)
	rx, _ := back.OwnRX(0)
	front.Write(frame(1000, 3))
	var f [1]pvnet.Frame
	if n, err := rx.Receive(f[:]); n != 1 || err != nil || !f[0].ReadOnly() {
		t.Fatal(n, err, f[0].ReadOnly())
	}
	stop()
	front.Disconnect()
	if string(f[0].Bytes()) != string(frame(1000, 3)) {
		t.Error("the frame is not readable")
	}
	if n := front.Stats().RX.Get(telemetry.PagesQuarantined); n != 256 {
		t.Errorf("%d pages quarantined while one of them is mapped", n)
	}
	if err := f[0].Release(); err != nil {
		t.Error(err)
	}
	sent, received := front.Stats(), back.Stats()
	if n := telemetry.Unaccounted(&sent.TX, &received.RX); n != 0 {
		t.Errorf("%d frames in no account", n)
	}
}

// The backend's program is killed, and the next one goes on with the rings, without a word
// to the frontend, which adds its pages again.
func TestStaticGrantsWithTheNextProgram(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	cfg := pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{StaticGrants: true}}
	first := make(chan *pvnet.Device, 1)
	serving, stop := context.WithCancelCause(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		pvnet.Serve(serving, bdom, cfg, func(d *pvnet.Device) { first <- d })
	}()
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{StaticGrants: true})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	back := wait(t, first)
	await(t, back, true)
	awaitStatic(t, front, back)
	stop(pvnet.ErrHandover) // like a killed process, it writes nothing more to xenstore
	<-ended
	await(t, front, false)
	backs, _ := l.serve(bdom, cfg)
	back = wait(t, backs)
	await(t, back, true)
	await(t, front, true)
	echo(t, front, back)
	awaitStatic(t, front, back)
	before := bdom.Calls().CopyOps
	echo(t, back, front)
	if n := bdom.Calls().CopyOps - before; n != 0 {
		t.Errorf("%d grant copies", n)
	}
}

// The memory of many vifs with static grants is in their budgets: a frontend grants no page
// more for them than its two of the control ring, and a backend says how many it may map.
func TestBudgetsHoldWhatStaticGrantsTake(t *testing.T) {
	const vifs, queues = 3, 2
	l := newLab(t)
	bdom := l.domain(20)
	cfg := pvnet.Config{StaticGrants: true, Queues: queues}
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: cfg})
	shared, mapped := 0, 0
	for i := range vifs {
		dom := hypercall.DomID(i + 1)
		fdom := l.domain(dom)
		l.add(toolstack.Vif{Front: dom, Back: 20})
		front, err := pvnet.Connect(ctx(t), fdom, "0", cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer front.Disconnect()
		back := wait(t, backs)
		await(t, back, true)
		awaitStatic(t, front, back)
		f, b := front.Budget(), back.Budget()
		if f.MappedPages != 0 || b.MappedPages != 2*queues*512 {
			t.Errorf("budgets %v and %v", f, b)
		}
		if !strings.Contains(b.String(), fmt.Sprint(b.MappedPages)) || strings.Contains(f.String(), "mapped") {
			t.Errorf("budgets %v and %v", f, b)
		}
		shared, mapped = shared+f.SharedPages, mapped+b.MappedPages
	}
	now := l.Ledger()
	if now.Grants != shared {
		t.Errorf("%d pages granted, %d in the budgets", now.Grants, shared)
	}
	rings, lists := vifs*(2*queues+1), vifs // the backends map no list page
	if now.Mappings != shared-lists || now.Mappings-rings > mapped {
		t.Errorf("%d pages mapped, %d of them rings, of %d shared; %d in the budgets", now.Mappings, rings, shared, mapped)
	}
}
