//go:build linux

package xendev

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/domaintest"
	"barevif/hypercall/internal/backoff"
	"barevif/hypercall/xendev/xendevtest"
)

// blockThreads makes newDriver return waiters that block their threads.
var blockThreads bool

func TestWaiterThatBlocksItsThread(t *testing.T) {
	blockThreads = true
	defer func() { blockThreads = false }()
	for _, tt := range []struct {
		name string
		f    func(*testing.T)
	}{
		{"FiredPortStaysMaskedUntilTheNextWait", TestFiredPortStaysMaskedUntilTheNextWait},
		{"EventsBeforeAPassedDeadlineCount", TestEventsBeforeAPassedDeadlineCount},
		{"EventOfAClosedPortIsNoEvent", TestEventOfAClosedPortIsNoEvent},
		{"PortClosedWhileMaskedIsNotUnmasked", TestPortClosedWhileMaskedIsNotUnmasked},
		{"MaskedPortCannotFireTwice", TestMaskedPortCannotFireTwice},
		{"SpuriousEventsDelayUnmasking", TestSpuriousEventsDelayUnmasking},
		{"StormDelaysNeitherWakeNorDeadlineNorOthers", TestStormDelaysNeitherWakeNorDeadlineNorOthers},
		{"WorkEndsTheDelay", TestWorkEndsTheDelay},
		{"LatePortIsUnmaskedWithinWait", TestLatePortIsUnmaskedWithinWait},
		{"WakeIsNeverLost", TestWakeIsNeverLost},
		{"WakesOfOtherGoroutinesEndEveryWait", TestWakesOfOtherGoroutinesEndEveryWait},
		{"CloseEndsEveryCall", TestCloseEndsEveryCall},
		{"CloseEndsWaitBeforeTheFile", TestCloseEndsWaitBeforeTheFile},
		{"LostNumbersWakeEveryPort", TestLostNumbersWakeEveryPort},
		{"BrokenDriverEndsWait", TestBrokenDriverEndsWait},
		{"ManyPortsAreWrittenBackInParts", TestManyPortsAreWrittenBackInParts},
		{"WaitDoesNotAllocate", TestWaitDoesNotAllocate},
	} {
		t.Run(tt.name, tt.f)
	}
}

// A driver stands for evtchn: a socket whose packets are the results of read(2) and the
// data of write(2).
type driver struct {
	t  testing.TB
	fd int
}

func newDriver(t testing.TB, ports ...hypercall.PortID) (*waiter, driver) {
	t.Helper()
	xendevtest.CheckFiles(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	w, err := newWaiter(newDomain(Config{}, 0), os.NewFile(uintptr(fds[0]), "evtchn"))
	if err != nil {
		t.Fatal(err)
	}
	if blockThreads {
		if err := w.onThread(); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range ports {
		enter(t, w, id)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil && !errors.Is(err, unix.ENOTTY) {
			t.Error("Close:", err)
		}
		unix.Close(fds[1])
	})
	return w, driver{t, fds[1]}
}

func enter(t testing.TB, w *waiter, id hypercall.PortID) *port {
	t.Helper()
	p, err := newPort(w, id)
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.enterLocked(p)
	w.mu.Unlock()
	return p
}

// fire makes the ports readable, in one read.
func (d driver) fire(ports ...hypercall.PortID) {
	d.t.Helper()
	var b []byte
	for _, p := range ports {
		b = binary.NativeEndian.AppendUint32(b, uint32(p))
	}
	if _, err := unix.Write(d.fd, b); err != nil {
		d.t.Fatal(err)
	}
}

// unmasked returns the ports that were written back since the last call.
func (d driver) unmasked() (ports []hypercall.PortID) {
	d.t.Helper()
	buf := make([]byte, maxWrite)
	for {
		n, err := unix.Read(d.fd, buf)
		if err == unix.EAGAIN {
			slices.Sort(ports)
			return ports
		}
		if err != nil {
			d.t.Fatal(err)
		}
		for b := buf[:n]; len(b) > 0; b = b[4:] {
			ports = append(ports, hypercall.PortID(binary.NativeEndian.Uint32(b)))
		}
	}
}

func (d driver) wantUnmasked(ports ...hypercall.PortID) {
	d.t.Helper()
	if got := d.unmasked(); !slices.Equal(got, ports) {
		d.t.Errorf("unmasked %v, not %v", got, ports)
	}
}

var aDay = 24 * time.Hour

func event(t testing.TB, w *waiter, worked bool) {
	t.Helper()
	if err := w.Wait(time.Now().Add(soon), worked); err != nil {
		t.Fatal("Wait:", err)
	}
}

func noEvent(t testing.TB, w *waiter, worked bool) {
	t.Helper()
	if err := w.Wait(time.Now(), worked); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("Wait:", err)
	}
}

func TestFiredPortStaysMaskedUntilTheNextWait(t *testing.T) {
	w, d := newDriver(t, 5, 6, 7)
	d.fire(5, 7)
	event(t, w, true)
	d.wantUnmasked()
	noEvent(t, w, true)
	d.wantUnmasked(5, 7)
	noEvent(t, w, true)
	d.wantUnmasked()
}

func TestEventsBeforeAPassedDeadlineCount(t *testing.T) {
	w, d := newDriver(t, 5)
	noEvent(t, w, true)
	d.fire(5)
	if err := w.Wait(time.Now().Add(-aDay), true); err != nil {
		t.Fatal(err)
	}
}

func TestEventOfAClosedPortIsNoEvent(t *testing.T) {
	w, d := newDriver(t, 5, 6)
	p := w.ports[6]
	d.fire(6)
	if err := p.Close(); err == nil || !errors.Is(err, unix.ENOTTY) {
		t.Fatal("a socket unbinds no ports:", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal("second Close:", err)
	}
	noEvent(t, w, true)
	d.fire(9, 6, 5)
	event(t, w, true)
	noEvent(t, w, true)
	d.wantUnmasked(5)
}

func TestPortClosedWhileMaskedIsNotUnmasked(t *testing.T) {
	w, d := newDriver(t, 5, 6)
	p := w.ports[5]
	d.fire(5, 6)
	event(t, w, true)
	w.remove(p)
	enter(t, w, 5) // the number again, for a port that is not masked
	noEvent(t, w, true)
	d.wantUnmasked(6)
	d.fire(5)
	event(t, w, true)
}

func TestMaskedPortCannotFireTwice(t *testing.T) {
	w, d := newDriver(t, 5)
	d.fire(5, 5) // no real driver sends a port twice
	event(t, w, true)
	noEvent(t, w, true)
	d.wantUnmasked(5)
}

func TestSpuriousEventsDelayUnmasking(t *testing.T) {
	w, d := newDriver(t, 5, 6)
	late := w.ports[5]
	for range backoff.Free {
		d.fire(5)
		event(t, w, false)
	}
	noEvent(t, w, false)
	d.wantUnmasked(5, 5, 5, 5)

	// From now on the port is late, each time twice as long, and no other port is.
	for n := range 4 {
		d.fire(5)
		event(t, w, true)
		before := time.Now()
		w.settleAt(t, false)
		after := time.Now()
		d.wantUnmasked()
		delay := time.Millisecond << n
		if due := late.Due; due.Before(before.Add(delay)) || due.After(after.Add(delay)) {
			t.Errorf("wake-up %d delays for %v to %v, not %v", n, due.Sub(after), due.Sub(before), delay)
		}
		late.Due = after.Add(aDay) // else it may be due for the next Wait already, on a slow machine
		d.fire(6)
		event(t, w, false)
		d.wantUnmasked()
		noEvent(t, w, true)
		d.wantUnmasked(5, 6)
	}
}

// settleAt runs the first half of a Wait.
func (w *waiter) settleAt(t testing.TB, worked bool) {
	t.Helper()
	if err := w.settle(worked); err != nil {
		t.Fatal(err)
	}
}

// storm makes port 5 late for a long time.
func storm(t testing.TB, w *waiter, d driver) {
	t.Helper()
	p := w.ports[5]
	p.Spurious = 200
	d.fire(5)
	event(t, w, true)
	w.settleAt(t, false)
	if due := w.Next(time.Time{}); due != p.Due || due.IsZero() || time.Until(due) > time.Second {
		t.Fatalf("late until %v, %v", due, p.Due)
	}
	p.Due = time.Now().Add(aDay)
	d.wantUnmasked()
}

func TestStormDelaysNeitherWakeNorDeadlineNorOthers(t *testing.T) {
	w, d := newDriver(t, 5, 6)
	storm(t, w, d)
	noEvent(t, w, false)
	w.Wake()
	if err := w.Wait(time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	d.fire(6)
	if err := w.Wait(time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	d.wantUnmasked()
	noEvent(t, w, false)
	d.wantUnmasked(6)
}

func TestWorkEndsTheDelay(t *testing.T) {
	w, d := newDriver(t, 5)
	storm(t, w, d)
	noEvent(t, w, true)
	d.wantUnmasked(5)
	// The work was not the port's own: one more event without work, and it is late again.
	d.fire(5)
	event(t, w, true)
	w.settleAt(t, false)
	if !w.masked.Late() {
		t.Error("forgiven for the work of another")
	}
	noEvent(t, w, true)
	d.wantUnmasked(5)
	// Its own work resets the count.
	d.fire(5)
	event(t, w, true)
	w.settleAt(t, true)
	d.fire(5)
	event(t, w, true)
	w.settleAt(t, false)
	d.wantUnmasked(5, 5)
}

func TestLatePortIsUnmaskedWithinWait(t *testing.T) {
	w, d := newDriver(t, 5)
	storm(t, w, d)
	w.ports[5].Due = time.Now().Add(5 * time.Millisecond)
	done := make(chan error, 1)
	go func() { done <- w.Wait(time.Time{}, false) }()
	fds := []unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, int(soon/time.Millisecond)); n != 1 {
		t.Fatal("not unmasked:", err)
	}
	d.wantUnmasked(5)
	d.fire(5)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestWakeIsNeverLost(t *testing.T) {
	w, _ := newDriver(t, 5)
	for i := range 2000 {
		done := make(chan error, 1)
		go func() { done <- w.Wait(time.Time{}, true) }()
		w.Wake()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(soon):
			t.Fatalf("round %d: Wake did not end Wait", i)
		}
	}
	// Many Wakes count as one.
	w.Wake()
	w.Wake()
	if err := w.Wait(time.Time{}, true); err != nil {
		t.Fatal(err)
	}
	noEvent(t, w, true)
}

func TestANudgedWaitNeedsNoPoller(t *testing.T) {
	w, d := newDriver(t, 5)
	domaintest.CheckNudge(t, w, func() { d.fire(5) })
}

func TestWakesOfOtherGoroutinesEndEveryWait(t *testing.T) {
	w, _ := newDriver(t, 5)
	const rounds = 2000
	turn := make(chan struct{})
	go func() {
		defer close(turn)
		for range rounds {
			w.Wake()
			turn <- struct{}{}
		}
	}()
	for range rounds {
		// A Wake has begun before each turn, and may still move the deadline.
		if err := w.Wait(time.Now().Add(soon), true); err != nil {
			t.Fatal(err)
		}
		<-turn
	}
	<-turn
	noEvent(t, w, true)
}

func TestCloseEndsEveryCall(t *testing.T) {
	w, d := newDriver(t, 5)
	p := w.ports[5]
	done := make(chan error, 1)
	go func() { done <- w.Wait(time.Time{}, true) }()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Wait: %v", err)
	}
	if err := w.Wait(time.Time{}, true); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Wait after Close: %v", err)
	}
	if _, err := w.Unbound(1); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Unbound: %v", err)
	}
	if _, err := w.Bind(1, 1); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Bind: %v", err)
	}
	if err := p.Notify(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Notify: %v", err)
	}
	if err := errors.Join(w.Close(), p.Close()); err != nil {
		t.Error(err)
	}
	w.Wake()
	d.wantNoReader()
}

// TestCloseEndsWaitBeforeTheFile tests that Close ends Wait before it closes the driver's file. Closing the file
// cannot end Wait: the file stays open as long as a thread polls it, and after a resume Close never closes it.
func TestCloseEndsWaitBeforeTheFile(t *testing.T) {
	w, _ := newDriver(t, 5)
	done := make(chan error, 1)
	go func() { done <- w.Wait(time.Time{}, true) }()
	time.Sleep(10 * time.Millisecond) // Wait may have begun to wait, or not

	w.d.life.mu.Lock() // Close closes the file after it has had this
	closed := make(chan error, 1)
	go func() { closed <- w.Close() }()
	select {
	case err := <-done:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("Wait: %v", err)
		}
	case <-time.After(soon):
		t.Error("Wait goes on while Close waits for it")
	}
	if err := w.raw.Control(func(uintptr) {}); err != nil {
		t.Errorf("the file was closed before: %v", err)
	}
	w.d.life.mu.Unlock()
	select {
	case err := <-closed:
		if err != nil {
			t.Errorf("Close: %v", err)
		}
	case <-time.After(soon):
		t.Fatal("Close does not end")
	}
}

func (d driver) wantNoReader() {
	d.t.Helper()
	if n, err := unix.Read(d.fd, make([]byte, 4)); n != 0 || err != nil {
		d.t.Errorf("the file is still open: %d, %v", n, err)
	}
}

// TestLostNumbersWakeEveryPort tests what Wait does after EFBIG.
func TestLostNumbersWakeEveryPort(t *testing.T) {
	w, d := newDriver(t, 5, 6, 7)
	d.fire(6)
	event(t, w, true)
	w.allFired()
	noEvent(t, w, true)
	d.wantUnmasked(5, 6, 7)
	w.n, w.err = 0, unix.EFBIG
	if fired, err := w.note(); !fired || !errors.Is(err, unix.ENOTTY) {
		t.Errorf("a socket has no reset: %v, %v", fired, err)
	}
}

func TestBrokenDriverEndsWait(t *testing.T) {
	w, d := newDriver(t, 5)
	unix.Shutdown(d.fd, unix.SHUT_RDWR)
	if err := w.Wait(time.Now().Add(soon), true); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Wait on a file at its end: %v", err)
	}
}

func TestManyPortsAreWrittenBackInParts(t *testing.T) {
	ids := make([]hypercall.PortID, 3000)
	for i := range ids {
		ids[i] = hypercall.PortID(i + 1)
	}
	w, d := newDriver(t, ids...)
	w.allFired()
	noEvent(t, w, true)
	if got := d.unmasked(); !slices.Equal(got, ids) {
		t.Errorf("%d ports written back", len(got))
	}
}

func TestWaitDoesNotAllocate(t *testing.T) {
	w, d := newDriver(t, 5, 6)
	b := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, 5), 6)
	buf := make([]byte, 64)
	deadline := time.Now().Add(time.Hour)
	round := func(worked bool) {
		if _, err := unix.Write(d.fd, b); err != nil {
			t.Fatal(err)
		}
		if err := w.Wait(deadline, worked); err != nil {
			t.Fatal(err)
		}
		for {
			if _, err := unix.Read(d.fd, buf); err != nil {
				break
			}
		}
	}
	if n := testing.AllocsPerRun(100, func() { round(true) }); n != 0 {
		t.Errorf("an event: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		w.Wake()
		if err := w.Wait(time.Time{}, true); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("a Wake: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		if err := w.Wait(time.Now(), true); err != os.ErrDeadlineExceeded {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("a deadline: %v allocations", n)
	}
	p := w.ports[5]
	if n := testing.AllocsPerRun(100, func() { p.mu.Lock(); _ = w.raw.Control(p.ring); p.mu.Unlock() }); n != 0 {
		t.Errorf("a doorbell: %v allocations", n)
	}
}
