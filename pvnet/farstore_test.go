package pvnet_test

import (
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/wire"
)

// A farDomain is far from xenstore: each answer and each watch event arrives a time "away" after xenstore sent
// it. Answers to reads that are in flight together arrive together. Answers to other requests arrive one
// after the other, because the kernel's node sends such a request only after the answer to the one before.
type farDomain struct {
	*emu.Domain
	away time.Duration
}

func (d farDomain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := d.Domain.Store(ctx)
	if err != nil {
		return nil, err
	}
	far := &farConn{ReadWriteCloser: c, said: make(chan saying, 1024)}
	go far.listen(d.away)
	return far, nil
}

// A saying is one message of xenstore, and the time at which the client receives it.
type saying struct {
	at      time.Time
	message []byte
}

type farConn struct {
	io.ReadWriteCloser
	said chan saying
	last time.Time // when the answer to the last request that was not only a read arrives
	rest []byte    // of a message that is being read
}

// Pipeline implements [xenstore.Pipeliner].
func (c *farConn) Pipeline() int { return c.ReadWriteCloser.(xenstore.Pipeliner).Pipeline() }

func (c *farConn) listen(away time.Duration) {
	defer close(c.said)
	for buf := make([]byte, wire.HeaderSize+wire.MaxPayload); ; {
		h, payload, err := wire.ReadMessage(c.ReadWriteCloser, buf)
		if err != nil {
			return
		}
		at := time.Now().Add(away)
		if h.Op != wire.WatchEvent && (h.Op != wire.Read && h.Op != wire.Directory && h.Op != wire.Error || h.TxID != 0) {
			if next := c.last.Add(away); next.After(at) {
				at = next
			}
			c.last = at
		}
		message, _ := wire.Append(nil, h, string(payload))
		c.said <- saying{at, message}
	}
}

func (c *farConn) Read(b []byte) (int, error) {
	if len(c.rest) == 0 {
		s, open := <-c.said
		if !open {
			return 0, io.EOF
		}
		time.Sleep(time.Until(s.at))
		c.rest = s.message
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// A guest's start takes as many answers of xenstore, one after the other, as its frontend waits for:
// until it says Connected, 12 of them in the transaction with its nine keys, and until its link is up.
// These are 17 and 20, and a few more if its watches fire in between.
func TestAFrontendWaitsForFewAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const away = 10 * time.Millisecond
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		v := l.add(toolstack.Vif{Front: 1, Back: 2})
		_, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
		defer stop()
		l.reach(v.BackDir()+"/state", "2")

		begun := time.Now()
		answers := func() int { return int(time.Since(begun) / away) }
		connected := make(chan int, 1)
		go func() {
			l.reach(v.FrontDir()+"/state", "4")
			connected <- answers()
		}()
		front, err := pvnet.Connect(t.Context(), farDomain{fdom, away}, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		up := answers()
		if n := <-connected; n > 20 || up > 25 {
			t.Errorf("%d answers to Connected, %d until the link is up", n, up)
		}
		front.Disconnect()
	})
}
