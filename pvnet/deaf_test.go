package pvnet_test

import (
	"bytes"
	"context"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/wire"
)

// A deafDomain does not hear whether the transaction that announced its first rings was committed.
// Its connection to xenstore answers nothing for some time, or breaks with late 0, and then
// xenstore refuses the next transaction.
type deafDomain struct {
	*emu.Domain
	late  time.Duration
	phase *atomic.Int32 // 0: hears, 1: the commit was sent, 2: hears again
}

func deaf(dom *emu.Domain, late time.Duration) deafDomain {
	return deafDomain{dom, late, new(atomic.Int32)}
}

func (d deafDomain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := d.Domain.Store(ctx)
	return &deafConn{ReadWriteCloser: c, d: d}, err
}

type deafConn struct {
	io.ReadWriteCloser
	d      deafDomain
	ring   bool          // a ring was written
	commit atomic.Uint32 // the request that commits it
	rest   []byte        // of a message that is being read
}

func (c *deafConn) Write(b []byte) (int, error) {
	c.ring = c.ring || bytes.Contains(b, []byte("tx-ring-ref"))
	h, _, err := wire.ReadMessage(bytes.NewReader(b), make([]byte, wire.HeaderSize+wire.MaxPayload))
	if err == nil && c.ring && h.Op == wire.TransactionEnd && c.d.phase.CompareAndSwap(0, 1) {
		c.commit.Store(h.ReqID)
	}
	return c.ReadWriteCloser.Write(b)
}

func (c *deafConn) Read(b []byte) (int, error) {
	if len(c.rest) == 0 {
		h, payload, err := wire.ReadMessage(c.ReadWriteCloser, make([]byte, wire.HeaderSize+wire.MaxPayload))
		if err != nil {
			return 0, err
		}
		switch {
		case h.Op == wire.TransactionEnd && h.ReqID == c.commit.Load() && c.d.late == 0:
			return 0, io.ErrUnexpectedEOF
		case c.d.late > 0 && c.commit.Load() != 0 && c.d.phase.CompareAndSwap(1, 2):
			time.Sleep(c.d.late)
		case h.Op == wire.TransactionStart && c.d.phase.CompareAndSwap(1, 2):
			h.Op, payload = wire.Error, []byte("ENOSPC\x00")
		}
		c.rest, _ = wire.Append(nil, h, string(payload))
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// A deafLab has a vif whose frontend's domain is deaf.
type deafLab struct {
	*lab
	v           toolstack.Vif
	dom         deafDomain
	backs       <-chan *pvnet.Device
	stop        func()
	front, back logtest.Log // of each end
}

func inDeafLab(t *testing.T, late time.Duration, f func(t *testing.T, l *deafLab)) {
	synctest.Test(t, func(t *testing.T) {
		l := &deafLab{lab: newLab(t)}
		l.dom = deaf(l.domain(1), late)
		bdom := l.domain(2)
		l.v = l.add(toolstack.Vif{Front: 1, Back: 2})
		l.backs, l.stop = l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Logger: l.back.Logger()}})
		f(t, l)
		l.stop()
		if l.dom.phase.Load() == 0 {
			t.Error("it was never deaf")
		}
	})
}

func (l *deafLab) connect(limit time.Duration) (*pvnet.Device, error) {
	patience, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return pvnet.Connect(patience, l.dom, "0", pvnet.Config{Logger: l.front.Logger()})
}

// mustConnect returns both ends, which receive.
func (l *deafLab) mustConnect() (front, back *pvnet.Device) {
	l.t.Helper()
	front, err := l.connect(5 * time.Minute)
	if err != nil {
		l.t.Fatalf("%v\n%s", err, &l.front)
	}
	back = wait(l.t, l.backs)
	go listens(front)
	go listens(back)
	return front, back
}

// requireOrder requires that the backend has met no rings that were gone, and that none went while
// it used them.
func (l *deafLab) requireOrder() {
	l.t.Helper()
	if lines := l.front.Lines("quarantined"); len(lines) > 0 {
		l.t.Errorf("%q", lines)
	}
	for _, line := range append(l.back.Lines("cannot connect"), l.back.Lines("link down")...) {
		if !strings.Contains(line, "is Closing") {
			l.t.Errorf("%s\nfrontend:\n%s", line, &l.front)
		}
	}
}

// A frontend that does not hear whether its backend was told of the rings keeps them, because the
// backend may use them: both close in order, and connect again.
func TestAnAnnouncementWithoutAnAnswer(t *testing.T) {
	inDeafLab(t, setupTimeout+30*time.Second, func(t *testing.T, l *deafLab) {
		front, back := l.mustConnect()
		passFrames(t, "afterwards", front, back)
		l.requireOrder()
		front.Disconnect()
	})
}

// A frontend that does not hear whether its backend was told of the rings keeps them also if xenstore
// refuses the next transaction.
func TestAnAnnouncementWithoutAnAnswerAndARefusal(t *testing.T) {
	inDeafLab(t, 0, func(t *testing.T, l *deafLab) {
		front, back := l.mustConnect()
		passFrames(t, "afterwards", front, back)
		l.requireOrder()
		front.Disconnect()
	})
}

// The directory is known again by the keys of an announcement whose answer came late: a state that
// another wrote is put right, and does not count as another directory's.
func TestAnAnnouncementThatIsAnsweredLateMarksItsDirectory(t *testing.T) {
	inDeafLab(t, setupTimeout+500*time.Millisecond, func(t *testing.T, l *deafLab) {
		front, back := l.mustConnect()
		passFrames(t, "before", front, back)
		if err := l.tools.Write(ctx(t), l.v.FrontDir()+"/state", "1"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		passFrames(t, "after", front, back)
		if len(l.front.Lines("is put right")) == 0 {
			t.Errorf("the state was not put right:\n%s", &l.front)
		}
		front.Disconnect()
	})
}

// A Connect that is given up meanwhile ends as any other.
func TestAnAnnouncementThatIsGivenUp(t *testing.T) {
	inDeafLab(t, 3*time.Second, func(t *testing.T, l *deafLab) {
		if _, err := l.connect(2 * time.Second); err == nil {
			t.Fatal("it connected")
		}
		time.Sleep(10 * time.Second)
		if lines := l.front.Lines("level=WARN"); len(lines) > 0 {
			t.Errorf("%q", lines)
		}
		if s := l.read(l.v.FrontDir() + "/state"); s != "6" {
			t.Errorf("it left state %s", s)
		}
	})
}

// An announcement that xenstore refuses leaves nothing behind: the frontend says why it cannot
// connect, stays as it was, and tries again.
func TestAnAnnouncementThatIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		v := l.add(toolstack.Vif{Front: 1, Back: 2})
		var log logtest.Log
		backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
		front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Logger: log.Logger()})
		if err != nil {
			t.Fatal(err)
		}
		wait(t, backs)
		ownedBy := func(owner hypercall.DomID) {
			t.Helper()
			err := l.tools.SetPerms(ctx(t), v.FrontDir()+"/tx-ring-ref", xenstore.Perm{Dom: owner, Access: xenstore.None},
				xenstore.Perm{Dom: 1, Access: xenstore.ReadOnly}, xenstore.Perm{Dom: 2, Access: xenstore.ReadOnly})
			if err != nil {
				t.Fatal(err)
			}
		}
		ownedBy(0)
		stop()
		await(t, front, false)
		backs, stop = l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
		time.Sleep(5 * time.Second)
		lines := log.Lines("cannot connect")
		if len(lines) == 0 || !strings.Contains(lines[0], "EACCES") {
			t.Errorf("%q\n%s", lines, &log)
		}
		if s := l.read(v.FrontDir() + "/state"); s != "1" {
			t.Errorf("the frontend's state is %s\n%s", s, &log)
		}
		if why := l.read("/local/domain/1/error/device/vif/0/error"); !strings.Contains(why, "EACCES") {
			t.Errorf("xenstore says %q", why)
		}
		ownedBy(1)
		await(t, front, true)
		back := wait(t, backs)
		go listens(front)
		go listens(back)
		passFrames(t, "afterwards", front, back)
		front.Disconnect()
		stop()
	})
}
