package pvnet_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
)

// A keeper remembers the shares of its domain.
type keeper struct {
	*emu.Domain
	shares []*hypercall.Share
	pages  [][]byte
}

func (k *keeper) Share(peer hypercall.DomID, pages int, access hypercall.Access) (*hypercall.Share, error) {
	s, err := k.Domain.Share(peer, pages, access)
	if err == nil {
		k.shares, k.pages = append(k.shares, s), append(k.pages, s.Memory.Bytes())
	}
	return s, err
}

// If shared memory is taken away, which no correct hypervisor does, that ends the device,
// but neither the process nor another device.
func TestMemoryThatIsTakenAwayEndsTheDevice(t *testing.T) {
	l := newLabOn(t, emu.Config{Mapped: true, Grants: 2048})
	fdom, bdom := &keeper{Domain: l.domain(1)}, l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Buffers: 64})
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, backs)
	await(t, back, true)
	other := l.domain(3)
	l.add(toolstack.Vif{Front: 3, Back: 2})
	neighbour, err := pvnet.Connect(ctx(t), other, "0", pvnet.Config{Buffers: 64})
	if err != nil {
		t.Fatal(err)
	}
	defer neighbour.Disconnect()
	heard := make(chan int, 1)
	far := wait(t, backs)
	go far.Listen(context.Background(), func(f pvnet.Frame) { heard <- f.Len() })

	ended, got := make(chan error, 1), make(chan int, 1)
	go func() { ended <- front.Listen(context.Background(), func(f pvnet.Frame) { got <- f.Len() }) }()
	if _, err := front.Write(frame(100, 0)); err != nil { // a frame in flight, at the end
		t.Fatal(err)
	}
	if _, err := back.Write(frame(100, 0)); err != nil {
		t.Fatal(err)
	}
	wait(t, got)
	rings := fdom.pages[len(fdom.pages)-1]
	if len(rings) != 2*shm.PageSize {
		t.Fatalf("the rings have %d bytes", len(rings))
	}
	if err := unix.Mprotect(rings, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	if _, err := back.Write(frame(100, 0)); err != nil {
		t.Fatal(err)
	}
	var pe *pvnet.PeerError
	if err := wait(t, ended); !errors.As(err, &pe) || !strings.Contains(pe.Reason, "shared memory is gone") {
		t.Errorf("Listen ended with %v", err)
	}
	wait(t, front.Done())
	if _, err := front.Write(frame(100, 0)); !errors.As(err, &pe) {
		t.Errorf("Write: %v", err)
	}
	if _, err := neighbour.Write(frame(200, 0)); err != nil {
		t.Error(err)
	}
	if n := wait(t, heard); n != 200 {
		t.Errorf("the neighbour's frame has %d bytes", n)
	}
}

// A waiting owner does not look at the rings again: the slow tick finds that they are
// gone.
func TestMemoryThatIsTakenAwayWhileAnOwnerWaits(t *testing.T) {
	l := newLabOn(t, emu.Config{Mapped: true})
	fdom, bdom := &keeper{Domain: l.domain(1)}, l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Buffers: 64})
	if err != nil {
		t.Fatal(err)
	}
	await(t, wait(t, backs), true)
	rx, err := front.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error, 1)
	go func() {
		var f [1]pvnet.Frame
		_, err := rx.Receive(f[:])
		waiting <- err
	}()
	for last := -1; front.Parked(0) == 0 || front.Parked(0) != last; time.Sleep(20 * time.Millisecond) {
		last = front.Parked(0) // the events of the new connection have come
	}
	if err := unix.Mprotect(fdom.pages[len(fdom.pages)-1], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	var pe *pvnet.PeerError
	if err := wait(t, waiting); !errors.As(err, &pe) || !strings.Contains(pe.Reason, "shared memory is gone") {
		t.Errorf("Receive: %v", err)
	}
	wait(t, front.Done())
}
