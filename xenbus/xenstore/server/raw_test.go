package server_test

import (
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu/emutest"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/wire/wiretest"
)

// raw is a client that tests control message by message.
type raw = wiretest.Client

const (
	ok       = wiretest.OK
	patience = wiretest.Patience
)

// until waits until is reports true.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatal("never: ", what)
		}
	}
}

// z ends each argument with a NUL and joins them.
func z(args ...string) string { return wiretest.Z(args...) }

// embedded makes a store, and checks its accounts at the end of the test.
type embedded struct {
	t testing.TB
	*server.Store
}

func newEmbedded(t testing.TB, cfg server.Config) embedded {
	s := server.New(cfg)
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
	return wiretest.New(e.t, conn)
}

// dial returns the client's end, and the result of ServeConn.
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

// socketPair returns two ends of a unix socket, which buffers, unlike net.Pipe.
func socketPair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(emutest.SocketDir(t), "s"))
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
