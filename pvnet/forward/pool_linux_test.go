package forward_test

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/forward"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/xenbus/xenstore/server/labtest"
)

// A pooled is a pool whose worker receives from guest 0 and sends to guest 1, which takes nothing yet.
type pooled struct {
	*pvnettest.Hub
	pool   *forward.Pool
	sender *forward.Sender
	ended  chan error // the result of Pool.Receive
}

// newPooled returns it with as many frames of guest 0 as guest 1 has pages for, and others that wait.
func newPooled(t *testing.T, goroutines int) *pooled {
	t.Helper()
	h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: -1})
	p := &pooled{Hub: h, pool: newPool(t, h, goroutines), ended: make(chan error, 1)}
	p.sender = newSender(t, h.Backs[1], forward.Config{Pool: p.pool})
	in := newInput(t, p.sender, forward.NewSource(0))
	go func() {
		p.ended <- p.pool.Receive(context.Background(), h.Backs[0], func(_ int, frames []pvnet.Frame) (int, error) {
			return in.Send(frames)
		})
	}()
	const pages, frames = 256, 600
	for i := range frames {
		if _, err := h.Fronts[0].Write(packet(100, i)); err != nil {
			t.Fatal(err)
		}
	}
	p.until(t, func(n forward.Stats) bool { return int(n.Sent+n.Full)+n.Waiting == frames })
	if n := p.sender.Stats(); n.Sent < pages/2 || n.Waiting < 64 {
		t.Fatalf("%+v", n)
	}
	return p
}

func (p *pooled) until(t *testing.T, ok func(forward.Stats) bool) {
	t.Helper()
	if err := labtest.Comes(func() error {
		if n := p.sender.Stats(); !ok(n) {
			return fmt.Errorf("%+v", n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// arrive has guest 1 take all frames, which come in their order.
func (p *pooled) arrive(t *testing.T) {
	t.Helper()
	n := p.sender.Stats()
	got := listen(t, p.Fronts[1])
	last := -1
	for range int(n.Sent) + n.Waiting {
		i := numberOf(next(t, got))
		if i <= last {
			t.Fatalf("frame %d after %d", i, last)
		}
		last = i
	}
	p.until(t, func(n forward.Stats) bool { return n.Waiting == 0 })
}

func processorTime(t *testing.T) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// A worker sends the frames that wait for room once the guest posts pages, and uses no processor time until
// the guest does.
func TestAPoolSendsWhatWaits(t *testing.T) {
	for _, goroutines := range []int{1, 2} {
		t.Run(fmt.Sprint(goroutines), func(t *testing.T) {
			const pause = 400 * time.Millisecond
			var used time.Duration
			for range 5 { // what else the process does, as to collect garbage, takes time too, but not in each of them
				p := newPooled(t, goroutines)
				began := processorTime(t)
				time.Sleep(pause) // not to wait for anything: a worker that looks all the time would use up this time
				used = processorTime(t) - began
				p.arrive(t)
				if used <= pause/8 {
					return
				}
			}
			t.Errorf("%v of processor time in %v without room", used, pause)
		})
	}
}

// The link goes down while frames wait for room: the Sender drops these frames, and does not send them to the
// guest's next connection.
func TestAPoolDropsWhatWaitsForALinkThatGoes(t *testing.T) {
	p := newPooled(t, 1)
	waiting := p.sender.Stats().Waiting
	p.Disconnect(1)
	p.until(t, func(n forward.Stats) bool { return n.Waiting == 0 && n.Down == uint64(waiting) })
	p.Connect(1)
	got := listen(t, p.Fronts[1])
	if _, err := p.Fronts[0].Write(packet(100, 1000)); err != nil {
		t.Fatal(err)
	}
	if n := numberOf(next(t, got)); n != 1000 {
		t.Errorf("frame %d of the connection before", n)
	}
}

// A Sender that is closed drops the frames that wait for room, and counts them as Ended.
func TestAPoolLosesASender(t *testing.T) {
	p := newPooled(t, 1)
	waiting := p.sender.Stats().Waiting
	p.sender.Close()
	if n := p.sender.Stats(); n.Waiting != 0 || n.Ended != uint64(waiting) {
		t.Errorf("%+v, %d waited", n, waiting)
	}
	if _, err := p.Fronts[0].Write(packet(100, 1)); err != nil {
		t.Fatal(err)
	}
	if err := next(t, p.ended); err != forward.ErrClosed { // that of Input.Send
		t.Error(err)
	}
}

// A Sender whose device ends drops the frames that wait for room.
func TestAPoolLosesADevice(t *testing.T) {
	p := newPooled(t, 1)
	waiting := p.sender.Stats().Waiting
	p.Unplug(1)
	p.until(t, func(n forward.Stats) bool { return n.Waiting == 0 && n.Down+n.Ended == uint64(waiting) })
}

// Frames wait for a guest that takes nothing no longer than the vif lets them, also while frames come all
// the time.
func TestAPoolDropsWhatWaitsTooLong(t *testing.T) {
	h := newHub(t, 2, pvnet.Config{}, pvnet.ServeConfig{DrainTimeout: 100 * time.Millisecond})
	pool := newPool(t, h, 1)
	in := newInput(t, newSender(t, h.Backs[1], forward.Config{Pool: pool}), forward.NewSource(0))
	go pool.Receive(context.Background(), h.Backs[0], func(_ int, frames []pvnet.Frame) (int, error) { return in.Send(frames) })
	until(t, "a dropped frame", func() bool {
		for i := range 1000 {
			if _, err := h.Fronts[0].Write(packet(100, i)); err != nil {
				t.Fatal(err)
			}
		}
		return h.Backs[1].Stats().TX.Lost(telemetry.DropGuestStalled) > 0
	})
}

// After Pool.Close the Sender's own goroutine sends the frames that wait for room.
func TestWhatWaitsSurvivesThePool(t *testing.T) {
	p := newPooled(t, 1)
	p.pool.Close()
	if err := next(t, p.ended); err != forward.ErrClosed {
		t.Error(err)
	}
	p.arrive(t)
}

// A pool's goroutines must not wait.
func TestAPoolIsForSendersThatDrop(t *testing.T) {
	h := newHub(t, 1, pvnet.Config{}, pvnet.ServeConfig{})
	if _, err := forward.NewSender(h.Backs[0], forward.Config{Pool: newPool(t, h, 1), Full: forward.Wait}); err == nil {
		t.Error("a Sender that waits was made")
	}
}
