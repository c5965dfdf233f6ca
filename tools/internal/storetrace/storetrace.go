// Package storetrace listens in on a connection to an embedded xenstore and tells
// what its client changes there, in order and completely, which a watch cannot: it
// says "look", and by then the value may be another.
//
// It is for showing a handshake to people. What it cannot make sense of it passes
// on and does not report: the store decides what is valid.
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

// A Change is a node a domain wrote, made or removed.
type Change struct {
	By      hypercall.DomID
	Path    string // absolute
	Value   string
	Removed bool
}

// Tap is conn, of which the store is the server and dom the client. It calls tell
// with what one request changed, a transaction counting as one, once the store has
// said yes. tell is called by whoever reads or writes conn and must not wait.
func Tap(conn io.ReadWriteCloser, dom hypercall.DomID, tell func([]Change)) io.ReadWriteCloser {
	return &tap{ReadWriteCloser: conn, dom: dom, tell: tell, open: make(map[uint32][]Change)}
}

type tap struct {
	io.ReadWriteCloser
	dom  hypercall.DomID
	tell func([]Change)

	in, out stream // in: read and out: written by one goroutine each

	mu      sync.Mutex
	waiting []request           // guarded by mu: unanswered, oldest first
	lost    bool                // guarded by mu: more than maxWaiting were, so nothing is known
	open    map[uint32][]Change // guarded by mu: of transactions
}

// A request is what its answer decides about.
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

// Write looks at answers before the client sees them: what a client does because
// of another's change is told after it.
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

// settle takes the oldest request, which is the one answered: a connection's
// requests are answered in order.
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
	dead bool // no message came where one should
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
