package netstack

import (
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// A clock is the stack's clock. gVisor's TCP asks for the time some six times per segment.
// On a machine where that takes a system call, such as a paravirtual guest of an older
// Xen, it uses a fifth of the processor. So the clock answers several times with one
// reading. Linux's TCP, too, reads the clock once per segment.
//
// Every event that makes the stack run, a frame, a call or a timer, expires the reading.
// So a reading is never older than the event that the stack is handling.
type clock struct {
	tcpip.Clock
	reading atomic.Int64 // the latest reading, in nanoseconds
	left    atomic.Int32 // how often reading may still be returned
}

// answers is how often NowMonotonic repeats one reading.
const answers = 8

// fastReading is the duration below which a reading of the machine's clock counts as cheap.
const fastReading = 300 * time.Nanosecond

// newClock measures the machine's clock. If its readings are cheap it returns nil, which
// means the standard clock.
func newClock() *clock {
	const readings = 64
	best := time.Duration(1 << 62)
	for range 4 { // the best of 4 was not interrupted
		start := time.Now()
		for range readings {
			_ = time.Since(start)
		}
		best = min(best, time.Since(start))
	}
	if best < readings*fastReading {
		return nil
	}
	return &clock{Clock: tcpip.NewStdClock()}
}

// expire makes the next NowMonotonic read the machine's clock. A nil clock ignores it.
func (c *clock) expire() {
	if c != nil && c.left.Load() > 0 {
		c.left.Store(0)
	}
}

// NowMonotonic implements tcpip.Clock.
func (c *clock) NowMonotonic() tcpip.MonotonicTime {
	if c.left.Load() > 0 && c.left.Add(-1) >= 0 {
		return tcpip.MonotonicTime{}.Add(time.Duration(c.reading.Load()))
	}
	now := int64(c.Clock.NowMonotonic().Sub(tcpip.MonotonicTime{}))
	for { // another goroutine may have stored a later reading
		was := c.reading.Load()
		if was >= now {
			now = was
			break
		}
		if c.reading.CompareAndSwap(was, now) {
			break
		}
	}
	c.left.Store(answers)
	return tcpip.MonotonicTime{}.Add(time.Duration(now))
}

// AfterFunc implements tcpip.Clock.
func (c *clock) AfterFunc(d time.Duration, f func()) tcpip.Timer {
	return c.Clock.AfterFunc(d, func() {
		c.expire()
		f()
	})
}
