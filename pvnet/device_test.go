package pvnet_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/server/labtest"
)

// A lab is an emulated machine with a xenstore and a toolstack.
type lab struct {
	*labtest.Lab
	t     testing.TB
	store *server.Store
	dom0  *emu.Domain
	tools *xenstore.Client
}

func newLab(t testing.TB) *lab { return newLabOn(t, emu.Config{}) }

func newLabOn(t testing.TB, cfg emu.Config) *lab {
	t.Helper()
	if cfg.Mapped && runtime.GOOS != "linux" {
		t.Skip("memory that can be taken away needs Linux's memfds")
	}
	l := labtest.New(t, cfg)
	return &lab{Lab: l, t: t, store: l.Store, dom0: l.Dom0, tools: l.Tools}
}

func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	t.Cleanup(cancel)
	return c
}

func (l *lab) domain(id hypercall.DomID) *emu.Domain {
	l.t.Helper()
	return l.Domain(id)
}

func (l *lab) add(v toolstack.Vif) toolstack.Vif {
	l.t.Helper()
	return l.Add(v)
}

func (l *lab) read(path string) string {
	s, err := l.store.Read(path)
	if err != nil {
		return err.Error()
	}
	return s
}

// serve runs a backend until the test ends or stop is called, and returns a channel of
// its devices.
func (l *lab) serve(dom hypercall.Domain, cfg pvnet.ServeConfig) (devs <-chan *pvnet.Device, stop func()) {
	l.t.Helper()
	c, cancel := context.WithCancel(context.Background())
	out := make(chan *pvnet.Device, 16)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := pvnet.Serve(c, dom, cfg, func(d *pvnet.Device) { out <- d }); !errors.Is(err, context.Canceled) {
			l.t.Errorf("Serve: %v", err)
		}
	}()
	var once sync.Once
	stop = func() { once.Do(func() { cancel(); <-done }) }
	l.t.Cleanup(stop)
	return out, stop
}

func wait[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(labtest.Limit):
		buf := make([]byte, 1<<16)
		t.Fatalf("nothing came\n%s", buf[:runtime.Stack(buf, true)])
		panic("unreachable")
	}
}

// await reads link events until the link is up, or down.
func await(t testing.TB, d *pvnet.Device, up bool) pvnet.LinkEvent {
	t.Helper()
	for ev := range d.Links(ctx(t)) {
		if ev.Up == up {
			return ev
		}
	}
	buf := make([]byte, 1<<16)
	t.Fatalf("the link did not change\n%s", buf[:runtime.Stack(buf, true)])
	panic("unreachable")
}

func frame(n, seed int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*5 + seed)
	}
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5})
	return b
}

func TestConnectAndEveryCallOfTheSeed(t *testing.T) {
	for _, queues := range []int{1, 3} {
		t.Run(fmt.Sprint("queues=", queues), func(t *testing.T) {
			l := newLab(t)
			fdom, bdom := l.domain(1), l.domain(2)
			v := l.add(toolstack.Vif{Front: 1, Back: 2, MTU: 9000})
			backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Queues: 4}})
			front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: queues})
			if err != nil {
				t.Fatal(err)
			}
			defer front.Disconnect()
			back := wait(t, backs)
			await(t, back, true)
			if front.MAC() != pvnet.MAC(v.MAC) || front.MTU() != 9000 || front.ID() != "0" || front.Active() != queues {
				t.Errorf("MAC %v, MTU %d, id %q, %d queues", front.MAC(), front.MTU(), front.ID(), front.Active())
			}
			// Three full queues exceed the default limit of 1024 pages, so they are made
			// smaller.
			if b := front.Budget(); b.SharedPages != l.Ledger().Grants || b.SharedPages > 1024 || b.PrivatePages != queues*512 {
				t.Errorf("budget: %v, %d granted", b, l.Ledger().Grants)
			}

			type end struct {
				dev *pvnet.Device
				got chan []byte
			}
			ends := []end{{front, make(chan []byte, 100)}, {back, make(chan []byte, 100)}}
			var wg sync.WaitGroup
			for _, e := range ends {
				wg.Go(func() {
					err := e.dev.Listen(context.Background(), func(f pvnet.Frame) {
						b := make([]byte, f.Len())
						f.CopyTo(b)
						e.got <- b
					})
					if err != nil {
						t.Errorf("Listen: %v", err)
					}
				})
			}
			for i, e := range ends {
				for k, n := range []int{14, 60, 1514, 9014, 65535} {
					want := frame(n, k)
					if n, err := e.dev.Writev(want[:3], want[3:10], nil, want[10:]); n != len(want) || err != nil {
						t.Fatal(n, err)
					}
					got := wait(t, ends[1-i].got)
					if string(got) != string(want) {
						t.Fatalf("%d bytes arrived as %d others", n, len(got))
					}
				}
				if n, err := e.dev.Write(frame(100, 0)); n != 100 || err != nil {
					t.Fatal(n, err)
				}
				wait(t, ends[1-i].got)
				for _, n := range []int{0, 13, 65536} {
					if _, err := e.dev.Write(make([]byte, n)); !errors.Is(err, pvnet.ErrFrameSize) {
						t.Errorf("%d bytes: %v", n, err)
					}
				}
				st := e.dev.Stats()
				if st.TX.Get(telemetry.Packets) != 6 || st.TX.Get(telemetry.Bytes) != 14+60+1514+9014+65535+100 {
					t.Errorf("tx: %d frames, %d bytes", st.TX.Get(telemetry.Packets), st.TX.Get(telemetry.Bytes))
				}
			}
			front.ResetStats()
			if st := front.Stats(); st.TX.Get(telemetry.Packets) != 0 || st.RX.Get(telemetry.Bytes) != 0 {
				t.Error("not reset")
			}
			if err := front.Listen(ctx(t), nil); !errors.Is(err, pvnet.ErrOwned) {
				t.Errorf("a second Listen: %v", err)
			}
			front.Disconnect()
			front.Disconnect()
			if _, err := front.Write(frame(60, 0)); !errors.Is(err, pvnet.ErrDisconnected) || !errors.Is(err, net.ErrClosed) {
				t.Errorf("Write after Disconnect: %v", err)
			}
			if s := l.read(v.FrontDir() + "/state"); s != "6" {
				t.Errorf("frontend state is %s", s)
			}
			back.Disconnect()
			wg.Wait()
			if s := l.read(v.BackDir() + "/state"); s != "6" {
				t.Errorf("backend state is %s", s)
			}
		})
	}
}

func TestKeysSayThatNoOffloadIsOffered(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	for path, want := range map[string]string{
		v.FrontDir() + "/feature-no-csum-offload": "1",
		v.FrontDir() + "/request-rx-copy":         "1",
		v.FrontDir() + "/feature-rx-notify":       "1",
		v.FrontDir() + "/feature-sg":              "1",
		v.FrontDir() + "/feature-gso-tcpv4":       "ENOENT",
		v.BackDir() + "/feature-no-csum-offload":  "1",
		v.BackDir() + "/feature-gso-tcpv4":        "ENOENT",
		v.BackDir() + "/feature-rx-copy":          "1",
		v.BackDir() + "/state":                    "4",
		v.FrontDir() + "/state":                   "4",
	} {
		if got := l.read(path); !strings.Contains(got, want) {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
}

func TestASecondConnectIsTheSameDevice(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	a, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil || a != b {
		t.Fatal(err, a == b)
	}
	if _, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 2}); err == nil {
		t.Error("another Config was accepted")
	}
	b.Disconnect()
	if _, err := a.Write(frame(60, 0)); !errors.Is(err, pvnet.ErrDisconnected) {
		t.Error(err)
	}
	c, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	if c == a {
		t.Error("a device that ended was given again")
	}
	c.Disconnect()
}

func TestConnectNamesTheVifsThereAre(t *testing.T) {
	l := newLab(t)
	fdom := l.domain(1)
	l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2, ID: 0})
	l.add(toolstack.Vif{Front: 1, Back: 2, ID: 7})
	for _, id := range []string{"1", "", "x", "-1", "00", "0/../7", "4294967296", strings.Repeat("9", 5000)} {
		_, err := pvnet.Connect(ctx(t), fdom, id, pvnet.Config{})
		if err == nil || !errors.Is(err, xenstore.ErrNotFound) || !strings.Contains(err.Error(), `there are: "0" "7"`) {
			t.Errorf("id %.20q: %v", id, err)
		}
		if len(err.Error()) > 400+len(id) {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
}

func TestConnectSaysWhichStatesItSaw(t *testing.T) {
	synctest.Test(t, testConnectSaysWhichStatesItSaw)
}

func testConnectSaysWhichStatesItSaw(t *testing.T) {
	l := newLab(t)
	fdom := l.domain(1)
	l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	c, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err := pvnet.Connect(c, fdom, "0", pvnet.Config{})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "Initialising") {
		t.Fatal(err)
	}
	if s := l.read(v.FrontDir() + "/state"); s != "6" {
		t.Errorf("left state %s behind", s)
	}
}

// The toolstack gives the frontend no permission for its nodes: Connect returns that
// error at once, and works once the permissions are right.
func TestConnectSaysWhatXenstoreDoesNotPermit(t *testing.T) {
	synctest.Test(t, testConnectSaysWhatXenstoreDoesNotPermit)
}

func testConnectSaysWhatXenstoreDoesNotPermit(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	state := v.FrontDir() + "/state"
	ownedBy := func(owner hypercall.DomID) {
		t.Helper()
		err := l.tools.SetPerms(ctx(t), state, xenstore.Perm{Dom: owner, Access: xenstore.None},
			xenstore.Perm{Dom: 1, Access: xenstore.ReadOnly}, xenstore.Perm{Dom: 2, Access: xenstore.ReadOnly})
		if err != nil {
			t.Fatal(err)
		}
	}
	ownedBy(0)
	start := time.Now()
	_, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if !errors.Is(err, xenstore.ErrAccess) || !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "state") {
		t.Fatal(err)
	}
	if d := time.Since(start); d > 3*time.Second { // it must not wait for a peer
		t.Errorf("after %v", d)
	}
	ownedBy(1)
	d, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	d.Disconnect()
}

// The backend goes away and comes back, as another process would: the frontend's
// device and its owners survive.
func TestTheDeviceSurvivesItsBackend(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	tx, _ := front.OwnTX(0)
	rx, _ := front.OwnRX(0)
	for round := range 3 {
		back := wait(t, backs)
		await(t, back, true)
		await(t, front, true)
		var f, old [1]pvnet.Frame
		if n, err := tx.AllocWait(old[:], 100); n != 1 || err != nil {
			t.Fatal(err)
		}
		back.Write(frame(200, round))
		if n, err := rx.Receive(f[:]); n != 1 || err != nil || f[0].Len() != 200 {
			t.Fatal(n, err)
		}
		stop()
		await(t, front, false)
		if _, err := tx.Send(old[:]); !errors.Is(err, pvnet.ErrLinkDown) {
			t.Errorf("Send while down: %v", err)
		}
		if tx.Alloc(old[:0]) != 0 {
			t.Error("Alloc while down")
		}
		if string(f[0].Bytes()) != string(frame(200, round)) {
			t.Error("a frame of the connection that ended is not readable")
		}
		got := make(chan int, 1)
		go func() { // waits until the link is back
			n, err := tx.SendWait(old[:])
			if err != nil {
				t.Errorf("SendWait over the gap: %v", err)
			}
			got <- n
		}()
		backs, stop = l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
		if wait(t, got) != 1 {
			t.Fatal("not sent")
		}
		if err := rx.Release(f[:]); err != nil {
			t.Error(err)
		}
	}
	stop()
}

// Frames that are sent during a handover from one backend to another arrive late, but
// none is lost or comes twice.
func TestHandoverLosesNothing(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	got := make(chan int, 10000)
	serve := func() (stop func()) {
		c, cancel := context.WithCancelCause(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			err := pvnet.Serve(c, bdom, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) {
				d.Listen(context.Background(), func(f pvnet.Frame) { got <- f.Len() })
			})
			if !errors.Is(err, pvnet.ErrHandover) {
				t.Errorf("Serve: %v", err)
			}
		}()
		return func() { cancel(pvnet.ErrHandover); <-done }
	}
	stop := serve()
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	const total = 3000
	sent := make(chan error, 1)
	go func() {
		for i := range total {
			if _, err := front.Write(frame(14+i%1000, i)); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	for i := range total {
		if n := wait(t, got); n != 14+i%1000 {
			t.Fatalf("frame %d has %d bytes", i, n)
		}
		if i%1000 == 500 {
			stop()
			if s := l.read(v.BackDir() + "/state"); s != "4" {
				t.Errorf("handed over in state %s", s)
			}
			stop = serve()
		}
	}
	if err := wait(t, sent); err != nil {
		t.Error(err)
	}
	front.Disconnect()
	stop()
}

func TestHotUnplugAndReplug(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	for range 3 {
		back := wait(t, backs)
		await(t, back, true)
		await(t, front, true)
		if err := toolstack.Remove(ctx(t), l.tools, v); err != nil {
			t.Fatal(err)
		}
		wait(t, back.Done())
		await(t, front, false)
		l.add(v)
	}
	await(t, wait(t, backs), true)
	await(t, front, true)
}

func TestDisconnectWakesEverybody(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Queues: 1})
	if err != nil {
		t.Fatal(err)
	}
	listening := make(chan error, 1)
	go func() { listening <- front.Listen(context.Background(), func(pvnet.Frame) {}) }()
	tx, _ := front.OwnTX(0)
	sending := make(chan error, 1)
	go func() {
		var f [1]pvnet.Frame
		for {
			if _, err := tx.AllocWait(f[:], 60); err != nil {
				sending <- err
				return
			}
			if _, err := tx.SendWait(f[:]); err != nil {
				f[0].Release()
				sending <- err
				return
			}
		}
	}()
	told := make(chan pvnet.LinkEvent, 1)
	go func() {
		var last pvnet.LinkEvent
		for last = range front.Links(context.Background()) {
		}
		told <- last
	}()
	time.Sleep(20 * time.Millisecond)
	front.Disconnect()
	if err := wait(t, listening); err != nil {
		t.Errorf("Listen: %v", err)
	}
	if err := wait(t, sending); !errors.Is(err, pvnet.ErrDisconnected) {
		t.Errorf("SendWait: %v", err)
	}
	if last := wait(t, told); last.Up || last.Reason != pvnet.ErrDisconnected.Error() {
		t.Errorf("the last event of the link is %+v", last)
	}
}

func TestListenEndsWithItsContext(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	for range 3 {
		c, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- front.Listen(c, func(pvnet.Frame) {}) }()
		cancel()
		if err := wait(t, ended); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	if _, err := front.OwnRX(0); err != nil {
		t.Error(err)
	}
}

// Frames that come before anybody listens wait in the ring.
func TestFramesBeforeListenAreKept(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	back := wait(t, backs)
	await(t, back, true)
	for i := range 100 {
		if _, err := back.Write(frame(60+i, i)); err != nil {
			t.Fatal(err)
		}
	}
	got := make(chan int, 200)
	go front.Listen(context.Background(), func(f pvnet.Frame) { got <- f.Len() })
	for i := range 100 {
		if n := wait(t, got); n != 60+i {
			t.Fatalf("frame %d has %d bytes", i, n)
		}
	}
}
