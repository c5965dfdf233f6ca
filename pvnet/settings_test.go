package pvnet_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// A linked pair has a frontend and a backend on an emulated machine.
type linked struct {
	*lab
	v           toolstack.Vif
	front, back *pvnet.Device
	log         *logtest.Log // of both
	stop        func()       // ends the backend
	shown       *names       // what is shown beside the frontend's counters
}

func newLinked(t *testing.T, v toolstack.Vif) *linked {
	t.Helper()
	l := &linked{lab: newLab(t), log: new(logtest.Log), shown: new(names)}
	fdom, bdom := l.domain(1), l.domain(2)
	v.Front, v.Back = 1, 2
	l.v = l.add(v)
	var backs <-chan *pvnet.Device
	backs, l.stop = l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Logger: l.log.Logger()}})
	var err error
	if l.front, err = pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Logger: l.log.Logger(), Counters: l.shown}); err != nil {
		t.Fatal(err)
	}
	l.back = wait(t, backs)
	await(t, l.back, true)
	return l
}

func (l *linked) end() {
	l.front.Disconnect()
	l.stop()
}

// mtu waits for an event of a link that is up with that MTU.
func (l *linked) mtu(d *pvnet.Device, want int) {
	l.t.Helper()
	c, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	for ev := range d.Links(c) {
		if ev.Up && ev.MTU == want && d.MTU() == want {
			return
		}
	}
	l.t.Fatalf("the MTU is %d, not %d\n%s", d.MTU(), want, l.log)
}

func TestNothingIsSentWithoutACarrier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLinked(t, toolstack.Vif{})
		key := l.v.BackDir() + "/carrier"
		if l.read(key) == "1" || !l.front.Carrier() || !l.back.Carrier() {
			t.Errorf("the key is %q before anybody has said something", l.read(key))
		}
		tx, err := l.front.OwnTX(0)
		if err != nil {
			t.Fatal(err)
		}
		var f, g [1]pvnet.Frame
		if _, err := tx.AllocWait(f[:], 60); err != nil {
			t.Fatal(err)
		}
		_, _, before := l.shown.now()
		for range 2 {
			if err := l.back.SetCarrier(false); err != nil {
				t.Fatal(err)
			}
			ev := await(t, l.front, false)
			if ev.Reason != "the backend has no carrier" || l.front.Carrier() || l.back.Carrier() || l.read(key) != "0" {
				t.Errorf("%+v, the key is %q", ev, l.read(key))
			}
			if _, _, st := l.shown.now(); st.Up || st.State != 4 || st.Epoch != before.Epoch {
				t.Errorf("beside the counters: %+v", st)
			}
			if n, err := tx.Send(f[:]); n != 0 || err != pvnet.ErrLinkDown {
				t.Errorf("Send: %d, %v", n, err)
			}
			if n := tx.Alloc(g[:]); n != 0 {
				t.Errorf("Alloc: %d", n)
			}
			tx.SetDeadline(time.Now().Add(5 * time.Second))
			if n, err := tx.SendWait(f[:]); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("SendWait: %d, %v", n, err)
			}
			tx.SetDeadline(time.Time{})

			// What the backend sends all the same arrives.
			c, cancel := context.WithCancel(context.Background())
			got := make(chan int, 1)
			ended := make(chan error, 1)
			go func() { ended <- l.front.Listen(c, func(f pvnet.Frame) { got <- f.Len() }) }()
			if _, err := l.back.Write(frame(300, 1)); err != nil {
				t.Error(err)
			}
			if n := wait(t, got); n != 300 {
				t.Errorf("%d bytes came", n)
			}
			cancel()
			<-ended

			sent := make(chan error, 1)
			go func() { _, err := tx.SendWait(f[:]); sent <- err }()
			synctest.Wait()
			if err := l.back.SetCarrier(true); err != nil {
				t.Fatal(err)
			}
			if err := wait(t, sent); err != nil {
				t.Error(err)
			}
			await(t, l.front, true)
			if !l.front.Carrier() || !l.back.Carrier() || l.read(key) != "1" {
				t.Errorf("the key is %q", l.read(key))
			}
			if _, _, st := l.shown.now(); !st.Up || st.Epoch != before.Epoch {
				t.Errorf("beside the counters: %+v", st)
			}
			if _, err := tx.AllocWait(f[:], 60); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.front.SetCarrier(false); err != pvnet.ErrNotBackend {
			t.Errorf("a frontend's SetCarrier: %v", err)
		}
		if err := l.front.SetMTU(1500); err != pvnet.ErrNotBackend || !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("a frontend's SetMTU: %v", err)
		}
		f[0].Release()
		l.end()
	})
}

// A frontend that connects without a carrier never says that the link is up. The next
// backend says nothing of a carrier, and removes what the first one said.
func TestACarrierThatIsOffFromTheBeginning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		v := l.add(toolstack.Vif{Front: 1, Back: 2})
		c, cancel := context.WithCancel(context.Background())
		served := make(chan error, 1)
		go func() {
			served <- pvnet.Serve(c, bdom, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) { d.SetCarrier(false) })
		}()
		synctest.Wait()
		if got := l.read(v.BackDir() + "/carrier"); got != "0" {
			t.Fatalf("carrier is %q", got)
		}
		front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for ev := range front.Links(context.Background()) {
			if ev.Up || ev.Reason != "the backend has no carrier" || front.Carrier() || front.Active() != 1 {
				t.Errorf("%+v, %d queues", ev, front.Active())
			}
			break
		}
		cancel()
		<-served
		_, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
		await(t, front, true)
		if !front.Carrier() || l.exists(v.BackDir()+"/carrier") {
			t.Errorf("carrier %v, the key is %q", front.Carrier(), l.read(v.BackDir()+"/carrier"))
		}
		front.Disconnect()
		stop()
	})
}

// A carrier that is neither 0 nor 1, and an MTU that no vif has, are named once each and
// change nothing.
func TestSettingsThatMakeNoSense(t *testing.T) {
	for _, value := range []string{"", "2", "up", "-1", "65536", "67", "0x5dc", "9000 ", "18446744073709551617", "1500\n"} {
		t.Run(fmt.Sprintf("%q", value), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLinked(t, toolstack.Vif{MTU: 4000})
				var events atomic.Int32
				c, cancel := context.WithCancel(context.Background())
				go func() {
					for range l.front.Links(c) {
						events.Add(1)
					}
				}()
				l.write(l.v.BackDir()+"/carrier", value)
				l.write(l.v.FrontDir()+"/mtu", value)
				l.write(l.v.BackDir()+"/mtu", value)
				time.Sleep(time.Second)
				l.back.SetCarrier(false) // makes the frontend read all of them again
				time.Sleep(time.Second)
				l.back.SetCarrier(true)
				time.Sleep(time.Second)
				l.write(l.v.BackDir()+"/carrier", value)
				time.Sleep(time.Second)
				if l.front.MTU() != 4000 || l.back.MTU() != 4000 || !l.front.Carrier() || events.Load() != 3 {
					t.Errorf("MTU %d and %d, carrier %v, %d events", l.front.MTU(), l.back.MTU(), l.front.Carrier(), events.Load())
				}
				for key, want := range map[string]int{"/backend/vif/1/0/carrier": 2, "key=device/vif/0/mtu": 1, "key=backend/vif/1/0/mtu": 1} {
					if len(l.log.Lines(key)) != want {
						t.Errorf("%d log lines name %s, want %d\n%s", len(l.log.Lines(key)), key, want, l.log)
					}
				}
				cancel()
				l.end()
			})
		})
	}
}

// The MTU that the toolstack writes to a directory is that end's from then on, and the
// backend tells its frontend of its own.
func TestTheMTUFollowsItsKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLinked(t, toolstack.Vif{MTU: 1500})
		epoch := func() telemetry.Status { _, _, st := l.shown.now(); return st }
		was := epoch()
		l.write(l.v.FrontDir()+"/mtu", "9000")
		l.mtu(l.front, 9000)
		if l.back.MTU() != 1500 {
			t.Errorf("the backend's is %d", l.back.MTU())
		}
		for _, mtu := range []int{65535, 68, 1280} {
			l.write(l.v.BackDir()+"/mtu", fmt.Sprint(mtu))
			l.mtu(l.back, mtu)
			l.mtu(l.front, mtu)
		}
		for _, mtu := range []int{65535, 68, 4000} {
			if err := l.back.SetMTU(mtu); err != nil {
				t.Fatal(err)
			}
			l.mtu(l.front, mtu)
			l.mtu(l.back, mtu)
			if a, b := l.read(l.v.BackDir()+"/mtu"), l.read(l.v.FrontDir()+"/mtu"); a != fmt.Sprint(mtu) || a != b {
				t.Errorf("xenstore says %q and %q", a, b)
			}
		}
		if st := epoch(); st.Epoch != was.Epoch || st.MTU != 4000 || !st.Up {
			t.Errorf("beside the counters: %+v", st)
		}
		for _, mtu := range []int{-1, 0, 67, 65536} {
			if err := l.back.SetMTU(mtu); err == nil {
				t.Errorf("an MTU of %d", mtu)
			}
		}
		// While it has no carrier, the link shows the new MTU when it comes up.
		l.back.SetCarrier(false)
		await(t, l.front, false)
		l.back.SetMTU(2000)
		time.Sleep(time.Second)
		if ev := await(t, l.front, false); ev.MTU != 4000 || l.front.MTU() != 2000 {
			t.Errorf("%+v, the device says %d", ev, l.front.MTU())
		}
		l.back.SetCarrier(true)
		l.mtu(l.front, 2000)
		l.end()
	})
}

// Where the frontend's mtu does not belong to the backend's domain, its log says who is
// not told. The backend's own MTU changes all the same, and no key is made elsewhere.
func TestAFrontendThatCannotBeToldOfTheMTU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLinked(t, toolstack.Vif{})
		l.back.SetMTU(3000)
		l.mtu(l.back, 3000)
		synctest.Wait()
		if l.front.MTU() != 1500 || l.exists(l.v.FrontDir()+"/mtu") {
			t.Errorf("the frontend's is %d", l.front.MTU())
		}
		if len(l.log.Lines("the frontend is not told of the MTU")) != 1 || len(l.log.Lines("key=/local/domain/1/device/vif/0/mtu")) != 1 {
			t.Error(l.log)
		}
		l.end()
	})
}

// Whoever flips a setting without end is followed at our pace, and the last value counts.
func TestSettingsThatChangeWithoutEndAreFollowedSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLinked(t, toolstack.Vif{MTU: 1500})
		var events atomic.Int32
		go func() {
			for range l.front.Links(context.Background()) {
				events.Add(1)
			}
		}()
		for i := range 500 {
			l.write(l.v.BackDir()+"/carrier", fmt.Sprint(i%2))
			l.write(l.v.FrontDir()+"/mtu", fmt.Sprint(1500+i))
			time.Sleep(10 * time.Millisecond)
		}
		if n := events.Load(); n < 20 || n > 150 {
			t.Errorf("%d changes were followed within 5 s", n)
		}
		l.mtu(l.front, 1999)
		if !l.front.Carrier() {
			t.Error("no carrier")
		}
		l.end()
	})
}

func (l *lab) exists(path string) bool {
	_, err := l.store.Read(path)
	return err == nil
}
