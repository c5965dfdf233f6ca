package pvnet

import (
	"reflect"
	"runtime/debug"
	"sync"
	"time"
)

// A clock is the slow tick of all devices of a domain: an idle process wakes up once a
// second, however many devices it has. It does the beat of a device on its own goroutine
// and lets the device's goroutine sleep.
type clock struct {
	stop chan struct{}

	mu    sync.Mutex
	lives map[*life]struct{} // guarded by mu
}

// tick adds l to the clock of its domain. The function it returns removes l.
func (l *life) tick() (untick func()) {
	var dom any = l.d.domain
	if !reflect.ValueOf(dom).Comparable() {
		dom = l // this device gets a clock of its own
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
	debug.SetPanicOnFault(true) // a beat reads shared rings
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

// ticked does the beat of a device whose goroutine sleeps. It wakes that goroutine only
// if the goroutine has to look itself: because the link is down, or to check suspects
// again.
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
