package labtest

import (
	"context"
	"io"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
)

// A World is an emulated machine for examples, which have no testing.TB: a xenstore, a
// driver domain (1), and guests (from 2 on) that have a vif each. On real Xen each program
// has one domain, its own, from xendev.Open.
type World struct {
	Driver hypercall.Domain
	Guests []hypercall.Domain

	undo []func()
}

// NewWorld makes a machine with so many guests. The guest of domain n has the MAC
// 02:00:00:00:00:n.
func NewWorld(ctx context.Context, guests int) (w *World, err error) {
	w = new(World)
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	store := server.New(server.Config{})
	w.undo = append(w.undo, func() { store.Close() })
	machine, err := emu.New(emu.Config{
		Store: func(dom hypercall.DomID, c io.ReadWriteCloser) { store.ServeConn(c, dom) },
	})
	if err != nil {
		return nil, err
	}
	w.undo = append(w.undo, func() { machine.Close() })
	domains := make([]hypercall.Domain, 2+guests)
	for i := range domains {
		store.Introduce(hypercall.DomID(i))
		if domains[i], err = machine.NewDomain(hypercall.DomID(i)); err != nil {
			return nil, err
		}
	}
	tools, err := xenstore.Dial(ctx, domains[0].Store, xenstore.Config{})
	if err != nil {
		return nil, err
	}
	w.undo = append(w.undo, func() { tools.Close() })
	w.Driver, w.Guests = domains[1], domains[2:]
	for i := range domains[1:] {
		id := hypercall.DomID(1 + i)
		if err := toolstack.Home(ctx, tools, id); err != nil {
			return nil, err
		}
		if id == 1 {
			continue
		}
		vif := toolstack.Vif{Front: id, Back: 1, MAC: [6]byte{2, 0, 0, 0, 0, byte(id)}}
		if err := toolstack.Add(ctx, tools, vif); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// Defer makes Close call f before it ends what was there before.
func (w *World) Defer(f func()) { w.undo = append(w.undo, f) }

// Close ends the machine.
func (w *World) Close() {
	for len(w.undo) > 0 {
		last := len(w.undo) - 1
		w.undo[last]()
		w.undo = w.undo[:last]
	}
}
