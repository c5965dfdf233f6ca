package pvnet

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/telemetry"
)

// virtually runs test with a pair on virtual time, which passes only while every
// goroutine waits. So each delay is exactly what the test makes it.
func virtually(t *testing.T, f features, cfg Config, test func(t *testing.T, p *pair)) {
	synctest.Test(t, func(t *testing.T) { test(t, join(t, emu.Config{}, f, cfg)) })
}

// delays are at the edges of the histogram's buckets, and within them.
var delays = []time.Duration{
	0, 100, 1024, 1025, 3000, 1 << 15, 1<<15 + 1, 400 * time.Microsecond, 3 * time.Millisecond, 1 << 22, 1<<22 + 1, 3 * time.Second,
}

// latencies returns the samples, buckets and sum of request_latency.
func latencies(v *telemetry.Values) (samples uint64, buckets []uint64, sum time.Duration) {
	for _, f := range telemetry.Fields() {
		if f.Name == "request_latency" {
			b, s := v.Histogram(f)
			for _, n := range b {
				samples += n
			}
			return samples, b, time.Duration(s)
		}
	}
	panic("no field request_latency")
}

// want asserts that request_latency holds exactly one sample of each of delays.
func want(t *testing.T, v *telemetry.Values, delays ...time.Duration) {
	t.Helper()
	set := telemetry.NewSet(1)
	var sum time.Duration
	for _, d := range delays {
		set.RX(0).Observe(telemetry.RequestLatency, uint64(d))
		sum += d
	}
	set.RX(0).Flush()
	st := set.Snapshot()
	_, should, _ := latencies(&st.RX)
	if _, have, total := latencies(v); !slices.Equal(have, should) || total != sum {
		t.Errorf("latencies of %v: %v in all %v, want %v", delays, have, total, should)
	}
}

// put sends n frames of size bytes without waiting.
func put(t *testing.T, tx *TX, n, size int) {
	t.Helper()
	var f [1]Frame
	for range n {
		if tx.AllocSize(f[:], size) != 1 {
			t.Fatal("no buffer")
		}
		if _, err := tx.Send(f[:]); err != nil {
			t.Fatal(err)
		}
	}
}

// take receives n frames.
func take(t *testing.T, rx *RX, n int) {
	t.Helper()
	var f [32]Frame
	for n > 0 {
		k, err := rx.Receive(f[:min(n, len(f))])
		if err != nil {
			t.Fatal(err)
		}
		rx.Release(f[:k])
		n -= k
	}
}

// The peer answers after a while, and the owner looks for the response meanwhile.
func TestRequestLatencyIsWhatThePeerTook(t *testing.T) {
	for _, d := range delays {
		virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			tx.eng.sample()
			put(t, tx, 1, 60)
			step := d / 20
			for range 20 {
				time.Sleep(step)
				put(t, tx, 1, 60) // each send is a look
			}
			time.Sleep(d - 20*step)
			take(t, rx, 21)
			put(t, tx, 1, 60)
			st := p.front.Stats()
			want(t, &st.TX, d)
			put(t, tx, 5, 60) // no further sample was asked for
			take(t, rx, 6)
			st = p.front.Stats()
			want(t, &st.TX, d)
		})
	}
}

// A sender that waits for room sees the response as soon as it comes.
func TestRequestLatencyOfASenderThatWaits(t *testing.T) {
	for _, d := range delays {
		virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			tx.eng.sample()
			put(t, tx, 256, 60)
			sent := make(chan error, 1)
			go func() {
				var f [1]Frame
				_, err := tx.AllocWait(f[:], 60)
				f[0].Release()
				sent <- err
			}()
			time.Sleep(d)
			take(t, rx, 256)
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			st := p.front.Stats() // the request of the first frame was timed
			want(t, &st.TX, d)
		})
	}
}

// Time that the owner spends elsewhere does not count as the peer's.
func TestRequestLatencyIsNotIdleness(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		tx.eng.sample()
		put(t, tx, 1, 60)
		take(t, rx, 1)
		time.Sleep(time.Second)
		put(t, tx, 1, 60)
		st := p.front.Stats()
		want(t, &st.TX)

		// Nor does it after a wait that ended before the response came.
		put(t, tx, 254, 60)
		take(t, rx, 200)
		tx.eng.sample()
		put(t, tx, 201, 60)
		tx.SetDeadline(time.Now().Add(time.Millisecond))
		var f [1]Frame
		if _, err := tx.AllocWait(f[:], 60); !errors.Is(err, errTimeout) {
			t.Fatal(err)
		}
		take(t, rx, 256)
		time.Sleep(time.Minute)
		put(t, tx, 1, 60)
		st = p.front.Stats()
		want(t, &st.TX)

		// The next sample counts.
		tx.eng.sample()
		put(t, tx, 1, 60)
		time.Sleep(time.Millisecond)
		put(t, tx, 1, 60)
		take(t, rx, 2)
		put(t, tx, 1, 60)
		st = p.front.Stats()
		want(t, &st.TX, time.Millisecond)
	})
}

// A slowDomain takes some time for each batch of copies.
type slowDomain struct {
	hypercall.Domain
	d time.Duration
}

func (s *slowDomain) Copy(ops []hypercall.CopyOp) error {
	time.Sleep(s.d)
	return s.Domain.Copy(ops)
}

// A backend's request latency is its own time: how long it holds the requests of a batch.
func TestRequestLatencyOfABackendIsItsOwn(t *testing.T) {
	for _, d := range delays {
		virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
			ftx, frx := own(t, p.front)
			btx, brx := own(t, p.back)
			slow := &slowDomain{p.bdom, d}
			btx.eng.(*backTX).dom, brx.eng.(*backRX).dom = slow, slow
			p.back.tx[0].eng.sample()
			p.back.rx[0].eng.sample()
			time.Sleep(time.Second) // no request has come yet
			if n, err := brx.Poll(make([]Frame, 1)); n != 0 || err != nil {
				t.Fatal(n, err)
			}
			put(t, ftx, 32, 60)
			take(t, brx, 32)
			put(t, btx, 32, 60)
			take(t, frx, 32)
			st := p.back.Stats()
			want(t, &st.RX, d)
			want(t, &st.TX, d)
			st = p.front.Stats()
			want(t, &st.RX) // a sample would show how long nobody sent
		})
	}
}

// The rule that makes timing cheap: without a tick nothing is timed, and each half times
// one request per tick.
func TestAMillionFramesAreNotTimed(t *testing.T) {
	const frames, batch, ticks = 1_000_000, 32, 5
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	var f [batch]Frame
	for i := range frames / batch {
		if i%(frames/batch/ticks) == 1000 {
			tx.eng.sample()
			rx.eng.sample()
		}
		n := tx.AllocSize(f[:], 60)
		if k, err := tx.Send(f[:n]); k != batch || err != nil {
			t.Fatal(k, err)
		}
		if k, err := rx.Receive(f[:]); k != batch || err != nil {
			t.Fatal(k, err)
		}
		rx.Release(f[:])
	}
	sent, received := p.front.Stats(), p.back.Stats()
	for _, v := range []*telemetry.Values{&sent.TX, &received.RX} {
		if n := v.Get(telemetry.Packets); n != frames {
			t.Fatalf("%d frames", n)
		}
		if n := v.Get(telemetry.Parks); n > 1 {
			t.Fatalf("%d parks", n)
		}
	}
	// Here the sender looks only after each batch is answered, so its samples do not
	// count; the backend's always do.
	if n, _, _ := latencies(&sent.TX); n > ticks {
		t.Errorf("%d requests timed of %d asked for", n, ticks)
	}
	if n, _, _ := latencies(&received.RX); n != ticks {
		t.Errorf("%d batches timed of %d asked for", n, ticks)
	}
}

// A sample reads the clock a few times, not at every look.
func TestASampleReadsTheClockAFewTimes(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		set := telemetry.NewSet(1)
		var w stopwatch
		w.sample()
		if !w.begin() || w.begin() {
			t.Fatal("one sample at a time")
		}
		reads := 0
		for last, i := w.missed, 0; i < 1<<20; i++ {
			time.Sleep(time.Nanosecond)
			w.look(set.TX(0), false)
			if w.missed != last {
				last = w.missed
				reads++
			}
		}
		if reads != 21 { // 2^0 to 2^20
			t.Errorf("%d reads", reads)
		}
		w.look(set.TX(0), true)
		set.TX(0).Flush()
		st := set.Snapshot()
		want(t, &st.TX, 1<<20)
	})
}
