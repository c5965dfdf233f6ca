package wiretest

import (
	"encoding/binary"
	"io"
	"testing"

	"barevif/xenbus/xenstore/wire"
)

// A Peer is the server's end of one connection.
type Peer struct {
	t    testing.TB
	conn io.ReadWriteCloser
}

// NewPeer returns the server's end for the client at the other end of conn.
func NewPeer(t testing.TB, conn io.ReadWriteCloser) *Peer { return &Peer{t, conn} }

// Close closes the connection.
func (p *Peer) Close() { p.conn.Close() }

// A Message is a message that the client sent.
type Message struct {
	wire.Header
	Payload string
}

// Next reads a message; ok is false at the end of the connection.
func (p *Peer) Next() (m Message, ok bool) {
	buf := make([]byte, wire.HeaderSize+wire.MaxPayload)
	h, payload, err := wire.ReadMessage(p.conn, buf)
	return Message{h, string(payload)}, err == nil
}

// Expect reads a message and fails the test if it is not of type op.
func (p *Peer) Expect(op wire.Op) Message {
	p.t.Helper()
	m, ok := p.Next()
	if !ok || m.Op != op {
		p.t.Errorf("got message %+v (%v), want type %d", m, ok, op)
	}
	return m
}

// Send writes a message. It ignores a client that has closed the connection.
func (p *Peer) Send(op wire.Op, id, tx uint32, payload string) {
	msg, err := wire.Append(nil, wire.Header{Op: op, ReqID: id, TxID: tx}, payload)
	if err != nil {
		p.t.Error(err)
	}
	p.conn.Write(msg)
}

// Reply answers m with payload.
func (p *Peer) Reply(m Message, payload string) { p.Send(m.Op, m.ReqID, m.TxID, payload) }

// Refuse answers m with an error of this name.
func (p *Peer) Refuse(m Message, name string) { p.Send(wire.Error, m.ReqID, m.TxID, name+"\x00") }

// Event sends a watch event for path with a watch's token.
func (p *Peer) Event(path, token string) { p.Send(wire.WatchEvent, 0, 0, path+"\x00"+token+"\x00") }

// Claim writes only a header, which announces n bytes of payload.
func (p *Peer) Claim(op wire.Op, id, n uint32) {
	b := make([]byte, wire.HeaderSize)
	binary.LittleEndian.PutUint32(b, uint32(op))
	binary.LittleEndian.PutUint32(b[4:], id)
	binary.LittleEndian.PutUint32(b[12:], n)
	p.conn.Write(b)
}

// Serve answers each message with f until the connection ends.
func (p *Peer) Serve(f func(Message)) {
	for {
		m, ok := p.Next()
		if !ok {
			return
		}
		f(m)
	}
}
