// Package storetrace listens in on a connection to an embedded xenstore and reports its
// client's changes, completely and in order. A watch cannot do that: its event carries no
// value, and a later read may find another one.
//
// It serves to show a handshake to people. It passes on messages that it cannot parse,
// and does not report them: the store decides which messages are valid.
package storetrace

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/wire"
)

// A Change is a node that a domain wrote, made or removed.
type Change struct {
	By      hypercall.DomID
	Path    string // absolute
	Value   string
	Removed bool
}

// Tap returns conn, of which the store is the server and dom the client. It calls tell
// with the changes of each request once the store has accepted it; a transaction counts
// as one request. The goroutines that read and write conn call tell, so it must not
// block.
func Tap(conn io.ReadWriteCloser, dom hypercall.DomID, tell func([]Change)) io.ReadWriteCloser {
	return &tap{ReadWriteCloser: conn, dom: dom, tell: tell, open: make(map[uint32][]Change)}
}

type tap struct {
	io.ReadWriteCloser
	dom  hypercall.DomID
	tell func([]Change)

	in, out stream // in: bytes read, out: bytes written; each used by one goroutine

	mu      sync.Mutex
	waiting []request           // guarded by mu: unanswered requests, oldest first
	lost    bool                // guarded by mu: there were more than maxWaiting, so replies cannot be matched
	open    map[uint32][]Change // guarded by mu: changes of open transactions
}

// A request is what has to be known when its reply comes.
type request struct {
	op     wire.Op
	tx     uint32
	change []Change
	commit bool
}

func (t *tap) Read(p []byte) (int, error) {
	n, err := t.ReadWriteCloser.Read(p)
	t.in.feed(p[:n], t.asked)
	return n, err
}

// Write parses replies before the client gets them, so that what another client does
// because of a change is reported after the change.
func (t *tap) Write(p []byte) (int, error) {
	t.out.feed(p, t.answered)
	return t.ReadWriteCloser.Write(p)
}

func (t *tap) asked(h wire.Header, payload []byte) {
	r := request{op: h.Op, tx: h.TxID}
	name, value, _ := bytes.Cut(payload, []byte{0})
	switch h.Op {
	case wire.Write, wire.Mkdir, wire.Rm:
		r.change = []Change{{By: t.dom, Path: t.absolute(string(name)), Value: string(value), Removed: h.Op == wire.Rm}}
	case wire.TransactionEnd:
		r.commit = string(name) == "T"
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lost = t.lost || len(t.waiting) == maxWaiting; !t.lost {
		t.waiting = append(t.waiting, r)
	}
}

// maxWaiting is far more than a store lets a client have unanswered.
const maxWaiting = 1024

func (t *tap) answered(h wire.Header, _ []byte) {
	if h.Op == wire.WatchEvent {
		return
	}
	if done := t.settle(h.Op != wire.Error); len(done) > 0 {
		t.tell(done)
	}
}

// settle takes the oldest request, to which the reply belongs: the requests of a
// connection are answered in order.
func (t *tap) settle(ok bool) (done []Change) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lost || len(t.waiting) == 0 {
		return nil
	}
	r := t.waiting[0]
	t.waiting = t.waiting[1:]
	switch {
	case r.op == wire.TransactionEnd:
		if ok && r.commit {
			done = t.open[r.tx]
		}
		delete(t.open, r.tx)
	case !ok:
	case r.tx != 0 && r.change != nil:
		t.open[r.tx] = append(t.open[r.tx], r.change...)
	default:
		done = r.change
	}
	return done
}

func (t *tap) absolute(path string) string {
	if strings.HasPrefix(path, "/") {
		return path
	}
	return fmt.Sprintf("/local/domain/%d/%s", t.dom, path)
}

// A stream cuts one direction into messages.
type stream struct {
	buf  []byte
	one  [wire.HeaderSize + wire.MaxPayload]byte
	dead bool // a message with an impossible length
}

func (s *stream) feed(p []byte, each func(wire.Header, []byte)) {
	if s.dead {
		return
	}
	s.buf = append(s.buf, p...)
	for {
		r := bytes.NewReader(s.buf)
		h, payload, err := wire.ReadMessage(r, s.one[:])
		if err != nil {
			s.dead = errors.Is(err, wire.ErrTooLong)
			return // the rest of the message is still to come
		}
		each(h, payload)
		s.buf = s.buf[:copy(s.buf, s.buf[len(s.buf)-r.Len():])]
	}
}
