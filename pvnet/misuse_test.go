package pvnet

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
)

// Values of one frame share its pieces: cutting one of them must not let another
// put half a frame into a ring.
func TestACopyOfAFrameThatWasCutIsRefused(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		var f [1]Frame
		tx.AllocWait(f[:], 9000)
		cut := f[0]
		if !cut.Truncate(100) {
			t.Fatal("not cut")
		}
		if n, err := tx.Send(f[:]); n != 0 || err != ErrFrameSize {
			t.Fatal(n, err)
		}
		f[0] = cut
		if n, err := tx.Send(f[:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		tx.AllocWait(f[:], 9000)
		f[0].Retain()
		if f[0].Truncate(100) || f[0].Extend(1) != nil {
			t.Error("a chain with two holders was changed")
		}
		f[0].Release()
		f[0].Release()
	})
}

func TestOneFrameTwiceInABatch(t *testing.T) {
	for _, back := range []bool{false, true} {
		p := join(t, emu.Config{}, plain, Config{})
		d := p.front
		if back {
			d = p.back
		}
		tx, _ := own(t, d)
		var f [2]Frame
		tx.AllocWait(f[:1], 60)
		f[1] = f[0]
		if n, err := tx.Send(f[:]); n == 0 || err != nil && err != ErrStale {
			t.Fatal(n, err)
		}
		if f[0].Valid() || f[1].Valid() {
			t.Error("still held")
		}
	}
}

func TestWaitingForWhatOneHoldsOneselfIsAnError(t *testing.T) {
	for _, mode := range []WaitMode{Park, Adaptive, Busy} {
		p := join(t, emu.Config{}, plain, Config{Wait: mode})
		for _, d := range []*Device{p.front, p.back} {
			tx, _ := own(t, d)
			held := make([]Frame, 250)
			if n := tx.Alloc(held); n != 250 {
				t.Fatal(n)
			}
			var f [1]Frame
			if _, err := tx.AllocWait(f[:], 60000); err != ErrNoBuffers {
				t.Fatalf("mode %d: %v", mode, err)
			}
			for i := range held {
				held[i].Release()
			}
			if _, err := tx.AllocWait(f[:], 60000); err != nil {
				t.Fatal(err)
			}
			f[0].Release()
		}
	}
}

func TestSizesThatNoFrameHas(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	var f [1]Frame
	for _, size := range []int{-1, MaxFrame + 1, 1 << 31} {
		if n := tx.AllocSize(f[:], size); n != 0 {
			t.Errorf("%d bytes: a frame of %d", size, f[0].Len())
		}
		if _, err := tx.AllocWait(f[:], size); err != ErrFrameSize {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	dom := struct{ hypercall.Domain }{p.fdom} // a domain that cannot block threads
	for _, c := range []Config{{Queues: -1}, {Buffers: -1}, {Buffers: maxFrameBuffers - 1}, {LockedThreads: true}} {
		if err := c.check(dom); err == nil || !strings.Contains(err.Error(), ": ") {
			t.Errorf("%+v: %v; want what is wrong and what to write", c, err)
		}
	}
}

// A peer may offer fewer queues than the Config asks for: the link of the others is down.
func TestAQueueThatWasNotOfferedIsDown(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	d := p.front
	rx, tx := new(RX), new(TX)
	rx.init(d, 1, receive, d.counters.RX(0))
	tx.init(d, 1, transmit, d.counters.TX(0))
	d.rx, d.tx = append(d.rx, rx), append(d.tx, tx)
	if _, err := tx.Send(make([]Frame, 1)); err != ErrLinkDown {
		t.Error(err)
	}
	c, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := d.Listen(c, func(Frame) {}); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	d.rx, d.tx = d.rx[:1], d.tx[:1]
}

// The end of a Listen must not reach the receiver after it.
func TestAnInterruptDoesNotOutliveItsListen(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	for range 300 {
		c, cancel := context.WithCancel(context.Background())
		go cancel()
		if err := p.front.Listen(c, func(Frame) {}); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if p.front.rx[0].ending.Load() {
			t.Fatal("still interrupted")
		}
	}
}

// A listener whose function keeps every frame gets the next frame once it releases one.
func TestListenOutlastsAFullPool(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{Buffers: 32})
	tx, _ := own(t, p.front)
	kept := make(chan Frame, 100)
	done := make(chan error, 1)
	c, cancel := context.WithCancel(context.Background())
	go func() {
		done <- p.back.Listen(c, func(f Frame) {
			f.Retain()
			kept <- f
		})
	}()
	for range 40 {
		var f [1]Frame
		tx.AllocWait(f[:], 60)
		if _, err := tx.SendWait(f[:]); err != nil {
			t.Fatal(err)
		}
	}
	for range 40 {
		f := <-kept
		f.Release()
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
