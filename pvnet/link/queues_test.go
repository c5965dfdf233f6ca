//go:build linux

package link

import (
	"context"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
)

// The vif has fewer queues than the TAP, and more again with the next connection. The kernel
// spreads its flows only over those that somebody reads: no frame is lost.
func TestTheKernelUsesTheQueuesThatTheVifHas(t *testing.T) {
	needTAP(t)
	for _, queues := range []int{1, 2, 3} {
		taps, err := OpenTAPQueues(TAPConfig{}, 3)
		if err != nil {
			t.Fatal(err)
		}
		var links []Link
		for _, tap := range taps {
			t.Cleanup(func() { tap.Close() })
			links = append(links, tap)
		}
		p := openPacket(t, taps[0].Name())
		h := newHostOf(t, 1500, pvnet.Config{Queues: 3}, pvnet.Config{Queues: queues})
		got := h.listen()
		ctx, cancel := context.WithCancel(context.Background())
		_, ended := h.join(ctx, h.Back, links...)
		const frames = 90
		// Frames in queues that are about to be detached are lost. So not every batch arrives
		// whole, but one does; if flows went to queues that nobody reads, none would.
		whole := false
		for batch := 0; batch < 50 && !whole; batch++ {
			for i := range frames {
				f, _ := partialTCP(100)
				f[34], f[35] = byte(batch), byte(i) // another source port: another flow
				send(t, p, Offload{}, f)
			}
			for n, silent := 0, false; n < frames && !silent; {
				select {
				case f := <-got:
					if f[34] == byte(batch) {
						n++
					}
					whole = n == frames
				case <-time.After(300 * time.Millisecond):
					silent = true
				}
			}
		}
		if !whole {
			t.Errorf("%d queues: frames are lost", queues)
		}
		// A listener shows what it counted every 32 frames, and when it waits.
		for q := range queues {
			for end := time.Now().Add(wait); h.Front.Stats().Queues[q].RX.Packets() == 0; runtime.Gosched() {
				if time.Now().After(end) {
					t.Fatalf("%d queues: queue %d got no frame", queues, q)
				}
			}
		}
		cancel()
		next(t, ended)
	}
}

// A switched is a TAP that counts how often its queue was attached or detached.
type switched struct {
	*TAP
	times atomic.Int32
}

func (l *switched) attach(on bool) error {
	l.times.Add(1)
	return l.TAP.attach(on)
}

// While the links are held they may be another process's: a connection with more queues that comes
// meanwhile attaches none, until Resume.
func TestTheQueuesStayWhileTheTAPIsHeld(t *testing.T) {
	needTAP(t)
	taps, err := OpenTAPQueues(TAPConfig{}, 2)
	if err != nil {
		t.Fatal(err)
	}
	links := []*switched{{TAP: taps[0]}, {TAP: taps[1]}}
	for _, l := range links {
		t.Cleanup(func() { l.Close() })
	}
	h := newHostOf(t, 1500, pvnet.Config{Queues: 2}, pvnet.Config{})
	j, _ := h.join(context.Background(), h.Back, links[0], links[1])
	until(t, "the second queue is detached", func() bool { return !taps[1].attached() })
	if err := j.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	was := links[1].times.Load()
	h.Front.Disconnect()
	front, err := pvnet.Connect(t.Context(), h.Guest, "0", pvnet.Config{Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	for ev := range h.Back.Links(t.Context()) {
		if ev.Up && h.Back.Active() == 2 {
			break
		}
	}
	for range 20 {
		if time.Sleep(time.Millisecond); links[1].times.Load() != was || taps[1].attached() {
			t.Fatal("the queues of a TAP that is held have changed")
		}
	}
	j.Resume()
	until(t, "the second queue is attached", func() bool { return taps[1].attached() })
}

// What another program did to a queue of the TAP does not stop the others from following.
func TestAQueueThatIsAsWantedAlreadyIsNoFailure(t *testing.T) {
	needTAP(t)
	taps, err := OpenTAPQueues(TAPConfig{}, 3)
	if err != nil {
		t.Fatal(err)
	}
	var links []Link
	for _, tap := range taps {
		t.Cleanup(func() { tap.Close() })
		links = append(links, tap)
	}
	q := queuesOf(links)
	if err := taps[2].attach(false); err != nil {
		t.Fatal(err)
	}
	if err := q.use(1); err != nil || taps[1].attached() || !taps[0].attached() {
		t.Errorf("%v; attached: %v %v", err, taps[0].attached(), taps[1].attached())
	}
	if err := taps[1].attach(true); err != nil {
		t.Fatal(err)
	}
	if err := q.use(3); err != nil || !taps[2].attached() {
		t.Errorf("%v; attached: %v", err, taps[2].attached())
	}
}

// Where the kernel loads no program for this process, as in a user namespace, everything else
// goes on, and the log says once what is missing.
func TestAHashWithoutTheRightToLoadAProgram(t *testing.T) {
	needTAP(t)
	taps, err := OpenTAPQueues(TAPConfig{}, 2)
	if err != nil {
		t.Fatal(err)
	}
	var links []Link
	for _, tap := range taps {
		t.Cleanup(func() { tap.Close() })
		links = append(links, tap)
	}
	var said logtest.Log
	p := openPacket(t, taps[0].Name())
	h := &host{pvnettest.New(t, toolstack.Vif{MAC: ourMAC}, pvnet.Config{Queues: 2},
		pvnet.Config{Queues: 2, Logger: said.Logger()}), t}
	got := h.listen()
	h.join(context.Background(), h.Back, links...)
	for i := range 4 {
		if err := h.Front.SetHash(t.Context(), &pvnet.HashConfig{Table: []int{i % 2}}); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(wait); len(said.Lines("frames by hash")) == 0; runtime.Gosched() {
			if time.Now().After(end) {
				t.Fatal("it does not say that the kernel chooses the queues")
			}
		}
		send(t, p, Offload{}, testFrame(60+i))
		for len(next(t, got)) != 60+i {
		}
	}
	if s := said.Lines("frames by hash"); len(s) != 1 || !strings.Contains(s[0], "operation not permitted") ||
		!strings.Contains(s[0], "outside of a user namespace") || !strings.Contains(s[0], taps[0].Name()) {
		t.Errorf("it says\n%s", s)
	}
	if h.Back.Features()&telemetry.FeatureHash == 0 {
		t.Error("the hash itself is gone")
	}
}
