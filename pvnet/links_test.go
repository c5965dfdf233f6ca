package pvnet

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"barevif/hypercall/emu"
)

func (d *Device) subscribers() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.subs)
}

// A loop over Links that ends early leaves no subscription behind.
func TestALoopOverLinksThatEndsIsForgotten(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	d := p.front
	links := d.Links(context.Background())
	for range 100 { // a second loop over the same iterator starts with the present state
		for ev := range links {
			if !ev.Up {
				t.Fatalf("%+v", ev)
			}
			break
		}
	}
	if n := d.subscribers(); n != 0 {
		t.Errorf("%d channels after break", n)
	}
	func() {
		defer func() { recover() }()
		for range links {
			panic("the caller's")
		}
	}()
	if n := d.subscribers(); n != 0 {
		t.Errorf("%d channels after a panic", n)
	}
	c, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range 10 {
		started := make(chan struct{})
		wg.Go(func() {
			for range d.Links(c) {
				close(started)
			}
		})
		<-started
	}
	if n := d.subscribers(); n != 10 {
		t.Errorf("%d channels for 10 loops", n)
	}
	cancel()
	wg.Wait()
	for range d.Links(c) {
		t.Error("an event after the context's end")
	}
	if n := d.subscribers(); n != 0 {
		t.Errorf("%d channels after the context's end", n)
	}
}

func TestASlowLoopOverLinksLosesTheOldest(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	d := p.back
	n, first, last := 0, "", LinkEvent{}
	for last = range d.Links(context.Background()) {
		switch n++; n {
		case 1:
			for i := range 100 { // while the reader still handles this event
				d.announce(linkDown, LinkEvent{Reason: fmt.Sprint("reason ", i)})
			}
			p.disconnect()
		case 2:
			first = last.Reason
		}
	}
	// The event that was being handled, and the last 16 of the 100 here and the two of
	// the end.
	if n != 17 || first != "reason 86" || last.Reason != ErrDisconnected.Error() {
		t.Errorf("%d events, after the first %q, in the end %+v", n, first, last)
	}
	for last = range d.Links(context.Background()) {
		n++
	}
	if n != 18 || last.Reason != ErrDisconnected.Error() || d.subscribers() != 0 {
		t.Errorf("a device that has ended gives %d events, %+v", n-17, last)
	}
}
