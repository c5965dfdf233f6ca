//go:build linux

package xenhost

// Tests that need a real Xen.

import (
	"context"
	"errors"
	"os"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/xendev"
	"barevif/hypercall/xendev/privcmd"
	"barevif/hypercall/xendev/xendevtest"
)

const vifEnv = "XENHOST_TEST_VIF" // the number of an unused vif

func TestXenReport(t *testing.T) {
	xendevtest.OnXen(t)
	d, err := xendev.Open(xendev.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error("Close:", err)
		}
	})
	r := Inspect(context.Background(), xendev.Config{})
	t.Logf("\n%s", r)
	if r.Domain.Err != nil || r.Domain.Value != d.ID() {
		t.Errorf("domain %v", r.Domain)
	}
	for name, err := range map[string]error{
		"version": r.Xen.Err, "guest": r.Guest.Err, "limit": r.GrantLimit.Err, "map limit": r.MapLimit.Err, "vifs": r.Vifs.Err,
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, n := range r.Nodes {
		if n.Err != nil {
			t.Error(n.Err)
		}
	}
	if errors.Is(r.Ports.Err, privcmd.ErrRestricted) {
		return
	}
	near, far := waiterOf(t, d), waiterOf(t, d)
	channel := func() {
		a, err := near.Unbound(hypercall.DomSelf)
		if err == nil {
			_, err = far.Bind(hypercall.DomSelf, a.ID())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	channel() // with the first port comes the channel by which a guest notices that it was resumed
	before := Inspect(context.Background(), xendev.Config{}).Ports
	channel()
	if after := Inspect(context.Background(), xendev.Config{}).Ports; after.Value.Interdomain != before.Value.Interdomain+2 {
		t.Errorf("before a channel %v, after %v", before, after)
	}
}

func waiterOf(t *testing.T, d *xendev.Domain) hypercall.Waiter {
	t.Helper()
	w, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error("Close:", err)
		}
	})
	return w
}

// TestXenTakeVif takes a vif from xen-netfront and gives it back.
func TestXenTakeVif(t *testing.T) {
	id := os.Getenv(vifEnv)
	if id == "" {
		t.Skip(vifEnv + " names no vif that may be taken from the kernel")
	}
	xendevtest.OnXen(t)
	var owned *OwnedError
	if err := CheckFree(xendev.Config{}, id); !errors.As(err, &owned) {
		t.Fatal("before Take:", err)
	}
	t.Log(owned)
	if err := Take(xendev.Config{}, id); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(CheckFree(xendev.Config{}, id), Take(xendev.Config{}, id)); err != nil {
		t.Error("after Take:", err)
	}
	if err := Release(xendev.Config{}, id); err != nil {
		t.Fatal(err)
	}
	if err := CheckFree(xendev.Config{}, id); !errors.As(err, &owned) {
		t.Error("after Release:", err)
	}
}
