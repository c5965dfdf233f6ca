package telemetry

import (
	"errors"
	"sync/atomic"
	"testing"
)

// heapMirror is a mirror that the race detector can see.
type heapMirror struct {
	words  [][BlockWords]uint64
	base   [][]uint64
	status Status
	reset  Reset
	events []Event
	closed int
	short  bool
}

func newHeapMirror(queues int) *heapMirror {
	return &heapMirror{words: make([][BlockWords]uint64, 2*queues), base: make([][]uint64, 2*queues)}
}

// attached returns a Set that is mirrored to a heapMirror.
func attached(t *testing.T, queues int) (*Set, *heapMirror) {
	t.Helper()
	s, m := NewSet(queues), newHeapMirror(queues)
	if err := s.Attach(m); err != nil {
		t.Fatal(err)
	}
	return s, m
}

func (m *heapMirror) Words(q int, d Dir) (words, base []uint64) {
	i := 2*q + int(d)
	if m.short {
		return m.words[i][:BlockWords-1], nil
	}
	return m.words[i][:], m.base[i]
}

func (m *heapMirror) Kind() string                { return "test" }
func (m *heapMirror) Reason() string              { return "because" }
func (m *heapMirror) Update(st Status, r Reset)   { m.status, m.reset = st, r }
func (m *heapMirror) Record(e Event)              { m.events = append(m.events, e) }
func (m *heapMirror) Close() error                { m.closed++; return nil }
func (m *heapMirror) block(q int, d Dir) []uint64 { return m.words[2*q+int(d)][:] }

// read copies a block as the kernel copies a map element: upwards, a word at a
// time. It reports whether the markers were equal.
func (m *heapMirror) read(q int, d Dir) (w [BlockWords]uint64, whole bool) {
	for i := range w {
		w[i] = atomic.LoadUint64(&m.words[2*q+int(d)][i])
	}
	return w, w[wordDone] == w[wordStart]
}

type storeFunc func(Info) (Mirror, error)

func (f storeFunc) Open(i Info) (Mirror, error) { return f(i) }

var errRefused = errors.New("refused")
