package pvnet_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
)

// A portFault is what the page fault handler of a port panics with: any value that says its
// address in this way, as those of Go's runtime do after debug.SetPanicOnFault.
type portFault uintptr

func (f portFault) Error() string { return "page fault" }
func (f portFault) Addr() uintptr { return uintptr(f) }

// A fadingDomain is a domain whose peer's pages fade: from the given copy on they fault.
type fadingDomain struct {
	*emu.Domain
	faded atomic.Bool
}

func (d *fadingDomain) Copy(ops []hypercall.CopyOp) error {
	if d.faded.Load() {
		panic(portFault(0x5000))
	}
	return d.Domain.Copy(ops)
}

// The trap needs nothing of an operating system: where a fault is a panic with an address, it
// ends the device whose memory is gone, by its name, and nothing else.
func TestAFaultOfThePortEndsOneDevice(t *testing.T) {
	l := newLabOn(t, emu.Config{Grants: 2048})
	l.Dirty = true // the call that met the fault had taken private pages, which stay with it
	guest, driver := l.domain(1), &fadingDomain{Domain: l.domain(2)}
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(driver, pvnet.ServeConfig{Config: pvnet.Config{Buffers: 64}, Hotplug: true})
	front, err := pvnet.Connect(ctx(t), guest, "0", pvnet.Config{Buffers: 64})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	back := wait(t, backs)
	await(t, back, true)
	neighbour := l.domain(3)
	l.add(toolstack.Vif{Front: 3, Back: 2})
	other, err := pvnet.Connect(ctx(t), neighbour, "0", pvnet.Config{Buffers: 64})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Disconnect()
	far := wait(t, backs)
	await(t, far, true)

	heard := make(chan int, 1)
	ended := make(chan error, 2)
	go func() { ended <- back.Listen(context.Background(), func(f pvnet.Frame) { heard <- f.Len() }) }()
	go far.Listen(context.Background(), func(f pvnet.Frame) { heard <- f.Len() })
	if _, err := front.Write(frame(100, 0)); err != nil {
		t.Fatal(err)
	}
	if n := wait(t, heard); n != 100 {
		t.Fatalf("%d bytes", n)
	}
	driver.faded.Store(true)
	if _, err := front.Write(frame(100, 0)); err != nil {
		t.Fatal(err)
	}
	var pe *pvnet.PeerError
	if err := wait(t, ended); !errors.As(err, &pe) || !strings.Contains(pe.Reason, "shared memory is gone at 0x5000") {
		t.Fatalf("Listen ended with %v", err)
	}
	driver.faded.Store(false)
	wait(t, back.Done())
	if _, err := other.Write(frame(200, 0)); err != nil {
		t.Error(err)
	}
	if n := wait(t, heard); n != 200 {
		t.Errorf("the neighbour's frame has %d bytes", n)
	}
}
