package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
)

// A machine is an emulated Xen with a xenstore, and domain 0 with a toolstack.
type machine struct {
	*emu.Machine
	store *server.Store
	tools *xenstore.Client // of domain 0

	undo  []func()      // the functions that shutdown calls, last first
	ready chan struct{} // closed once tools is set, or will never be

	mu    sync.Mutex
	homes map[hypercall.DomID]bool // guarded by mu: the domains that xenstore knows
}

// machineConfig configures a machine. Fields may be zero.
type machineConfig struct {
	// listen is the path of a socket at which processes join as domains; "" means that
	// all domains are in this process.
	listen string

	// tap wraps each connection of a domain to xenstore.
	tap func(io.ReadWriteCloser, hypercall.DomID) io.ReadWriteCloser

	// opened is called for each connection of a domain to xenstore, died when a domain
	// dies.
	opened, died func(hypercall.DomID)
}

func startMachine(ctx context.Context, cfg machineConfig) (_ *machine, err error) {
	m := &machine{
		store: server.New(server.Config{}),
		ready: make(chan struct{}),
		homes: map[hypercall.DomID]bool{0: true},
	}
	m.undo = append(m.undo, func() { m.store.Close() })
	defer func() {
		close(m.ready)
		if err != nil {
			m.shutdown()
		}
	}()
	econf := emu.Config{Admit: m.store.Admit, Store: func(dom hypercall.DomID, conn io.ReadWriteCloser) {
		if dom != 0 {
			<-m.ready
			if m.tools == nil || m.introduce(context.Background(), dom) != nil {
				conn.Close() // the machine ends
				return
			}
		}
		if cfg.opened != nil {
			cfg.opened(dom)
		}
		if cfg.tap != nil {
			conn = cfg.tap(conn, dom)
		}
		// The domain at the other end sees how its connection ended.
		_ = m.store.ServeConn(conn, dom)
	}}
	if cfg.listen == "" {
		if m.Machine, err = emu.New(econf); err != nil {
			return nil, err
		}
		m.undo = append(m.undo, func() { m.Close() })
	} else {
		h, err := emu.Listen(cfg.listen, econf)
		if err != nil {
			return nil, err
		}
		m.Machine = h.Machine
		m.undo = append(m.undo, func() { h.Close() })
	}
	if cfg.died != nil {
		m.OnDeath(cfg.died)
	}
	dom0, err := m.NewDomain(0)
	if err != nil {
		return nil, err
	}
	m.tools, err = xenstore.Dial(ctx, dom0.Store, xenstore.Config{Pipeline: 8})
	if err != nil {
		return nil, fmt.Errorf("open xenstore: %w", err)
	}
	m.undo = append(m.undo, func() { m.tools.Close() })
	return m, nil
}

// introduce makes dom known to xenstore and creates its home directory there.
//
// A domain that ends stays known, because only the program in it has ended. A program that
// joins again with the same number finds its vifs, as in a driver domain on Xen.
func (m *machine) introduce(ctx context.Context, dom hypercall.DomID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.homes[dom] {
		return nil
	}
	m.store.Introduce(dom)
	if err := toolstack.Home(ctx, m.tools, dom); err != nil {
		return fmt.Errorf("make domain %d known to xenstore: %w", dom, err)
	}
	m.homes[dom] = true
	return nil
}

// add makes a vif and, if necessary, its domains.
func (m *machine) add(ctx context.Context, v toolstack.Vif) error {
	for _, dom := range []hypercall.DomID{v.Front, v.Back} {
		if err := m.introduce(ctx, dom); err != nil {
			return err
		}
	}
	v.Room = true
	if v.MTU == 0 { // the frontend's key belongs to the backend's domain, as libxl makes it: the backend may write another
		v.MTU = 1500
	}
	if err := toolstack.Add(ctx, m.tools, v); err != nil {
		return fmt.Errorf("add vif %d of domain %d: %w", v.ID, v.Front, err)
	}
	return nil
}

// shutdown ends the machine and everything in it.
func (m *machine) shutdown() {
	for _, f := range slices.Backward(m.undo) {
		f()
	}
	m.undo = nil
}
