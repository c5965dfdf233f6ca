package emu

import (
	"io"
	"sync"
)

// pipeSize is the buffer of one direction, in bytes: several of the largest xenstore
// messages, so that an end can answer while the other does not read.
const pipeSize = 64 << 10

// newPipe makes a buffered connection within the process. Any goroutine may use its ends.
func newPipe() (near, far *pipeEnd) {
	a, b := newHalf(), newHalf()
	return &pipeEnd{in: a, out: b}, &pipeEnd{in: b, out: a}
}

type pipeEnd struct{ in, out *half }

// Read blocks until there is data or either end is closed.
func (e *pipeEnd) Read(p []byte) (int, error) { return e.in.read(p) }

// Write blocks until all of p is in the buffer or either end is closed.
func (e *pipeEnd) Write(p []byte) (int, error) { return e.out.write(p) }

// Close ends both directions for this end. The other end can still read what was sent to
// it.
func (e *pipeEnd) Close() error {
	e.in.close(true)
	e.out.close(false)
	return nil
}

// A half is one direction.
type half struct {
	mu      sync.Mutex
	changed *sync.Cond
	ring    []byte // guarded by mu
	start   int    // guarded by mu
	n       int    // guarded by mu
	closed  bool   // guarded by mu
	aborted bool   // guarded by mu: the reader itself closed it
}

func newHalf() *half {
	h := &half{ring: make([]byte, pipeSize)}
	h.changed = sync.NewCond(&h.mu)
	return h
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for h.n == 0 && !h.closed {
		h.changed.Wait()
	}
	switch {
	case h.aborted:
		return 0, io.ErrClosedPipe
	case h.n == 0:
		return 0, io.EOF
	}
	n := copy(p, h.ring[h.start:min(h.start+h.n, len(h.ring))]) // short if the data wraps
	h.start = (h.start + n) % len(h.ring)
	h.n -= n
	h.changed.Broadcast()
	return n, nil
}

func (h *half) write(p []byte) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for n < len(p) {
		for h.n == len(h.ring) && !h.closed {
			h.changed.Wait()
		}
		if h.closed {
			return n, io.ErrClosedPipe
		}
		at := (h.start + h.n) % len(h.ring)
		c := copy(h.ring[at:min(at+len(h.ring)-h.n, len(h.ring))], p[n:])
		n += c
		h.n += c
		h.changed.Broadcast()
	}
	return n, nil
}

func (h *half) close(byReader bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	h.aborted = h.aborted || byReader
	h.changed.Broadcast()
}
