package pvnet_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/wire"
)

// fillQuota makes a guest use up its quota of nodes.
func fillQuota(t testing.TB, dom *emu.Domain) {
	t.Helper()
	c, err := xenstore.Dial(ctx(t), dom.Store, xenstore.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	full := 0
	for i := 0; full < 2; i++ { // the first refusal may be for two nodes, a directory and a node in it
		if err := c.Write(ctx(t), fmt.Sprintf("data/%d/%d-%d", i/100, i%100, full), "x"); errors.Is(err, xenstore.ErrQuota) {
			full++
			i -= i%100 + 100 // continue in the last directory that exists
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// A refusingDomain has a xenstore that refuses some requests.
type refusingDomain struct {
	*emu.Domain
	op         wire.Op
	path, code string
}

func (d refusingDomain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := d.Domain.Store(ctx)
	return &refusingConn{ReadWriteCloser: c, d: d, ids: make(map[uint32]bool)}, err
}

type refusingConn struct {
	io.ReadWriteCloser
	d    refusingDomain
	mu   sync.Mutex
	ids  map[uint32]bool // guarded by mu: ids of requests to refuse
	rest []byte
}

func (c *refusingConn) Write(b []byte) (int, error) {
	h, payload, err := wire.ReadMessage(bytes.NewReader(b), make([]byte, len(b)))
	if err == nil && h.Op == c.d.op && strings.Contains(string(payload), c.d.path) {
		c.mu.Lock()
		c.ids[h.ReqID] = true
		c.mu.Unlock()
	}
	return c.ReadWriteCloser.Write(b)
}

func (c *refusingConn) Read(b []byte) (int, error) {
	for len(c.rest) == 0 {
		h, payload, err := wire.ReadMessage(c.ReadWriteCloser, make([]byte, wire.HeaderSize+wire.MaxPayload))
		if err != nil {
			return 0, err
		}
		c.mu.Lock()
		if h.Op == c.d.op && c.ids[h.ReqID] {
			delete(c.ids, h.ReqID)
			h.Op, payload = wire.Error, []byte(c.d.code+"\x00")
		}
		c.mu.Unlock()
		c.rest, _ = wire.Append(nil, h, string(payload))
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// If a quota stops Connect, the error names the request that met it: one that makes a
// node, one that only changes the state, or a watch.
func TestConnectNamesTheRequestThatFoundTheQuotaUsedUp(t *testing.T) {
	for name, c := range map[string]struct {
		dom  func(testing.TB, *emu.Domain) hypercall.Domain
		says string
		once bool
	}{
		"no node": {func(t testing.TB, d *emu.Domain) hypercall.Domain {
			fillQuota(t, d)
			return d
		}, "write device/vif/0/", true},
		"no state": {func(t testing.TB, d *emu.Domain) hypercall.Domain {
			return refusingDomain{d, wire.Write, "/state\x00", "ENOSPC"}
		}, "set state Initialising", true},
		"no watch": {func(t testing.TB, d *emu.Domain) hypercall.Domain { // another process may give one back
			return refusingDomain{d, wire.Watch, "/local/domain", "E2BIG"}
		}, "watch /local/domain", false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(t)
				fdom, bdom := l.domain(1), l.domain(2)
				v := l.add(toolstack.Vif{Front: 1, Back: 2})
				if err := l.tools.Write(ctx(t), v.FrontDir()+"/state", "6"); err != nil {
					t.Fatal(err)
				}
				if c.once {
					l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
				}
				patience, cancel := context.WithTimeout(context.Background(), 15*time.Second)
				defer cancel()
				began := time.Now()
				_, err := pvnet.Connect(patience, c.dom(t, fdom), "0", pvnet.Config{})
				var waited *xenbus.WaitError
				if !errors.Is(err, xenstore.ErrQuota) || errors.As(err, &waited) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%v", err)
				}
				if d := time.Since(began); c.once && d > 5*time.Second {
					t.Errorf("after %v", d)
				}
			})
		})
	}
}

// A muteDomain has a xenstore that answers left requests; later answers are lost.
type muteDomain struct {
	*emu.Domain
	left *atomic.Int64
}

func mute(d *emu.Domain, after int64) muteDomain {
	m := muteDomain{d, new(atomic.Int64)}
	m.left.Store(after)
	return m
}

func (d muteDomain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := d.Domain.Store(ctx)
	return &muteConn{ReadWriteCloser: c, left: d.left}, err
}

type muteConn struct {
	io.ReadWriteCloser
	left *atomic.Int64
	rest []byte
}

func (c *muteConn) Read(b []byte) (int, error) {
	for len(c.rest) == 0 {
		h, payload, err := wire.ReadMessage(c.ReadWriteCloser, make([]byte, wire.HeaderSize+wire.MaxPayload))
		if err != nil {
			return 0, err
		}
		if c.left.Add(-1) >= 0 {
			c.rest, _ = wire.Append(nil, h, string(payload))
		}
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Several waits in a row together may take no longer than one.
const (
	connectGrace = time.Second     // after the context has ended
	endTimeout   = 6 * time.Second // for the end of a device
	setupTimeout = time.Minute     // for the whole set-up of a connection
)

func TestConnectEndsInTimeWhereverXenstoreFallsSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		connected := false
		for after := int64(0); !connected; after++ {
			func() {
				l := newLab(t)
				l.Dirty = true // the connection to xenstore ends later
				fdom, bdom := l.domain(1), l.domain(2)
				l.add(toolstack.Vif{Front: 1, Back: 2})
				_, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
				defer stop()
				const patience = 3 * time.Second
				c, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				began := time.Now()
				d, err := pvnet.Connect(c, mute(fdom, after), "0", pvnet.Config{})
				if took := time.Since(began); took > patience+connectGrace {
					t.Errorf("silent after %d messages: Connect took %v: %v", after, took, err)
				}
				if connected = err == nil; connected {
					d.Disconnect()
				} else if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("silent after %d messages: %v", after, err)
				}
				// The device closes in the background, and a second Connect waits for
				// that.
				c, cancel = context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				if d, err = pvnet.Connect(c, fdom, "0", pvnet.Config{}); err != nil {
					t.Errorf("silent after %d messages, then again: %v", after, err)
					return
				}
				d.Disconnect()
			}()
		}
	})
}

// The end of a device has one limit for all of its steps, too.
func TestDisconnectEndsInTimeWithASilentXenstore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for after := range int64(24) {
			l := newLab(t)
			fdom, bdom := l.domain(1), l.domain(2)
			front, back := mute(fdom, 1<<40), mute(bdom, 1<<40)
			l.add(toolstack.Vif{Front: 1, Back: 2})
			backs, stop := l.serve(back, pvnet.ServeConfig{Hotplug: true, Remove: true})
			d, err := pvnet.Connect(ctx(t), front, "0", pvnet.Config{})
			if err != nil {
				t.Fatal(err)
			}
			await(t, wait(t, backs), true)
			front.left.Store(after)
			back.left.Store(after)
			for name, end := range map[string]func(){"Disconnect": d.Disconnect, "Serve": stop} {
				began := time.Now()
				end()
				if took := time.Since(began); took > endTimeout {
					t.Errorf("silent after %d messages: %s took %v", after, name, took)
				}
			}
		}
	})
}
