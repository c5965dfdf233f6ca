package pvnet_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
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
// but neither the process nor another device, and no page is left behind.
func TestMemoryThatIsTakenAwayEndsTheDevice(t *testing.T) {
	for name, left := range map[string]int{"all access": unix.PROT_NONE, "writing": unix.PROT_READ} {
		t.Run(name, func(t *testing.T) { memoryIsTakenAway(t, left) })
	}
}

// memoryIsTakenAway leaves only some access to a frontend's rings. If it may still read them, the
// fault comes in the middle of a batch, when the frontend posts the page of a frame again.
func memoryIsTakenAway(t *testing.T, left int) {
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
	if err := unix.Mprotect(rings, left); err != nil {
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
	last := -1
	soon(t, "without events", func() bool { // those of the new connection have come
		if n := front.Parked(0); n == 0 || n != last {
			last = n
			time.Sleep(20 * time.Millisecond)
			return false
		}
		return true
	})
	if err := unix.Mprotect(fdom.pages[len(fdom.pages)-1], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	var pe *pvnet.PeerError
	if err := wait(t, waiting); !errors.As(err, &pe) || !strings.Contains(pe.Reason, "shared memory is gone") {
		t.Errorf("Receive: %v", err)
	}
	wait(t, front.Done())
}

// A ringKeeper is a driver domain whose mapped pages, the rings, can no longer be written once a
// batch of copies has run.
type ringKeeper struct {
	*emu.Domain
	armed atomic.Bool
	mu    sync.Mutex
	rings [][]byte // guarded by mu
}

func (k *ringKeeper) Map(peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) (*hypercall.Mapping, error) {
	m, err := k.Domain.Map(peer, refs, access)
	if err == nil {
		k.mu.Lock()
		k.rings = append(k.rings, m.Memory.Bytes())
		k.mu.Unlock()
	}
	return m, err
}

func (k *ringKeeper) Copy(ops []hypercall.CopyOp) error {
	err := k.Domain.Copy(ops)
	if k.armed.Swap(false) {
		ops[0].Status = hypercall.GeneralError // the first frame has no bytes
		k.mu.Lock()
		defer k.mu.Unlock()
		for _, r := range k.rings {
			if err := unix.Mprotect(r, unix.PROT_READ); err != nil {
				panic(err)
			}
		}
	}
	return err
}

// A backend has the frames of a batch, but for the first, whose copy has failed, and the rings are
// gone before it can answer them.
func TestRingsThatAreGoneBeforeTheAnswer(t *testing.T) {
	for _, size := range []int{100, 9000} {
		l := newLabOn(t, emu.Config{Mapped: true})
		guest, driver := l.domain(1), &ringKeeper{Domain: l.domain(2)}
		l.add(toolstack.Vif{Front: 1, Back: 2})
		backs, _ := l.serve(driver, pvnet.ServeConfig{Config: pvnet.Config{Buffers: 64}, Hotplug: true})
		front, err := pvnet.Connect(ctx(t), guest, "0", pvnet.Config{Buffers: 64})
		if err != nil {
			t.Fatal(err)
		}
		defer front.Disconnect()
		back := wait(t, backs)
		await(t, back, true)
		for i := range 3 {
			if _, err := front.Write(frame(size, i)); err != nil {
				t.Fatal(err)
			}
		}
		driver.armed.Store(true)
		ended := make(chan error, 1)
		go func() {
			ended <- back.Listen(context.Background(), func(pvnet.Frame) { t.Error("a frame came") })
		}()
		var pe *pvnet.PeerError
		if err := wait(t, ended); !errors.As(err, &pe) || !strings.Contains(pe.Reason, "shared memory is gone") {
			t.Errorf("Listen ended with %v", err)
		}
		wait(t, back.Done())
	}
}
