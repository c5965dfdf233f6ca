// Package pvnettest makes a vif of an emulated machine with both ends in one process, for tests of
// programs that own a vif, or serve vifs. It takes no rights, no Xen and no kernel's network, and
// the memory of both ends is on the heap, where the race detector sees it.
//
// [New] gives a test both devices, a guest's and a backend's. A program's own code runs on one
// of them, and the test on the other: with frames, or with pvnet/netstack on it as a client of
// the program's server; see the example of that package. [Wire.Plug] takes the vif away and
// gives it back as another card. The vif ends with its test, which fails if a page, a grant or a
// goroutine is left. [Open] is for examples. A [Hub] is a driver domain with vifs of several
// guests.
//
// It is for tests alone: no program imports it.
package pvnettest

import (
	"context"
	"errors"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// A Wire is a vif of a machine of its own.
type Wire struct {
	Front, Back *pvnet.Device
	Guest       *emu.Domain // the frontend's

	t     testing.TB
	cfg   pvnet.Config // of the frontend
	lab   *labtest.Lab
	vif   toolstack.Vif
	backs <-chan *pvnet.Device
}

// New makes a vif between two domains of a new machine and connects its ends.
// Where vif names no domains the backend is in domain 1 and the frontend in 2.
func New(t testing.TB, vif toolstack.Vif, front, back pvnet.Config) *Wire {
	t.Helper()
	return NewServed(t, vif, front, pvnet.ServeConfig{Config: back, Hotplug: true})
}

// NewServed is New with a backend that is served with cfg.
func NewServed(t testing.TB, vif toolstack.Vif, front pvnet.Config, cfg pvnet.ServeConfig) *Wire {
	t.Helper()
	if vif.Front == 0 && vif.Back == 0 {
		vif.Front, vif.Back = 2, 1
	}
	l := labtest.New(t, emu.Config{})
	w := &Wire{t: t, cfg: front, Guest: l.Domain(vif.Front)}
	driver := l.Domain(vif.Back)
	w.lab, w.vif = l, l.Add(vif)
	serving, stop := context.WithCancel(context.Background())
	backs, served := make(chan *pvnet.Device, 1), make(chan error, 1)
	go func() {
		served <- pvnet.Serve(serving, driver, cfg, func(d *pvnet.Device) { backs <- d })
	}()
	t.Cleanup(func() {
		stop()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	w.backs = backs
	w.Connect()
	w.waitBackend()
	return w
}

// waitBackend waits for the backend's device and its link, which is up after the frontend's.
func (w *Wire) waitBackend() {
	w.t.Helper()
	select {
	case w.Back = <-w.backs:
		waitLink(w.t, w.Back, true)
	case <-time.After(labtest.Limit):
		w.t.Fatal("no backend")
	}
}

// Plug unplugs the vif and plugs it again as another card. The frontend's device
// stays; the backend's is another one.
func (w *Wire) Plug(mac [6]byte, mtu int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	if err := toolstack.Remove(ctx, w.lab.Tools, w.vif); err != nil {
		w.t.Fatal(err)
	}
	w.vif.MAC, w.vif.MTU = mac, mtu
	w.lab.Add(w.vif)
	w.waitBackend()
	for ev := range w.Front.Links(ctx) {
		if ev.Up && ev.MAC == mac {
			return
		}
	}
	w.t.Fatal("the vif did not connect again")
}

// waitLink waits until the link of a device is up, or down.
func waitLink(t testing.TB, dev *pvnet.Device, up bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	for ev := range dev.Links(ctx) {
		if ev.Up == up {
			return
		}
	}
	t.Fatalf("the link of device %s to domain %d: never up=%t", dev.ID(), dev.Peer(), up)
}

// Connect connects the frontend, again if it was disconnected.
func (w *Wire) Connect() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	front, err := pvnet.Connect(ctx, w.Guest, "0", w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.Front = front
	w.t.Cleanup(front.Disconnect)
	if w.Back != nil {
		waitLink(w.t, w.Back, true)
	}
}
