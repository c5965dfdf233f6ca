package xenbus_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"

	"barevif/xenbus"
	"barevif/xenbus/wire"
)

// A scripted server is a test that plays xenstored, message by message.
type scripted struct {
	t     testing.TB
	conns chan net.Conn // those the client has opened
}

func newScripted(t testing.TB) *scripted {
	return &scripted{t, make(chan net.Conn, 64)}
}

func (s *scripted) open(ctx context.Context) (io.ReadWriteCloser, error) {
	ours, theirs := net.Pipe()
	select {
	case s.conns <- theirs:
		return ours, nil
	default:
		return nil, errors.New("the server takes no more connections")
	}
}

// client dials; the test closes it.
func (s *scripted) client(cfg xenbus.Config) *xenbus.Client {
	s.t.Helper()
	c, err := xenbus.Dial(context.Background(), s.open, cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// accept is the next connection the client opened.
func (s *scripted) accept() *peer { return &peer{t: s.t, conn: <-s.conns} }

// A peer is the server's end of one connection.
type peer struct {
	t    testing.TB
	conn net.Conn
}

type message struct {
	wire.Header
	payload string
}

// next reads a message, or ok is false at the end of the connection.
func (p *peer) next() (m message, ok bool) {
	buf := make([]byte, wire.HeaderSize+wire.MaxPayload)
	h, payload, err := wire.ReadMessage(p.conn, buf)
	return message{h, string(payload)}, err == nil
}

// expect reads a message of a type.
func (p *peer) expect(op wire.Op) message {
	p.t.Helper()
	m, ok := p.next()
	if !ok || m.Op != op {
		p.t.Errorf("got message %+v (%v), want type %d", m, ok, op)
	}
	return m
}

// send writes a message; the client may have hung up.
func (p *peer) send(op wire.Op, id, tx uint32, payload string) {
	msg, err := wire.Append(nil, wire.Header{Op: op, ReqID: id, TxID: tx}, payload)
	if err != nil {
		p.t.Error(err)
	}
	p.conn.Write(msg)
}

func (p *peer) reply(m message, payload string) { p.send(m.Op, m.ReqID, m.TxID, payload) }
func (p *peer) refuse(m message, name string)   { p.send(wire.Error, m.ReqID, m.TxID, name+"\x00") }
func (p *peer) event(path, token string)        { p.send(wire.WatchEvent, 0, 0, path+"\x00"+token+"\x00") }

// claim writes a header that announces n bytes, and nothing more.
func (p *peer) claim(op wire.Op, id, n uint32) {
	b := make([]byte, wire.HeaderSize)
	binary.LittleEndian.PutUint32(b, uint32(op))
	binary.LittleEndian.PutUint32(b[4:], id)
	binary.LittleEndian.PutUint32(b[12:], n)
	p.conn.Write(b)
}

// serve answers each message with f until the connection ends.
func (p *peer) serve(f func(message)) {
	for {
		m, ok := p.next()
		if !ok {
			return
		}
		f(m)
	}
}
