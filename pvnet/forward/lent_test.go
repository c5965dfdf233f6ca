package forward_test

import (
	"context"
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
	if s := deaf.Stats(); s.Full == 0 || s.Waiting < forward.Batch {
		t.Errorf("the deaf guest's: %+v", s)
	}
	if n := h.Backs[0].Stats().RX.Get(telemetry.LentPackets); n < frames/2 {
		t.Errorf("%d of %d frames were lent", n, frames)
	}
	late := listen(t, h.Fronts[1])
	for i, s := 0, deaf.Stats(); i < int(s.Sent)+s.Waiting; i++ {
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

// BenchmarkLentFrames sends batches of 32 lent frames to a guest, with room in its ring, and with
// none, where each frame becomes a copy in the queue first: copied is the time for such a frame in
// that for one that finds room. Its time includes that of the guests.
func BenchmarkLentFrames(b *testing.B) {
	h := newHub(b, 2, pvnet.Config{StaticGrants: true},
		pvnet.ServeConfig{Config: pvnet.Config{StaticGrants: true, LendRx: true}, DrainTimeout: -1})
	until(b, "static grants", func() bool { return h.Backs[0].Features()&telemetry.FeatureStaticGrants != 0 })
	const size, batches = 1514, 2
	in := newInput(b, newSender(b, h.Backs[1], forward.Config{}), forward.NewSource(0))
	fromGuest, toBack, toGuest := ownTX(b, h.Fronts[0], 0), ownRX(b, h.Backs[0], 0), ownRX(b, h.Fronts[1], 0)
	sample := packet(size, 1)
	var frames, got [forward.Batch]pvnet.Frame
	taken := 0
	take := func() {
		n, err := toGuest.Poll(got[:])
		if err != nil {
			b.Fatal(err)
		}
		toGuest.Release(got[:n])
		taken += n
	}
	given := 0
	give := func() (took time.Duration) {
		n := fromGuest.AllocSize(frames[:], size)
		for i := range frames[:n] {
			frames[i].CopyFrom(sample)
		}
		if k, err := fromGuest.Send(frames[:n]); k != len(frames) || err != nil {
			b.Fatal(k, err)
		}
		for left := n; left > 0; {
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
		}
		given += n
		return took
	}
	drain := func() {
		for taken < given {
			take()
		}
	}
	var room, full time.Duration
	rounds := 0
	for b.Loop() {
		for range batches { // with room
			room += give()
			drain()
		}
		for in.Stats().Waiting == 0 { // until the ring is full
			give()
		}
		for range batches - 1 { // one batch has waited already, and the queue has 64
			full += give()
		}
		drain()
		until(b, "an empty queue", func() bool { return in.Stats().Waiting == 0 })
		rounds++
	}
	perRoom := float64(room) / float64(rounds*batches*forward.Batch)
	perFull := float64(full) / float64(rounds*(batches-1)*forward.Batch)
	b.ReportMetric(perFull/perRoom, "copied")
	b.ReportMetric(perRoom, "ns/room")
	b.ReportMetric(perFull, "ns/full")
	b.ReportMetric(0, "ns/op")
}
