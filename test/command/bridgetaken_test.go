//go:build linux

package command_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/handover"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"

	"golang.org/x/sys/unix"
)

// unmoved fails the test if the vif of a guest connects again, or its link goes down, before the test
// has ended.
func (g *guest) unmoved(c *xenstore.Client, v toolstack.Vif) (check func()) {
	g.t.Helper()
	ctx, cancel := context.WithCancel(g.t.Context())
	g.t.Cleanup(cancel)
	var downs atomic.Int64
	go func() {
		for ev := range g.Links(ctx) {
			if !ev.Up {
				downs.Add(1)
			}
		}
	}()
	keys := func() string {
		g.t.Helper()
		var all []string
		for _, path := range []string{v.BackDir() + "/state", v.FrontDir() + "/state", v.FrontDir() + "/tx-ring-ref", v.FrontDir() + "/rx-ring-ref", v.FrontDir() + "/event-channel"} {
			s, err := c.Read(g.t.Context(), path)
			if err != nil {
				s = err.Error() // of several queues the rings are elsewhere
			}
			all = append(all, s)
		}
		return strings.Join(all, " ")
	}
	before := keys()
	if !strings.HasPrefix(before, "4 4 ") {
		g.t.Fatalf("a vif of domain %d is not connected: %s", v.Front, before)
	}
	return func() {
		g.t.Helper()
		if now := keys(); now != before || downs.Load() != 0 {
			g.t.Errorf("the guest of domain %d saw a reconnect: %d times down; states and rings were %q, and are %q", v.Front, downs.Load(), before, now)
		}
		cancel()
	}
}

// crosses sends frames from one guest to another, one at a time, until one arrives that was sent after
// the call. It returns how many were lost before. That they are it believes soon.
func (g *guest) crosses(to *guest, number *int) (lost int) {
	g.t.Helper()
	for end := time.Now().Add(limit); !g.reaches(to, number, time.Second); lost++ {
		if time.Now().After(end) {
			g.t.Fatal("no frame crosses the bridge")
		}
	}
	return lost
}

// reaches sends a frame from one guest to another, and reports whether it arrives.
func (g *guest) reaches(to *guest, number *int, patience time.Duration) bool {
	g.t.Helper()
	*number++
	g.send(to.MAC(), g.MAC(), *number)
	for end := time.After(patience); ; {
		select {
		case b := <-to.got:
			if n, ok := numberOf(b); ok && n == *number {
				return true
			}
		case <-end:
			return false
		}
	}
}

// A bridge that takes over does so without a reconnect of the guests, and frames cross it before, while
// and after. Guards are known at once.
func TestABridgeTakesOver(t *testing.T) {
	s := newSite(t, "--vif", "front=1", "--vif", "front=3", "--vif", "front=5")
	c := s.tools()
	args := []string{"--isolated=5.0", "--inspect", s.private()}
	b := s.bridge(args...)
	one, three, five := s.asGuest(1), s.asGuest(3), s.asGuest(5)
	b.await("connected to domain", 3)
	number, lost := 0, 0
	one.crosses(three, &number)
	three.crosses(one, &number)
	var checks []func()
	for i, g := range []*guest{one, three, five} {
		checks = append(checks, g.unmoved(c, toolstack.Vif{Front: hypercall.DomID(1 + 2*i), Back: 2}))
	}
	cross := func(p *process, times int) {
		// A vif is taken over a moment before it is a port.
		for strings.Count(p.text(), "3 vifs taken over from") < times || strings.Count(p.text(), ": on bridge ") < 3*times {
			lost += one.crosses(three, &number)
			lost += three.crosses(one, &number)
		}
		for _, way := range [][2]*guest{{one, three}, {three, one}, {one, five}} {
			if !way[0].reaches(way[1], &number, limit) {
				t.Error("a frame is lost after the vifs were taken over")
			}
		}
	}
	for i := range 3 {
		if i == 2 { // it starts the next one itself, which says what it has to say in its place
			b.signal(syscall.SIGUSR2)
			cross(b, 2)
		}
		next := s.bridge(append([]string{"--take-over"}, args...)...)
		cross(next, 1)
		wants(t, b.exit(0), "vif 1.0: handed over; ", "vif 3.0: handed over; ", "vif 5.0: handed over; ")
		b = next
	}
	t.Logf("%d frames lost while vifs moved", lost)
	number += 2
	one.send(three.MAC(), five.MAC(), number-1) // another's address: the guard is there
	one.send(three.MAC(), one.MAC(), number)
	patience := time.After(limit)
	for arrived := 0; arrived != number; {
		select {
		case b := <-three.got:
			if n, ok := numberOf(b); ok {
				if arrived = n; n == number-1 {
					t.Error("a frame from another's address crossed")
				}
			}
		case <-patience:
			t.Fatal("no frame crosses the bridge")
		}
	}
	for _, check := range checks {
		check()
	}
	b.signal(syscall.SIGTERM)
	if out := b.exit(0); strings.Contains(out, "left something behind") {
		t.Error("a page is granted or mapped, or a channel is open")
	}
}

// A vif that the flags of the one that takes over leave out stays where it is until the other one ends.
func TestABridgeTakesOverWhatItWouldServe(t *testing.T) {
	s := newSite(t, "--vif", "front=1", "--vif", "front=3,bridge=xenbr0", "--vif", "front=5")
	c := s.tools()
	socket := filepath.Join(filepath.Dir(s.socket), "h.sock")
	b := s.bridge("--handover", socket, "--inspect", s.private())
	one := s.asGuest(1)
	s.asGuest(3)
	s.asGuest(5)
	b.await("connected to domain", 3)
	unmoved := one.unmoved(c, toolstack.Vif{Front: 1, Back: 2})
	next := s.bridge("--name", "lan", "--vif", "1.*", "--vif", "3.*", "--handover", socket, "--take-over", "--inspect", s.private())
	next.await("1 vif taken over from", 1)
	wants(t, next.text(), "it stays with the bridge that serves it until that ends: bridge=xenbr0: this is the bridge lan")
	out := b.exit(0)
	wants(t, out, "vif 1.0: handed over; ", "vif 3.0: gone; ", "vif 5.0: gone; ")
	key(t, c, toolstack.Vif{Front: 3, Back: 2}, "hotplug-error", "bridge=xenbr0: this is the bridge lan")
	key(t, c, toolstack.Vif{Front: 5, Back: 2}, "state", "4") // it waits for a process that serves it
	unmoved()
	wants(t, start(t, nil, s.bin, "bridge", "status", "--inspect", s.private(), "lan").exit(0), "bridge lan in domain 2, ", "1 ports of 256", "1.0")
	t.Log("a bridge for the third vif goes on with it")
	third := s.bridge("--vif", "5.*", "--take-over", "--inspect", s.private()) // the domain has a process already, and there is nothing to take over
	third.await("connected to domain 5", 1)
	for _, p := range []*process{next, third} {
		p.signal(syscall.SIGTERM)
		p.exit(0)
	}
}

// A process that takes over and ends half way leaves the bridge in service: the vifs that it had come
// back, and the others have not noticed.
func TestABridgeGoesOnIfItsSuccessorDies(t *testing.T) {
	s := newSite(t, "--vif", "front=1", "--vif", "front=3")
	c := s.tools()
	b := s.bridge("--inspect", s.private())
	one, three := s.asGuest(1), s.asGuest(3)
	b.await("connected to domain", 2)
	number := 0
	one.crosses(three, &number)
	unmoved := three.unmoved(c, toolstack.Vif{Front: 3, Back: 2})
	dial := func() *handover.Client {
		t.Helper()
		for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
			h, err := handover.Dial(t.Context(), filepath.Join(filepath.Dir(s.socket), "bridge-2-vif.handover"), handover.Identity{Domain: 2, Program: "a test"})
			if err == nil {
				return h
			}
			if time.Now().After(end) { // the session before may be about to end
				t.Fatal(err)
			}
		}
	}

	t.Log("it ends before it has accepted a vif")
	stays := one.unmoved(c, toolstack.Vif{Front: 1, Back: 2})
	h := dial()
	if in, err := h.TakeOver(t.Context(), 1, "0"); err != nil || in == nil || in.State == nil {
		t.Fatalf("%+v, %v", in, err)
	}
	h.Close()
	one.crosses(three, &number)
	three.crosses(one, &number)
	stays()

	t.Log("it ends when it has one of two")
	h = dial()
	dom, err := emu.JoinBeside(t.Context(), s.socket, 2)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	came, served := make(chan *pvnet.Device, 1), make(chan error, 1)
	go func() {
		served <- pvnet.Serve(ctx, dom, pvnet.ServeConfig{
			Config: pvnet.Config{Queues: pvnet.AutoQueues, StaticGrants: true, Offload: true}, Hotplug: true, TakeOver: h.TakeOver,
			Select: func(front hypercall.DomID, _ string) bool { return front == 1 },
		}, func(d *pvnet.Device) { came <- d })
	}()
	select {
	case <-came:
	case <-time.After(limit):
		t.Fatal("no vif came")
	}
	b.await("vif 1.0: handed over; ", 1)
	h.Close()
	stop(pvnet.ErrHandover)
	<-served
	dom.Destroy()
	b.await("connected to domain 1", 2)
	one.crosses(three, &number)
	three.crosses(one, &number)
	unmoved()
	b.signal(syscall.SIGTERM)
	b.exit(0)
}

// The uplinks of a bridge that takes over wait until the process before it has given its own up, though
// it has the vifs long since.
func TestUplinksWaitForTheBridgeBefore(t *testing.T) {
	for _, takeOver := range []bool{true, false} {
		uplinksWait(t, takeOver)
	}
}

func uplinksWait(t *testing.T, takeOver bool) {
	s := newSite(t, "--vif", "front=2,back=4")
	socket := filepath.Join(filepath.Dir(s.socket), "h.sock")
	before, err := handover.Listen(socket, handover.Identity{Domain: 2, Program: "a test"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	lock, err := os.Create(socket + ".uplinks")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	world, err := emu.Join(t.Context(), s.socket, 4)
	if err != nil {
		t.Fatal(err)
	}
	defer world.Destroy()
	serving, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- pvnet.Serve(serving, world, pvnet.ServeConfig{Hotplug: true}, func(*pvnet.Device) {})
	}()
	defer func() { stop(); <-served }()
	args := []string{"--uplink", "vif:0", "--handover", socket, "--inspect", s.private()}
	if takeOver {
		args = append(args, "--take-over")
	}
	b := s.bridge(args...)
	if takeOver {
		b.await("0 vifs taken over from a test", 1)
	}
	b.await("the uplinks wait for the end of the other bridge", 1)
	if strings.Contains(b.text(), "uplink vif:0: ") {
		t.Error("the bridge has an uplink that the process before it has")
	}
	lock.Close()
	b.await("uplink vif:0: connected, backend in domain 4", 1)
	b.signal(syscall.SIGTERM)
	b.exit(0)
	if _, err := os.Lstat(socket + ".uplinks"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the lock is left behind: %v", err)
	}
}
