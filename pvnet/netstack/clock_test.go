package netstack

import (
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// ticking is a clock that advances by one second with each reading.
type ticking struct {
	tcpip.Clock
	readings int
	fire     func()
}

func (c *ticking) NowMonotonic() tcpip.MonotonicTime {
	c.readings++
	return tcpip.MonotonicTime{}.Add(time.Duration(c.readings) * time.Second)
}

func (c *ticking) AfterFunc(_ time.Duration, f func()) tcpip.Timer {
	c.fire = f
	return nil
}

func TestOneReadingAnswersSeveralTimes(t *testing.T) {
	under := new(ticking)
	c := &clock{Clock: under}
	now := func() int { return int(c.NowMonotonic().Milliseconds() / 1000) }
	for i := range 1 + answers {
		if got := now(); got != 1 {
			t.Fatalf("answer %d is of reading %d", i, got)
		}
	}
	if got := now(); got != 2 {
		t.Fatalf("after all answers of a reading, the next is of reading %d", got)
	}
	c.expire()
	if got := now(); got != 3 {
		t.Fatalf("after expire the answer is of reading %d", got)
	}
	fired := 0
	c.AfterFunc(0, func() { fired = now() })
	under.fire()
	if fired != 4 {
		t.Fatalf("a timer is told of reading %d", fired)
	}
	(*clock)(nil).expire() // as in a stack with the standard clock
}

// A reading that another goroutine has overtaken must not turn the clock back.
func TestClockDoesNotGoBack(t *testing.T) {
	c := &clock{Clock: new(ticking)}
	c.reading.Store(int64(time.Hour))
	if got := c.NowMonotonic().Milliseconds(); got != time.Hour.Milliseconds() {
		t.Fatalf("the clock went back to %d ms", got)
	}
}
