package xenstore_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"

	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/wire/wiretest"
)

// A scripted server is a test that plays xenstored, message by message.
type scripted struct {
	t     testing.TB
	conns chan net.Conn // connections that the client has opened
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

// client dials the server; the test closes the client.
func (s *scripted) client(cfg xenstore.Config) *xenstore.Client {
	s.t.Helper()
	c, err := xenstore.Dial(context.Background(), s.open, cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// accept returns the next connection that the client opened.
func (s *scripted) accept() *wiretest.Peer { return wiretest.NewPeer(s.t, <-s.conns) }
