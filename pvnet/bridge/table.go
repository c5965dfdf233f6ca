package bridge

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet"
)

// ages is how many steps of the table's time make Config.Age.
const ages = 8

// A table holds the stations that the bridge knows.
type table struct {
	most, perPort int
	now           atomic.Uint32 // the time in steps: ages of them make Config.Age

	mu      sync.RWMutex
	entries map[pvnet.MAC]*entry // guarded by mu
	learned int                  // guarded by mu: how many of them are not fixed
}

// An entry is what the table has of a station.
type entry struct {
	port  *Port         // guarded by table.mu
	fixed bool          // it is in the Guard of its port: it neither ages nor moves
	seen  atomic.Uint32 // table.now when it sent last
}

func newTable(cfg Config) table {
	return table{most: cfg.Stations, perPort: cfg.PerPort, entries: map[pvnet.MAC]*entry{}}
}

// station reports whether mac is the address of one station.
func station(mac pvnet.MAC) bool { return mac[0]&1 == 0 && mac != pvnet.MAC{} }

// guard makes entries at p that neither age nor move, for the addresses of its Guard. An error names an
// address that is in another port's Guard; then it has changed nothing.
func (t *table) guard(p *Port, guard []pvnet.MAC) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, mac := range guard {
		if e := t.entries[mac]; e != nil && e.fixed {
			return fmt.Errorf("%w: %v is in the Guard of the port of vif %s of domain %d, and a station is behind one port", ErrGuarded, mac, e.port.dev.ID(), e.port.dev.Peer())
		}
	}
	for _, mac := range guard {
		t.removeLocked(mac)
		t.entries[mac] = &entry{port: p, fixed: true}
	}
	return nil
}

// removeLocked forgets a station, if the table has it.
func (t *table) removeLocked(mac pvnet.MAC) {
	e := t.entries[mac]
	if e == nil {
		return
	}
	if !e.fixed {
		t.learned--
		e.port.learned--
	}
	delete(t.entries, mac)
}

// forget removes the stations of p; with guards, also those of its Guard.
func (t *table) forget(p *Port, guards bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for mac, e := range t.entries {
		if e.port == p && (guards || !e.fixed) {
			t.removeLocked(mac)
		}
	}
}

// fullFor reports whether the table has no room for another station of p. e is the station's entry at
// another port, or nil. The caller holds mu.
func (t *table) fullFor(p *Port, e *entry) bool {
	return p.learned >= t.perPort || e == nil && t.learned >= t.most
}

// learnLocked notes that mac is behind p. It reports whether it was behind another port before,
// and whether there is no room for it.
func (t *table) learnLocked(p *Port, mac pvnet.MAC) (moves, full bool) {
	e := t.entries[mac]
	switch {
	case e != nil && (e.fixed || e.port == p): // another goroutine made the entry since sort looked
		return false, false
	case t.fullFor(p, e):
		return false, true
	case e != nil:
		e.port.learned--
		e.port = p
		moves = true
	default:
		e = &entry{port: p}
		t.entries[mac] = e
		t.learned++
	}
	p.learned++
	e.seen.Store(t.now.Load())
	return moves, false
}

// age counts steps of the time, and forgets stations that have sent nothing for more than ages of
// them, until ctx ends.
func (t *table) age(ctx context.Context, step time.Duration) {
	tick := time.NewTicker(step)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			t.step()
		case <-ctx.Done():
			return
		}
	}
}

func (t *table) step() {
	now := t.now.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	for mac, e := range t.entries {
		if !e.fixed && now-e.seen.Load() > ages {
			t.removeLocked(mac)
		}
	}
}

// A Station is an address that a [Bridge] knows.
type Station struct {
	MAC  pvnet.MAC
	Port *Port
	Idle time.Duration // since it sent, in steps of an eighth of [Config].Age; 0 for a guarded one
	// Guarded says that the address is in the port's Guard.
	Guarded bool
}

// Stations returns what the bridge knows now, by address.
func (b *Bridge) Stations() []Station {
	t := &b.table
	now := t.now.Load()
	t.mu.RLock()
	list := make([]Station, 0, len(t.entries))
	for mac, e := range t.entries {
		s := Station{MAC: mac, Port: e.port, Guarded: e.fixed}
		if !e.fixed {
			s.Idle = time.Duration(now-e.seen.Load()) * (b.cfg.Age / ages)
		}
		list = append(list, s)
	}
	t.mu.RUnlock()
	slices.SortFunc(list, func(x, y Station) int { return slices.Compare(x.MAC[:], y.MAC[:]) })
	return list
}
