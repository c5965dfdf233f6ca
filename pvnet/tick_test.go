package pvnet

import (
	"bytes"
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/telemetry"
	"barevif/xenbus"
)

// A pulse is a mirror that counts heartbeats, and can be written to.
type pulse struct {
	words [2][]uint64
	beats atomic.Int64
}

func newPulse() *pulse {
	return &pulse{words: [2][]uint64{make([]uint64, telemetry.BlockWords), make([]uint64, telemetry.BlockWords)}}
}

func (p *pulse) Open(telemetry.Info) (telemetry.Mirror, error) { return p, nil }
func (p *pulse) Kind() string                                  { return "test" }
func (p *pulse) Reason() string                                { return "" }
func (p *pulse) Words(_ int, d telemetry.Dir) (words, base []uint64) {
	return p.words[d], nil
}
func (p *pulse) Update(telemetry.Status, telemetry.Reset) { p.beats.Add(1) }
func (p *pulse) Record(telemetry.Event)                   {}
func (p *pulse) Close() error                             { return nil }

// While their owners wait, devices have heartbeats and get damaged counters repaired. One
// goroutine does that for all; neither the devices' goroutines nor the owners wake up.
func TestAnIdleDeviceSleepsThroughTheTick(t *testing.T) {
	mirror := newPulse()
	virtually(t, plain, Config{Counters: mirror}, func(t *testing.T, p *pair) {
		p.back.counters.Open(mirror, telemetry.Info{})
		_, rx := own(t, p.back)
		rx.SetDeadline(time.Time{})
		got := make(chan error, 1)
		go func() {
			_, err := rx.Receive(make([]Frame, 1))
			got <- err
		}()
		synctest.Wait()

		before := clocks()
		l := &lifecycle{d: p.back, conn: p.conns[1], running: true}
		unticks := []func(){l.startTicks()}
		for range 99 { // idle devices of the same domain
			other := &lifecycle{d: newDevice("1", telemetry.Backend, p.bdom, Config{}), running: true, conn: new(conn)}
			unticks = append(unticks, other.startTicks())
		}
		synctest.Wait() // until they run: with one processor none has begun
		if n := clocks() - before; n != 1 {
			t.Errorf("%d goroutines tick for 100 devices", n)
		}
		time.Sleep(500 * time.Millisecond) // to look between two ticks
		parks, beats := rx.waitSeq.Load(), mirror.beats.Load()
		word := int(telemetry.Parks)
		at := &mirror.words[telemetry.RX][word]
		was := atomic.LoadUint64(at)
		for range 20 {
			atomic.StoreUint64(at, 4711)
			time.Sleep(time.Second)
			if now := atomic.LoadUint64(at); now != was {
				t.Fatalf("the mirror says %d, and said %d", now, was)
			}
		}
		if n := rx.waitSeq.Load() - parks; n != 0 {
			t.Errorf("the owner woke up %d times", n/2)
		}
		if n := mirror.beats.Load() - beats; n != 20 {
			t.Errorf("%d heartbeats in 20 s", n)
		}
		if len(p.back.wake) != 0 {
			t.Error("the device's goroutine was woken")
		}
		for _, untick := range unticks {
			untick()
		}
		synctest.Wait()
		if n := clocks() - before; n != 0 || global.clocks[p.bdom] != nil {
			t.Errorf("%d goroutines tick for nobody", n)
		}
		rx.interrupt()
		<-got
	})
}

// clocks returns how many goroutines tick. The number of all would change with those of the runtime.
func clocks() int {
	buf := make([]byte, 1<<20)
	return bytes.Count(buf[:runtime.Stack(buf, true)], []byte("(*slowTicker).run("))
}

// A device whose link is down, or whose goroutine is at work, does its beat itself.
func TestTheTickWakesADeviceThatIsNotIdle(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		l := &lifecycle{d: p.back}
		defer l.startTicks()()
		for _, busy := range []bool{false, true} {
			l.mu.Lock()
			if l.running = busy; !busy {
				l.mu.Unlock()
			}
			time.Sleep(time.Second)
			synctest.Wait()
			if len(p.back.wake) != 1 || !l.tickDue.Swap(false) {
				t.Errorf("at work %v: no beat is asked for", busy)
			}
			<-p.back.wake
		}
		l.mu.Unlock()
	})
}

type nowhere struct{}

func (nowhere) Open(telemetry.Info) (telemetry.Mirror, error) {
	return nil, errors.New("nowhere to mirror")
}

// The tick of an idle device ends no wait, whether the counters are mirrored or not.
func TestTheTickWakesNoOwner(t *testing.T) {
	for _, mirrored := range []bool{false, true} {
		cfg := Config{}
		if mirrored {
			cfg.Counters = nowhere{}
		}
		virtually(t, plain, cfg, func(t *testing.T, p *pair) {
			_, rx := own(t, p.back)
			rx.SetDeadline(time.Time{})
			got := make(chan error, 1)
			go func() {
				_, err := rx.Receive(make([]Frame, 1))
				got <- err
			}()
			synctest.Wait()
			parks := rx.waitSeq.Load()
			l := &lifecycle{d: p.back, conn: p.conns[1], running: true}
			for range 10 {
				time.Sleep(time.Second)
				l.tick()
				synctest.Wait()
			}
			if n := rx.waitSeq.Load() - parks; n != 0 {
				t.Errorf("mirrored %v: the tick ended %d waits", mirrored, n/2)
			}
			rx.interrupt()
			<-got
		})
	}
}

// If the tick asks for something just before the owner waits, the owner does it before it
// waits.
func TestWhatIsDueDoesNotWaitForAnEvent(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		_, rx := own(t, p.back)
		rx.SetDeadline(time.Time{})
		got := make(chan error, 1)
		receive := func() {
			_, err := rx.Receive(make([]Frame, 1))
			got <- err
		}
		go receive() // consumes the event of the bind
		synctest.Wait()
		rx.interrupt()
		<-got
		rx.ending.Store(false)
		rx.park.Load().wait(rx.dir, time.Now()) // consumes the wake of the interrupt
		rx.requests.Or(requestStall)
		go receive()
		synctest.Wait()
		st := p.back.Stats()
		if n := st.RX.Get(telemetry.Stalls); n != 1 {
			t.Errorf("%d", n)
		}
		rx.interrupt()
		<-got
	})
}

// A step that failed is not tried again before its pause is over, unless the directory has
// gone: then only the rings and pages are to be given back.
func TestAMissingDirectoryIsNotWaitedFor(t *testing.T) {
	ch := xenbus.Change{Online: true}
	l := &lifecycle{d: new(Device), failedOn: &ch, retryAt: time.Now().Add(time.Hour)}
	if !l.onHold(ch) {
		t.Error("a failed step is tried again at once")
	}
	ch.Gone = true
	if l.onHold(ch) {
		t.Error("the end waits for a pause")
	}
}
