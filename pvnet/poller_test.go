package pvnet

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/telemetry"
	"barevif/xenbus/xenstore/server/labtest"
)

var waitModes = map[string]WaitMode{"Park": Park, "Adaptive": Adaptive, "Busy": Busy}

// A polled is a set of vifs whose backends one Poller serves.
type polled struct {
	*Poller
	pairs []*pair
	tx    []*TX // of the frontends
	rx    []*RX // of the backends: members, whose value is their index
}

func newPoller(t testing.TB, dom hypercall.Domain, cfg PollerConfig) *Poller {
	t.Helper()
	p, err := NewPoller(dom, cfg)
	if cfg.LockedThread && errors.Is(err, errors.ErrUnsupported) && runtime.GOOS != "linux" {
		t.Skip("a thread can block for a domain on Linux only:", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.SetDeadline(time.Now().Add(labtest.Limit))
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func poll(t testing.TB, n int, cfg PollerConfig, f features) *polled {
	t.Helper()
	q := new(polled)
	for range n {
		p := join(t, emu.Config{}, f, Config{})
		q.pairs = append(q.pairs, p)
	}
	q.Poller = newPoller(t, q.pairs[0].bdom, cfg)
	for i, p := range q.pairs {
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		if err := q.Add(rx, i); err != nil {
			t.Fatal(err)
		}
		q.tx, q.rx = append(q.tx, tx), append(q.rx, rx)
	}
	return q
}

// send sends n frames of vif i.
func send(t testing.TB, tx *TX, n int) {
	t.Helper()
	if err := sendAll(tx, n); err != nil {
		t.Fatal(err)
	}
}

func sendAll(tx *TX, n int) error {
	var frames [32]Frame
	for n > 0 {
		k, err := tx.AllocWait(frames[:min(n, len(frames))], 60)
		if err != nil {
			return err
		}
		if _, err := tx.SendWait(frames[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// receive takes the frames of each ready member and counts them by index. It returns the
// errors of members that have left.
func (q *polled) receive(t testing.TB, got []int) (left []error) {
	t.Helper()
	ready, err := q.Wait()
	if err != nil {
		t.Fatalf("Wait: %v, after %v", err, got)
	}
	var frames [32]Frame
	for _, r := range ready {
		if r.Err != nil {
			left = append(left, r.Err)
			continue
		}
		n, err := r.RX.Poll(frames[:])
		if err != nil && err != ErrLinkDown {
			t.Fatalf("Poll: %v", err)
		}
		if err := r.RX.Release(frames[:n]); err != nil {
			t.Fatal(err)
		}
		got[r.Value.(int)] += n
	}
	return left
}

// until receives until every member has received as many frames as want says.
func (q *polled) until(t testing.TB, got []int, want ...int) {
	t.Helper()
	for i := 0; i < len(want); {
		if got[i] > want[i] {
			t.Fatalf("%v, want %v", got, want)
		}
		if got[i] == want[i] {
			i++
			continue
		}
		if left := q.receive(t, got); left != nil {
			t.Fatal(left)
		}
	}
}

// wantQuiet fails if a frame comes within a moment. It leaves every member asleep, unless the
// Poller is Busy.
func (q *polled) wantQuiet(t testing.TB, got []int) {
	t.Helper()
	before := fmt.Sprint(got)
	q.SetDeadline(time.Now().Add(20 * time.Millisecond))
	defer q.SetDeadline(time.Now().Add(labtest.Limit))
	for {
		ready, err := q.Wait()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		var frames [32]Frame
		for _, r := range ready {
			n := 0
			if r.RX != nil {
				n, _ = r.RX.Poll(frames[:])
				r.RX.Release(frames[:n])
			}
			if n > 0 || r.Err != nil {
				t.Fatalf("%d frames, %v, of %v, where nothing was to come", n, r.Err, r.Value)
			}
		}
	}
	if now := fmt.Sprint(got); now != before {
		t.Fatalf("%s, want %s", now, before)
	}
}

func everyWay(t *testing.T, f func(t *testing.T, cfg PollerConfig)) {
	for name, mode := range waitModes {
		for _, locked := range []bool{false, true} {
			how := map[bool]string{false: "", true: ", locked thread"}[locked]
			t.Run(name+how, func(t *testing.T) {
				if locked {
					runtime.LockOSThread()
					defer runtime.UnlockOSThread()
				}
				f(t, PollerConfig{Wait: mode, LockedThread: locked})
			})
		}
	}
}

// Poll sees what Wait sees, also of members that sleep, and does not wait.
func TestPollDoesNotWait(t *testing.T) {
	everyWay(t, func(t *testing.T, cfg PollerConfig) {
		q := poll(t, 2, cfg, plain)
		got := make([]int, 2)
		q.wantQuiet(t, got) // both members sleep
		if ready, err := q.Poll(); len(ready) > 0 || err != nil {
			t.Fatalf("%v, %v where nothing was to come", ready, err)
		}
		send(t, q.tx[1], 3)
		for end := time.Now().Add(labtest.Limit); got[1] < 3; {
			ready, err := q.Poll()
			if err != nil || time.Now().After(end) {
				t.Fatalf("%v, after %v", err, got)
			}
			var frames [32]Frame
			for _, r := range ready {
				n, err := r.RX.Poll(frames[:])
				if err != nil {
					t.Fatal(err)
				}
				r.RX.Release(frames[:n])
				got[r.Value.(int)] += n
			}
		}
		if got[0] > 0 {
			t.Error(got)
		}
		q.Close()
		if _, err := q.Poll(); !errors.Is(err, hypercall.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

func TestPollerSaysWhoHasFrames(t *testing.T) {
	everyWay(t, func(t *testing.T, cfg PollerConfig) {
		q := poll(t, 4, cfg, plain)
		got := make([]int, 4)
		send(t, q.tx[2], 3)
		q.until(t, got, 0, 0, 3, 0)
		q.wantQuiet(t, got)
		send(t, q.tx[0], 100)
		send(t, q.tx[3], 40)
		q.until(t, got, 100, 0, 3, 40)
		q.wantQuiet(t, got)
		for i := range 20 {
			send(t, q.tx[i%4], 1)
			want := append([]int(nil), got...)
			want[i%4]++
			q.until(t, got, want...)
		}
	})
}

// A countingRX counts the looks at its ring.
type countingRX struct {
	receiver
	looks atomic.Int64
}

func (c *countingRX) ready(n int) bool { c.looks.Add(1); return c.receiver.ready(n) }
func (c *countingRX) arm() (bool, error) {
	c.looks.Add(1)
	return c.receiver.arm()
}
func (c *countingRX) receive(f []Frame, into bool) (int, error) {
	c.looks.Add(1)
	return c.receiver.receive(f, into)
}

func TestPollerNeverLooksAtIdleMembers(t *testing.T) {
	for name, mode := range waitModes {
		t.Run(name, func(t *testing.T) {
			const n = 64
			q := poll(t, n, PollerConfig{Wait: mode}, plain)
			counts := make([]*countingRX, n)
			for i, rx := range q.rx {
				counts[i] = &countingRX{receiver: rx.eng}
				rx.eng = counts[i]
			}
			got := make([]int, n)
			sent := 0
			flow := func(n int) { // some frames are always in flight
				for end := got[7] + n; got[7] < end; q.receive(t, got) {
					if sent < got[7]+40 {
						send(t, q.tx[7], 8)
						sent += 8
					}
				}
			}
			flow(3000)
			before := make([]int64, n)
			for i, c := range counts {
				before[i] = c.looks.Load()
			}
			flow(3000)
			for i, c := range counts {
				looks := c.looks.Load() - before[i]
				if i != 7 && looks != 0 {
					t.Errorf("%d looks at idle member %d", looks, i)
				}
				if i == 7 && looks == 0 {
					t.Error("looks are not counted")
				}
			}
			// The idle members are still reported.
			for i := range n {
				send(t, q.tx[i], 1)
			}
			for i := range n {
				for i != 7 && got[i] < 1 {
					q.receive(t, got)
				}
			}
		})
	}
}

// Peers send now and then, and stop. Nothing would make up for a lost wake-up, since each
// vif sends its next frame only once the last one has arrived.
func TestPollerLosesNoWakeup(t *testing.T) {
	for _, split := range []bool{true, false} {
		f := plain
		f.split = split
		t.Run(fmt.Sprintf("split=%v", split), func(t *testing.T) {
			everyWay(t, func(t *testing.T, cfg PollerConfig) {
				const n, rounds = 6, 100
				q := poll(t, n, cfg, f)
				var arrived [n]atomic.Int64
				var senders sync.WaitGroup
				errs := make(chan error, n)
				for i := range n {
					senders.Go(func() {
						r := rand.New(rand.NewPCG(uint64(i), 1))
						sent := int64(0)
						for range rounds {
							k := 1 + r.IntN(3)
							if err := sendAll(q.tx[i], k); err != nil {
								errs <- err
								return
							}
							sent += int64(k)
							for arrived[i].Load() < sent {
								runtime.Gosched()
							}
							for range r.IntN(200) {
								runtime.Gosched()
							}
						}
					})
				}
				done := make(chan struct{})
				go func() { senders.Wait(); close(done); q.Wake() }()
				got := make([]int, n)
				for over := false; !over; {
					select {
					case err := <-errs:
						t.Fatal(err)
					case <-done:
						over = true
					default:
						q.receive(t, got)
						for i := range got {
							arrived[i].Store(int64(got[i]))
						}
					}
				}
				for i, p := range q.pairs {
					p.back.flush()
					if s := p.back.Stats(); s.RX.Get(telemetry.RescuedWakeups) != 0 {
						t.Errorf("vif %d: %d wake-ups were rescued", i, s.RX.Get(telemetry.RescuedWakeups))
					}
				}
			})
		})
	}
}

func TestPollerIsFair(t *testing.T) {
	const n = 5
	q := poll(t, n, PollerConfig{}, plain)
	got := make([]int, n)
	q.wantQuiet(t, got)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() { // floods as fast as it can
		for {
			select {
			case <-stop:
				return
			default:
				q.tx[0].SetDeadline(time.Now().Add(20 * time.Millisecond))
				sendAll(q.tx[0], 32)
			}
		}
	})
	defer func() { close(stop); flood.Wait() }()
	for got[0] == 0 {
		q.receive(t, got)
	}
	for round := 1; round <= 50; round++ {
		for i := 1; i < n; i++ {
			send(t, q.tx[i], 1)
		}
		turns := 0
		for i := 1; i < n; i++ {
			for got[i] < round {
				q.receive(t, got)
				turns++
			}
		}
		if turns > 3*eventTurns {
			t.Fatalf("%d turns until all were seen to", turns)
		}
	}
}

func TestPollerMembersComeAndGo(t *testing.T) {
	for name, mode := range waitModes {
		t.Run(name, func(t *testing.T) {
			const n = 4
			q := poll(t, n, PollerConfig{Wait: mode}, plain)
			got := make([]int, n)
			var arrived [n]atomic.Int64
			done := make(chan struct{})
			stopped := make(chan error, 1)
			go func() {
				var frames [32]Frame
				for {
					ready, err := q.Wait()
					select {
					case <-done:
						err = net.ErrClosed
					default:
					}
					if err != nil {
						stopped <- err
						return
					}
					for _, r := range ready {
						k, err := r.RX.Poll(frames[:])
						r.RX.Release(frames[:k])
						if err != nil {
							stopped <- err
							return
						}
						arrived[r.Value.(int)].Add(int64(k))
					}
				}
			}()
			for round := range 200 {
				i := round % n
				q.Remove(q.rx[i])
				q.Remove(q.rx[i]) // a second Remove does nothing
				send(t, q.tx[i], 1)
				send(t, q.tx[(i+1)%n], 1)
				if err := q.Add(q.rx[i], i); err != nil {
					t.Fatal(err)
				}
				got[i]++
				got[(i+1)%n]++
				for k := range got {
					for end := time.Now().Add(labtest.Limit); arrived[k].Load() < int64(got[k]); runtime.Gosched() {
						if time.Now().After(end) {
							t.Fatalf("round %d: %d of %d frames of %d", round, arrived[k].Load(), got[k], k)
						}
					}
				}
			}
			close(done)
			q.Wake()
			if err := <-stopped; !errors.Is(err, net.ErrClosed) {
				t.Fatal(err)
			}
			// The slot of a removed member is free once the owner has seen to it, which may be
			// a round or two later. Slots that nobody frees would be 200 more.
			if len(q.members) > 2*n {
				t.Errorf("%d slots for %d members", len(q.members), n)
			}
		})
	}
}

func TestPollerTakesAHalfOnce(t *testing.T) {
	q := poll(t, 1, PollerConfig{}, plain)
	p := newPoller(t, q.pairs[0].bdom, PollerConfig{})
	if err := q.Add(q.rx[0], nil); err != ErrPolled {
		t.Errorf("again: %v", err)
	}
	if err := p.Add(q.rx[0], nil); err != ErrPolled {
		t.Errorf("in another: %v", err)
	}
	p.Remove(q.rx[0]) // not a member of p
	if err := p.Add(q.pairs[0].back.tx[0], nil); err != nil {
		t.Errorf("the other half is not bound: %v", err)
	}
	q.Remove(q.rx[0])
	if err := p.Add(q.rx[0], 0); err != nil {
		t.Errorf("after Remove: %v", err)
	}
	r := join(t, emu.Config{}, plain, Config{})
	if err := p.Add(r.front.rx[0], nil); err == nil {
		t.Error("a half without an owner was taken")
	}
}

func TestPolledHalfDoesNotWait(t *testing.T) {
	q := poll(t, 1, PollerConfig{}, plain)
	var frames [32]Frame
	if n, err := q.rx[0].Receive(frames[:]); n != 0 || err != ErrPolled {
		t.Errorf("Receive: %d, %v", n, err)
	}
	send(t, q.tx[0], 1)
	if n, err := q.rx[0].Receive(frames[:]); n != 1 || err != nil {
		t.Errorf("Receive of what is there: %d, %v", n, err)
	}
	q.rx[0].Release(frames[:1])
	q.Remove(q.rx[0])
	go sendAll(q.tx[0], 1)
	if n, err := q.rx[0].Receive(frames[:]); n != 1 || err != nil {
		t.Errorf("Receive after Remove: %d, %v", n, err)
	}
	q.rx[0].Release(frames[:1])
	// An event that was armed before Remove wakes nobody.
	q.wantQuiet(t, make([]int, 1))
}

func TestPollerEndsByDeadlineWakeAndClose(t *testing.T) {
	everyWay(t, func(t *testing.T, cfg PollerConfig) {
		q := poll(t, 2, cfg, plain)
		got := make([]int, 2)
		q.wantQuiet(t, got)
		q.Wake()
		if ready, err := q.Wait(); len(ready) != 0 || err != nil {
			t.Errorf("after Wake: %v, %v", ready, err)
		}
		wait := func() <-chan error {
			done := make(chan error, 1)
			go func() {
				_, err := q.Wait()
				done <- err
			}()
			for end := time.Now().Add(labtest.Limit); !q.inside.Load(); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("nobody is in Wait")
				}
			}
			return done
		}
		ends := func(done <-chan error, want error) {
			t.Helper()
			select {
			case err := <-done:
				if !errors.Is(err, want) {
					t.Errorf("%v, want %v", err, want)
				}
			case <-time.After(labtest.Limit):
				t.Fatal("Wait goes on")
			}
		}
		done := wait()
		if _, err := q.Wait(); err != ErrBusy {
			t.Errorf("a second Wait: %v", err)
		}
		q.Wake()
		ends(done, nil)
		done = wait()
		q.SetDeadline(time.Now())
		ends(done, os.ErrDeadlineExceeded)
		q.SetDeadline(time.Time{})
		done = wait()
		q.Close()
		ends(done, net.ErrClosed)
		if err := q.Close(); err != nil {
			t.Error(err)
		}
		if err := q.Add(q.rx[0], nil); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Add: %v", err)
		}
		// Its members may wait again.
		var frames [4]Frame
		go sendAll(q.tx[0], 1)
		if n, err := q.rx[0].Receive(frames[:]); n != 1 || err != nil {
			t.Errorf("Receive after Close: %d, %v", n, err)
		}
		q.rx[0].Release(frames[:1])
	})
}

// reconnect ends the connection of a pair and makes another.
func (p *pair) reconnect(t testing.TB, f features) {
	t.Helper()
	for i, d := range []*Device{p.back, p.front} {
		d.quiesce(p.conns[1-i], "reconnects")
		d.detach(p.conns[1-i])
		p.conns[1-i] = nil
	}
	p.connect(t, f)
}

func TestPollerMembersStayWhileTheyReconnect(t *testing.T) {
	everyWay(t, func(t *testing.T, cfg PollerConfig) {
		const n = 3
		q := poll(t, n, cfg, plain)
		got := make([]int, n)
		want := make([]int, n)
		for round := range 12 {
			if round%2 == 0 {
				q.wantQuiet(t, got) // members are asleep when the link goes down
			}
			i := round % n
			done := make(chan struct{})
			go func() { // reconnect as the lifecycle goroutine does, while the owner waits
				f := plain
				f.split = round%4 < 2
				q.pairs[i].reconnect(t, f)
				send(t, q.tx[i], 2)
				send(t, q.tx[(i+1)%n], 1)
				close(done)
			}()
			want[i] += 2
			want[(i+1)%n]++
			q.until(t, got, want...)
			<-done
		}
		q.wantQuiet(t, got)
	})
}

func TestPollerReportsAnEndedDeviceOnce(t *testing.T) {
	everyWay(t, func(t *testing.T, cfg PollerConfig) {
		q := poll(t, 3, cfg, plain)
		got := make([]int, 3)
		q.wantQuiet(t, got)
		why := errors.New("it is over")
		go func() {
			q.pairs[1].back.quiesce(q.pairs[1].conns[1], "ends")
			q.pairs[1].back.finishWith(why)
		}()
		var left []error
		for left == nil {
			left = q.receive(t, got)
		}
		if len(left) != 1 || left[0] != why {
			t.Errorf("%v, want %v", left, why)
		}
		q.wantQuiet(t, got)
		if q.rx[1].member.Load() != nil {
			t.Error("it is a member still")
		}
		send(t, q.tx[2], 1)
		q.until(t, got, 0, 0, 1)
		if err := q.Add(q.rx[1], 1); err != why {
			t.Errorf("Add: %v", err)
		}
	})
}

func TestPollerReportsAPeerThatBreaksTheProtocol(t *testing.T) {
	for name, mode := range waitModes {
		t.Run(name, func(t *testing.T) {
			q := poll(t, 2, PollerConfig{Wait: mode}, plain)
			got := make([]int, 2)
			q.wantQuiet(t, got)
			v := &PeerError{Ring: "tx", Reason: "test"}
			broken := q.pairs[0].back
			broken.callError(v)
			q.rx[0].markMember() // as gone does at the end of a device
			var left []error
			for left == nil {
				left = q.receive(t, got)
			}
			if len(left) != 1 || left[0] != v {
				t.Errorf("%v, want %v", left, v)
			}
			<-broken.violations
			send(t, q.tx[1], 1)
			q.until(t, got, 0, 1)
		})
	}
}

// A sending half is reported once when there is room, and not before.
func TestPollerSaysWhenThereIsRoom(t *testing.T) {
	for _, split := range []bool{true, false} {
		for name, mode := range waitModes {
			t.Run(fmt.Sprintf("%s, split=%v", name, split), func(t *testing.T) {
				f := plain
				f.split = split
				p := join(t, emu.Config{}, f, Config{})
				q := newPoller(t, p.fdom, PollerConfig{Wait: mode})
				tx, frx := own(t, p.front)
				btx, rx := own(t, p.back)
				if err := errors.Join(q.Add(tx, "tx"), q.Add(frx, "rx")); err != nil {
					t.Fatal(err)
				}
				next := func() string {
					t.Helper()
					for {
						ready, err := q.Wait()
						if errors.Is(err, os.ErrDeadlineExceeded) {
							return ""
						}
						if err != nil {
							t.Fatal(err)
						}
						for _, r := range ready {
							if r.Err != nil {
								t.Fatal(r.Err)
							}
							if r.TX != nil {
								return r.Value.(string)
							}
							var frames [8]Frame
							n, _ := r.RX.Poll(frames[:])
							r.RX.Release(frames[:n])
							if n > 0 {
								return r.Value.(string)
							}
						}
					}
				}
				calm := func() {
					t.Helper()
					q.SetDeadline(time.Now().Add(10 * time.Millisecond))
					if v := next(); v != "" {
						t.Fatalf("%s was reported", v)
					}
					q.SetDeadline(time.Now().Add(labtest.Limit))
				}
				if v := next(); v != "tx" {
					t.Fatalf("%s was reported first", v)
				}
				calm()
				var frames [64]Frame
				drain := func() {
					var frames [64]Frame
					for n, err := 1, error(nil); n > 0; {
						if n, err = rx.Poll(frames[:]); err != nil {
							t.Error(err)
						}
						rx.Release(frames[:n])
					}
				}
				for range 20 {
					for n := 1; n > 0; { // until no page is left
						n = tx.AllocSize(frames[:], 60)
						if k, err := tx.Send(frames[:n]); k != n || err != nil {
							t.Fatal(k, err)
						}
					}
					if mode != Busy {
						calm()
					}
					drained := make(chan struct{})
					go func() { // while the Poller sleeps, or before
						defer close(drained)
						time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
						drain()
					}()
					if v := next(); v != "tx" {
						t.Fatalf("%s was reported", v)
					}
					send(t, btx, 1) // an event for the other half reports only that half
					if v := next(); v != "rx" {
						t.Fatalf("%s was reported", v)
					}
					<-drained
				}
				drain()
			})
		}
	}
}

// With one event channel for both halves, one may wait by itself while the other is in a
// Poller: each gets its own events.
func TestPollerSharesAChannelWithAHalfThatWaits(t *testing.T) {
	f := plain
	f.split = false
	p := join(t, emu.Config{}, f, Config{})
	q := newPoller(t, p.fdom, PollerConfig{})
	tx, frx := own(t, p.front)
	btx, rx := own(t, p.back)
	if err := q.Add(frx, 0); err != nil {
		t.Fatal(err)
	}
	const n = 3000
	errs := make(chan error, 3)
	go func() { errs <- sendAll(tx, n) }() // waits for room
	go func() {                            // makes room for the sender
		var frames [32]Frame
		for got := 0; got < n; {
			k, err := rx.Receive(frames[:])
			if err != nil {
				errs <- err
				return
			}
			rx.Release(frames[:k])
			got += k
			if got%7 == 0 {
				time.Sleep(time.Microsecond)
			}
		}
		errs <- nil
	}()
	go func() { errs <- sendAll(btx, n) }()
	var frames [32]Frame
	for got := 0; got < n; {
		ready, err := q.Wait()
		if err != nil {
			t.Fatal(err, got)
		}
		for _, r := range ready {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
			k, err := r.RX.Poll(frames[:])
			if err != nil {
				t.Fatal(err)
			}
			r.RX.Release(frames[:k])
			got += k
		}
	}
	for range 3 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

func TestPollersOfASharedChannelMustBeOne(t *testing.T) {
	f := plain
	f.split = false
	p := join(t, emu.Config{}, f, Config{})
	a, b := newPoller(t, p.fdom, PollerConfig{}), newPoller(t, p.fdom, PollerConfig{})
	tx, rx := own(t, p.front)
	if err := a.Add(rx, nil); err != nil {
		t.Fatal(err)
	}
	a.SetDeadline(time.Now().Add(time.Millisecond))
	if _, err := a.Wait(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	if err := b.Add(tx, nil); err != nil {
		t.Fatal(err)
	}
	var frames [64]Frame
	for {
		ready, err := b.Wait()
		if err != nil {
			t.Fatal(err)
		}
		if len(ready) == 1 && ready[0].Err != nil {
			if !errors.Is(ready[0].Err, hypercall.ErrGrouped) {
				t.Fatal(ready[0].Err)
			}
			return
		}
		for n := 1; n > 0; {
			n = tx.AllocSize(frames[:], 60)
			tx.Send(frames[:n])
		}
	}
}

func TestPollerDoesNotAllocate(t *testing.T) {
	const n = 8
	for name, mode := range waitModes {
		t.Run(name, func(t *testing.T) {
			q := poll(t, n, PollerConfig{Wait: mode}, plain)
			got := make([]int, n)
			values := make([]any, n)
			for i := range values {
				values[i] = i
			}
			frames := make([]Frame, 32)
			round := func() {
				for _, tx := range q.tx {
					k := tx.AllocSize(frames[:4], 60)
					if k, err := tx.Send(frames[:k]); k != 4 || err != nil {
						t.Fatal(k, err)
					}
				}
				for left := 4 * n; left > 0; {
					ready, err := q.Wait()
					if err != nil {
						t.Fatal(err)
					}
					for _, r := range ready {
						k, _ := r.RX.Poll(frames)
						r.RX.Release(frames[:k])
						left -= k
					}
				}
			}
			round()
			q.wantQuiet(t, got)
			round()
			if n := testing.AllocsPerRun(100, round); n != 0 {
				t.Errorf("%v allocations", n)
			}
		})
	}
}

// The Poller delays the events of a peer whose events bring no work, and only that
// peer's.
func TestPollerPutsOffAStorm(t *testing.T) {
	q := poll(t, 2, PollerConfig{}, plain)
	got := make([]int, 2)
	q.wantQuiet(t, got)
	port := q.tx[0].eng.(*frontTX).port
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				port.Notify()
				time.Sleep(20 * time.Microsecond)
			}
		}
	})
	q.SetDeadline(time.Now().Add(300 * time.Millisecond))
	for {
		if _, err := q.Wait(); err != nil {
			break
		}
	}
	q.SetDeadline(time.Now().Add(labtest.Limit))
	q.pairs[0].back.flush()
	s := q.pairs[0].back.Stats()
	if n := s.RX.Get(telemetry.EventsSpurious); n < 2 || n > 20 {
		t.Errorf("a storm of 300 ms was heard %d times", n)
	}
	send(t, q.tx[1], 1)
	q.until(t, got, 0, 1)
	close(stop)
	storm.Wait()
	send(t, q.tx[0], 1)
	q.until(t, got, 1, 1)
}

// If another goroutine removes a member while the owner is about to put it to sleep, the
// member has left for good: another Poller may take it at once.
func TestPollerMemberMovesToAnother(t *testing.T) {
	const n = 2
	q := poll(t, n, PollerConfig{}, plain)
	pollers := [2]*Poller{q.Poller, newPoller(t, q.pairs[0].bdom, PollerConfig{})}
	var arrived [2][n]atomic.Int64
	errs := make(chan error, 2)
	for i, p := range pollers {
		go func() {
			var frames [32]Frame
			for {
				ready, err := p.Wait()
				if err != nil {
					errs <- err
					return
				}
				for _, r := range ready {
					if r.Err != nil {
						errs <- r.Err
						return
					}
					k, err := r.RX.Poll(frames[:])
					if err != nil && err != ErrBusy {
						errs <- err
						return
					}
					r.RX.Release(frames[:k])
					arrived[i][r.Value.(int)].Add(int64(k))
				}
			}
		}()
	}
	total := func() (n int64) {
		for i := range arrived {
			n += arrived[i][0].Load()
		}
		return n
	}
	for round := range 300 {
		from, to := pollers[round%2], pollers[1-round%2]
		send(t, q.tx[0], 1)
		for end := time.Now().Add(labtest.Limit); total() <= int64(round); runtime.Gosched() {
			if time.Now().After(end) {
				t.Fatalf("round %d: frame %d has not arrived", round, total())
			}
			select {
			case err := <-errs:
				t.Fatal(err)
			default:
			}
		}
		from.Remove(q.rx[0])
		for from.hasNews.Load() { // until the Wait under way has seen the removal
			runtime.Gosched()
		}
		if err := to.Add(q.rx[0], 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range pollers {
		p.Close()
	}
	for range pollers {
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	}
}
