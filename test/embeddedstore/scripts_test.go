//go:build linux

package embeddedstore_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"barevif/hypercall"
	"barevif/test/xenstored"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/wire"
	"barevif/xenbus/xenstore/wire/wiretest"
)

// xenstoredRig is the rig of the real daemon.
type xenstoredRig struct {
	t testing.TB
	*xenstored.Daemon
}

func startXenstored(t testing.TB) xenstoredRig { return xenstoredRig{t, xenstored.Start(t)} }

func (x xenstoredRig) guest(id hypercall.DomID) *raw {
	conn, err := x.Dial(x.t.Context(), id)
	if err != nil {
		x.t.Fatal(err)
	}
	return wiretest.New(x.t, conn)
}

func (x xenstoredRig) dom0() *raw { return x.guest(0) }

func (x xenstoredRig) kill(id hypercall.DomID) {
	if err := x.Destroy(id); err != nil {
		x.t.Fatal(err)
	}
}

func (x xenstoredRig) defect(d xenstored.Defect) (string, bool) { return x.Version(), x.Has(d) }

// TestRowsHoldForDebiansXenstored keeps the conformance table honest.
func TestRowsHoldForDebiansXenstored(t *testing.T) {
	for _, row := range conformance {
		t.Run(row.name, func(t *testing.T) { row.run(t, startXenstored(t)) })
	}
}

// A twin does the same to both daemons.
type twin struct{ ours, theirs *raw }

func (w twin) do(op wire.Op, tx uint32, payload string) (ours, theirs string) {
	return w.ours.Do(op, tx, payload), w.theirs.Do(op, tx, payload)
}

// TestRandomScriptsAnswerLikeXenstored runs the same requests against both: every
// reply and every event has to be the same. BAREVIF_SCRIPTS says how many scripts,
// if not 4.
func TestRandomScriptsAnswerLikeXenstored(t *testing.T) {
	scripts := uint64(4)
	if s := os.Getenv("BAREVIF_SCRIPTS"); s != "" {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		scripts = n
	}
	for seed := range scripts {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { runScript(t, seed, 1000) })
	}
}

// A script makes up requests, and makes each of both stores.
type script struct {
	*testing.T
	rnd          *rand.Rand
	ours, theirs rig
	clients      []twin     // two of domain 0, then domains 3 and 4
	txs          [][]uint32 // open ones, by client
}

func runScript(t *testing.T, seed uint64, steps int) {
	s := &script{
		T: t, rnd: rand.New(rand.NewPCG(seed, 1)),
		ours: newEmbedded(t, server.Config{}), theirs: startXenstored(t),
	}
	for range 2 {
		s.clients = append(s.clients, twin{s.ours.dom0(), s.theirs.dom0()})
	}
	s.clients = append(s.clients, s.guest(3), s.guest(4))
	s.txs = make([][]uint32, len(s.clients))
	for step := range steps {
		if s.rnd.IntN(100) == 0 {
			s.replaceGuest(2 + s.rnd.IntN(2))
		} else {
			s.step(fmt.Sprint("step ", step), s.rnd.IntN(len(s.clients)))
		}
	}
}

func (s *script) guest(id hypercall.DomID) twin { return twin{s.ours.guest(id), s.theirs.guest(id)} }

func (s *script) pick(from ...string) string { return from[s.rnd.IntN(len(from))] }

func (s *script) path() string {
	p := s.pick("", "", "/", "/local/domain/3/", "/local/domain/4/", "/local/domain/0/")
	for range 1 + s.rnd.IntN(3) {
		p += s.pick("a", "b", "long-name-of-a-node") + "/"
	}
	if s.rnd.IntN(30) == 0 {
		return s.pick("/", "", "/local", "/local/domain", "/local/domain/3", "/a//b", p)
	}
	return strings.TrimSuffix(p, "/")
}

func (s *script) request() (op wire.Op, payload string) {
	path := z(s.path())
	switch k := s.rnd.IntN(99); {
	case k < 30:
		return wire.Write, path + strings.Repeat("v", s.rnd.IntN(2)*s.rnd.IntN(46)*s.rnd.IntN(46))
	case k < 40:
		return wire.Mkdir, path
	case k < 48:
		return wire.Rm, path
	case k < 56:
		return wire.Read, path
	case k < 62:
		return wire.Directory, path
	case k < 66:
		return wire.GetPerms, path
	case k < 76:
		if path == z("/") {
			return wire.GetPerms, path // xenstored loses all nodes if the owner of / dies
		}
		for range 1 + s.rnd.IntN(4) {
			path += z(s.pick("n", "r", "w", "b") + s.pick("0", "3", "3", "4", "4", "9"))
		}
		return wire.SetPerms, path
	case k < 81:
		return wire.Watch, path + z(s.pick("t", "u"))
	case k < 83:
		return wire.Unwatch, path + z(s.pick("t", "u"))
	case k < 92:
		return wire.TransactionStart, path
	case k < 98:
		return wire.TransactionEnd, z(s.pick("T", "T", "T", "F"))
	}
	return wire.Watch, z(s.pick("@introduceDomain", "@releaseDomain"), "s")
}

func (s *script) step(name string, who int) {
	c := s.clients[who]
	var tx uint32
	if n := len(s.txs[who]); n > 0 && s.rnd.IntN(2) == 0 {
		tx = s.txs[who][s.rnd.IntN(n)]
	}
	op, payload := s.request()
	if op == wire.TransactionStart && s.rnd.IntN(10) > 0 {
		tx = 0
	}
	name += fmt.Sprintf(": client %d op %d tx %d %s", who, op, tx, wiretest.Short(payload))
	got, want := c.do(op, tx, payload)
	if op == wire.Rm && tx != 0 && got == ok && (want == "EIO" || want == "EINVAL") {
		// The transaction sees a parent older than its children, or the other way
		// round. Xenstored has removed half of them; neither lets it be committed.
		op, payload = wire.TransactionEnd, z("T")
		if got, want = c.do(op, tx, payload); got != "EAGAIN" {
			s.Fatalf("%s: doomed transaction ends with %s", name, wiretest.Short(got))
		}
	}
	if got != want {
		s.Fatalf("%s: got %s, want %s", name, wiretest.Short(got), wiretest.Short(want))
	}
	switch {
	case op == wire.TransactionStart && strings.HasSuffix(got, "\x00"):
		s.txs[who] = append(s.txs[who], wiretest.Number(s, got))
	case op == wire.TransactionEnd:
		s.txs[who] = slices.DeleteFunc(s.txs[who], func(id uint32) bool { return id == tx })
	}
	for i, c := range s.clients {
		if got, want := c.ours.Heard(), c.theirs.Heard(); !slices.Equal(got, want) {
			s.Fatalf("%s: then client %d hears %q, want %q", name, i, got, want)
		}
	}
}

// replaceGuest has another domain follow one, with the same number. It goes round
// two places where xenstored lets the second have what was the first's: a node of
// which an open transaction made the first the owner, and permissions on the node
// last written before the second came.
func (s *script) replaceGuest(i int) {
	for i, c := range s.clients {
		for _, tx := range s.txs[i] {
			c.do(wire.TransactionEnd, tx, z("F"))
		}
		s.txs[i] = nil
	}
	id := hypercall.DomID(i + 1)
	dom0 := s.clients[0]
	dom0.do(wire.Mkdir, 0, z(fmt.Sprint("/local/domain/", id))) // it may be gone
	s.clients[i].theirs.Conn.Close()
	s.ours.kill(id)
	s.theirs.kill(id)
	dom0.do(wire.Write, 0, z("/tool/bump"))
	s.clients[i] = s.guest(id)
	for _, c := range s.clients {
		// How many merge, and in which order a domain's nodes go, is chance.
		c.ours.Heard()
		c.theirs.Heard()
	}
}
