// Package embeddedstore_test holds xenbus/xenstore/server to what Debian's xenstored does: the same
// requests are made to both, as domain 0 and as guests.
package embeddedstore_test

import (
	"errors"
	"fmt"
	"net"
	"testing"

	"barevif/hypercall"
	"barevif/test/xenstored"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/wire/wiretest"
)

// raw is a client that tests drive by hand.
type raw = wiretest.Client

const (
	ok       = wiretest.OK
	patience = wiretest.Patience
)

// z joins arguments, each with a NUL.
func z(args ...string) string { return wiretest.Z(args...) }

// A rig is a xenstore under test.
type rig interface {
	// dom0 opens a connection of domain 0.
	dom0() *raw
	// guest introduces a domain, gives it a home of its own and connects as it.
	guest(id hypercall.DomID) *raw
	// kill removes a guest's home and the guest; its connection must be closed.
	kill(id hypercall.DomID)
	// defect says whether the store has a defect that others know too, and its version.
	defect(d xenstored.Defect) (version string, has bool)
}

type embedded struct {
	t testing.TB
	*server.Store
}

func newEmbedded(t testing.TB, cfg server.Config) embedded {
	s := server.New(cfg)
	t.Cleanup(func() { s.Close() })
	return embedded{t, s}
}

func (e embedded) connect(dom hypercall.DomID) *raw {
	ours, theirs := net.Pipe()
	go e.ServeConn(theirs, dom)
	return wiretest.New(e.t, ours)
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

func (e embedded) defect(xenstored.Defect) (string, bool) { return "", false }
