package netstack

import (
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// A clock is the stack's. TCP asks for the time some six times for each segment, and
// where the machine cannot tell it without a system call, as in a paravirtual guest of an
// older Xen, that takes a fifth of the processor. So one reading answers several times:
// as TCP of Linux has it, which reads the clock once for each segment.
//
// Whatever sets the stack to work, a frame, a caller, a timer, has the next answer read
// anew. So a reading is never older than what is done about one of them.
type clock struct {
	tcpip.Clock
	reading atomic.Int64 // the latest, in nanoseconds
	left    atomic.Int32 // answers that reading may still give
}

// answers is how often one reading answers.
const answers = 8

// fastReading is how long a reading may take to be of no concern.
const fastReading = 300 * time.Nanosecond

// newClock makes a clock for this machine: nil, the stack's own, where readings cost little.
func newClock() *clock {
	const readings = 64
	best := time.Duration(1 << 62)
	for range 4 { // one that is not interrupted
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

// expire has the next answer read anew.
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
	for { // another goroutine may have a later one
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
