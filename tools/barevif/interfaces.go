package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// An interfaceState is what the frontend of a vif should know of an interface behind it.
type interfaceState struct {
	up      bool // set up by the administrator, and so is the bridge that it is on
	carrier bool // up, and connected to something
	mtu     int  // in bytes, if it has changed since the watch began; else 0
}

// interfaces follows the interfaces of this machine's network namespace. The zero
// interfaces has no follower yet.
type interfaces struct {
	mu      sync.Mutex
	known   map[int]netlink.LinkAttrs // guarded by mu: by index
	watches map[*interfaceWatch]bool  // guarded by mu
}

// An interfaceWatch is the watch of a vif on the interface behind it.
type interfaceWatch struct {
	all    *interfaces
	index  int // of the interface, whose name may change
	change func(interfaceState)

	// Guarded by all.mu.
	told interfaceState
	mtu  int // as last seen; 0: not seen yet
	ours int // the MTU that setMTU sets, until the kernel's message about it; else 0
}

// follow starts a goroutine that follows the interfaces until ctx ends. The function that it
// returns waits for the end of it.
func (n *interfaces) follow(ctx context.Context, log *slog.Logger) (wait func()) {
	var all sync.WaitGroup
	all.Go(func() {
		said := false
		for ctx.Err() == nil {
			if err := n.listen(ctx); err != nil && !said && ctx.Err() == nil {
				log.Warn("cannot follow this machine's interfaces: frontends do not learn of their carriers and MTUs", "err", err)
				said = true
			}
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
		}
	})
	return all.Wait
}

// listen takes the kernel's messages until ctx ends or some are lost.
func (n *interfaces) listen(ctx context.Context) error {
	updates, done := make(chan netlink.LinkUpdate, 16), make(chan struct{})
	var failed error
	err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{
		ListExisting: true,
		ErrorCallback: func(err error) {
			n.mu.Lock()
			failed = err
			n.mu.Unlock()
		},
	})
	if err != nil {
		return err
	}
	n.mu.Lock()
	clear(n.known) // messages may have been lost
	for w := range n.watches {
		w.ours = 0
	}
	n.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { close(done) })
	defer stop()
	for u := range updates {
		n.take(*u.Attrs(), u.Header.Type == unix.RTM_DELLINK)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return failed
}

// take makes a the state of an interface, or removes it.
func (n *interfaces) take(a netlink.LinkAttrs, gone bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.known == nil {
		n.known = make(map[int]netlink.LinkAttrs)
	}
	if gone {
		delete(n.known, a.Index)
		return // whoever uses it learns so from it
	}
	n.known[a.Index] = a
	for w := range n.watches {
		n.tellLocked(w)
	}
}

// tellLocked tells a watch the state of its interface, if it is another one.
func (n *interfaces) tellLocked(w *interfaceWatch) {
	a, ok := n.known[w.index]
	if !ok {
		return
	}
	s := interfaceState{up: a.Flags&net.FlagUp != 0}
	if bridge, ok := n.known[a.MasterIndex]; ok && bridge.Flags&net.FlagUp == 0 {
		s.up = false
	}
	s.carrier = s.up && a.RawFlags&unix.IFF_LOWER_UP != 0
	changed := w.mtu != 0 && a.MTU != w.mtu
	first := w.mtu == 0
	w.mtu = a.MTU
	switch {
	case w.ours == 0:
		if changed {
			s.mtu = a.MTU
		}
	case a.MTU == w.ours: // earlier messages are about what we have replaced
		w.ours = 0
	}
	if first || s.mtu != 0 || s != w.told {
		w.told = s
		w.told.mtu = 0
		w.change(s)
	}
}

// watch calls change with the state of the interface of that index, now and when it changes,
// until end is called. change must not wait.
func (n *interfaces) watch(index int, change func(interfaceState)) *interfaceWatch {
	w := &interfaceWatch{all: n, index: index, change: change}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.watches == nil {
		n.watches = make(map[*interfaceWatch]bool)
	}
	n.watches[w] = true
	n.tellLocked(w)
	return w
}

func (w *interfaceWatch) end() {
	w.all.mu.Lock()
	defer w.all.mu.Unlock()
	delete(w.all.watches, w)
}

// setMTU gives the interface another MTU. The watch does not report it, since it is not a
// change of the network.
func (w *interfaceWatch) setMTU(mtu int) error {
	expect := func(ours int) {
		w.all.mu.Lock()
		defer w.all.mu.Unlock()
		w.ours = ours
	}
	l, err := netlink.LinkByIndex(w.index)
	if err != nil || l.Attrs().MTU == mtu {
		return err
	}
	expect(mtu)
	if err := netlink.LinkSetMTU(l, mtu); err != nil {
		expect(0)
		return fmt.Errorf("give %s the MTU %d: %w", l.Attrs().Name, mtu, err)
	}
	return nil
}
