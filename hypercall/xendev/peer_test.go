//go:build linux

package xendev

// Tests that need a second domain. It runs the test program with childEnv=peer; the
// control domain runs TestXenPeer, with the other's number in peerEnv.

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/xenbus/xenstore/wire"
)

const (
	peerEnv  = "XENDEV_TEST_PEER"
	peerNode = "data/xendev"
	peerDie  = 0xdead // written to the shared page: kill yourself with SIGKILL
)

// peer is the far side. It shares pages with domain 0 and with a domain that does not
// exist, opens a port for each, and answers events until told to die.
func peer() error {
	d, err := Open(Config{})
	if err != nil {
		return err
	}
	const nobody hypercall.DomID = 0x6fff
	rw, err := d.Share(0, 2, hypercall.ReadWrite)
	if err != nil {
		return err
	}
	ro, err := d.Share(0, 1, hypercall.ReadOnly)
	if err != nil {
		return err
	}
	foreign, err := d.Share(nobody, 1, hypercall.ReadWrite)
	if err != nil {
		return err
	}
	copy(ro.Page(0), "only to read")
	copy(foreign.Page(0), "not for you")
	w, err := d.Waiter()
	if err != nil {
		return err
	}
	p, err := w.Unbound(0)
	if err != nil {
		return err
	}
	q, err := w.Unbound(nobody)
	if err != nil {
		return err
	}
	c, err := talk(d)
	if err != nil {
		return err
	}
	say := fmt.Sprint(d.ID(), rw.Refs[0], rw.Refs[1], ro.Refs[0], foreign.Refs[0], p.ID(), q.ID())
	if h, v, err := c.ask(wire.Write, peerNode+"\x00", say); err != nil || h.Op != wire.Write {
		return fmt.Errorf("%q, %w", v, err)
	}
	in, out := rw.In(0), rw.Out(4)
	for {
		if err := w.Wait(time.Now().Add(time.Minute), true); err != nil {
			return err
		}
		v := in.Load()
		if v == peerDie {
			return syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		out.Store(v + 1)
		if err := p.Notify(); err != nil {
			return err
		}
	}
}

// readPeer waits for a line of the peer.
func readPeer(t *testing.T, d *Domain, domid string) string {
	t.Helper()
	c, err := talk(d)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	stop := time.AfterFunc(time.Minute, func() { c.Close() })
	defer stop.Stop()
	path := "/local/domain/" + domid + "/" + peerNode + "\x00"
	if h, v, err := c.ask(wire.Watch, path, "token\x00"); err != nil || h.Op != wire.Watch {
		t.Fatalf("watch: %q, %v", v, err)
	}
	for {
		h, say, err := c.ask(wire.Read, path)
		if err != nil {
			t.Fatal(err)
		}
		if h.Op == wire.Read && strings.TrimSpace(say) != "" {
			return say
		}
		if err := c.event(); err != nil {
			t.Fatal("the peer says nothing:", err)
		}
	}
}

func TestXenPeer(t *testing.T) {
	domid := os.Getenv(peerEnv)
	if domid == "" {
		t.Skip(peerEnv + " names no second domain that runs this test's peer")
	}
	d := onXen(t, Config{})
	var peer hypercall.DomID
	var rw0, rw1, ro, foreign hypercall.GrantRef
	var p, q hypercall.PortID
	if _, err := fmt.Sscan(readPeer(t, d, domid), &peer, &rw0, &rw1, &ro, &foreign, &p, &q); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(peer) != domid {
		t.Errorf("domain %s takes itself for %d", domid, peer)
	}

	m, err := d.Map(peer, []hypercall.GrantRef{rw0, rw1}, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Release()
	var ge *hypercall.GrantError
	if _, err := d.Map(peer, []hypercall.GrantRef{rw0, foreign}, hypercall.ReadOnly); !errors.As(err, &ge) || ge.Ref != foreign {
		t.Errorf("map of what is granted to another: %v", err)
	} else {
		t.Logf("map of what is granted to another: %v", err)
	}
	if _, err := d.Map(peer, []hypercall.GrantRef{ro}, hypercall.ReadWrite); !errors.As(err, &ge) || ge.Ref != ro {
		t.Errorf("writable map of a read-only grant: %v", err)
	}

	buf := make([]byte, 12)
	area := func(ref hypercall.GrantRef) hypercall.Area { return hypercall.Area{Dom: peer, Ref: ref} }
	local := hypercall.Area{Local: buf}
	ops := []hypercall.CopyOp{
		{Src: area(foreign), Dst: local, Len: 12},
		{Src: local, Dst: area(foreign), Len: 12},
		{Src: local, Dst: area(ro), Len: 12},
		{Src: area(ro), Dst: local, Len: 12},
		{Src: area(ro), Dst: area(rw1), Len: 12},
	}
	if err := d.Copy(ops); err != nil {
		t.Fatal(err)
	}
	for i, op := range ops {
		if good := i >= 3; (op.Status == hypercall.OK) != good {
			t.Errorf("operation %d: %v", i, op.Status)
		}
		t.Logf("operation %d: %v", i, op.Status)
	}
	if string(buf) != "only to read" || string(m.Page(1)[:12]) != "only to read" {
		t.Errorf("copied %q and %q", buf, m.Page(1)[:12])
	}

	w, err := d.Waiter()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Bind(peer, q); !errors.Is(err, hypercall.ErrNoPort) {
		t.Errorf("bind to a port that is open to another: %v", err)
	}
	port, err := w.Bind(peer, p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Bind(peer, p); !errors.Is(err, hypercall.ErrNoPort) {
		t.Errorf("a second bind: %v", err)
	}
	wait := func() {
		t.Helper()
		if err := w.Wait(time.Now().Add(soon), true); err != nil {
			t.Fatal(err)
		}
	}
	wait() // the event of the binding
	in, out := m.In(4), m.Out(0)
	start := time.Now()
	const rounds = 200
	for i := range uint32(rounds) {
		out.Store(i * 7)
		if err := port.Notify(); err != nil {
			t.Fatal(err)
		}
		wait()
		if v := in.Load(); v != i*7+1 {
			t.Fatalf("round %d: %d", i, v)
		}
	}
	t.Logf("%v a round trip", time.Since(start)/rounds)

	out.Store(peerDie)
	if err := port.Notify(); err != nil {
		t.Fatal(err)
	}
	dead := []hypercall.CopyOp{{Src: area(ro), Dst: local, Len: 12}}
	for end := time.Now().Add(soon); dead[0].Status == hypercall.OK; time.Sleep(10 * time.Millisecond) {
		if err := d.Copy(dead); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(end) {
			t.Fatal("the peer does not die")
		}
	}
	if v := in.Load(); v != (rounds-1)*7+1 {
		t.Errorf("the page of the dead changed: %d", v)
	}
	if err := port.Notify(); err != nil {
		t.Errorf("notify of the dead: %v", err)
	}
	if got := m.Page(1)[:shm.PageSize]; string(got[:12]) != "only to read" {
		t.Errorf("the page of the dead: %q", got[:12])
	}
}
