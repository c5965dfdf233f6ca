package store_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/store"
	"barevif/xenbus/wire"
)

// raw is the least a client can be: one request, its reply, events put aside.
type raw struct {
	t      testing.TB
	conn   io.ReadWriteCloser
	buf    [wire.HeaderSize + wire.MaxPayload]byte
	lastID uint32
	events []string // path and token, joined by a blank
}

const ok = "OK\x00"

// patience bounds every wait for a peer in these tests.
const patience = 20 * time.Second

func newRaw(t testing.TB, conn io.ReadWriteCloser) *raw {
	if d, ok := conn.(interface{ SetDeadline(time.Time) error }); ok {
		d.SetDeadline(time.Now().Add(patience))
	}
	t.Cleanup(func() { conn.Close() })
	return &raw{t: t, conn: conn}
}

// z joins arguments, each with a NUL.
func z(args ...string) string { return strings.Join(args, "\x00") + "\x00" }

func (c *raw) send(op wire.Op, tx uint32, payload string) uint32 {
	c.t.Helper()
	c.lastID++
	msg, err := wire.Append(nil, wire.Header{Op: op, ReqID: c.lastID, TxID: tx}, payload)
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.conn.Write(msg); err != nil {
		c.t.Fatalf("send op %d: %v", op, err)
	}
	return c.lastID
}

// receive waits for the next reply; events before it are put aside.
func (c *raw) receive() (wire.Header, string) {
	c.t.Helper()
	for {
		h, p, err := wire.ReadMessage(c.conn, c.buf[:])
		if err != nil {
			c.t.Fatalf("receive: %v", err)
		}
		if h.Op != wire.WatchEvent {
			return h, string(p)
		}
		if h.ReqID != 0 || h.TxID != 0 {
			c.t.Errorf("event with req_id %d, tx_id %d", h.ReqID, h.TxID)
		}
		args := strings.Split(string(p), "\x00")
		if len(args) != 3 || args[2] != "" {
			c.t.Errorf("event %q", p)
			continue
		}
		c.events = append(c.events, args[0]+" "+args[1])
	}
}

// do gives the reply's payload, or the name of the error without its NUL.
func (c *raw) do(op wire.Op, tx uint32, payload string) string {
	c.t.Helper()
	id := c.send(op, tx, payload)
	h, p := c.receive()
	if h.ReqID != id || h.TxID != tx {
		c.t.Errorf("op %d: reply has req_id %d tx_id %d, want %d %d", op, h.ReqID, h.TxID, id, tx)
	}
	if h.Op == wire.Error {
		return strings.TrimSuffix(p, "\x00")
	}
	if h.Op != op {
		c.t.Errorf("reply to op %d is of op %d", op, h.Op)
	}
	return p
}

func (c *raw) want(op wire.Op, tx uint32, payload, want string) {
	c.t.Helper()
	if got := c.do(op, tx, payload); got != want {
		c.t.Errorf("op %d tx %d %s: got %s, want %s", op, tx, short(payload), short(got), short(want))
	}
}

func short(s string) string {
	if len(s) > 80 {
		return fmt.Sprintf("%q... (%d bytes)", s[:80], len(s))
	}
	return fmt.Sprintf("%q", s)
}

// heard gives the events queued up to now. A reply comes after all of them.
func (c *raw) heard() []string {
	c.t.Helper()
	c.do(wire.GetDomainPath, 0, z("0"))
	events := c.events
	c.events = nil
	return events
}

func (c *raw) wantEvents(want ...string) {
	c.t.Helper()
	if got := c.heard(); !slices.Equal(got, want) {
		c.t.Errorf("events %q, want %q", got, want)
	}
}

func (c *raw) start() uint32 {
	c.t.Helper()
	return atou(c.t, c.do(wire.TransactionStart, 0, z("")))
}

func atou(t testing.TB, s string) (n uint32) {
	t.Helper()
	if _, err := fmt.Sscanf(s, "%d\x00", &n); err != nil {
		t.Fatalf("%q is no number: %v", s, err)
	}
	return n
}

// embedded is a store under test, whose accounts are checked at the end.
type embedded struct {
	t testing.TB
	*store.Store
}

func newEmbedded(t testing.TB, cfg store.Config) embedded {
	s := store.New(cfg)
	t.Cleanup(func() {
		if err := s.Check(); err != nil {
			t.Error("accounts: ", err)
		}
		s.Close()
		if err := s.Check(); err != nil {
			t.Error("accounts after Close: ", err)
		}
	})
	return embedded{t, s}
}

func (e embedded) connect(dom hypercall.DomID) *raw {
	conn, _ := e.dial(dom)
	return newRaw(e.t, conn)
}

// dial gives the client's end, and the result of ServeConn.
func (e embedded) dial(dom hypercall.DomID) (net.Conn, <-chan error) {
	ours, theirs := socketPair(e.t)
	ended := make(chan error, 1)
	go func() { ended <- e.ServeConn(theirs, dom) }()
	return ours, ended
}

func (e embedded) dom0() *raw { return e.connect(0) }

func (e embedded) guest(id hypercall.DomID) *raw {
	e.Introduce(id)
	home := fmt.Sprintf("/local/domain/%d", id)
	if err := e.Mkdir(home); err != nil {
		e.t.Fatal(err)
	}
	if err := e.SetPerms(home, fmt.Sprintf("n%d", id)); err != nil {
		e.t.Fatal(err)
	}
	return e.connect(id)
}

// socketPair is two ends of a unix socket, which buffers, unlike net.Pipe.
func socketPair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "xs") // short: a socket's path is at most 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}
