//go:build linux

package link

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"barevif/pvnet"
)

// A Joint that is held again and again moves every frame once and in order, in both
// directions. While it is held it moves none.
func TestAHeldJointLosesNothing(t *testing.T) {
	both(t, func(t *testing.T, tap *counted) {
		p := openPacket(t, tap.Name())
		h := newHostOf(t, 1500, pvnet.Config{Offload: true}, pvnet.Config{})
		got := h.listen()
		j, ended := h.join(context.Background(), h.Back, tap)
		j.holds.patience = 2 * time.Second // the guest takes frames when this machine lets it
		const total = 3000
		want := make([][]byte, total)
		for i := range want {
			want[i] = numbered(i, 60+i%1400)
		}
		sent, way := make(chan struct{}), newWindow()
		inOrder, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() {
			defer close(sent)
			for i := range want {
				if !way.enter(inOrder) {
					return
				}
				send(t, p, Offload{}, want[i])
				if i%32 == 31 {
					time.Sleep(time.Millisecond) // so that the Joint is held often meanwhile
				}
			}
		}()
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			for running := true; running; {
				select {
				case <-sent:
					running = false
				default:
				}
				if err := j.Hold(t.Context()); err != nil {
					t.Error(err)
					return
				}
				before := j.Stats()
				time.Sleep(time.Millisecond)
				if now := j.Stats(); now != before || !j.Held() {
					t.Errorf("held, and it moves frames: %+v, %+v", before, now)
				}
				j.Resume()
				time.Sleep(2 * time.Millisecond)
			}
		}()
		guest := make(chan struct{})
		go func() {
			defer close(guest)
			sendFromGuest(t, h, p, want)
		}()
		for i := range want {
			if b := next(t, got); !bytes.Equal(b, want[i]) {
				t.Errorf("frame %d: % x", i, b[:16])
				cancel()
				break
			}
			way.leave()
		}
		<-guest
		<-stopped
		if st := j.Stats(); st.Unfed+st.Unread+st.Unsent+st.Refused != 0 {
			t.Errorf("%+v", st)
		}
		tap.Close()
		next(t, ended)
		if err := j.Hold(t.Context()); err != errNotJoined {
			t.Errorf("Hold of a Joint that has ended: %v", err)
		}
	})
}

// A Hold that is given up leaves the Joint running.
func TestAHoldEndsWithItsContext(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	h := newHost(t, 1500, pvnet.Config{})
	got := h.listen()
	j, _ := h.join(context.Background(), h.Back, tap)
	send(t, p, Offload{}, testFrame(60))
	next(t, got)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 {
		if err := j.Hold(over); err == nil {
			j.Resume() // it was quicker
		}
		if err := j.Hold(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := j.Hold(t.Context()); err != errNotJoined {
			t.Fatalf("a second Hold: %v", err)
		}
		j.Resume()
		j.Resume()
		send(t, p, Offload{}, testFrame(60))
		next(t, got)
	}
}

// A TAP that is passed on keeps its interface and the frames in its queue. The other process
// learns which interface it is from the kernel.
// A Run that ends for another reason while Hold waits ends both, and the Joint is not held.
func TestAHoldEndsWithRun(t *testing.T) {
	h := newHost(t, 1500, pvnet.Config{})
	l, j, ended := h.joinScripted(openTAP(t, TAPConfig{}))
	got := h.listen()
	l.frame(testFrame(60), Offload{})
	next(t, got)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	held := make(chan error, 1)
	go func() { held <- j.Hold(ctx) }()
	until(t, "it is held", j.Held)
	l.end()
	if err := <-held; !errors.Is(err, errNotJoined) {
		t.Errorf("Hold: %v", err)
	}
	if err := <-ended; err != nil && !errors.Is(err, net.ErrClosed) {
		t.Errorf("Run: %v", err)
	}
	if j.Held() {
		t.Error("it is held")
	}
}

// A link that is down, as a packet socket whose interface is, can be held like any other.
func TestALinkThatIsDownIsHeld(t *testing.T) {
	h := newHost(t, 1500, pvnet.Config{})
	l, j, _ := h.joinScripted(openTAP(t, TAPConfig{}))
	got := h.listen()
	l.frame(testFrame(60), Offload{})
	next(t, got)
	down, stop := context.WithCancel(context.Background())
	defer stop()
	reads := make(chan struct{})
	go func() {
		defer close(reads)
		for {
			select {
			case l.script <- func([][]byte) (int, Offload, error) { return 0, Offload{}, ErrDown }:
			case <-down.Done():
				return
			}
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := j.Hold(ctx); err != nil {
		t.Errorf("Hold: %v", err)
	}
	stop()
	<-reads
	j.Resume()
	l.frame(testFrame(60), Offload{})
	next(t, got)
}

func TestAnAdoptedTAPIsTheSameInterface(t *testing.T) {
	tap := openTAP(t, TAPConfig{MTU: 1400})
	p := openPacket(t, tap.Name())
	send(t, p, Offload{}, numbered(7, 100))
	f, err := tap.File()
	if err != nil {
		t.Fatal(err)
	}
	if err := tap.Close(); err != nil {
		t.Fatal(err)
	}
	successor, err := AdoptTAP(f)
	if err != nil {
		t.Fatal(err)
	}
	defer successor.Close()
	if successor.Info() != tap.Info() || successor.mtuNow() != 1400 {
		t.Errorf("%+v, %d; it was %+v", successor.Info(), successor.mtuNow(), tap.Info())
	}
	for {
		b, _ := receive(t, successor)
		if bytes.Equal(b, numbered(7, 100)) {
			break // the kernel's own frames, such as router solicitations, may come first
		}
	}
	other, err := p.File()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := AdoptTAP(other); err == nil {
		t.Error("a packet socket was adopted as a TAP")
	}
}

// A hurried is a TAP that knows whether its Joint had no more patience for frames under way.
type hurried struct {
	*TAP
	yes atomic.Bool
}

func (l *hurried) setWriteDeadline(t time.Time) error {
	if !t.IsZero() {
		l.yes.Store(true)
	}
	return l.TAP.setWriteDeadline(t)
}

// A queue that the vif does not have keeps no Hold waiting: nothing was read from its link.
func TestAHoldWaitsForNoQueueThatTheVifLacks(t *testing.T) {
	needTAP(t)
	taps, err := OpenTAPQueues(TAPConfig{}, 2)
	if err != nil {
		t.Fatal(err)
	}
	links := []*hurried{{TAP: taps[0]}, {TAP: taps[1]}}
	for _, l := range links {
		t.Cleanup(func() { l.Close() })
	}
	p := openPacket(t, taps[0].Name())
	h := newHostOf(t, 1500, pvnet.Config{Queues: 2}, pvnet.Config{})
	got := h.listen()
	j, _ := h.join(context.Background(), h.Back, links[0], links[1])
	j.holds.patience = 10 * time.Second // only a queue that keeps the Hold waiting uses it up
	for range 5 {
		for moved := false; !moved; { // a frame in the queue that is about to be detached is lost
			send(t, p, Offload{}, testFrame(60))
			select {
			case <-got:
				moved = true
			case <-time.After(20 * time.Millisecond):
			}
		}
		if err := j.Hold(t.Context()); err != nil {
			t.Fatal(err)
		}
		j.Resume()
	}
	for i, l := range links {
		if l.yes.Load() {
			t.Errorf("queue %d: nothing was under way, and the Joint waited for it", i)
		}
	}
}
