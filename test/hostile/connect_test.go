package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/test/hostile/raw"
	"barevif/xenbus/xenstore"
)

// openFiles returns how many files the process has open.
func openFiles(t testing.TB) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("no /proc: ", err)
	}
	return len(all)
}

// settledGoroutines returns the number of goroutines once it no longer changes: those that start
// with the machine have started.
func settledGoroutines() (n int) {
	for same := 0; same < 20; same++ {
		if now := runtime.NumGoroutine(); now != n {
			n, same = now, 0
		}
		time.Sleep(5 * time.Millisecond)
	}
	return n
}

// requireNoLeaks waits until the numbers of goroutines and of open files are back at their
// earlier values.
func requireNoLeaks(t testing.TB, goroutines, files int) {
	t.Helper()
	end := time.Now().Add(waitLimit)
	for runtime.NumGoroutine() > goroutines && time.Now().Before(end) {
		time.Sleep(time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines, %d before\n%s", n, goroutines, stacks())
	}
	if n := openFiles(t); n > files {
		t.Errorf("%d descriptors, %d before", n, files)
	}
}

// T30: from the kth call on all calls of the first connect fail, for each k. The failed
// connect leaves no descriptor and no goroutine behind.
func TestT30FailedConnectsLeaveNoDescriptors(t *testing.T) {
	l := newLab(t, emu.Config{Mapped: true})
	try := func(op emu.Op, k int) (called bool) {
		v := l.addVif()
		keys := raw.BackKeys()
		keys["multi-queue-max-queues"] = "2"
		l.write(l.drvStore, v.BackDir(), keys, "2")
		base := l.Ledger()
		lift := l.guest.Fail(emu.Fault{Op: op, K: k, Times: -1, Err: syscall.ENOMEM})
		c, cancel := context.WithCancel(ctx(t))
		defer cancel()
		front := l.startConnect(c, v, pvnet.Config{Queues: 2, Buffers: 64})
		if s := l.awaitOr(v.FrontDir()+"/state", front.done, "4"); s == "4" {
			cancel() // there is no kth call
			l.write(l.drvStore, v.BackDir(), nil, "6")
		}
		err := wait(t, front.done)
		lift()
		if !errors.Is(err, syscall.ENOMEM) && !errors.Is(err, context.Canceled) {
			t.Errorf("call %d of %d: %v", k, op, err)
		}
		if now := l.Ledger(); now != base {
			t.Errorf("call %d of %d: it holds %+v, before: %+v", k, op, now, base)
		}
		l.write(l.drvStore, v.BackDir(), nil, "6")
		l.removeVif(v)
		return errors.Is(err, syscall.ENOMEM)
	}
	try(emu.OpShare, 1)
	goroutines, files := settledGoroutines(), openFiles(t)
	calls := 0
	for _, op := range []emu.Op{emu.OpStore, emu.OpShare, emu.OpMemory, emu.OpWaiter, emu.OpUnbound} {
		k := 1
		for try(op, k) {
			k++
		}
		calls += k - 1
	}
	// The first attempt has no room for the receive pages of the second queue. In the
	// second attempt both queues are smaller.
	if calls != 1+(3+2+3+3)+(1+2)+(2+4)+(2+4) {
		t.Errorf("%d calls failed", calls)
	}
	requireNoLeaks(t, goroutines, files)
}

// A flakyDomain domain loses its connection to xenstore once.
type flakyDomain struct {
	*emu.Domain
	breaks       int64        // 1: it breaks
	messagesLeft atomic.Int64 // messages until it breaks
}

func (d *flakyDomain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := d.Domain.Store(ctx)
	if err != nil {
		return nil, err
	}
	return &flakyConn{c, d}, nil
}

type flakyConn struct {
	io.ReadWriteCloser
	d *flakyDomain
}

func (c *flakyConn) Write(b []byte) (int, error) {
	if c.d.messagesLeft.Add(-1) == 0 {
		c.Close()
		return 0, net.ErrClosed
	}
	return c.ReadWriteCloser.Write(b)
}

// connectLosingStore connects our two ends. One of them loses its connection to xenstore at the kth
// request. It requires that they move frames or hold nothing, and reports whether there
// was a kth request.
func (l *lab) connectLosingStore(k int64, front, back *flakyDomain) bool {
	t := l.t
	t.Helper()
	front.messagesLeft.Store(0)
	back.messagesLeft.Store(0)
	base := l.Ledger()
	c, cancel := context.WithCancel(ctx(t))
	defer cancel()
	devs, served := make(chan *pvnet.Device, 1), make(chan error, 1)
	back.messagesLeft.Store(k * back.breaks)
	go func() {
		served <- pvnet.Serve(c, back, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Buffers: 64}}, func(d *pvnet.Device) { devs <- d })
	}()
	v := l.addVif()
	front.messagesLeft.Store(k * front.breaks)
	d, err := pvnet.Connect(ctx(t), front, fmt.Sprint(v.ID), pvnet.Config{Buffers: 64})
	if err == nil {
		far := wait(t, devs)
		lengths := make(chan int, 1)
		go far.Listen(context.Background(), func(f pvnet.Frame) { lengths <- f.Len() })
		if _, err := d.Write(pattern(100, 0)); err != nil {
			t.Errorf("request %d: %v", k, err)
		}
		wait(t, lengths)
		d.Disconnect()
	} else if !errors.Is(err, xenstore.ErrLost) || front.breaks == 0 {
		t.Errorf("request %d: Connect: %v", k, err)
	}
	l.removeVif(v)
	cancel()
	if err := wait(t, served); !errors.Is(err, context.Canceled) {
		t.Errorf("request %d: Serve: %v", k, err)
	}
	eventually(t, "everything back", func() bool { return l.Ledger() == base })
	return front.messagesLeft.Load()*front.breaks+back.messagesLeft.Load()*back.breaks <= 0
}

// T32: a device that loses its connection to xenstore while it connects, at any request,
// comes up, or fails and then holds nothing.
func TestT32XenstoreBreaksAtEveryRequestOfAConnect(t *testing.T) {
	for _, end := range []string{"front", "back"} {
		t.Run(end, func(t *testing.T) {
			l := newLab(t, emu.Config{Mapped: true})
			front, back := &flakyDomain{Domain: l.guest}, &flakyDomain{Domain: l.drv}
			if end == "front" {
				front.breaks = 1
			} else {
				back.breaks = 1
			}
			l.connectLosingStore(1<<40, front, back)
			goroutines, files := settledGoroutines(), openFiles(t)
			k := int64(1)
			for l.connectLosingStore(k, front, back) {
				k++
			}
			if k < 30 {
				t.Errorf("it has only %d requests", k)
			}
			requireNoLeaks(t, goroutines, files)
		})
	}
}

// T41: however often a device is opened and closed, neither end keeps goroutines, threads
// or descriptors.
func TestT41OpenAndCloseBothEnds(t *testing.T) {
	l := newLab(t, emu.Config{Mapped: true})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Buffers: 17}})
	cycle := func() {
		v := l.addVif()
		d, err := pvnet.Connect(context.Background(), l.guest, fmt.Sprint(v.ID), pvnet.Config{Buffers: 17})
		if err != nil {
			t.Fatal(err)
		}
		back := wait(t, l.devs)
		d.Disconnect()
		l.removeVif(v)
		wait(t, back.Done())
	}
	threads := func() int {
		all, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Skip("no /proc: ", err)
		}
		return len(all)
	}
	for range 20 {
		cycle()
	}
	goroutines, files, before := settledGoroutines(), openFiles(t), threads()
	n := 0
	for end := time.Now().Add(5 * time.Second); n < 10000 && time.Now().Before(end); n++ {
		cycle()
	}
	t.Logf("%d times", n)
	requireNoLeaks(t, goroutines, files)
	if now := threads(); now > before+4 { // the runtime keeps threads that it once needed
		t.Errorf("%d threads, %d before", now, before)
	}
}
