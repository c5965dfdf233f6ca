//go:build linux

package link

import (
	"bytes"
	"context"
	"log/slog"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"

	"github.com/vishvananda/netlink"
)

// newStoppedHost makes a vif whose guest takes no frames until it is told to, through rx.
func newStoppedHost(t testing.TB, mtu int, drain, stall time.Duration) (h *host, rx *pvnet.RX) {
	t.Helper()
	cfg := pvnet.ServeConfig{Hotplug: true, DrainTimeout: drain, StallTimeout: stall}
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	h = &host{pvnettest.NewServed(t, toolstack.Vif{MAC: ourMAC, MTU: mtu}, pvnet.Config{}, cfg), t}
	return h, ownRX(t, h.Front)
}

// attributes returns what the kernel says of an interface.
func attributes(t testing.TB, name string) *netlink.LinkAttrs {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs()
}

// hasCarrier reports whether an interface that is up has a carrier.
func hasCarrier(t testing.TB, name string) bool {
	const lowerUp = 1 << 16 // IFF_LOWER_UP of linux/if.h
	return attributes(t, name).RawFlags&lowerUp != 0
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(wait); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: ", what)
		}
	}
}

// The frames that a joint holds for a guest that takes none are bounded, in number and in
// pages. The rest waits in the kernel.
func TestAStoppedGuestHoldsFewFrames(t *testing.T) {
	for _, c := range []struct{ mtu, size, least, most int }{
		{1500, 1514, 256 + 1, 256 + 128},
		{9000, 9014, 256/3 + 1, 256/3 + 256/3},
	} {
		tap := openTAP(t, TAPConfig{MTU: c.mtu})
		p := openPacket(t, tap.Name())
		h, _ := newStoppedHost(t, c.mtu, -1, -1)
		before := attributes(t, tap.Name()).Statistics.TxPackets
		h.join(context.Background(), h.Back, tap)
		for range 900 { // a TAP's queue has room for 500 or 1000
			send(t, p, Offload{}, testFrame(c.size))
		}
		read, same := 0, 0
		until(t, "rest", func() bool {
			now := int(attributes(t, tap.Name()).Statistics.TxPackets - before)
			if same++; now != read {
				same = 0
			}
			read = now
			return same >= 200 && read >= c.least // fewer: the Joint has not read all yet that it may
		})
		if read < c.least || read > c.most {
			t.Errorf("MTU %d: %d frames were read for a guest that takes none, want %d to %d", c.mtu, read, c.least, c.most)
		}
	}
}

// The kernel learns that the guest takes no frames, and that it takes them again.
func TestTheCarrierOfTheTAPIsTheGuests(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	h, rx := newStoppedHost(t, 1500, time.Second, time.Second)
	ctx, cancel := context.WithCancel(context.Background())
	_, ended := h.join(ctx, h.Back, tap)
	stop := func() {
		t.Helper()
		until(t, "the carrier goes off", func() bool {
			if hasCarrier(t, tap.Name()) {
				_, _ = p.WriteFrame(Offload{}, [][]byte{testFrame(60)}) // fails while the kernel takes none
				return false
			}
			return true
		})
		if !h.Back.Stalled() {
			t.Error("only the TAP has no carrier")
		}
	}
	stop()
	carried := h.Back.Stats().TX.Get(telemetry.Packets)
	if carried != 256 {
		t.Errorf("%d frames sent to a ring of 256", carried)
	}
	until(t, "the frames that wait are dropped", func() bool {
		st := h.Back.Stats()
		return st.TX.Lost(telemetry.DropGuestStalled) > 0
	})

	var frames [64]pvnet.Frame
	// The frames that wait in the TAP fill the ring again, and perhaps more than once.
	until(t, "the carrier is on", func() bool {
		n, err := rx.Poll(frames[:])
		if err != nil {
			t.Fatal(err)
		}
		rx.Release(frames[:n])
		return hasCarrier(t, tap.Name())
	})
	carrier(t, tap.Name())
	want := testFrame(99)
	send(t, p, Offload{}, want)
	for {
		if n, err := rx.Receive(frames[:1]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		got := bytes.Equal(frames[0].Bytes(), want)
		rx.Release(frames[:1])
		if got {
			break
		}
	}

	// The TAP has its carrier back when nobody joins it any more.
	stop()
	cancel()
	next(t, ended)
	if !hasCarrier(t, tap.Name()) {
		t.Error("the TAP keeps no carrier after Run")
	}
}

// A packet socket's interface has other users: its carrier stays on, and so does that of a
// link that is not of this package.
func TestTheCarrierOfOtherLinksStays(t *testing.T) {
	a, b := veth(t, 1500)
	h, _ := newStoppedHost(t, 1500, time.Second, time.Second)
	h.join(context.Background(), h.Back, openPacket(t, a))
	p := openPacket(t, b)
	until(t, "the guest counts as stalled", func() bool {
		_, _ = p.WriteFrame(Offload{}, [][]byte{testFrame(60)})
		return h.Back.Stalled()
	})
	if !hasCarrier(t, a) {
		t.Error("the interface lost its carrier")
	}
	tap := openTAP(t, TAPConfig{})
	h, _ = newStoppedHost(t, 1500, time.Second, time.Second)
	h.join(context.Background(), h.Back, plainLink{tap})
	p = openPacket(t, tap.Name())
	until(t, "the guest counts as stalled", func() bool {
		_, _ = p.WriteFrame(Offload{}, [][]byte{testFrame(60)})
		return h.Back.Stalled()
	})
}

// Vifs with a joint each: one guest that takes no frames costs another nothing.
func TestJointsOfDifferentGuestsDoNotWaitForEachOther(t *testing.T) {
	stopped, busy := openTAP(t, TAPConfig{}), openTAP(t, TAPConfig{})
	sh, _ := newStoppedHost(t, 1500, -1, -1)
	bh, rx := newStoppedHost(t, 1500, -1, -1)
	sh.join(context.Background(), sh.Back, stopped)
	bh.join(context.Background(), bh.Back, busy)
	flood, p := openPacket(t, stopped.Name()), openPacket(t, busy.Name())
	for range 800 {
		send(t, flood, Offload{}, testFrame(1514))
	}
	sent := func() uint64 {
		st := sh.Back.Stats()
		return st.TX.Get(telemetry.Packets)
	}
	until(t, "the stopped guest's ring is full", func() bool { return sent() >= 256 })
	var frames [64]pvnet.Frame
	for range 2000 {
		send(t, p, Offload{}, testFrame(1514))
		receiveAndRelease(t, rx, frames[:], 1)
	}
	if n := sent(); n != 256 {
		t.Errorf("%d frames sent to a ring of 256", n)
	}
}

// A TAP that is held may be another process's: its carrier stays as it is until Resume. A process
// that gets a TAP without a carrier turns it on.
func TestTheCarrierStaysWhileTheTAPIsHeld(t *testing.T) {
	tap := openTAP(t, TAPConfig{})
	p := openPacket(t, tap.Name())
	h, rx := newStoppedHost(t, 1500, time.Second, time.Second)
	if err := tap.SetCarrier(false); err != nil {
		t.Fatal(err)
	}
	j, _ := h.join(context.Background(), h.Back, tap)
	until(t, "the carrier is on", func() bool { return hasCarrier(t, tap.Name()) })
	until(t, "the carrier goes off", func() bool {
		_, _ = p.WriteFrame(Offload{}, [][]byte{testFrame(60)}) // fails while the kernel takes none
		return !hasCarrier(t, tap.Name())
	})
	if err := j.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	var frames [64]pvnet.Frame
	poll := func() {
		t.Helper()
		n, err := rx.Poll(frames[:])
		if err != nil {
			t.Fatal(err)
		}
		rx.Release(frames[:n])
	}
	until(t, "the guest takes frames again", func() bool {
		poll()
		return !h.Back.Stalled()
	})
	for range 20 {
		if time.Sleep(time.Millisecond); hasCarrier(t, tap.Name()) {
			t.Fatal("the carrier of a TAP that is held has changed")
		}
	}
	j.Resume()
	until(t, "the carrier is on", func() bool {
		poll()
		return hasCarrier(t, tap.Name())
	})
}
