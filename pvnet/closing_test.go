package pvnet_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server/labtest"
)

// A heldDomain is a domain whose xenstore takes no requests for a while, as if its machine or
// xenstored were too busy.
type heldDomain struct {
	*emu.Domain
	mu   sync.Mutex
	free chan struct{} // guarded by mu: closed when requests pass; nil: they do
}

func (d *heldDomain) hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.free = make(chan struct{})
}

func (d *heldDomain) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.free)
	d.free = nil
}

func (d *heldDomain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := d.Domain.Store(ctx)
	if err != nil {
		return nil, err
	}
	return &heldConn{c, d}, nil
}

type heldConn struct {
	io.ReadWriteCloser
	d *heldDomain
}

func (c *heldConn) Write(b []byte) (int, error) {
	c.d.mu.Lock()
	free := c.d.free
	c.d.mu.Unlock()
	if free != nil {
		<-free
	}
	return c.ReadWriteCloser.Write(b)
}

// Disconnect does not wait for xenstore for ever. If it has ended before the state Closed could
// be written, the state is written later: frontend and toolstack wait for it.
func TestAVifThatXenstoreHeldUpIsClosedLater(t *testing.T) {
	for name, silent := range map[string]bool{"nothing is written": false, "Closing is written": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(t)
				fdom, bdom := &heldDomain{Domain: l.domain(1)}, &heldDomain{Domain: l.domain(2)}
				v := l.add(toolstack.Vif{Front: 1, Back: 2})
				backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
				front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Buffers: 32})
				if err != nil {
					t.Fatal(err)
				}
				back := wait(t, backs)
				await(t, back, true)
				want := "4"
				if silent { // the frontend does not answer, so that the backend waits in the middle
					fdom.hold()
					want = "5"
				} else {
					bdom.hold()
				}
				gone := make(chan struct{})
				go func() {
					defer close(gone)
					back.Disconnect()
				}()
				if silent {
					l.reads(v.BackDir(), map[string]string{"state": "5"})
					bdom.hold()
				}
				wait(t, gone)
				if s := l.read(v.BackDir() + "/state"); s != want {
					t.Fatalf("the state is %s when Disconnect returns, want %s", s, want)
				}
				bdom.release()
				l.reads(v.BackDir(), map[string]string{"state": "6", "claim": ""})
				if silent {
					fdom.release()
				}
				front.Disconnect()
				if err := toolstack.Remove(ctx(t), l.tools, v); err != nil {
					t.Error(err)
				}
				// The vif is served again when it is plugged again, and not before.
				l.add(v)
				if again, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Buffers: 32}); err != nil {
					t.Error(err)
				} else {
					again.Disconnect()
				}
			})
		})
	}
}

// After a device has ended, Serve still does what the toolstack asks for: it answers the state
// Closing with Closed, and with ServeConfig.Remove it removes the vif's directory.
func TestAVifThatEndedIsStillClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, remove := range []bool{false, true} {
			l := newLab(t)
			l.domain(1)
			bdom := l.domain(2)
			v := l.add(toolstack.Vif{Front: 1, Back: 2})
			backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Remove: remove})
			wait(t, backs).Disconnect()
			l.reads(v.BackDir(), map[string]string{"state": "6"})
			err := l.tools.Transact(ctx(t), func(tx xenstore.Tx) error {
				return errors.Join(tx.Write(v.BackDir()+"/online", "0"), tx.Write(v.BackDir()+"/state", "5"))
			})
			if err != nil {
				t.Fatal(err)
			}
			if !remove {
				l.reads(v.BackDir(), map[string]string{"state": "6", "claim": ""})
			} else if err := labtest.Comes(func() error {
				if _, err := l.store.Read(v.BackDir()); err == nil {
					return errors.New("the directory of a vif that is gone is there")
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			stop()
		}
	})
}

// A vif that another process has taken up meanwhile is not closed.
func TestAVifThatEndedIsLeftToAnotherBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		fdom, first := l.domain(1), &heldDomain{Domain: l.domain(2)}
		v := l.add(toolstack.Vif{Front: 1, Back: 2})
		backs, _ := l.serve(first, pvnet.ServeConfig{Hotplug: true})
		front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Buffers: 32})
		if err != nil {
			t.Fatal(err)
		}
		defer front.Disconnect()
		back := wait(t, backs)
		await(t, back, true)
		first.hold()
		back.Disconnect()
		others, _ := l.serve(first.Domain, pvnet.ServeConfig{Hotplug: true})
		other := wait(t, others)
		await(t, other, true)
		first.release()
		time.Sleep(10 * time.Second) // time for several attempts to claim the vif
		select {
		case <-other.Done():
			t.Error("the other backend's device has ended")
		default:
		}
		l.reads(v.BackDir(), map[string]string{"state": "4"})
		claim := l.read(v.BackDir() + "/claim")
		time.Sleep(5 * time.Minute)
		if now := l.read(v.BackDir() + "/claim"); now != claim {
			t.Errorf("the vif is still asked for: the claim was %q and is %q", claim, now)
		}
		if _, err := front.Write(frame(100, 0)); err != nil {
			t.Error(err)
		}
	})
}
