package pvnet_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// A driver domain is destroyed under a frontend. The frontend keeps none of its grants to
// the dead domain and continues with the next one: another domain, and a vif made anew.
func TestADriverDomainIsReplacedByAnother(t *testing.T) {
	l := newLab(t)
	fdom, old := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	serving, stop := context.WithCancelCause(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		pvnet.Serve(serving, old, pvnet.ServeConfig{Hotplug: true}, func(*pvnet.Device) {})
	}()
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()

	stop(pvnet.ErrHandover) // like a killed process, it writes nothing more to xenstore
	<-ended
	old.Destroy()
	if err := l.tools.Remove(ctx(t), "/local/domain/2"); err != nil {
		t.Fatal(err)
	}
	await(t, front, false)
	for end := time.Now().Add(labtest.Limit); l.Ledger().Grants > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("with nobody at the other end it keeps %+v", l.Ledger())
		}
	}
	if err := l.tools.Remove(ctx(t), v.FrontDir()); err != nil {
		t.Fatal(err)
	}
	backs, _ := l.serve(l.domain(3), pvnet.ServeConfig{Hotplug: true})
	l.add(toolstack.Vif{Front: 1, Back: 3})
	back := wait(t, backs)
	await(t, front, true)
	if front.Peer() != 3 {
		t.Errorf("the backend is domain %d", front.Peer())
	}
	got := make(chan []byte, 1)
	listening, enough := context.WithCancel(ctx(t))
	done := make(chan error, 1)
	go func() {
		done <- back.Listen(listening, func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			select {
			case got <- b:
			default:
			}
		})
	}()
	if _, err := front.Write(frame(1000, 7)); err != nil {
		t.Fatal(err)
	}
	if b := wait(t, got); !bytes.Equal(b, frame(1000, 7)) {
		t.Errorf("%d bytes, and not those that were sent", len(b))
	}
	enough()
	<-done
}
