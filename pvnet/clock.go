package pvnet

import (
	"reflect"
	"runtime/debug"
	"sync"
	"time"
)

// A clock is the slow tick of all devices of a domain, so that a process that has
// nothing to do wakes up once a second, however many devices it has. It does the
// beat of a device that runs on its own goroutine and leaves the device's asleep.
type clock struct {
	stop chan struct{}

	mu    sync.Mutex
	lives map[*life]struct{} // guarded by mu
}

// tick enrols l until the function it gives is called.
func (l *life) tick() (untick func()) {
	var dom any = l.d.domain
	if !reflect.ValueOf(dom).Comparable() {
		dom = l // then this device has one to itself
	}
	global.mu.Lock()
	defer global.mu.Unlock()
	c := global.clocks[dom]
	if c == nil {
		c = &clock{stop: make(chan struct{}), lives: make(map[*life]struct{})}
		global.clocks[dom] = c
		go c.run()
	}
	c.mu.Lock()
	c.lives[l] = struct{}{}
	c.mu.Unlock()
	return func() {
		global.mu.Lock()
		defer global.mu.Unlock()
		c.mu.Lock()
		defer c.mu.Unlock()
		if delete(c.lives, l); len(c.lives) == 0 {
			delete(global.clocks, dom)
			close(c.stop)
		}
	}
}

func (c *clock) run() {
	debug.SetPanicOnFault(true) // a beat looks at rings
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var all []*life
	for {
		select {
		case <-tick.C:
		case <-c.stop:
			return
		}
		c.mu.Lock()
		for l := range c.lives {
			all = append(all, l)
		}
		c.mu.Unlock()
		for _, l := range all {
			l.ticked()
		}
		clear(all)
		all = all[:0]
	}
}

// ticked does the beat of a device whose goroutine sleeps, and wakes that one only
// if it has to look itself: because it is not running, or has to come back to
// halves that seem to have missed an event.
func (l *life) ticked() {
	if !l.mu.TryLock() {
		l.owed.Store(true)
	} else {
		ran := l.running
		if ran {
			l.beat()
		}
		l.owed.Store(!ran)
		idle := ran && len(l.suspects) == 0 && !l.deserted()
		l.mu.Unlock()
		if idle {
			return
		}
	}
	l.d.wakeLife()
}
