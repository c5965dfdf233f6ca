// Package wiretest is both ends of the xenstore protocol, for tests that control every
// message: a [Client] that sends nothing by itself, and its [Peer].
package wiretest

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/xenbus/xenstore/wire"
)

// A Client is a minimal client: it sends one request, waits for the reply and collects
// events meanwhile. Its methods fail the test when the store breaks the protocol.
type Client struct {
	Conn   io.ReadWriteCloser
	Buf    [wire.HeaderSize + wire.MaxPayload]byte
	LastID uint32   // of a request
	Events []string // path and token, joined by a blank

	t testing.TB
}

// OK is the payload of a reply without any other content.
const OK = "OK\x00"

// Patience bounds every wait of a Client. It is long because the machine may be busy.
const Patience = 5 * time.Minute

// New returns a client that takes conn over.
func New(t testing.TB, conn io.ReadWriteCloser) *Client {
	if d, ok := conn.(interface{ SetDeadline(time.Time) error }); ok {
		d.SetDeadline(time.Now().Add(Patience))
	}
	t.Cleanup(func() { conn.Close() })
	return &Client{t: t, Conn: conn}
}

// Z ends each argument with a NUL and joins them.
func Z(args ...string) string { return strings.Join(args, "\x00") + "\x00" }

// Send sends a request and returns its request id.
func (c *Client) Send(op wire.Op, tx uint32, payload string) uint32 {
	c.t.Helper()
	c.LastID++
	msg, err := wire.Append(nil, wire.Header{Op: op, ReqID: c.LastID, TxID: tx}, payload)
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.Conn.Write(msg); err != nil {
		c.t.Fatalf("send op %d: %v", op, err)
	}
	return c.LastID
}

// Receive waits for the next reply and collects the events before it.
func (c *Client) Receive() (wire.Header, string) {
	c.t.Helper()
	for {
		h, p, err := wire.ReadMessage(c.Conn, c.Buf[:])
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
		c.Events = append(c.Events, args[0]+" "+args[1])
	}
}

// Do sends a request and returns the payload of the reply, or the error's name without
// its NUL.
func (c *Client) Do(op wire.Op, tx uint32, payload string) string {
	c.t.Helper()
	id := c.Send(op, tx, payload)
	h, p := c.Receive()
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

// Want is Do with the expected reply.
func (c *Client) Want(op wire.Op, tx uint32, payload, want string) {
	c.t.Helper()
	if got := c.Do(op, tx, payload); got != want {
		c.t.Errorf("op %d tx %d %s: got %s, want %s", op, tx, Short(payload), Short(got), Short(want))
	}
}

// Short shortens s for a message of the test.
func Short(s string) string {
	if len(s) > 80 {
		return fmt.Sprintf("%q... (%d bytes)", s[:80], len(s))
	}
	return fmt.Sprintf("%q", s)
}

// Heard returns the events queued up to now: the store sends them before the reply to Do.
func (c *Client) Heard() []string {
	c.t.Helper()
	c.Do(wire.GetDomainPath, 0, Z("0"))
	events := c.Events
	c.Events = nil
	return events
}

// WantEvents checks the result of Heard.
func (c *Client) WantEvents(want ...string) {
	c.t.Helper()
	if got := c.Heard(); !slices.Equal(got, want) {
		c.t.Errorf("events %q, want %q", got, want)
	}
}

// Start begins a transaction.
func (c *Client) Start() uint32 {
	c.t.Helper()
	return Number(c.t, c.Do(wire.TransactionStart, 0, Z("")))
}

// Number parses a reply that consists of a number.
func Number(t testing.TB, s string) (n uint32) {
	t.Helper()
	if _, err := fmt.Sscanf(s, "%d\x00", &n); err != nil {
		t.Fatalf("%q is no number: %v", s, err)
	}
	return n
}
