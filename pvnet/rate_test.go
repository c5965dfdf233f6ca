package pvnet

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/xenbus/xenstore/server/labtest"
)

func TestParseRate(t *testing.T) {
	for _, c := range []struct {
		text string
		want rate
		bad  bool
	}{
		{text: "52428,50000", want: rate{52428, 50 * time.Millisecond}},
		{text: "1,1", want: rate{1, time.Microsecond}},
		{text: "0,50000", want: rate{0, 50 * time.Millisecond}},
		{text: "1000,0"},                     // no limit
		{text: "18446744073709551615,50000"}, // no limit: ~0UL
		{text: "18446744073709551614,1", want: rate{math.MaxUint64 - 1, time.Microsecond}},
		{text: "5,18446744073709551615", want: rate{5, math.MaxInt64 / 4 / 1000 * time.Microsecond}},
		{text: "", bad: true},
		{text: ",", bad: true},
		{text: "1000", bad: true},
		{text: "1000,", bad: true},
		{text: ",1000", bad: true},
		{text: "1000,50000,", bad: true},
		{text: "1000, 50000", bad: true},
		{text: "-1,50000", bad: true},
		{text: "+1,50000", bad: true},
		{text: "1e6,50000", bad: true},
		{text: "1000,18446744073709551616", bad: true},
		{text: "1000,50000\x00", bad: true},
	} {
		r, err := parseRate(c.text)
		if r != c.want || (err != nil) != c.bad {
			t.Errorf("%q: %+v, %v", c.text, r, err)
		}
	}
	for r, want := range map[rate]uint64{
		{}:                             0,
		{0, time.Second}:               1,
		{1, time.Hour}:                 1,
		{52428, 50 * time.Millisecond}: 1048560,
		{math.MaxUint64 - 1, 50 * time.Microsecond}: math.MaxUint64,
	} {
		if n := r.perSecond(); n != want {
			t.Errorf("%v is %d bytes/s, want %d", r, n, want)
		}
	}
}

// flood sends frames of some sizes for ever, until stop.
func flood(t *testing.T, tx *TX, sizes ...int) (stop func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		var f [1]Frame
		for i := 0; ; i++ {
			size := sizes[i%len(sizes)]
			if _, err := tx.AllocWait(f[:], size); err != nil {
				return
			}
			f[0].CopyFrom(make([]byte, size))
			if _, err := tx.SendWait(f[:]); err != nil {
				f[0].Release()
				return
			}
		}
	})
	return func() {
		tx.SetDeadline(time.Unix(1, 0))
		wg.Wait()
	}
}

// floodAll is flood on all queues of a frontend.
func floodAll(t *testing.T, d *Device, sizes ...int) (stop func()) {
	var stops []func()
	for q := range d.tx {
		tx, err := d.OwnTX(q)
		if err != nil {
			t.Fatal(err)
		}
		stops = append(stops, flood(t, tx, sizes...))
	}
	return func() {
		for _, stop := range stops {
			stop()
		}
	}
}

// A consumer receives on all queues of a backend and counts bytes.
type consumer struct {
	bytes []atomic.Int64 // by queue
	stop  func()
}

func (d *consumer) total() (sum int64) {
	for i := range d.bytes {
		sum += d.bytes[i].Load()
	}
	return sum
}

func consume(t *testing.T, dev *Device, batch int) *consumer {
	r := &consumer{bytes: make([]atomic.Int64, len(dev.rx))}
	var wg sync.WaitGroup
	for q := range dev.rx {
		rx, err := dev.OwnRX(q)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			f := make([]Frame, batch)
			for {
				n, err := rx.Receive(f)
				if err != nil {
					return
				}
				for i := range f[:n] {
					r.bytes[q].Add(int64(f[i].Len()))
				}
				rx.Release(f[:n])
			}
		})
	}
	r.stop = func() {
		for _, rx := range dev.rx {
			rx.SetDeadline(time.Unix(1, 0))
		}
		wg.Wait()
	}
	return r
}

func queues(n int) features {
	f := plain
	f.queues = n
	return f
}

// Whatever the frames and the number of queues, the vif as a whole keeps to its limit, and
// uses it up. Nobody takes the guest for one whose events get lost.
func TestAVifKeepsToItsRate(t *testing.T) {
	for _, r := range []rate{
		{52428, 50 * time.Millisecond},   // xl: rate=1MB/s
		{1310720, 50 * time.Millisecond}, // xl: rate=25MB/s
		{1000, 50 * time.Millisecond},    // less than a frame in each window
		{2000000, time.Second},
		{777, 300 * time.Microsecond},
	} {
		for _, n := range []int{1, 3} {
			for name, sizes := range map[string][]int{"small": {200}, "full": {1514}, "mixed": {60, 1514, 9000, 200, 65535}} {
				t.Run(fmt.Sprint(r, ", ", n, " queues, ", name), func(t *testing.T) {
					virtually(t, queues(n), Config{}, func(t *testing.T, p *pair) {
						p.back.limiter.set(r)
						stop := floodAll(t, p.front, sizes...)
						d := consume(t, p.back, 32)
						l := &lifecycle{d: p.back, conn: p.conns[1], running: true}
						untick := l.startTicks()
						const long = 2 * time.Second
						time.Sleep(long + 100*time.Microsecond)
						synctest.Wait()
						l.mu.Lock()
						l.rescue()
						l.mu.Unlock()
						untick()
						got, want := float64(d.total()), float64(r.bytes)*float64(long)/float64(r.window)
						// All queues together may hold half a window's credit that they have not used, and
						// each of them credit for a part of its next frame. What netback's rule for bursts
						// takes away is what is left over of windows larger than 128 KiB.
						slack := float64(r.bytes)/2 + float64(n*sizes[len(sizes)-1])
						if got > want+2*float64(r.bytes) || got < 0.98*want-slack {
							t.Errorf("%.0f bytes in %v, want %.0f", got, long, want)
						}
						for q := range d.bytes {
							if b := float64(d.bytes[q].Load()); b < want/float64(n)/2-slack {
								t.Errorf("queue %d got %.0f bytes of %.0f", q, b, got)
							}
						}
						st := p.back.Stats().RX
						if n := st.Get(telemetry.RescuedWakeups); n > 0 {
							t.Errorf("%d rescued wake-ups", n)
						}
						if w := st.Get(telemetry.CreditWaits); w == 0 {
							t.Error("no frame waited")
						}
						d.stop()
						stop()
					})
				})
			}
		}
	}
}

// arrivals sends frames of one size, as fast as it can, and returns when each of them arrived.
func arrivals(t *testing.T, tx *TX, rx *RX, n, size int) (at []time.Duration) {
	t.Helper()
	start := time.Now()
	done := make(chan struct{})
	go func() {
		defer close(done)
		var f [1]Frame
		for range n {
			tx.AllocWait(f[:], size)
			f[0].CopyFrom(make([]byte, size))
			tx.SendWait(f[:])
		}
	}()
	var f [8]Frame
	for len(at) < n {
		k, err := rx.Receive(f[:])
		if err != nil {
			t.Fatal(err)
		}
		rx.Release(f[:k])
		for range k {
			at = append(at, time.Since(start))
		}
	}
	<-done
	return at
}

// steps says how many frames arrived at which time.
func steps(at []time.Duration) (s string) {
	for i := 0; i < len(at); {
		n := 1
		for i+n < len(at) && at[i+n] == at[i] {
			n++
		}
		s += fmt.Sprintf("%d@%v ", n, at[i])
		i += n
	}
	return s
}

// The times at which frames pass are those of Linux's netback.
func TestTheBurstIsNetbacks(t *testing.T) {
	ten := rate{10000, 50 * time.Millisecond}
	for _, c := range []struct {
		rate    rate
		n, size int
		idle    time.Duration // before the second round
		want    [2]string
	}{
		// A window's worth at once, then one in each window. Of a guest that was idle no more
		// than that and what it had left over: netback's credit does not grow by itself.
		{ten, 25, 1000, 10 * time.Second, [2]string{"10@0s 10@50ms 5@100ms ", "15@0s 10@50ms "}},
		// What is left of a window is kept: 10000 = 6 * 1500 + 1000.
		{ten, 14, 1500, 0, [2]string{"6@0s 7@50ms 1@100ms ", "6@0s 6@50ms 2@100ms "}},
		// A frame longer than the credit of a window waits for several.
		{ten, 2, 65535, 0, [2]string{"1@300ms 1@650ms ", "1@300ms 1@650ms "}},
		{rate{100, time.Millisecond}, 2, 1514, 0, [2]string{"1@15ms 1@30ms ", "1@15ms 1@30ms "}},
	} {
		virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
			p.back.limiter.set(c.rate)
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			for round, want := range c.want {
				if got := steps(arrivals(t, tx, rx, c.n, c.size)); got != want {
					t.Errorf("%v, %d frames of %d bytes, round %d: %s, want %s", c.rate, c.n, c.size, round, got, want)
				}
				time.Sleep(c.idle)
			}
		})
	}
}

// A GSO frame costs its bytes on the wire, as the first of its requests says.
func TestALongFrameCostsAllItsBytes(t *testing.T) {
	f := plain
	f.offload, f.peerTakes = true, takesCsum4|takesGSO4
	virtually(t, f, Config{Offload: true}, func(t *testing.T, p *pair) {
		p.back.limiter.set(rate{100000, time.Second})
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		long := typical
		long.payload = 40000
		size := long.headers() + long.payload
		start := time.Now()
		for i, want := range []time.Duration{0, 0, time.Second} {
			out := long.put(t, tx)
			if _, err := tx.Send(out[:]); err != nil {
				t.Fatal(err)
			}
			var in [1]Frame
			if _, err := rx.Receive(in[:]); err != nil {
				t.Fatal(err)
			}
			if in[0].Len() != size || in[0].GSO() != long.gso() || time.Since(start) != want {
				t.Errorf("frame %d: %d bytes, %+v after %v", i, in[0].Len(), in[0].GSO(), time.Since(start))
			}
			rx.Release(in[:])
		}
	})
}

// A frame that is wrong costs its bytes, as in netback: else a guest could keep its backend
// busy with such frames without limit.
func TestALostFrameCostsItsBytes(t *testing.T) {
	for name, bad := range map[string]func(hypercall.GrantRef) []netif.TxRequest{
		"chain": func(ref hypercall.GrantRef) []netif.TxRequest { // its second slot has more than the frame
			return []netif.TxRequest{{Ref: ref, Size: 2000, Flags: netif.TxMoreData}, {Ref: ref, Size: 2001}}
		},
		"grant": func(hypercall.GrantRef) []netif.TxRequest { return []netif.TxRequest{{Ref: 1 << 30, Size: 2000}} },
	} {
		t.Run(name, func(t *testing.T) {
			virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
				p.back.limiter.set(rate{100_000, time.Second})
				_, rx := own(t, p.back)
				eng := p.front.tx[0].eng.(*frontTX)
				var page [1]uint32
				eng.shared.Get(page[:])
				defer eng.shared.Put(page[0])
				good := netif.TxRequest{Ref: eng.refs[page[0]], Size: 1000}
				put := func(requests ...netif.TxRequest) {
					for _, r := range requests {
						eng.ring.Put(r)
					}
					eng.ring.Publish()
				}
				taken := 0
				answers := func() { // the engine does not know the requests
					n, err := eng.ring.Poll()
					for ; n > 0 && err == nil; n-- {
						eng.ring.Take()
						taken++
					}
				}
				start := time.Now()
				for range 60 { // 120000 bytes: more than a window's
					put(bad(good.Ref)...)
				}
				put(good)
				var f [1]Frame
				if n, err := rx.Receive(f[:]); n != 1 || err != nil || f[0].Len() != 1000 {
					t.Fatal(n, err)
				}
				if at := time.Since(start); at != time.Second {
					t.Errorf("the frame comes after %v", at)
				}
				rx.Release(f[:])
				if answers(); taken != 60*len(bad(0))+1 {
					t.Errorf("%d answers", taken)
				}
			})
		})
	}
}

// A change takes effect at once, also for a frame that waits under the limit before.
func TestTheRateChangesWhileFramesWait(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		slow := rate{1000, time.Second}
		change := func(r rate) {
			if p.back.limiter.set(r) {
				p.back.wakeReceivers()
			}
		}
		change(slow)
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		tx.SetDeadline(time.Time{})
		rx.SetDeadline(time.Time{})
		stop := flood(t, tx, 1000)
		var bytes atomic.Int64
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			var f [32]Frame
			for {
				n, err := rx.Receive(f[:])
				if err != nil {
					return
				}
				bytes.Add(int64(n * 1000))
				rx.Release(f[:n])
				if p.back.limiter.now() == (rate{}) {
					time.Sleep(time.Millisecond) // else nothing ends the test
				}
			}
		}()
		in := func(d time.Duration) int64 {
			before := bytes.Load()
			time.Sleep(d)
			synctest.Wait()
			return bytes.Load() - before
		}
		if n := in(10*time.Second + time.Millisecond); n != 11000 {
			t.Errorf("%d bytes at 1000 a second", n)
		}
		change(rate{100000, time.Second})
		if n := in(10 * time.Second); n != 1000000 {
			t.Errorf("%d bytes after it was raised", n)
		}
		change(rate{})
		if n := in(time.Second); n < 2000000 {
			t.Errorf("%d bytes without a limit", n)
		}
		change(slow)
		if n := in(10 * time.Second); n > 11000 || n < 10000 {
			t.Errorf("%d bytes after it was lowered", n)
		}
		change(rate{0, time.Second})
		in(time.Second)
		if n := in(time.Hour); n != 0 {
			t.Errorf("%d bytes when nothing may be sent", n)
		}
		change(slow)
		if n := in(10 * time.Second); n < 9000 || n > 11000 {
			t.Errorf("%d bytes after that", n)
		}
		rx.SetDeadline(time.Unix(1, 0))
		<-ended
		stop()
	})
}

// A queue whose frame waits gets credit by another queue's draw, and a new limit before it
// looks: then its frame passes, and nothing is held back any more. Else the next Receive
// would arm no event, and not wait either, until another frame comes.
func TestAFrameThatPassesUnderANewLimitIsHeldNoLonger(t *testing.T) {
	virtually(t, queues(2), Config{}, func(t *testing.T, p *pair) {
		p.back.limiter.set(rate{3000, time.Second})
		var f [1]Frame
		poll := func(q, want int) {
			t.Helper()
			n, err := p.back.rx[q].Poll(f[:])
			if n != want || err != nil {
				t.Fatalf("queue %d: %d frames, %v; want %d", q, n, err, want)
			}
			p.back.rx[q].Release(f[:n])
		}
		for q := range 2 {
			tx, err := p.front.OwnTX(q)
			if err != nil {
				t.Fatal(err)
			}
			put(t, tx, 4, 1000)
		}
		for range 3 {
			poll(0, 1)
		}
		poll(0, 0)
		time.Sleep(time.Second)
		poll(1, 1) // begins a window, of which queue 0 gets its share
		p.back.limiter.set(rate{4000, time.Second})
		poll(0, 1)
		if until, held := p.back.rx[0].eng.heldUntil(); held {
			t.Errorf("an empty queue is held until %v", until)
		}
	})
}

// Changes of the limit, however many, are no way to get more than the highest of them.
func TestManyChangesGiveNoCredit(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		stop := floodAll(t, p.front, 1000)
		p.back.limiter.set(rate{10000, time.Second})
		d := consume(t, p.back, 32)
		for i := range 1000 {
			p.back.limiter.set(rate{10000 - uint64(i%2), time.Second})
			p.back.wakeReceivers()
			time.Sleep(10 * time.Millisecond)
		}
		if n := d.total(); n > 110000 || n < 90000 {
			t.Errorf("%d bytes in 10 s at 10000 a second", n)
		}
		d.stop()
		stop()
	})
}

// A guest that connects again gets no credit by that.
func TestANewConnectionGivesNoCredit(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		p.back.limiter.set(rate{10000, time.Hour})
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		total := 0
		for range 20 {
			for range 12 {
				put(t, tx, 1, 1000)
			}
			var f [32]Frame
			for {
				n, err := rx.Poll(f[:])
				if err != nil {
					t.Fatal(err)
				}
				if total += n; n == 0 {
					break
				}
				rx.Release(f[:n])
			}
			for i, d := range []*Device{p.back, p.front} {
				d.quiesce(p.conns[1-i], "again")
				d.detach(p.conns[1-i])
			}
			p.connect(t, plain)
		}
		if total != 10 {
			t.Errorf("%d frames of 1000 bytes passed", total)
		}
		if n := len(p.back.limiter.accounts); n != 1 {
			t.Errorf("the limiter knows %d queues", n)
		}
	})
}

// While a frame waits, the deadline of Receive holds, and Disconnect does not wait.
func TestWaitsForCreditEnd(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		p.back.limiter.set(rate{1000, time.Hour})
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		put(t, tx, 2, 1000)
		var f [4]Frame
		n, err := rx.Receive(f[:])
		if n != 1 || err != nil {
			t.Fatal(n, err)
		}
		rx.Release(f[:n])
		start := time.Now()
		rx.SetDeadline(start.Add(time.Minute))
		if n, err := rx.Receive(f[:]); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Minute {
			t.Errorf("%d frames, %v after %v", n, err, time.Since(start))
		}
		rx.SetDeadline(time.Time{})
		got := make(chan error, 1)
		go func() {
			_, err := rx.Receive(f[:])
			got <- err
		}()
		time.Sleep(time.Minute)
		start = time.Now()
		p.disconnect()
		if err := <-got; !errors.Is(err, ErrDisconnected) || time.Since(start) != 0 {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		wantAccount(t, p.front, p.back, 2, 1)
		st := p.back.Stats().RX
		if w, d := st.Get(telemetry.CreditWaits), time.Duration(st.Get(telemetry.CreditWaited)); w != 1 || d != 2*time.Minute {
			t.Errorf("%d waits of %v in all", w, d)
		}
	})
}

// A half in a Poller waits for credit there, beside members without a limit; so does one
// whose owner is locked to its thread, and one that never parks. These wait in real time.
func TestEveryWaitEndsWhenCreditComes(t *testing.T) {
	limit := rate{20000, 20 * time.Millisecond} // 1 MB/s
	const enough = 300000                       // bytes, of 15 windows: a wait that did not end would end the test
	judge := func(t *testing.T, bytes int, took time.Duration) {
		t.Helper()
		if most := 20000 + int(took/limit.window+1)*20000; bytes > most { // the machine may be busy: less says nothing
			t.Errorf("%d bytes in %v, at most %d expected", bytes, took, most)
		}
	}
	for _, mode := range []WaitMode{Park, Adaptive, Busy} {
		for _, locked := range []bool{false, true} {
			t.Run(fmt.Sprint("Receive, mode ", mode, ", locked ", locked), func(t *testing.T) {
				if locked && runtime.GOOS != "linux" {
					t.Skip("a thread can block for a domain on Linux only")
				}
				p := join(t, emu.Config{}, plain, Config{Wait: mode, LockedThreads: locked})
				p.back.limiter.set(limit)
				stop := floodAll(t, p.front, 1000)
				defer stop()
				_, err := p.back.OwnRX(0)
				if err != nil {
					t.Fatal(err)
				}
				rx, start, bytes := p.back.rx[0], time.Now(), 0
				if locked {
					runtime.LockOSThread()
					defer runtime.UnlockOSThread()
				}
				rx.SetDeadline(start.Add(labtest.Limit))
				var f [32]Frame
				for bytes < enough {
					n, err := rx.Receive(f[:])
					if err != nil {
						t.Fatalf("after %d bytes: %v", bytes, err)
					}
					bytes += 1000 * n
					rx.Release(f[:n])
				}
				judge(t, bytes, time.Since(start))
			})
		}
		t.Run(fmt.Sprint("Poller, mode ", mode), func(t *testing.T) {
			p := join(t, emu.Config{}, queues(2), Config{})
			p.back.limiter.set(limit)
			stop := floodAll(t, p.front, 1000)
			defer stop()
			poller := newPoller(t, p.bdom, PollerConfig{Wait: mode})
			for q := range 2 {
				rx, err := p.back.OwnRX(q)
				if err != nil {
					t.Fatal(err)
				}
				if err := poller.Add(rx, q); err != nil {
					t.Fatal(err)
				}
			}
			start, bytes, turns := time.Now(), 0, 0
			poller.SetDeadline(start.Add(labtest.Limit))
			for bytes < enough {
				ready, err := poller.Wait()
				if err != nil {
					t.Fatalf("after %d bytes: %v", bytes, err)
				}
				for _, r := range ready {
					var f [32]Frame
					n, err := r.RX.Poll(f[:])
					if err != nil {
						t.Fatal(err)
					}
					bytes += 1000 * n
					turns++
					r.RX.Release(f[:n])
				}
			}
			took := time.Since(start)
			judge(t, bytes, took)
			if windows := int(took/limit.window) + 1; turns > 40*windows {
				t.Errorf("the Poller listed members %d times in %d windows", turns, windows)
			}
		})
	}
}

// A change of the limit wakes a Poller whose member waits for credit that never comes.
func TestAPollerNoticesAChangeOfTheRate(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	p.back.limiter.set(rate{0, time.Second})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	put(t, tx, 1, 1000)
	poller := newPoller(t, p.bdom, PollerConfig{})
	if err := poller.Add(rx, nil); err != nil {
		t.Fatal(err)
	}
	got := make(chan int, 1)
	go func() {
		var f [1]Frame
		for {
			ready, err := poller.Wait()
			if err != nil {
				got <- -1
				return
			}
			for range ready {
				if n, _ := rx.Poll(f[:]); n > 0 {
					rx.Release(f[:])
					got <- n
					return
				}
			}
		}
	}()
	time.Sleep(20 * time.Millisecond) // the member is held, most likely
	p.back.limiter.set(rate{})
	p.back.wakeReceivers()
	if n := <-got; n != 1 {
		t.Errorf("got %d", n)
	}
}

// A Poller's member waits for credit, and has not slept before. A page that it has lent meanwhile is
// the frontend's again as soon as another goroutine releases it.
func TestALentPageComesBackWhileItsPollerWaitsForCredit(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{LendRx: true})
	static(t, p)
	p.back.limiter.set(rate{150_000, time.Hour})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	const sent = 200
	put(t, tx, sent, 1000)
	poller := newPoller(t, p.bdom, PollerConfig{})
	if err := poller.Add(rx, nil); err != nil {
		t.Fatal(err)
	}
	e := rx.eng.(*backRX)
	var held atomic.Bool // and all that was received is in frames
	frames, ended := make(chan Frame, sent), make(chan error, 1)
	go func() {
		var f [32]Frame
		for {
			ready, err := poller.Wait()
			if err != nil {
				ended <- err
				return
			}
			for range ready {
				n, _ := rx.Poll(f[:])
				for i := range n {
					frames <- f[i]
				}
				if e.account.held.Load() {
					held.Store(true)
				}
			}
		}
	}()
	comes(t, "the wait for credit", held.Load)
	time.Sleep(20 * time.Millisecond) // the Poller sleeps, most likely
	n, lent := len(frames), 0
	for range n {
		f := <-frames
		if f.ReadOnly() {
			lent++
		}
		f.Release()
	}
	if lent == 0 || n == sent {
		t.Fatalf("%d of %d frames came, of which %d were lent", n, sent, lent)
	}
	ft := tx.eng.(*frontTX)
	comes(t, "the last page", func() bool { ft.reap(); return int(ft.ring.InFlight()) == sent-n })
	poller.Close()
	<-ended
}

func TestALimitAllocatesNothing(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	p.back.limiter.set(rate{3000, time.Microsecond})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	var in, out [32]Frame
	cycle := func() {
		for _, size := range []int{1500, 9000} {
			k := tx.AllocSize(out[:], size)
			if n, err := tx.Send(out[:k]); n != k || err != nil {
				t.Fatal(n, err)
			}
			for got := 0; got < k; {
				n, err := rx.Receive(in[:])
				if err != nil {
					t.Fatal(err)
				}
				rx.Release(in[:n])
				got += n
			}
		}
	}
	cycle()
	if n := testing.AllocsPerRun(50, cycle); n != 0 {
		t.Errorf("%v allocations a batch", n)
	}
}
