//go:build linux

package machine

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// shared returns the usage of a QEMU that always wants so many processors, for as many
// threads, and gets the given part of each.
func shared(threads, part float64) func() usage {
	begin := time.Now()
	return func() usage {
		wanted := threads * float64(time.Since(begin))
		return usage{ran: time.Duration(part * wanted), waited: time.Duration((1 - part) * wanted)}
	}
}

func TestLimitGrowsWithTheShareOfAProcessor(t *testing.T) {
	const limit = time.Minute
	for _, c := range []struct {
		name    string
		threads float64
		part    float64
		want    time.Duration
	}{
		{"alone", 2, 1, limit},
		{"half of each", 2, 0.5, 2 * limit},
		{"half of one", 1, 0.5, 2 * limit},
		{"a quarter of three", 3, 0.25, 4 * limit},
		{"nearly nothing", 2, 0.01, maxStretch * limit},
		{"idle", 0, 1, limit},
		// It wants a processor for a tenth of the time, so it loses little by waiting.
		{"nearly idle", 0.1, 0.5, limit * 100 / 95},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				l := newLimit(limit, shared(c.threads, c.part))
				ctx, cancel := within(t.Context(), l)
				defer cancel()
				<-ctx.Done()
				if took := time.Since(begin); took < c.want-lookEvery || took > c.want+2*lookEvery {
					t.Errorf("it passed after %v, want %v", took, c.want)
				}
				cause := context.Cause(ctx)
				if !errors.Is(cause, context.DeadlineExceeded) || !strings.Contains(cause.Error(), "the limit of 1m0s") ||
					strings.Contains(cause.Error(), "processor time") != (c.want > limit*11/10) {
					t.Errorf("%v", cause)
				}
			})
		})
	}
}

// The load comes and goes: the limit grows by the time that the machine lost, and no more.
func TestLimitCountsWhatWasLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var used usage
		l := newLimit(time.Minute, func() usage { return used })
		pass := func(seconds int, part float64) bool {
			for range seconds {
				time.Sleep(time.Second)
				used.ran += time.Duration(part * float64(time.Second))
				used.waited += time.Duration((1 - part) * float64(time.Second))
				if l.Over() {
					return true
				}
			}
			return false
		}
		if pass(30, 1) || pass(60, 0.25) || pass(14, 1) || !pass(2, 1) {
			t.Errorf("got %v of a minute: %v", l.got, l)
		}
	})
}

func TestCancelledLimitLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // synctest waits for every goroutine
		ctx, cancel := within(t.Context(), newLimit(time.Hour, func() usage { return usage{} }))
		cancel()
		if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// A limit that guests enforce grows with the load of the last seconds.
func TestPaceFollowsTheLoad(t *testing.T) {
	var p pace
	now, used := time.Unix(0, 0), usage{}
	look := func(seconds int, part float64) (stretch float64) {
		for range seconds {
			now = now.Add(time.Second)
			used.ran += time.Duration(part * 1e9)
			used.waited += time.Duration((1 - part) * 1e9)
			stretch = p.look(now, used)
		}
		return stretch
	}
	if s := p.look(now, used); s != 1 {
		t.Errorf("at first %v", s)
	}
	if s := look(60, 1); s != 1 {
		t.Errorf("alone %v", s)
	}
	if s := look(60, 0.5); s < 1.9 || s > 2.1 {
		t.Errorf("with half a processor %v", s)
	}
	if s := look(60, 0.001); s != maxStretch {
		t.Errorf("with next to nothing %v", s)
	}
	if s := look(60, 1); s != 1 {
		t.Errorf("alone again %v", s)
	}
	var m Machine
	if d := m.Stretched(time.Minute); d != time.Minute {
		t.Errorf("without QEMU %v", d)
	}
}

// The usage of a real process can be read from the kernel.
func TestUsageOfAProcessIsRead(t *testing.T) {
	m := running(t)
	for begin := time.Now(); m.usage().ran == 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > time.Minute {
			t.Fatal("a process that runs used no processor")
		}
	}
	if s := m.Starved(); s < 0 || s > 1 {
		t.Errorf("starved: %v", s)
	}
}
