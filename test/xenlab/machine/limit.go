//go:build linux

package machine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// maxStretch bounds by how much a limit may grow.
const maxStretch = 8

// usage is what QEMU's threads had of this machine's processors, and how long they
// wanted one and waited, in total.
type usage struct{ ran, waited time.Duration }

func (m *Machine) usage() (u usage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.qemu == nil {
		return u
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", m.qemu.Pid))
	if err != nil {
		return u
	}
	for _, file := range files {
		var on, queued time.Duration
		if b, err := os.ReadFile(file); err == nil {
			fmt.Sscan(string(b), &on, &queued) // ns; a kernel without the numbers leaves 0
		}
		u.ran, u.waited = u.ran+on, u.waited+queued
	}
	return u
}

// Starved is the part of the time QEMU's threads wanted a processor of this machine
// and had to wait for it, from 0 to 1. It explains a slow run.
func (m *Machine) Starved() float64 {
	u := m.usage()
	if u.ran+u.waited == 0 {
		return 0
	}
	return float64(u.waited) / float64(u.ran+u.waited)
}

// progress is how far the machine got in the time between two looks at its usage: all
// of the time, less the part for which its threads were kept waiting. Of several
// threads that want a processor the average counts.
func progress(elapsed time.Duration, before, after usage) time.Duration {
	// The numbers of a thread that ended are gone.
	ran, waited := max(after.ran-before.ran, 0), max(after.waited-before.waited, 0)
	wanting := max(1, float64(ran+waited)/float64(max(elapsed, 1)))
	return elapsed - min(elapsed, time.Duration(float64(waited)/wanting))
}

// A Limit is a time that the machine has for something. A machine that other programs
// of this computer keep from its processors has longer, up to eight times.
// It is for one goroutine.
type Limit struct {
	usage func() usage
	d     time.Duration
	got   time.Duration // of d, as of last
	begin time.Time
	last  time.Time
	used  usage // as of last
}

// Limit begins now.
func (m *Machine) Limit(d time.Duration) *Limit { return newLimit(d, m.usage) }

func newLimit(d time.Duration, look func() usage) *Limit {
	now := time.Now()
	return &Limit{usage: look, d: d, begin: now, last: now, used: look()}
}

// left is how much of the limit there is; it does not pass earlier than that.
func (l *Limit) left() time.Duration {
	now, used := time.Now(), l.usage()
	l.got += progress(now.Sub(l.last), l.used, used)
	l.last, l.used = now, used
	return min(l.d-l.got, maxStretch*l.d-now.Sub(l.begin))
}

// Over reports whether it has passed.
func (l *Limit) Over() bool { return l.left() <= 0 }

// String says how long the limit is, and how long it was here if it grew.
func (l *Limit) String() string {
	took := l.last.Sub(l.begin)
	if l.got == 0 || float64(took) < 1.1*float64(l.got) {
		return fmt.Sprintf("the limit of %v", l.d)
	}
	return fmt.Sprintf("the limit of %v, which was %v here, for QEMU got %.0f %% of the processor time it wanted",
		l.d, took.Round(time.Second), 100*float64(l.got)/float64(took))
}

// Within gives a context that ends when a limit has passed. Its cause is what the
// limit's String says.
func (m *Machine) Within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return within(ctx, m.Limit(d))
}

// lookEvery is how often a context looks at what QEMU got.
const lookEvery = time.Second

func within(ctx context.Context, l *Limit) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		for left := l.d; left > 0; left = l.left() {
			select {
			case <-time.After(min(left, lookEvery)):
			case <-ctx.Done():
				return
			}
		}
		cancel(fmt.Errorf("%v: %w", l, context.DeadlineExceeded))
	}()
	return ctx, func() { cancel(context.Canceled) }
}

// A pace foretells how long the machine takes, from how long it took lately.
type pace struct {
	at      time.Time
	used    usage
	stretch float64
}

const (
	paceOver = 2 * time.Second  // less tells little
	paceKept = 20 * time.Second // more is long ago
)

// look takes a sample into account, and gives by how much limits grow.
func (p *pace) look(now time.Time, used usage) float64 {
	elapsed := now.Sub(p.at)
	switch {
	case p.stretch == 0: // the first time
		p.at, p.used, p.stretch = now, used, 1
	case elapsed >= paceOver:
		got := progress(elapsed, p.used, used)
		p.stretch = min(float64(elapsed)/float64(max(got, 1)), maxStretch)
		if elapsed >= paceKept {
			p.at, p.used = now, used
		}
	}
	return p.stretch
}

// Stretched is the time of a limit by the guests' clocks, which go on while QEMU
// waits for a processor: a limit that they enforce cannot grow while it runs.
func (m *Machine) Stretched(d time.Duration) time.Duration {
	used := m.usage()
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Duration(float64(d) * m.pace.look(time.Now(), used))
}
