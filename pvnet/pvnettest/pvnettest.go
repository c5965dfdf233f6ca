// Package pvnettest makes a vif of an emulated machine with both ends in one
// process. It is for tests alone.
package pvnettest

import (
	"context"
	"errors"
	"io"
	"runtime"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus"
	"barevif/xenbus/store"
	"barevif/xenbus/toolstack"
)

// Limit bounds what a test waits for; none comes near it.
const Limit = 20 * time.Second

// A Wire is a vif. It ends with its test, which fails if goroutines are left.
type Wire struct {
	Front, Back *pvnet.Device
	Guest       *emu.Domain // the frontend's

	t   testing.TB
	cfg pvnet.Config // of the frontend
}

// New makes a vif between two domains of a new machine and connects its ends.
// Where vif names no domains the backend is in domain 1 and the frontend in 2.
func New(t testing.TB, vif toolstack.Vif, front, back pvnet.Config) *Wire {
	t.Helper()
	if vif.Front == 0 && vif.Back == 0 {
		vif.Front, vif.Back = 2, 1
	}
	before := runtime.NumGoroutine()
	st := store.New(store.Config{})
	m, err := emu.New(emu.Config{Store: func(dom hypercall.DomID, c io.ReadWriteCloser) { st.ServeConn(c, dom) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Close()
		st.Close()
		for end := time.Now().Add(Limit); runtime.NumGoroutine() > before; runtime.Gosched() {
			if time.Now().After(end) {
				buf := make([]byte, 1<<16)
				t.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			}
		}
	})
	m.OnDeath(st.DomainDied)
	ctx, cancel := context.WithTimeout(context.Background(), 2*Limit)
	t.Cleanup(cancel)
	domain := func(id hypercall.DomID) *emu.Domain {
		d, err := m.NewDomain(id)
		if err != nil {
			t.Fatal(err)
		}
		st.Introduce(id)
		return d
	}
	tools, err := xenbus.Dial(ctx, domain(0).Store, xenbus.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tools.Close() })
	w := &Wire{t: t, cfg: front, Guest: domain(vif.Front)}
	driver := domain(vif.Back)
	if err := errors.Join(toolstack.Home(ctx, tools, vif.Front), toolstack.Home(ctx, tools, vif.Back), toolstack.Add(ctx, tools, vif)); err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(context.Background())
	backs, served := make(chan *pvnet.Device, 1), make(chan error, 1)
	go func() {
		served <- pvnet.Serve(serving, driver, pvnet.ServeConfig{Config: back, Hotplug: true}, func(d *pvnet.Device) { backs <- d })
	}()
	t.Cleanup(func() {
		stop()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	w.Connect()
	select {
	case w.Back = <-backs:
	case <-ctx.Done():
		t.Fatal("no backend")
	}
	return w
}

// Connect connects the frontend, again if it was disconnected.
func (w *Wire) Connect() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	front, err := pvnet.Connect(ctx, w.Guest, "0", w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.Front = front
	w.t.Cleanup(front.Disconnect)
}
