//go:build linux

package machine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// maxStretch is the largest factor by which a limit may grow.
const maxStretch = 8

// usage is how long QEMU's threads have run on this machine's processors, and how long they
// have waited for one, in total.
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

// Starved returns the share of the time for which QEMU's threads wanted a processor of this
// machine but had to wait for it, from 0 to 1. It explains a slow run.
func (m *Machine) Starved() float64 {
	u := m.usage()
	if u.ran+u.waited == 0 {
		return 0
	}
	return float64(u.waited) / float64(u.ran+u.waited)
}

// progress returns how far the machine got between two readings of its usage: the elapsed
// time, less the time for which its threads waited for a processor. If several threads want
// a processor, the average counts.
func progress(elapsed time.Duration, before, after usage) time.Duration {
	// A thread that has ended is no longer counted, so the sums may shrink.
	ran, waited := max(after.ran-before.ran, 0), max(after.waited-before.waited, 0)
	wanting := max(1, float64(ran+waited)/float64(max(elapsed, 1)))
	return elapsed - min(elapsed, time.Duration(float64(waited)/wanting))
}

// A Limit is the time that the machine has for a task. It grows, up to eightfold, while other
// programs of this computer keep the machine from its processors. A Limit is not safe for
// concurrent use.
type Limit struct {
	usage func() usage
	d     time.Duration
	got   time.Duration // the part of d that has passed at last
	begin time.Time
	last  time.Time
	used  usage // the usage at last
}

// Limit returns a Limit of d that begins now.
func (m *Machine) Limit(d time.Duration) *Limit { return newLimit(d, m.usage) }

func newLimit(d time.Duration, look func() usage) *Limit {
	now := time.Now()
	return &Limit{usage: look, d: d, begin: now, last: now, used: look()}
}

// left returns how much of the limit is left. The limit does not pass earlier than that.
func (l *Limit) left() time.Duration {
	now, used := time.Now(), l.usage()
	l.got += progress(now.Sub(l.last), l.used, used)
	l.last, l.used = now, used
	return min(l.d-l.got, maxStretch*l.d-now.Sub(l.begin))
}

// Over reports whether the limit has passed.
func (l *Limit) Over() bool { return l.left() <= 0 }

// String returns the length of the limit, and its actual length if it grew.
func (l *Limit) String() string {
	took := l.last.Sub(l.begin)
	if l.got == 0 || float64(took) < 1.1*float64(l.got) {
		return fmt.Sprintf("the limit of %v", l.d)
	}
	return fmt.Sprintf("the limit of %v, which was %v here, for QEMU got %.0f %% of the processor time it wanted",
		l.d, took.Round(time.Second), 100*float64(l.got)/float64(took))
}

// Within returns a context that ends when a Limit of d has passed. Its cause wraps
// context.DeadlineExceeded and has the text of the Limit.
func (m *Machine) Within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return within(ctx, m.Limit(d))
}

// lookEvery is the time between two readings of QEMU's usage for a context.
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

// A pace predicts by how much the machine will be slowed down, from the last seconds.
type pace struct {
	at      time.Time
	used    usage
	stretch float64
}

const (
	paceOver = 2 * time.Second  // a shorter sample means little
	paceKept = 20 * time.Second // an older sample no longer matters
)

// look adds a sample, and returns the factor by which limits grow.
func (p *pace) look(now time.Time, used usage) float64 {
	elapsed := now.Sub(p.at)
	switch {
	case p.stretch == 0: // the first sample
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

// Stretched returns d in the time of the guests' clocks, which go on while QEMU waits for a
// processor. It is for limits that the guests enforce, which cannot grow while they run.
func (m *Machine) Stretched(d time.Duration) time.Duration {
	used := m.usage()
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Duration(float64(d) * m.pace.look(time.Now(), used))
}
