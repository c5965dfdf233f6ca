package forward_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/forward"
	"barevif/telemetry"
)

// A backend answers its guest in order, and the page of a lent frame is the guest's again with the
// answer. So a frame that waited in its page, for a guest that takes nothing, would end what the
// first guest sends to anybody once its ring is full.
func TestALentFrameThatWaitsHoldsUpNobody(t *testing.T) {
	h := newHub(t, 3, pvnet.Config{StaticGrants: true},
		pvnet.ServeConfig{Config: pvnet.Config{StaticGrants: true, LendRx: true}, DrainTimeout: -1})
	for _, b := range h.Backs {
		until(t, "static grants", func() bool { return b.Features()&telemetry.FeatureStaticGrants != 0 })
	}
	src := forward.NewSource(0)
	deaf := newInput(t, newSender(t, h.Backs[1], forward.Config{}), src)
	hearing := newInput(t, newSender(t, h.Backs[2], forward.Config{}), src)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- forward.Receive(ctx, h.Backs[0], func(_ int, frames []pvnet.Frame) (int, error) {
			var both [forward.Batch]pvnet.Frame
			for i := range frames {
				frames[i].Retain()
			}
			n := copy(both[:], frames)
			deaf.Send(frames)
			return hearing.Send(both[:n])
		})
	}()
	defer func() { cancel(); next(t, ended) }()
	got := listen(t, h.Fronts[2])
	tx := ownTX(t, h.Fronts[0], 0)
	// At most so many are on their way, which find room wherever they wait.
	const frames, underway, size = 2000, 32, 1000
	var f [1]pvnet.Frame
	for i := range frames + underway {
		if i < frames {
			if _, err := tx.AllocWait(f[:], size); err != nil {
				t.Fatalf("frame %d: %v", i, err)
			}
			f[0].CopyFrom(packet(size, i))
			if _, err := tx.SendWait(f[:]); err != nil {
				t.Fatalf("frame %d: %v", i, err)
			}
		}
		if i < underway {
			continue
		}
		if b, want := next(t, got), i-underway; string(b) != string(packet(size, want)) {
			t.Fatalf("frame %d came, want %d, or it has other bytes", numberOf(b), want)
		}
	}
	until(t, "the last count", func() bool { return total(deaf.Stats()) == frames })
	s := deaf.Stats() // as long as that guest receives nothing
	if s.Full == 0 || s.Waiting < forward.Batch {
		t.Errorf("the deaf guest's: %+v", s)
	}
	if n := h.Backs[0].Stats().RX.Get(telemetry.LentPackets); n < frames/2 {
		t.Errorf("%d of %d frames were lent", n, frames)
	}
	late := listen(t, h.Fronts[1])
	for i := range int(s.Sent) + s.Waiting {
		if b := next(t, late); string(b) != string(packet(size, i)) {
			t.Fatalf("frame %d came late, want %d, or it has other bytes", numberOf(b), i)
		}
	}
	until(t, "the last page", func() bool { return src.Held() == 0 })
}

// Where a sender is to wait for the vif, its lent frames are not copied: its guest waits too.
func TestALentFrameWaitsWithItsGuest(t *testing.T) {
	h := newHub(t, 2, pvnet.Config{StaticGrants: true},
		pvnet.ServeConfig{Config: pvnet.Config{StaticGrants: true, LendRx: true}, DrainTimeout: -1})
	for _, b := range h.Backs {
		until(t, "static grants", func() bool { return b.Features()&telemetry.FeatureStaticGrants != 0 })
	}
	src := forward.NewSource(0)
	in := newInput(t, newSender(t, h.Backs[1], forward.Config{Full: forward.Wait}), src)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- forward.Receive(ctx, h.Backs[0], func(_ int, frames []pvnet.Frame) (int, error) { return in.Send(frames) })
	}()
	defer func() { in.Close(); cancel(); next(t, ended) }()
	tx := ownTX(t, h.Fronts[0], 0)
	sent := flood(t, tx, 1000)
	// Those that wait are in the guest's ring too, which has 256 slots. Copies would not be.
	if s := in.Stats(); s.Waiting < forward.Batch || sent > int(s.Sent)+256+forward.Batch {
		t.Errorf("the guest could send %d frames: %+v", sent, s)
	}
	got := listen(t, h.Fronts[1])
	for i := range sent {
		if b := next(t, got); string(b) != string(packet(1000, i)) {
			t.Fatalf("frame %d came, want %d, or it has other bytes", numberOf(b), i)
		}
	}
	until(t, "the last page", func() bool { return src.Held() == 0 })
	if s := in.Stats(); s.Lost() != 0 {
		t.Errorf("%+v", s)
	}
}

// BenchmarkLentFrames gives batches of 32 frames to the sender of a guest: with room in its ring, and
// with none, where the frames wait, and lent ones become copies first. ns/room and ns/full are the
// medians of the time of Input.Send by a frame, without that of the guests.
func BenchmarkLentFrames(b *testing.B) {
	for _, lent := range []bool{false, true} {
		b.Run(fmt.Sprintf("lent=%t", lent), func(b *testing.B) { benchLent(b, lent) })
	}
}

func benchLent(b *testing.B, lent bool) {
	h := newHub(b, 2, pvnet.Config{StaticGrants: true},
		pvnet.ServeConfig{Config: pvnet.Config{StaticGrants: true, LendRx: lent}, DrainTimeout: -1})
	until(b, "static grants", func() bool { return h.Backs[0].Features()&telemetry.FeatureStaticGrants != 0 })
	const size = 1514
	in := newInput(b, newSender(b, h.Backs[1], forward.Config{}), forward.NewSource(0))
	fromGuest, toBack, toGuest := ownTX(b, h.Fronts[0], 0), ownRX(b, h.Backs[0], 0), ownRX(b, h.Fronts[1], 0)
	fromGuest.SetDeadline(time.Time{})
	sample := packet(size, 1)
	var frames, got [forward.Batch]pvnet.Frame
	under := 0
	give := func() (took time.Duration) {
		if n := fromGuest.AllocSize(frames[:], size); n != len(frames) {
			b.Fatal(n)
		}
		for i := range frames {
			frames[i].CopyFrom(sample)
		}
		if k, err := fromGuest.Send(frames[:]); k != len(frames) || err != nil {
			b.Fatal(k, err)
		}
		for left := len(frames); left > 0; {
			k, err := toBack.Poll(got[:])
			if err != nil {
				b.Fatal(err)
			}
			start := time.Now()
			if lost, err := in.Send(got[:k]); lost != 0 || err != nil {
				b.Fatal(lost, err)
			}
			took += time.Since(start)
			left -= k
			under += k
		}
		return took
	}
	drain := func() {
		for under > 0 {
			n, err := toGuest.Poll(got[:])
			if err != nil {
				b.Fatal(err)
			}
			toGuest.Release(got[:n])
			under -= n
		}
		until(b, "an empty queue", func() bool { return in.Stats().Waiting == 0 })
	}
	var room, full []time.Duration
	for b.Loop() {
		room = append(room, give())
		for in.Stats().Waiting == 0 {
			give()
		}
		full = append(full, give()) // a batch is next already, and the queue has 64 places
		drain()
	}
	median := func(all []time.Duration) float64 {
		slices.Sort(all)
		return float64(all[len(all)/2]) / forward.Batch
	}
	b.ReportMetric(median(room), "ns/room")
	b.ReportMetric(median(full), "ns/full")
	b.ReportMetric(0, "ns/op")
}
