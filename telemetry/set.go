package telemetry

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// A Set is all counters of one device. It outlives connections and queues. Any goroutine
// may call its methods at any time.
type Set struct {
	blocks []Block // rx and tx of queue 0, of queue 1, ...; each written by its owner only

	mu     sync.Mutex
	mirror Mirror               // guarded by mu
	reason string               // guarded by mu: why there is no mirror
	last   [][BlockWords]uint64 // guarded by mu: latest copies of the blocks
	base   [][BlockWords]uint64 // guarded by mu: the baseline that Snapshot subtracts
	reset  Reset                // guarded by mu
	status Status               // guarded by mu
	events [eventsKept]Event    // guarded by mu: ring of the latest events
	seq    uint64               // guarded by mu: number of the latest event
	healed uint64               // guarded by mu: the part of mirror_healed that was reported
}

// eventsKept is how many events a Set keeps.
const eventsKept = 256

// NewSet makes the counters of a device with up to the given number of queues, on the
// heap.
func NewSet(queues int) *Set {
	return &Set{
		blocks: make([]Block, 2*queues),
		last:   make([][BlockWords]uint64, 2*queues),
		base:   make([][BlockWords]uint64, 2*queues),
	}
}

// Queues returns the number of queues that the Set has blocks for.
func (s *Set) Queues() int { return len(s.blocks) / 2 }

// RX returns the receive block of queue q. It panics if there is no such queue.
func (s *Set) RX(q int) *Block { return &s.blocks[2*q+int(RX)] }

// TX returns the transmit block of queue q. It panics if there is no such queue.
func (s *Set) TX(q int) *Block { return &s.blocks[2*q+int(TX)] }

// Open mirrors the counters to store. If that fails they stay on the heap alone, and
// [Set.Backend] says why. With a nil store there is no mirror.
func (s *Set) Open(store Store, info Info) {
	if store == nil {
		return
	}
	info.Queues = s.Queues()
	m, err := store.Open(info)
	if err == nil {
		if err = s.Attach(m); err == nil {
			return
		}
		err = errors.Join(err, m.Close())
	}
	s.mu.Lock()
	s.reason = err.Error()
	s.mu.Unlock()
}

// ErrAttached is returned by [Set.Attach] for a second mirror.
var ErrAttached = errors.New("telemetry: there is a mirror already")

// Attach mirrors every block to m from now on and takes m over: [Set.Close] closes it. On
// an error m stays the caller's.
func (s *Set) Attach(m Mirror) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mirror != nil {
		return ErrAttached
	}
	sinks := make([]*sink, len(s.blocks))
	for i := range sinks {
		words, base := m.Words(i/2, Dir(i%2))
		if len(words) != BlockWords || (base != nil && len(base) != BlockWords) {
			return fmt.Errorf("telemetry: %s mirror gives %d and %d words for a block of %d",
				m.Kind(), len(words), len(base), BlockWords)
		}
		sinks[i] = &sink{words: (*[BlockWords]uint64)(words)}
		for _, r := range additive {
			if base != nil {
				copy(sinks[i].base[r[0]:r[1]], base[r[0]:r[1]])
			}
		}
	}
	for i := range s.blocks {
		s.blocks[i].attach(sinks[i])
	}
	s.mirror = m
	for _, e := range s.eventsLocked() {
		m.Record(e)
	}
	m.Update(s.status, s.reset)
	return nil
}

// Backend returns the kind of mirror, and why it is not a better one.
func (s *Set) Backend() (kind, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mirror == nil {
		return "heap", s.reason
	}
	return s.mirror.Kind(), s.mirror.Reason()
}

// Close detaches the mirror and closes it. The counters stay readable, and their owners
// may go on counting and publishing.
func (s *Set) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mirror == nil {
		return nil
	}
	for i := range s.blocks {
		s.blocks[i].attach(nil)
	}
	m := s.mirror
	s.mirror = nil
	return m.Close()
}

// SetStatus shows st beside the counters.
func (s *Set) SetStatus(st Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = st
	if s.mirror != nil {
		s.mirror.Update(st, s.reset)
	}
}

// Status returns what SetStatus was given last.
func (s *Set) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// Tick tells the mirror that the device is alive, and records an event for words that
// owners had to heal. Call it once a second.
func (s *Set) Tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readLocked()
	var healed uint64
	for i := range s.last {
		healed += s.last[i][MirrorHealed]
	}
	if healed != s.healed {
		s.recordLocked(EventTamper, NoQueue, healed-s.healed, 0)
		s.healed = healed
	}
	if s.mirror != nil {
		s.mirror.Update(s.status, s.reset)
	}
}

// Record stores an event; the kind defines the meaning of a and b. It takes a lock and
// reads the clock, so it is not for every frame.
func (s *Set) Record(k EventKind, queue int, a, b uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recordLocked(k, queue, a, b)
}

func (s *Set) recordLocked(k EventKind, queue int, a, b uint64) {
	s.seq++
	e := Event{Seq: s.seq, Time: time.Now(), Kind: k, Queue: queue, A: a, B: b}
	s.events[s.seq%eventsKept] = e
	if s.mirror != nil {
		s.mirror.Record(e)
	}
}

// Events returns the latest events, oldest first: at most 256.
func (s *Set) Events() []Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.eventsLocked()
}

func (s *Set) eventsLocked() []Event {
	n := min(s.seq, eventsKept)
	out := make([]Event, 0, n)
	for q := s.seq - n + 1; q <= s.seq; q++ {
		out = append(out, s.events[q%eventsKept])
	}
	return out
}

// readLocked copies the blocks to last.
func (s *Set) readLocked() {
	for i := range s.blocks {
		s.blocks[i].read(&s.last[i])
	}
}

// Snapshot returns the counters since the last Reset. Each block is of one instant;
// different blocks may be of slightly different instants.
func (s *Set) Snapshot() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snapshotLocked(true)
}

// Totals returns the counters since the Set was made, regardless of Reset.
func (s *Set) Totals() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snapshotLocked(false)
}

func (s *Set) snapshotLocked(sinceReset bool) Stats {
	s.readLocked()
	queues := make([]Queue, s.Queues())
	for i := range s.last {
		v := Values{s.last[i]}
		if sinceReset {
			for _, r := range additive {
				for w := r[0]; w < r[1]; w++ {
					v.words[w] -= s.base[i][w]
				}
			}
		}
		if Dir(i%2) == RX {
			queues[i/2].RX = v
		} else {
			queues[i/2].TX = v
		}
	}
	return Sum(queues)
}

// Reset makes the counters of Snapshot start from zero: it records their present values.
// It does not change gauges, mirrors and Totals.
func (s *Set) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readLocked()
	copy(s.base, s.last)
	s.reset = Reset{Count: s.reset.Count + 1, Time: time.Now()}
	for i := range s.last {
		if Dir(i%2) == RX {
			s.reset.RxPackets += s.last[i][Packets]
			s.reset.RxBytes += s.last[i][Bytes]
		} else {
			s.reset.TxPackets += s.last[i][Packets]
			s.reset.TxBytes += s.last[i][Bytes]
		}
	}
	s.recordLocked(EventReset, NoQueue, s.reset.Count, 0)
	if s.mirror != nil {
		s.mirror.Update(s.status, s.reset)
	}
}
