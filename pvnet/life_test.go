package pvnet_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
)

// A slowDomain is one in which a copy may take for ever.
type slowDomain struct {
	*emu.Domain
	slow  atomic.Bool   // the next one will
	begun chan struct{} // it has begun
	end   chan struct{} // closed: it may end
}

func (d *slowDomain) Copy(ops []hypercall.CopyOp) error {
	err := d.Domain.Copy(ops)
	if d.slow.CompareAndSwap(true, false) {
		close(d.begun)
		<-d.end
	}
	return err
}

// The pages under a caller that does not leave are not taken away, however long it
// stays. Here they are mapped: touching one that is not there is the end.
func TestACallerThatIsStuckKeepsItsMemory(t *testing.T) {
	l := newLabOn(t, emu.Config{Mapped: true})
	fdom := l.domain(1)
	bdom := &slowDomain{Domain: l.domain(2), begun: make(chan struct{}), end: make(chan struct{})}
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: 2}})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 2, Buffers: 64})
	if err != nil {
		t.Fatal(err)
	}
	back := wait(t, backs)
	back.SetPatience(50 * time.Millisecond)
	await(t, back, true)
	await(t, front, true)

	got := make(chan []byte, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- back.Listen(context.Background(), func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			got <- b
		})
	}()
	bdom.slow.Store(true)
	sent := frame(9000, 1)
	if _, err := front.Write(sent); err != nil {
		t.Fatal(err)
	}
	wait(t, bdom.begun)
	held := l.Ledger()
	leaving := make(chan struct{})
	go func() { defer close(leaving); front.Disconnect() }()
	wait(t, back.Done())
	wait(t, leaving)
	if now := l.Ledger(); now.Mappings != held.Mappings || now.Mappings != 4 {
		t.Errorf("%d ring pages mapped, %d before: %+v", now.Mappings, held.Mappings, now)
	}
	var unknown *pvnet.UnknownError
	if _, err := back.Write(sent); !errors.As(err, &unknown) {
		t.Errorf("Write on a device that was given up: %v", err)
	}
	var last pvnet.LinkEvent
	for last = range back.Links(ctx(t)) {
	}
	if last.Up || unknown == nil || last.Reason != unknown.Error() {
		t.Errorf("the last word of the link is %+v", last)
	}

	// Other vifs of the backend go on.
	other := l.domain(3)
	l.add(toolstack.Vif{Front: 3, Back: 2})
	near, err := pvnet.Connect(ctx(t), other, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	far := wait(t, backs)
	heard := make(chan int, 1)
	go far.Listen(context.Background(), func(f pvnet.Frame) { heard <- f.Len() })
	if _, err := near.Write(sent); err != nil {
		t.Fatal(err)
	}
	if n := wait(t, heard); n != len(sent) {
		t.Errorf("%d bytes", n)
	}
	near.Disconnect()

	// And the one that was stuck goes on, too, as far as there is anything to do.
	close(bdom.end)
	if b := wait(t, got); !bytes.Equal(b, sent) {
		t.Errorf("%d bytes came as %d others", len(sent), len(b))
	}
	if err := wait(t, ended); !errors.As(err, &unknown) {
		t.Errorf("Listen ended with %v", err)
	}
	stop()
	bdom.Destroy() // what was abandoned goes with the domain
}
