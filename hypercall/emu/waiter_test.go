package emu_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
)

func TestSpuriousEventsAreUnmaskedLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := machine(t, emu.Config{})
		a, b := domain(t, m, 1), domain(t, m, 2)
		wa, wb, pa, _ := channel(t, a, b)
		worked := true
		delay := func() time.Duration { // how long an event takes that is sent at once
			if err := pa.Notify(); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if err := wb.Wait(time.Time{}, worked); err != nil {
				t.Fatal(err)
			}
			worked = false
			return time.Since(start)
		}
		for round := range 2 { // work resets the count
			delay()
			for i, want := range []time.Duration{0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000, 1000} {
				if got := delay(); got != want*time.Millisecond {
					t.Errorf("round %d: spurious event %d took %v, not %v", round, i+1, got, want*time.Millisecond)
				}
			}
			worked = true
		}
		_ = wa.Close()
		_ = wb.Close()
	})
}

func TestWakeAndDeadlineAreNeverDelayed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := machine(t, emu.Config{})
		a, b := domain(t, m, 1), domain(t, m, 2)
		wa, wb, pa, _ := channel(t, a, b)
		storm := func() {
			if err := pa.Notify(); err != nil {
				t.Fatal(err)
			}
		}
		for range 17 {
			storm()
			_ = wb.Wait(time.Time{}, false)
		}
		storm()
		start := time.Now()
		if err := wb.Wait(start.Add(5*time.Millisecond), false); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		if d := time.Since(start); d != 5*time.Millisecond {
			t.Errorf("the deadline took %v", d)
		}
		time.AfterFunc(3*time.Millisecond, wb.Wake)
		start = time.Now()
		if err := wb.Wait(start.Add(time.Minute), false); err != nil || time.Since(start) != 3*time.Millisecond {
			t.Errorf("Wake took %v, %v", time.Since(start), err)
		}
		// A port that did not fire is not delayed by one that did.
		pa2, err := wa.Unbound(2)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := wb.Bind(1, pa2.ID()); err != nil {
			t.Fatal(err)
		}
		start = time.Now()
		if err := wb.Wait(time.Time{}, false); err != nil || time.Since(start) != 0 {
			t.Errorf("another port took %v, %v", time.Since(start), err)
		}
		// Wakes without work are not the peer's fault.
		_ = wb.Wait(time.Time{}, true) // the event that was delayed
		wb.Wake()
		_ = wb.Wait(time.Time{}, true) // which brought work
		for range 10 {
			wb.Wake()
			_ = wb.Wait(time.Time{}, false)
		}
		storm()
		start = time.Now()
		if err := wb.Wait(time.Time{}, false); err != nil || time.Since(start) != 0 {
			t.Errorf("an event after Wakes took %v, %v", time.Since(start), err)
		}
		_ = wa.Close()
		_ = wb.Close()
	})
}

func TestSecondWaitAtOnceIsABug(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := machine(t, emu.Config{})
		w := waiter(t, domain(t, m, 1))
		first := make(chan error, 1)
		go func() { first <- w.Wait(time.Time{}, true) }()
		synctest.Wait()
		func() {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			_ = w.Wait(time.Now(), true)
		}()
		w.Wake()
		if err := <-first; err != nil {
			t.Error(err)
		}
		_ = w.Close()
	})
}

func TestPortsRunOut(t *testing.T) {
	m := machine(t, emu.Config{Ports: 3})
	a := domain(t, m, 1)
	w := waiter(t, a)
	var ports []hypercall.Port
	for range 3 {
		p, err := w.Unbound(2)
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, p)
	}
	if _, err := w.Unbound(2); !errors.Is(err, hypercall.ErrNoPorts) {
		t.Errorf("a fourth port of 3: %v", err)
	}
	_ = ports[1].Close()
	p, err := w.Unbound(2)
	if err != nil || p.ID() != ports[1].ID() {
		t.Errorf("%v, port %v instead of %v", err, p.ID(), ports[1].ID())
	}
	_ = ports[1].Close() // a port of the old waiter: must not close the new one
	if l := m.Ledger(); l.Ports != 3 {
		t.Errorf("%+v", l)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if l := m.Ledger(); l.Ports != 0 || l.Waiters != 0 {
		t.Errorf("%+v", l)
	}
}

// A port whose far end is gone can be bound to again, as on Xen.
func TestPeerMayBindAgain(t *testing.T) {
	m := machine(t, emu.Config{})
	a, b := domain(t, m, 1), domain(t, m, 2)
	wa, wb, pa, pb := channel(t, a, b)
	for range 3 {
		if err := pa.Notify(); err != nil {
			t.Fatal(err)
		}
		fires(t, wb)
		if err := pb.Close(); err != nil {
			t.Fatal(err)
		}
		if err := pa.Notify(); err != nil {
			t.Fatal(err)
		}
		silent(t, wb)
		var err error
		if pb, err = wb.Bind(1, pa.ID()); err != nil {
			t.Fatal(err)
		}
		fires(t, wb)
	}
	_ = wa.Close()
	_ = wb.Close()
}

// The far end binds again under another number, and another port gets its old number:
// Notify finds the right one.
func TestNotifyFollowsThePeer(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		a, b := domain(t, m, 1), domain(t, m, 2)
		wa, wb, pa, pb := channel(t, a, b)
		if err := pa.Notify(); err != nil { // pa has cached pb's word
			t.Fatal(err)
		}
		fires(t, wb)
		if err := pb.Close(); err != nil {
			t.Fatal(err)
		}
		stranger := waiter(t, b)
		p, err := stranger.Unbound(1)
		if err != nil {
			t.Fatal(err)
		}
		if p.ID() != pb.ID() {
			t.Fatalf("the test needs port %d again, got %d", pb.ID(), p.ID())
		}
		if _, err := wb.Bind(1, pa.ID()); err != nil {
			t.Fatal(err)
		}
		fires(t, wb)
		if err := pa.Notify(); err != nil {
			t.Fatal(err)
		}
		fires(t, wb)
		silent(t, stranger)
		for _, w := range []hypercall.Waiter{wa, wb, stranger} {
			_ = w.Close()
		}
	})
}

// testNoWakeupIsLost notifies at any moment of a Wait, many times: each notification must
// end a Wait that starts before or after it.
func testNoWakeupIsLost(t *testing.T, a, b hypercall.Domain, rounds int) {
	wa, wb, pa, _ := channel(t, a, b)
	rng := rand.New(rand.NewPCG(1, 2))
	var go_ sync.WaitGroup
	next := make(chan int)
	go_.Go(func() {
		for spin := range next {
			for range spin {
				_ = time.Now()
			}
			if err := pa.Notify(); err != nil {
				t.Error(err)
			}
		}
	})
	deadline := time.Now().Add(time.Minute)
	for i := range rounds {
		next <- rng.IntN(40)
		if err := wb.Wait(deadline, true); err != nil {
			t.Errorf("round %d: %v", i, err)
			break
		}
	}
	close(next)
	go_.Wait()
	_ = wa.Close()
	_ = wb.Close()
}

func TestNoWakeupIsLost(t *testing.T) {
	m := machine(t, emu.Config{})
	testNoWakeupIsLost(t, domain(t, m, 1), domain(t, m, 2), 50000)
}
