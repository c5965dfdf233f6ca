package pvnet

import (
	"bytes"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/arena/shm"
	"barevif/hypercall/emu"
	"barevif/telemetry"
)

// seen reads all that a tap has, and keeps the bytes.
func seen(t *Tap) (all []TapFrame) {
	t.Read(func(f *TapFrame) bool {
		g := *f
		g.Data = bytes.Clone(f.Data)
		all = append(all, g)
		return true
	})
	return all
}

func tapOf(t *testing.T, d *Device, cfg TapConfig) *Tap {
	t.Helper()
	tap, err := d.Tap(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tap.Close)
	return tap
}

// Each end sees every frame that moves once, with all its bytes or the first of them.
func TestATapSeesEveryFrameThatMoves(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		whole, heads := tapOf(t, from, TapConfig{}), tapOf(t, to, TapConfig{Snaplen: 100})
		sizes := []int{14, 60, 1514, 4096, 4097, 9000, 20000, MaxFrame}
		before := time.Now()
		for i, size := range sizes {
			var f [1]Frame
			if tx.AllocSize(f[:], size) != 1 {
				t.Fatal("no room")
			}
			b := make([]byte, size)
			pattern(b, i)
			f[0].CopyFrom(b)
			if n, err := tx.Send(f[:]); n != 1 {
				t.Fatal(err)
			}
			if n, err := rx.Receive(f[:]); n != 1 {
				t.Fatal(err)
			}
			rx.Release(f[:])
		}
		for _, c := range []struct {
			tap  *Tap
			dir  telemetry.Dir
			most int
		}{{whole, telemetry.TX, MaxFrame}, {heads, telemetry.RX, 100}} {
			got := seen(c.tap)
			if len(got) != len(sizes) || c.tap.Stats() != (TapStats{Captured: uint64(len(sizes))}) {
				t.Fatalf("%v: %d frames, %+v", c.dir, len(got), c.tap.Stats())
			}
			for i, f := range got {
				want := make([]byte, sizes[i])
				pattern(want, i)
				if f.Dir != c.dir || f.Queue != 0 || f.Len != sizes[i] || f.Lost != 0 || f.Dropped != 0 ||
					!bytes.Equal(f.Data, want[:min(len(want), c.most)]) || f.Time.Before(before) || time.Since(f.Time) < 0 {
					t.Errorf("%v, frame %d: %v, %d of %d bytes", c.dir, i, f.Dir, len(f.Data), f.Len)
				}
			}
		}
	})
}

// A frame that the ring has no room for was not sent, and is seen once it is.
func TestATapSeesOnlyWhatIsSent(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		tap := tapOf(t, from, TapConfig{Sent: true})
		frames := make([]Frame, 0, 600)
		sent := 0
		for len(frames) < 600 {
			f := make([]Frame, 1)
			if tx.AllocSize(f, 60) == 0 {
				break
			}
			frames = append(frames, f[0])
		}
		var in [32]Frame
		for round := 0; sent < len(frames); round++ {
			n, err := tx.Send(frames[sent:])
			if err != nil && err != ErrFull {
				t.Fatal(err)
			}
			sent += n
			if got := len(seen(tap)); got != n {
				t.Fatalf("round %d: %d frames seen, %d sent", round, got, n)
			}
			for k := 1; k > 0; {
				if k, err = rx.Poll(in[:]); err != nil {
					t.Fatal(err)
				}
				rx.Release(in[:k])
			}
		}
		if sent < 256 {
			t.Fatalf("only %d frames", sent)
		}
		if _, err := tx.Send(frames[:1]); !errors.Is(err, ErrStale) || len(seen(tap)) != 0 {
			t.Errorf("a stale frame: %v", err)
		}
	})
}

// A tap that nobody reads loses frames of its own, and tells how many; the traffic loses
// none and does not wait.
func TestAFullTapLosesNoTraffic(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		tap := tapOf(t, to, TapConfig{Buffer: 64 << 10})
		move := func(n int) {
			for range n {
				sendSizes(t, tx, 1500)
				receiveN(t, rx, 1)
			}
		}
		move(100)
		st := tap.Stats()
		if st.Lost == 0 || st.Captured == 0 || st.Captured+st.Lost != 100 {
			t.Fatalf("%+v", st)
		}
		if got := to.Stats().RX; got.Get(telemetry.Packets) != 100 || got.Dropped()+got.Errors() != 0 {
			t.Errorf("the traffic: %v", got)
		}
		if n := len(seen(tap)); n != int(st.Captured) {
			t.Errorf("%d frames, want %d", n, st.Captured)
		}
		move(1)
		if got := seen(tap); len(got) != 1 || got[0].Lost != st.Lost {
			t.Errorf("the next frame tells of %v", got)
		}
		for range 20 { // the bytes go round many times
			move(30)
			got := seen(tap)
			if len(got) != 30 || got[29].Lost != 0 || len(got[29].Data) != 1500 {
				t.Fatalf("%d frames", len(got))
			}
		}
	})
}

func TestATapFiltersByAllBytes(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		// The filter gets bytes that are not kept, and those of later pieces.
		long := func(b []byte) bool { return len(b) > 8000 && b[8000] == 7 }
		taps := []*Tap{
			tapOf(t, from, TapConfig{Filter: long, Snaplen: 20}), tapOf(t, to, TapConfig{Filter: long, Snaplen: 20}),
			tapOf(t, from, TapConfig{Received: true}), tapOf(t, to, TapConfig{Sent: true}),
			tapOf(t, from, TapConfig{Queues: []int{}}),
		}
		for _, mark := range []byte{7, 8} {
			var f [1]Frame
			tx.AllocSize(f[:], 9000)
			b := make([]byte, 9000)
			b[8000] = mark
			f[0].CopyFrom(b)
			if _, err := tx.Send(f[:]); err != nil {
				t.Fatal(err)
			}
			receiveN(t, rx, 1)
		}
		for i, tap := range taps {
			want, stats := 0, TapStats{}
			if i < 2 {
				want, stats = 1, TapStats{Captured: 1, Filtered: 1}
			}
			if n := len(seen(tap)); n != want || tap.Stats() != stats {
				t.Errorf("tap %d: %d frames, %+v", i, n, tap.Stats())
			}
		}
	})
}

// With GSO and a partial checksum the frame is seen as it is. A peer that takes neither
// gets it in pieces, which are what is seen.
func TestATapSeesOffloads(t *testing.T) {
	for name, takes := range map[string]offloads{"taken": takesCsum4 | takesGSO4, "cut": 0} {
		for _, back := range []bool{false, true} {
			f := plain
			f.offload, f.peerTakes = true, takes
			p := join(t, emu.Config{}, f, Config{Offload: true})
			from, to := p.front, p.back
			if back {
				from, to = to, from
			}
			tx, _ := own(t, from)
			_, rx := own(t, to)
			tap := tapOf(t, from, TapConfig{})
			s := stream{payload: 4000, size: 1448}
			for _, gso := range []bool{true, false} {
				b, g := s.frame(), [1]Frame{}
				tx.AllocSize(g[:], len(b))
				g[0].CopyFrom(b)
				g[0].SetChecksum(ChecksumPartial)
				if gso {
					if err := g[0].SetGSO(s.gso()); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := tx.Send(g[:]); err != nil {
					t.Fatal(err)
				}
			}
			got := seen(tap)
			for range got {
				receiveN(t, rx, 1)
			}
			if takes == 0 {
				if len(got) != 4 || got[0].Checksum != ChecksumVerified || got[0].GSO != (GSO{}) || got[0].Finished || !got[3].Finished {
					t.Errorf("%s, back %v: %d frames, %+v", name, back, len(got), got)
				}
			} else if len(got) != 2 || got[0].GSO != s.gso() || got[0].Checksum != ChecksumPartial || got[1].GSO != (GSO{}) || got[1].Finished {
				t.Errorf("%s, back %v: %d frames, %+v", name, back, len(got), got)
			}
		}
	}
}

// A frame that the device drops is seen with its reason.
func TestATapSeesDroppedFrames(t *testing.T) {
	t.Run("a copy that failed", func(t *testing.T) {
		p := join(t, emu.Config{}, plain, Config{})
		tx, _ := own(t, p.back)
		tap := tapOf(t, p.back, TapConfig{})
		p.back.tx[0].eng.(*backTX).dom = failing{p.bdom}
		sendSizes(t, tx, 60, 9000)
		p.back.tx[0].eng.(*backTX).dom = p.bdom
		sendSizes(t, tx, 61)
		got := seen(tap)
		if len(got) != 3 || got[0].Dropped != telemetry.DropBadGref || got[1].Dropped != telemetry.DropBadGref || got[1].Len != 9000 || got[2].Dropped != 0 {
			t.Errorf("%+v", got)
		}
	})
	for _, back := range []bool{true, false} {
		t.Run("a checksum that is nowhere", func(t *testing.T) {
			f := plain
			f.peerTakes = takesCsum4 // but the receiver did not offer it
			p := join(t, emu.Config{}, f, Config{})
			from, to := p.front, p.back
			if back {
				from, to = to, from
			}
			tx, _ := own(t, from)
			_, rx := own(t, to)
			tap := tapOf(t, to, TapConfig{})
			s := stream{payload: 100, size: 1448}
			b, g := s.frame(), [1]Frame{}
			tx.AllocSize(g[:], len(b))
			g[0].CopyFrom(b)
			g[0].SetChecksum(ChecksumPartial)
			if _, err := tx.Send(g[:]); err != nil {
				t.Fatal(err)
			}
			// Once it is in the ring, its bytes become another protocol's.
			switch e := from.tx[0].eng.(type) {
			case *frontTX:
				e.shared.Bytes(e.lastFirst)[headroom+23] = 99
			case *backTX:
				to.rx[0].eng.(*frontRX).shared.Bytes(to.rx[0].eng.(*frontRX).pageAt[0])[23] = 99
			}
			var in [1]Frame
			if n, err := rx.Poll(in[:]); n != 0 || err != nil {
				t.Fatal(n, err)
			}
			got := seen(tap)
			if len(got) != 1 || got[0].Dropped != telemetry.DropBadCsum || got[0].Len != len(b) || len(got[0].Data) != len(b) {
				t.Errorf("%+v", got)
			}
		})
	}
	t.Run("the end of the connection", func(t *testing.T) {
		p := join(t, emu.Config{}, plain, Config{})
		tx, _ := own(t, p.back)
		tap := tapOf(t, p.front, TapConfig{})
		sendSizes(t, tx, 60, 9000)
		p.disconnect()
		got := seen(tap)
		if len(got) != 2 || got[0].Dropped != telemetry.DropDisconnected || got[1].Len != 9000 || len(got[1].Data) != 9000 {
			t.Errorf("%+v", got)
		}
	})
}

// Taps cost no allocation, whether they have room or not, with a filter and with frames of
// several pieces.
func TestTapsAllocateNothing(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		filter := func(b []byte) bool { return len(b) > 64 }
		read := tapOf(t, to, TapConfig{Filter: filter})
		tapOf(t, from, TapConfig{Filter: filter, Buffer: 64 << 10})
		tapOf(t, from, TapConfig{})
		var f [32]Frame
		for _, size := range []int{64, 1500, 3 * shm.PageSize} {
			cycle := func() {
				n := tx.AllocSize(f[:16], size)
				if k, err := tx.Send(f[:n]); k != n || err != nil {
					t.Fatal(k, n, err)
				}
				for got := 0; got < n; {
					k, err := rx.Receive(f[:])
					if err != nil {
						t.Fatal(err)
					}
					rx.Release(f[:k])
					got += k
				}
				read.Read(func(*TapFrame) bool { return true })
			}
			cycle()
			if n := testing.AllocsPerRun(50, cycle); n != 0 {
				t.Errorf("size %d: %v allocations", size, n)
			}
		}
	})
}

func TestTapsHaveLimits(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	for _, cfg := range []TapConfig{{Snaplen: -1}, {Buffer: 1}, {Buffer: 1 << 40}, {Queues: []int{1}}, {Queues: []int{-1}}} {
		if _, err := p.front.Tap(cfg); err == nil {
			t.Errorf("%+v is taken", cfg)
		}
	}
	var taps []*Tap
	for range maxTaps {
		taps = append(taps, tapOf(t, p.front, TapConfig{}))
	}
	if _, err := p.front.Tap(TapConfig{}); err != ErrTaps {
		t.Errorf("one more: %v", err)
	}
	taps[1].Close()
	taps[1].Close()
	tapOf(t, p.front, TapConfig{})
	for _, tap := range taps {
		tap.Close()
	}
	if n := len(*p.front.taps.Load()); n != 1 {
		t.Errorf("%d taps are left", n)
	}
}

// While taps come and go and are read, traffic moves; this is for the race detector.
func TestTapsComeAndGoUnderLoad(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		stop, done := make(chan bool), make(chan bool)
		var seen atomic.Uint64 // frames, by the taps
		begun := sync.OnceFunc(func() { stop <- true })
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, d := range []*Device{from, to} {
					tap, err := d.Tap(TapConfig{Snaplen: 64})
					if err != nil {
						t.Error(err)
						continue
					}
					begun()
					d.Rings()
					for n := 0; n == 0; { // until it has seen something
						n = tap.Read(func(f *TapFrame) bool {
							if len(f.Data) != 60 || f.Data[59] != 59*7%256 {
								t.Error("another frame's bytes")
							}
							return true
						})
						seen.Add(uint64(n))
						select {
						case <-stop:
							n = -1
						default:
							runtime.Gosched()
						}
					}
					tap.Close()
				}
			}
		}()
		<-stop // the first tap is there
		var f [1]Frame
		b := make([]byte, 60)
		pattern(b, 0)
		sent := uint64(0)
		for ; sent < 3000 || seen.Load() == 0; sent++ { // the taps' goroutine may have no processor for a while
			if sent == 10_000_000 {
				t.Fatal("no tap has seen a frame")
			}
			for tx.AllocSize(f[:], 60) == 0 {
			}
			f[0].CopyFrom(b)
			if _, err := tx.Send(f[:]); err != nil {
				t.Fatal(err)
			}
			receiveN(t, rx, 1)
		}
		close(stop)
		<-done
		if got := to.Stats().RX.Get(telemetry.Packets); got != sent {
			t.Errorf("%d of %d frames", got, sent)
		}
	})
}
