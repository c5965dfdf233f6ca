package pvnet

import (
	"reflect"
	"runtime/debug"
	"sync"
	"time"

	"barevif/telemetry"
)

// A slowTicker is the slow tick of all devices of a domain: an idle process wakes up once a
// second, however many devices it has. It does a device's work on its own goroutine
// and lets the device's goroutine sleep.
type slowTicker struct {
	stop chan struct{}

	mu      sync.Mutex
	members map[*lifecycle]struct{} // guarded by mu
}

// startTicks adds l to the clock of its domain. The function it returns removes l.
func (l *lifecycle) startTicks() (untick func()) {
	var dom any = l.d.domain
	if !reflect.ValueOf(dom).Comparable() {
		dom = l // this device gets a clock of its own
	}
	global.mu.Lock()
	defer global.mu.Unlock()
	c := global.clocks[dom]
	if c == nil {
		c = &slowTicker{stop: make(chan struct{}), members: make(map[*lifecycle]struct{})}
		global.clocks[dom] = c
		go c.run()
	}
	c.mu.Lock()
	c.members[l] = struct{}{}
	c.mu.Unlock()
	return func() {
		global.mu.Lock()
		defer global.mu.Unlock()
		c.mu.Lock()
		defer c.mu.Unlock()
		if delete(c.members, l); len(c.members) == 0 {
			delete(global.clocks, dom)
			close(c.stop)
		}
	}
}

func (c *slowTicker) run() {
	debug.SetPanicOnFault(true) // the work of a tick reads shared rings
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var all []*lifecycle
	for {
		select {
		case <-tick.C:
		case <-c.stop:
			return
		}
		c.mu.Lock()
		for l := range c.members {
			all = append(all, l)
		}
		c.mu.Unlock()
		for _, l := range all {
			l.tickFor()
		}
		clear(all)
		all = all[:0]
	}
}

// tickFor does the beat of a device whose goroutine sleeps. It wakes that goroutine only
// if the goroutine has to look itself: because the link is down, to check suspects again, or
// to open the mirror.
func (l *lifecycle) tickFor() {
	if !l.mu.TryLock() {
		l.tickDue.Store(true)
	} else {
		ran := l.running
		if ran {
			l.tick()
		}
		l.tickDue.Store(!ran)
		idle := ran && !l.mirrorLate && len(l.suspects) == 0 && !l.peerEnded() && l.absentSince.IsZero()
		l.mu.Unlock()
		if idle {
			return
		}
	}
	l.d.wakeLifecycle()
}

// tick is the device's work on a slow tick: the heartbeat of the counters, and a search
// for halves that still wait although their event is due. A half that waits keeps waiting
// unless it must do something itself.
func (l *lifecycle) tick() {
	defer func() {
		if v := faultError(recover()); v != nil {
			l.d.callError(v)
		}
	}()
	l.d.counters.Tick()
	l.d.logs.CatchUp(false)
	l.suspects = nil
	if !l.running {
		return
	}
	if l.ticks++; l.ticks > 5 {
		l.pause, l.pace = 0, pace{} // the connection has held: later failures start with short pauses
	}
	mirrored, now := l.d.cfg.Counters != nil, time.Now()
	for i, q := range l.conn.queues {
		for _, s := range []suspect{{half: &l.d.tx[i].half, eng: q.tx, park: q.txPark}, {half: &l.d.rx[i].half, eng: q.rx, park: q.rxPark}} {
			s.eng.sample()
			if s.seq = s.half.waitSeq.Load(); s.seq%2 == 1 && s.eng.overdue() {
				l.suspects = append(l.suspects, s)
			}
			if mirrored {
				s.half.request(requestHeal)
			}
		}
		if l.d.tx[i].waitSeq.Load()%2 == 1 && q.tx.givesEarly() {
			q.txPark.wake() // the peer may never give as many responses as the half waits for
		}
		if l.d.tx[i].checkStall(q.tx, now) {
			q.txPark.wake()
		}
		l.d.callError(l.d.tx[i].settle(q.tx))
	}
	if l.conn.ctrl != nil {
		l.conn.ctrl.watch()
	}
	l.checkCarrier(now)
	if len(l.suspects) > 0 {
		l.recheckAt = time.After(eventGrace)
	}
}

// eventGrace is how long an event may be under way: the peer publishes first and then
// notifies, and may be descheduled in between. A [hypercall.Waiter] delays the events of a
// peer that sent several spurious ones; the slow tick does not know of that, and may count
// such an event as lost.
const eventGrace = 20 * time.Millisecond

// A suspect is a half that may have missed an event.
type suspect struct {
	half *half
	eng  engine
	park *parker
	seq  uint32 // number of its wait
}

// rescue wakes the suspects that still wait. On a correct system there are none.
func (l *lifecycle) rescue() {
	defer func() {
		if v := faultError(recover()); v != nil {
			l.d.callError(v)
		}
	}()
	l.recheckAt = nil
	suspects := l.suspects
	l.suspects = nil
	for _, s := range suspects {
		if !l.running || s.half.waitSeq.Load() != s.seq || !s.eng.overdue() {
			continue
		}
		s.half.rescued.Store(s.seq)
		l.d.counters.Record(telemetry.EventRescued, s.half.queue, 0, 0)
		s.park.wake()
	}
}
