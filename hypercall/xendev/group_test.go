//go:build linux

package xendev

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/internal/backoff"
	"barevif/hypercall/xendev/xendevtest"
)

func grouped(t *testing.T, f func(t *testing.T, g hypercall.Group)) {
	for name, onThread := range map[string]bool{"goroutine": false, "thread": true} {
		t.Run(name, func(t *testing.T) {
			xendevtest.CheckFiles(t)
			g, err := new(Domain).Group(onThread)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := g.Close(); err != nil {
					t.Error(err)
				}
			})
			f(t, g)
		})
	}
}

func add(t *testing.T, g hypercall.Group, w *waiter, tag int) {
	t.Helper()
	if err := g.Add(w, tag); err != nil {
		t.Fatal(err)
	}
}

// tells fails unless Wait returns the tag want, or none if want is negative.
func tells(t *testing.T, g hypercall.Group, want int) {
	t.Helper()
	var tags [4]int
	n, err := g.Wait(tags[:], time.Now().Add(20*time.Millisecond))
	switch {
	case want < 0 && (n != 0 || !errors.Is(err, os.ErrDeadlineExceeded)):
		t.Fatalf("%v, %v, want nothing", tags[:n], err)
	case want >= 0 && (n != 1 || tags[0] != want || err != nil):
		t.Fatalf("%v, %v, want %d", tags[:n], err, want)
	}
}

// TestGroupKnowsWhatAWaitLeftMasked tests Add of a waiter whose ports its own Wait left masked, or unmasked again.
func TestGroupKnowsWhatAWaitLeftMasked(t *testing.T) {
	grouped(t, func(t *testing.T, g hypercall.Group) {
		w, d := newDriver(t, 5)
		d.fire(5)
		event(t, w, true)
		add(t, g, w, 1)
		if err := g.Rearm(w, true); err != nil {
			t.Fatal(err)
		}
		d.wantUnmasked(5)
		d.fire(5)
		tells(t, g, 1)
		g.Remove(w)
		noEvent(t, w, true)
		d.wantUnmasked(5)
		add(t, g, w, 1)
		d.fire(5)
		tells(t, g, 1)
	})
}

// TestGroupTakesNoWaiterThatCloses tests Add between the moments when Close begins and when it closes the file.
func TestGroupTakesNoWaiterThatCloses(t *testing.T) {
	grouped(t, func(t *testing.T, g hypercall.Group) {
		w, _ := newDriver(t, 5)
		v, e := newDriver(t, 5)
		w.d.life.mu.Lock() // Close closes the file after it has had this
		closed := make(chan error, 1)
		go func() { closed <- w.Close() }()
		until(t, "Close begins", func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.closed
		})
		if err := g.Add(w, 1); !errors.Is(err, net.ErrClosed) {
			t.Errorf("a waiter that closes: %v", err)
		}
		w.d.life.mu.Unlock()
		if err := <-closed; err != nil {
			t.Error(err)
		}
		add(t, g, v, 1)
		e.fire(5)
		tells(t, g, 1)
	})
}

func TestGroupReadsEachFileAndUnmasksOnRearm(t *testing.T) {
	grouped(t, func(t *testing.T, g hypercall.Group) {
		w, d := newDriver(t, 5, 6)
		v, e := newDriver(t, 5)
		add(t, g, w, 1)
		add(t, g, v, 2)
		tells(t, g, -1)
		d.fire(5, 6)
		tells(t, g, 1)
		d.wantUnmasked()
		tells(t, g, -1)
		if err := g.Rearm(w, true); err != nil {
			t.Fatal(err)
		}
		d.wantUnmasked(5, 6)
		if err := g.Rearm(w, true); err != nil { // nothing fired
			t.Fatal(err)
		}
		d.wantUnmasked()
		e.fire(5)
		tells(t, g, 2)
		// When another port of the same file fires before Rearm, Wait does not return the
		// tag again. Rearm unmasks both ports.
		d.fire(5)
		tells(t, g, 1)
		d.fire(6)
		tells(t, g, -1)
		if err := g.Rearm(w, true); err != nil {
			t.Fatal(err)
		}
		d.wantUnmasked(5, 6)
	})
}

func TestGroupIgnoresEventsOfClosedPorts(t *testing.T) {
	grouped(t, func(t *testing.T, g hypercall.Group) {
		w, d := newDriver(t, 5)
		add(t, g, w, 0)
		d.fire(9)
		tells(t, g, -1)
		d.wantUnmasked()
	})
}

func TestGroupDelaysSpuriousPorts(t *testing.T) {
	grouped(t, func(t *testing.T, g hypercall.Group) {
		w, d := newDriver(t, 5)
		add(t, g, w, 0)
		for i := range backoff.Free + 1 {
			d.fire(5)
			tells(t, g, 0)
			if err := g.Rearm(w, false); err != nil {
				t.Fatal(err)
			}
			if i < backoff.Free {
				d.wantUnmasked(5)
			}
		}
		d.wantUnmasked()
		tells(t, g, -1) // for longer than the unmasking is delayed
		d.wantUnmasked(5)
		// Poll unmasks as well.
		d.fire(5)
		tells(t, g, 0)
		if err := g.Rearm(w, false); err != nil {
			t.Fatal(err)
		}
		d.wantUnmasked()
		time.Sleep(2 * time.Millisecond)
		if n, err := g.Poll(make([]int, 1)); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		d.wantUnmasked(5)
	})
}

func TestGroupForgetsWaitersThatClose(t *testing.T) {
	grouped(t, func(t *testing.T, g hypercall.Group) {
		w, d := newDriver(t, 5)
		add(t, g, w, 0)
		d.fire(5)
		tells(t, g, 0)
		w.Close()
		if err := g.Rearm(w, true); err != nil {
			t.Fatal(err)
		}
		tells(t, g, -1)
		v, e := newDriver(t, 5)
		add(t, g, v, 0)
		e.fire(5)
		tells(t, g, 0)
	})
}

func TestGroupSaysWhatIsWrongWithTheDriver(t *testing.T) {
	grouped(t, func(t *testing.T, g hypercall.Group) {
		w, d := newDriver(t, 5)
		add(t, g, w, 0)
		unix.Shutdown(d.fd, unix.SHUT_RDWR)
		if _, err := g.Wait(make([]int, 1), time.Now().Add(soon)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the driver is gone: %v", err)
		}
	})
}

func TestGroupUnmasksWhatAnotherDelayed(t *testing.T) {
	grouped(t, func(t *testing.T, g hypercall.Group) {
		w, d := newDriver(t, 5)
		add(t, g, w, 0)
		for range backoff.Free + 1 {
			d.fire(5)
			tells(t, g, 0)
			if err := g.Rearm(w, false); err != nil {
				t.Fatal(err)
			}
			d.unmasked()
		}
		g.Remove(w)
		other, err := new(Domain).Group(false)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		add(t, other, w, 7)
		tells(t, other, -1) // for longer than the unmasking is delayed
		d.wantUnmasked(5)
	})
}
