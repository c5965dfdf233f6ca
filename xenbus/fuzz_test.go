package xenbus_test

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"barevif/xenbus"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/wire"
	"barevif/xenbus/xenstore/wire/wiretest"
)

// A script says how a hostile server answers each request: a byte that selects the
// answer, a byte n, then n bytes.
const (
	replyWell  = iota // a correct reply
	replyError        // an ERROR
	replyEvent        // a WATCH_EVENT, then a correct reply
	replyID           // a correct reply with another id
	replyType         // a reply of another type
	replyRaw          // the bytes as they are
	replyHang         // close the connection
	replies
)

// FuzzReplies makes a hostile server answer. No answer may make the client panic, block
// beyond its context, or leave a goroutine.
func FuzzReplies(f *testing.F) {
	for _, script := range []string{
		"\x00\x05value\x00\x00\x00\x031\x002",
		"\x01\x07ENOENT\x00\x01\x06EAGAIN\x01\x00",
		"\x02\x06/a\x00b1\x00\x00\x03\x01x\x04\x00",
		"\x05\x10\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff",
		"\x06\x00\x00\x025\x00\x00\x00\x00\x03OK\x00",
		"\x01\x06E2BIG\x00\x00\x051\x00a\x00\x00",
	} {
		f.Add([]byte(script))
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		synctest.Test(t, func(t *testing.T) { answer(t, script) }) // waits cost no real time
	})
}

func answer(t *testing.T, script []byte) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var servers sync.WaitGroup
	var mu sync.Mutex // guards script
	take := func(n int) []byte {
		mu.Lock()
		defer mu.Unlock()
		n = min(n, len(script))
		b := script[:n]
		script = script[n:]
		if len(script) == 0 {
			cancel() // the server never answers again
		}
		return b
	}
	open := func(context.Context) (io.ReadWriteCloser, error) {
		ours, theirs := net.Pipe()
		p := wiretest.NewPeer(t, theirs)
		servers.Go(func() {
			defer theirs.Close()
			p.Serve(func(m wiretest.Message) {
				head := append(take(2), 0, 0)
				body := string(take(int(head[1])))
				switch head[0] % replies {
				case replyWell:
					p.Reply(m, body)
				case replyError:
					p.Send(wire.Error, m.ReqID, m.TxID, body)
				case replyEvent:
					p.Send(wire.WatchEvent, m.ReqID, 0, body)
					p.Reply(m, "OK\x00")
				case replyID:
					p.Send(m.Op, m.ReqID+uint32(len(body)), m.TxID, body)
				case replyType:
					p.Send(m.Op+wire.Op(len(body)), m.ReqID, m.TxID, body)
				case replyRaw:
					theirs.Write([]byte(body))
				case replyHang:
					theirs.Close()
				}
			})
		})
		return ours, nil
	}
	c, err := xenstore.Dial(ctx, open, xenstore.Config{Pipeline: 2})
	if err != nil {
		t.Fatal(err)
	}
	var calls sync.WaitGroup
	for _, call := range []func(){
		func() { c.Read(ctx, "/a"); c.Directory(ctx, "/a"); c.Perms(ctx, "/a") },
		func() {
			if w, err := c.Watch(ctx, "/a"); err == nil {
				select {
				case <-w.C():
				case <-ctx.Done():
				}
				w.Paths()
				w.Close()
			}
		},
		func() {
			c.Transact(ctx, func(tx xenstore.Tx) error {
				_, err := tx.Read("/a")
				return err
			})
			c.ResetWatches(ctx)
		},
		func() {
			d, err := xenbus.OpenFrontend(ctx, c, "vif", "0")
			if err == nil {
				d.Await(ctx, func(xenbus.Change) bool { return false })
				d.Close(ctx)
			}
		},
	} {
		calls.Go(call)
	}
	calls.Wait()
	c.Close()
	servers.Wait()
}
