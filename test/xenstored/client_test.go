//go:build linux

package xenstored_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/test/xenstored"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/storetest"
)

func TestClientAgainstDebiansDaemon(t *testing.T) {
	storetest.Run(t, func(t testing.TB) storetest.Dialer {
		return xenstored.Start(t).Dial
	})
}

// patience bounds what a test waits for. This machine may be busy.
const patience = 2 * time.Minute

func dial(t *testing.T, d *xenstored.Daemon, dom hypercall.DomID) *xenstore.Client {
	t.Helper()
	c, err := xenstore.Dial(t.Context(), func(ctx context.Context) (io.ReadWriteCloser, error) {
		return d.Dial(ctx, dom)
	}, xenstore.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// until waits for an event that ok accepts.
func until(t *testing.T, w *xenstore.Watch, ok func(paths []string, all bool) bool) {
	t.Helper()
	for limit := time.After(patience); ; {
		select {
		case <-w.C():
			if ok(w.Paths()) {
				return
			}
		case <-limit:
			t.Fatal("no such event")
		}
	}
}

func TestClientOutlivesTheDaemon(t *testing.T) {
	d := xenstored.Start(t)
	c := dial(t, d, 0)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	w, err := c.Watch(ctx, "/tree")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := c.Write(ctx, "/tree/leaf", "1"); err != nil {
			t.Fatal(err)
		}
		until(t, w, func(paths []string, all bool) bool { return all || slices.Contains(paths, "/tree/leaf") })
		d.Kill()
		d.Restart()
		until(t, w, func(_ []string, all bool) bool { return all })
		if _, err := c.Read(ctx, "/tree/leaf"); !errors.Is(err, xenstore.ErrNotFound) {
			t.Errorf("the tree of the dead daemon: %v", err)
		}
	}
	// One more, now and then, reaches the socket of the daemon that dies: the kernel
	// closes our connection first.
	if n := c.Stats().Reconnects; n < 3 {
		t.Errorf("%d reconnects", n)
	}
}

func TestBackendSeesItsFrontendsDomainVanish(t *testing.T) {
	d := xenstored.Start(t)
	c, ctx := dial(t, d, 0), t.Context()
	dial(t, d, 7).Close()
	for path, value := range map[string]string{
		"/local/domain/7/device/vif/0/state":             "4",
		"/local/domain/0/backend/vif/7/0/state":          "1",
		"/local/domain/0/backend/vif/7/0/frontend":       "/local/domain/7/device/vif/0",
		"/local/domain/0/backend/vif/7/0/frontend-id":    "7",
		"/local/domain/0/backend/vif/7/0/hotplug-status": "connected",
	} {
		if err := c.Write(ctx, path, value); err != nil {
			t.Fatal(err)
		}
	}
	back, err := xenbus.OpenBackend(ctx, c, "vif", 7, "0")
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close(ctx)
	if ch := back.Current(); ch.Peer != xenbus.Connected || !ch.Hotplug || !ch.Online {
		t.Errorf("%+v", ch)
	}
	w, err := c.Watch(ctx, "@releaseDomain")
	if err != nil {
		t.Fatal(err)
	}
	event := func([]string, bool) bool { return true }
	until(t, w, event)
	if err := d.Destroy(7); err != nil {
		t.Fatal(err)
	}
	until(t, w, event)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := back.Await(ctx, func(ch xenbus.Change) bool { return ch.Vanished }); err != nil {
		t.Error(err)
	}
	if is, err := c.IsIntroduced(ctx, 7); is || err != nil {
		t.Errorf("domain 7 is known: %v, %v", is, err)
	}
}

func TestConnectionsLeaveNoDescriptor(t *testing.T) {
	d := xenstored.Start(t)
	dial(t, d, 7).Close() // what is opened once is open now
	before := descriptors(t)
	for range 20 {
		for _, dom := range []hypercall.DomID{0, 7} {
			c := dial(t, d, dom)
			if err := c.Write(t.Context(), "x", fmt.Sprint(dom)); err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

func descriptors(t *testing.T) int {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}
