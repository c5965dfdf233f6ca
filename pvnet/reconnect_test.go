package pvnet_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// A ledger collects the devices that have been one end of a vif, and what their owners
// received.
type ledger struct {
	received atomic.Int64 // frames that the owners received
	traffic  sync.WaitGroup
	mark     int64         // when this many frames were received,
	marked   chan struct{} // marked is closed; nil: never

	mu   sync.Mutex
	devs []*pvnet.Device // guarded by mu
}

// carry sends and receives on the queues of d until d ends, which it may have already. On the
// last queue nobody receives.
func (l *ledger) carry(t *testing.T, d *pvnet.Device, seed uint64) {
	l.mu.Lock()
	l.devs = append(l.devs, d)
	l.mu.Unlock()
	for i := range d.Queues() {
		tx, err := d.OwnTX(i)
		if errors.Is(err, pvnet.ErrDisconnected) {
			return
		}
		if err != nil {
			t.Error(err)
			return
		}
		l.traffic.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			var frames [8]pvnet.Frame
			for {
				n, err := tx.AllocWait(frames[:1+rng.IntN(8)], []int{60, 1500, 9000, 20000}[rng.IntN(4)])
				if err == nil {
					var k int
					k, err = tx.SendWait(frames[:n])
					for f := range frames[k:n] {
						frames[k+f].Release()
					}
				}
				if err != nil {
					if !errors.Is(err, net.ErrClosed) && !errors.Is(err, pvnet.ErrHandover) && !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
					return
				}
			}
		})
		if i == d.Queues()-1 {
			return
		}
		rx, err := d.OwnRX(i)
		if errors.Is(err, pvnet.ErrDisconnected) {
			return
		}
		if err != nil {
			t.Error(err)
			return
		}
		l.traffic.Go(func() {
			var frames [32]pvnet.Frame
			for {
				n, err := rx.Receive(frames[:])
				if err != nil {
					return
				}
				if k := l.received.Add(int64(n)); l.marked != nil && k >= l.mark && k-int64(n) < l.mark {
					close(l.marked)
				}
				rx.Release(frames[:n])
			}
		})
	}
}

// An account sums up the counters of the devices of a ledger.
type account struct {
	tx, rx               int64  // frames, as telemetry.Unaccounted adds them
	sent, received, gone uint64 // gone: lost with a connection
}

func (l *ledger) account() (a account) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var none telemetry.Values
	for _, d := range l.devs {
		st := d.Stats()
		a.tx += telemetry.Unaccounted(&st.TX, &none)
		a.rx += telemetry.Unaccounted(&none, &st.RX)
		a.sent += st.TX.Get(telemetry.Packets)
		a.received += st.RX.Get(telemetry.Packets)
		a.gone += st.TX.Lost(telemetry.DropDisconnected) + st.RX.Lost(telemetry.DropDisconnected)
	}
	return a
}

// Frames move both ways on several queues, while either end leaves and comes back, both
// do so at once, the vif is replugged, and one backend follows another on live rings. In
// the end each frame sent was received, or is counted as lost, at one end and with a
// reason.
func TestFramesAreInOneAccountOverReconnects(t *testing.T) {
	l := newLabOn(t, emu.Config{Grants: 4096})
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	const queues = 3
	var fronts, backs ledger
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 3))

	connect := func() *pvnet.Device {
		t.Helper()
		d, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: queues, LendRx: rng.IntN(2) == 0})
		if err != nil {
			t.Fatal(err)
		}
		fronts.carry(t, d, rng.Uint64())
		return d
	}
	serve := func() (stop func(error)) {
		seed := rng.Uint64()
		c, cancel := context.WithCancelCause(context.Background())
		done := make(chan error, 1)
		go func() {
			done <- pvnet.Serve(c, bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: queues}},
				func(d *pvnet.Device) { backs.carry(t, d, seed) })
		}()
		return func(why error) {
			t.Helper()
			cancel(why)
			if err := wait(t, done); !errors.Is(err, why) {
				t.Errorf("Serve: %v", err)
			}
		}
	}
	moves := func() {
		t.Helper()
		f, b := fronts.received.Load()+200, backs.received.Load()+200
		for end := time.Now().Add(labtest.Limit); fronts.received.Load() < f || backs.received.Load() < b; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("no frames move")
			}
		}
	}

	stop, front := serve(), connect()
	rounds := 30
	if testing.Short() {
		rounds = 10
	}
	for round := range rounds {
		moves()
		switch round % 5 {
		case 0:
			front.Disconnect()
			front = connect()
		case 1:
			stop(context.Canceled)
			stop = serve()
		case 2:
			var both sync.WaitGroup
			both.Go(front.Disconnect)
			both.Go(func() { stop(context.Canceled) })
			both.Wait()
			stop, front = serve(), connect()
		case 3:
			if err := toolstack.Remove(ctx(t), l.tools, v); err != nil {
				t.Fatal(err)
			}
			l.add(v)
		case 4:
			stop(pvnet.ErrHandover)
			stop = serve()
		}
	}
	moves()
	front.Disconnect()
	stop(context.Canceled)
	fronts.traffic.Wait()
	backs.traffic.Wait()

	f, b := fronts.account(), backs.account()
	t.Logf("%d devices, %d; sent %d frames and %d; %d lost with connections", len(fronts.devs), len(backs.devs), f.sent, b.sent, f.gone)
	if n := f.tx + b.rx; n != 0 {
		t.Errorf("front to back: %d frames in no account", n)
	}
	if n := b.tx + f.rx; n != 0 {
		t.Errorf("back to front: %d frames in no account", n)
	}
	if f.gone == 0 || b.gone != 0 {
		t.Errorf("the frontends lost %d frames with connections, the backends %d", f.gone, b.gone)
	}
	if got := fronts.received.Load(); got != int64(f.received) {
		t.Errorf("frontends received %d frames, and counted %d", got, f.received)
	}
	if got := backs.received.Load(); got != int64(b.received) {
		t.Errorf("backends received %d frames, and counted %d", got, b.received)
	}
}

// A domain that is destroyed under traffic may leave frames that neither end counts: at
// most as many as the rings of its queues hold, in each direction. The test runs on
// virtual time, since a backend takes long to give up its xenstore.
func TestADestroyedDomainLeavesAtMostARingUnaccounted(t *testing.T) {
	for _, dies := range []hypercall.DomID{1, 2} {
		for range 5 {
			synctest.Test(t, func(t *testing.T) { destroyInFlow(t, dies) })
		}
	}
}

func destroyInFlow(t *testing.T, dies hypercall.DomID) {
	l := newLabOn(t, emu.Config{Grants: 4096})
	const queues, slots, enough = 3, 256, 500
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	cfg := pvnet.Config{Queues: queues}
	fronts, backs := ledger{mark: enough, marked: make(chan struct{})}, ledger{mark: enough, marked: make(chan struct{})}
	serving, stop := context.WithCancelCause(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- pvnet.Serve(serving, bdom, pvnet.ServeConfig{Hotplug: true, Config: cfg}, func(d *pvnet.Device) { backs.carry(t, d, 1) })
	}()
	front, err := pvnet.Connect(ctx(t), fdom, "0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	fronts.carry(t, front, 2)
	<-fronts.marked
	<-backs.marked

	if err := l.Destroy(dies); err != nil {
		t.Fatal(err)
	}
	dead := map[hypercall.DomID]*ledger{1: &fronts, 2: &backs}[dies]
	dead.traffic.Wait()
	counted := dead.account() // the last counters that a killed process could have published
	stop(pvnet.ErrHandover)   // like a killed process, it writes nothing more to xenstore
	front.Disconnect()
	<-served
	fronts.traffic.Wait()
	backs.traffic.Wait()
	f, b := fronts.account(), backs.account()
	if dies == 1 {
		f = counted
	} else {
		b = counted
	}
	t.Logf("domain %d dies: %d and %d frames in no account", dies, f.tx+b.rx, b.tx+f.rx)
	for _, n := range []int64{f.tx + b.rx, b.tx + f.rx} {
		if n > queues*slots || n < -queues*slots {
			t.Errorf("%d frames in no account: more than the rings hold", n)
		}
	}
}
