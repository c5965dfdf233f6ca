package pvnettest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// A Hub is a driver domain with a vif for each of several guests, for tests of programs that
// serve many vifs: routers and bridges. Its calls are for the goroutine of the test.
type Hub struct {
	Fronts, Backs []*pvnet.Device // by guest
	Driver        *emu.Domain     // the backends'

	t     testing.TB
	cfg   func(guest int) pvnet.Config
	lab   *labtest.Lab
	vifs  []toolstack.Vif
	doms  []*emu.Domain
	mu    sync.Mutex
	backs map[hypercall.DomID]chan *pvnet.Device // guarded by mu
}

// NewHub makes a machine with a driver domain and a vif for each of its guests, and connects
// them. vif has what all of them have in common; front makes the Config of each guest's end, by
// its number from 0. It ends with its test, which fails if a page, a grant or a goroutine is
// left.
func NewHub(t testing.TB, guests int, vif toolstack.Vif, front func(guest int) pvnet.Config, cfg pvnet.ServeConfig) *Hub {
	t.Helper()
	h := &Hub{t: t, cfg: front, lab: labtest.New(t, emu.Config{}), backs: map[hypercall.DomID]chan *pvnet.Device{}}
	h.Driver = h.lab.Domain(1)
	cfg.Hotplug = true
	serving, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- pvnet.Serve(serving, h.Driver, cfg, func(d *pvnet.Device) { h.backsOf(d.Peer()) <- d })
	}()
	t.Cleanup(func() {
		stop()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	for i := range guests {
		vif.Front, vif.Back = hypercall.DomID(2+i), 1
		h.doms = append(h.doms, h.lab.Domain(vif.Front))
		h.vifs = append(h.vifs, h.lab.Add(vif))
		h.Fronts, h.Backs = append(h.Fronts, nil), append(h.Backs, nil)
		h.Connect(i)
		h.waitBackend(i)
	}
	return h
}

func (h *Hub) backsOf(dom hypercall.DomID) chan *pvnet.Device {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.backs[dom]
	if c == nil {
		c = make(chan *pvnet.Device, 1)
		h.backs[dom] = c
	}
	return c
}

func (h *Hub) waitBackend(guest int) {
	h.t.Helper()
	select {
	case h.Backs[guest] = <-h.backsOf(h.vifs[guest].Front):
		waitLink(h.t, h.Backs[guest], true)
	case <-time.After(labtest.Limit):
		h.t.Fatal("no backend for guest", guest)
	}
}

// Connect connects a guest's end, again if it was disconnected. The backend's device stays.
func (h *Hub) Connect(guest int) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	front, err := pvnet.Connect(ctx, h.doms[guest], "0", h.cfg(guest))
	if err != nil {
		h.t.Fatal(err)
	}
	h.Fronts[guest] = front
	h.t.Cleanup(front.Disconnect)
	if h.Backs[guest] != nil {
		waitLink(h.t, h.Backs[guest], true)
	}
}

// Disconnect disconnects a guest's end, and waits until the backend's link is down.
func (h *Hub) Disconnect(guest int) {
	h.t.Helper()
	h.Fronts[guest].Disconnect()
	waitLink(h.t, h.Backs[guest], false)
}

// Unplug takes a guest's vif away for good: both devices end.
func (h *Hub) Unplug(guest int) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	if err := toolstack.Remove(ctx, h.lab.Tools, h.vifs[guest]); err != nil {
		h.t.Fatal(err)
	}
	h.await(h.Backs[guest].Done(), "the backend does not end")
	h.Backs[guest] = nil
	h.Fronts[guest].Disconnect()
}

// Plug plugs a guest's vif again after Unplug. Both devices are others.
func (h *Hub) Plug(guest int) {
	h.t.Helper()
	h.lab.Add(h.vifs[guest])
	h.Connect(guest)
	h.waitBackend(guest)
}

func (h *Hub) await(c <-chan struct{}, what string) {
	h.t.Helper()
	select {
	case <-c:
	case <-time.After(labtest.Limit):
		h.t.Fatal(what)
	}
}
