// Package store_test holds xenbus/store to what Debian's xenstored does: the same
// requests are made to both, as domain 0 and as guests.
package store_test

import (
	"errors"
	"fmt"
	"io"
	"net"
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

// A rig is a xenstore under test.
type rig interface {
	// dom0 opens a connection of domain 0.
	dom0() *raw
	// guest introduces a domain, gives it a home of its own and connects as it.
	guest(id hypercall.DomID) *raw
	// kill removes a guest's home and the guest; its connection must be closed.
	kill(id hypercall.DomID)
}

type embedded struct {
	t testing.TB
	*store.Store
}

func newEmbedded(t testing.TB, cfg store.Config) embedded {
	s := store.New(cfg)
	t.Cleanup(func() { s.Close() })
	return embedded{t, s}
}

func (e embedded) connect(dom hypercall.DomID) *raw {
	ours, theirs := net.Pipe()
	go e.ServeConn(theirs, dom)
	return newRaw(e.t, ours)
}

func (e embedded) dom0() *raw { return e.connect(0) }

func (e embedded) guest(id hypercall.DomID) *raw {
	e.Introduce(id)
	home := fmt.Sprintf("/local/domain/%d", id)
	if err := errors.Join(e.Mkdir(home), e.SetPerms(home, fmt.Sprintf("n%d", id))); err != nil {
		e.t.Fatal(err)
	}
	return e.connect(id)
}

func (e embedded) kill(id hypercall.DomID) {
	if err := e.Remove(fmt.Sprintf("/local/domain/%d", id)); err != nil {
		e.t.Fatal(err)
	}
	e.DomainDied(id)
}
