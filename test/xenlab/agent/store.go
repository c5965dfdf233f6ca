//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"barevif/xenbus/xenstore/wire"
)

// A store is a minimal xenstore client: one request in flight, and a broadcast that some
// watched path has changed. It does not use the project's client on purpose: the lab must not
// depend on the code that it tests.
type store struct {
	rw      io.ReadWriteCloser
	replies chan message
	gone    chan struct{} // closed when the connection ends
	err     error         // why; read after gone

	mu sync.Mutex // one request at a time
	id uint32     // guarded by mu

	watchMu sync.Mutex
	watched chan struct{} // guarded by watchMu; closed and replaced by each event
}

type message struct {
	op      wire.Op
	id      uint32
	payload string
}

func newStore(rw io.ReadWriteCloser) *store {
	s := &store{
		rw: rw, replies: make(chan message, 1),
		gone: make(chan struct{}), watched: make(chan struct{}),
	}
	go s.receive()
	return s
}

func (s *store) receive() {
	defer close(s.gone)
	buf := make([]byte, wire.HeaderSize+wire.MaxPayload)
	for {
		h, payload, err := wire.ReadMessage(s.rw, buf)
		if err != nil {
			s.err = fmt.Errorf("xenstore: %w", err)
			return
		}
		if h.Op == wire.WatchEvent {
			s.watchMu.Lock()
			close(s.watched)
			s.watched = make(chan struct{})
			s.watchMu.Unlock()
			continue
		}
		s.replies <- message{h.Op, h.ReqID, string(payload)}
	}
}

func (s *store) request(op wire.Op, parts ...string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.id++
	b, err := wire.Append(nil, wire.Header{Op: op, ReqID: s.id}, parts...)
	if err != nil {
		return "", err
	}
	if _, err := s.rw.Write(b); err != nil {
		return "", fmt.Errorf("xenstore: %w", err)
	}
	select {
	case m := <-s.replies:
		if m.id != s.id {
			return "", fmt.Errorf("xenstore: reply to %d while waiting for %d", m.id, s.id)
		}
		if m.op == wire.Error {
			return "", fmt.Errorf("%s: %w", strings.TrimSuffix(parts[0], "\x00"), storeError(strings.TrimSuffix(m.payload, "\x00")))
		}
		return m.payload, nil
	case <-s.gone:
		return "", s.err
	}
}

type storeError string

func (e storeError) Error() string { return string(e) }

func isMissing(err error) bool {
	var e storeError
	return errors.As(err, &e) && e == "ENOENT"
}

// change returns a channel that the next event closes. Call it before you read the node.
func (s *store) change() <-chan struct{} {
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	return s.watched
}

func (s *store) read(path string) (string, error) { return s.request(wire.Read, path+"\x00") }
func (s *store) write(path, value string) error {
	_, err := s.request(wire.Write, path+"\x00", value)
	return err
}
func (s *store) remove(path string) error {
	_, err := s.request(wire.Rm, path+"\x00")
	return err
}
func (s *store) watch(path string) error {
	_, err := s.request(wire.Watch, path+"\x00", "xenlab\x00")
	return err
}
func (s *store) close() { s.rw.Close() }
