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

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/wire"
)

// A deafDomain does not hear for long whether the transaction with the ring of a frontend was
// committed.
type deafDomain struct {
	*emu.Domain
	deaf *atomic.Bool // once
}

func (d deafDomain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := d.Domain.Store(ctx)
	return &deafConn{ReadWriteCloser: c, deaf: d.deaf}, err
}

type deafConn struct {
	io.ReadWriteCloser
	deaf  *atomic.Bool
	ring  bool // a ring was written
	until atomic.Pointer[time.Time]
}

func (c *deafConn) Write(b []byte) (int, error) {
	c.ring = c.ring || bytes.Contains(b, []byte("tx-ring-ref"))
	h, _, err := wire.ReadMessage(bytes.NewReader(b), make([]byte, wire.HeaderSize+wire.MaxPayload))
	if err == nil && c.ring && h.Op == wire.TransactionEnd && !c.deaf.Swap(true) {
		c.until.Store(new(time.Now().Add(setupTimeout + 30*time.Second)))
	}
	return c.ReadWriteCloser.Write(b)
}

func (c *deafConn) Read(b []byte) (int, error) {
	n, err := c.ReadWriteCloser.Read(b)
	if until := c.until.Load(); until != nil {
		time.Sleep(time.Until(*until))
	}
	return n, err
}

// A frontend that does not hear whether its backend was told of the rings keeps them, because the
// backend may use them: both close in order, and connect again.
func TestAnAnnouncementWithoutAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		l.add(toolstack.Vif{Front: 1, Back: 2})
		var log logtest.Log
		backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Logger: log.Logger()}})
		patience, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		d, began := deafDomain{fdom, new(atomic.Bool)}, time.Now()
		front, err := pvnet.Connect(patience, d, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < setupTimeout {
			t.Fatalf("it was not deaf: connected after %v", took)
		}
		back := wait(t, backs)
		go listens(front)
		go listens(back)
		passFrames(t, "afterwards", front, back)
		if down := log.Lines("link down"); len(log.Lines("cannot connect")) > 0 || len(down) > 1 || len(down) == 1 && !strings.Contains(down[0], "is Closing") {
			t.Errorf("the backend met rings that were gone:\n%s", &log)
		}
		front.Disconnect()
		stop()
	})
}
