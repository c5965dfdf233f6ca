package pvnet_test

import (
	"bytes"
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

// Whatever a listener was about when memory was gone, and whatever it had taken for it, comes
// back: the machine's ledger is clean in the end. What fn has retained stays its own until it
// releases it.
func TestAFaultKeepsNoPage(t *testing.T) {
	for name, c := range map[string]struct {
		size int
		fn   bool // the fault is the user's, in a frame that it has
	}{
		"a frame of one page": {size: 100}, "a long frame": {size: 9000},
		"the user's own": {100, true}, "the user's own, with a long frame": {9000, true},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
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
			driver.faded.Store(!c.fn)
			kept := make(chan pvnet.Frame, 2)
			ended := make(chan error, 1)
			go func() {
				ended <- back.Listen(context.Background(), func(f pvnet.Frame) {
					if err := f.Retain(); err != nil {
						t.Error(err)
					}
					kept <- f
					panic(portFault(0x6000))
				})
			}()
			sent := frame(c.size, 3)
			if _, err := front.Write(sent); err != nil {
				t.Fatal(err)
			}
			var pe *pvnet.PeerError
			if err := wait(t, ended); !errors.As(err, &pe) || !strings.Contains(pe.Reason, "shared memory is gone") {
				t.Fatalf("Listen ended with %v", err)
			}
			wait(t, back.Done())
			if !c.fn {
				return
			}
			f := wait(t, kept)
			b := make([]byte, f.Len())
			if f.CopyTo(b); !bytes.Equal(b, sent) {
				t.Error("the frame that was retained has other bytes")
			}
			if err := f.Release(); err != nil {
				t.Error(err)
			}
			if err := f.Release(); !errors.Is(err, pvnet.ErrStale) {
				t.Errorf("the second release: %v", err)
			}
		})
	}
}
