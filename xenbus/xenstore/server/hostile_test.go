package server_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/wire"
	"barevif/xenbus/xenstore/wire/wiretest"
)

// noLeak fails the test if it leaves goroutines behind.
func noLeak(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		deadline := time.Now().Add(patience)
		for runtime.NumGoroutine() > before {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<16)
				t.Fatalf("%d goroutines, %d at the start:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			}
			runtime.Gosched()
		}
	})
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// pipe connects without a buffer in between, so that only the store can hold unread
// bytes. The channel gets the result of ServeConn.
func (e embedded) pipe(dom hypercall.DomID) (*raw, <-chan error) {
	ours, theirs := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- e.ServeConn(theirs, dom) }()
	return wiretest.New(e.t, ours), ended
}

func TestFloodOfOnePathMerges(t *testing.T) {
	noLeak(t)
	e := newEmbedded(t, server.Config{})
	e.guest(3)
	g, _ := e.pipe(3)
	g.Want(wire.Watch, 0, z("flood", "t"), ok)
	g.Heard()
	before := heap()
	for i := range 100_000 {
		if err := e.Write("/local/domain/3/flood", strconv.Itoa(i)); err != nil {
			t.Fatal(err)
		}
	}
	if grown := heap() - before; grown > 1<<20 {
		t.Errorf("heap grew by %d bytes", grown)
	}
	// One message may be in the writer, one waits.
	if n := len(g.Heard()); n < 1 || n > 2 {
		t.Errorf("%d events", n)
	}
	if st := e.Stats(); st.EventsMerged < 99_990 {
		t.Errorf("%d events merged", st.EventsMerged)
	}
}

func TestFloodOfPathsEndsWhoDoesNotRead(t *testing.T) {
	noLeak(t)
	e := newEmbedded(t, server.Config{})
	e.guest(3)
	other := e.guest(4)
	g, ended := e.pipe(3)
	g.Want(wire.Watch, 0, z("flood", "t"), ok)
	before := heap()
	for i := range 100_000 {
		path := fmt.Sprint("/local/domain/3/flood/", i)
		if err := errors.Join(e.Write(path, ""), e.Remove(path)); err != nil {
			t.Fatal(err)
		}
		if i%10_000 == 0 {
			other.Want(wire.Read, 0, z(""), "EINVAL") // served meanwhile
		}
	}
	if err := <-ended; err != server.ErrBacklog {
		t.Errorf("the connection ended with %v", err)
	}
	if grown := heap() - before; grown > 1<<20 {
		t.Errorf("heap grew by %d bytes", grown)
	}
	if st := e.Stats(); st.BacklogKills != 1 || st.Watches != 0 {
		t.Errorf("%+v", st)
	}
}

// flood makes the client write n different nodes.
func flood(c *raw, n int) {
	for i := range n {
		c.Want(wire.Write, 0, fmt.Sprintf("shared/%d\x00", i), ok)
		if i%200 == 199 { // a directory has no room for the names of more
			c.Want(wire.Rm, 0, z("shared"), ok)
			c.Want(wire.Mkdir, 0, z("shared"), ok)
			c.Want(wire.SetPerms, 0, z("shared", "r4"), ok)
		}
	}
}

// shared makes a directory of domain 4 that domain 3 may read, and connects both. Domain
// 3 watches it.
func shared(t *testing.T, cfg server.Config) (e embedded, watcher *raw, watcherEnded <-chan error, flooder *raw, flooderEnded <-chan error) {
	e = newEmbedded(t, cfg)
	e.Introduce(3)
	e.Introduce(4)
	for _, err := range []error{e.Mkdir("/local/domain/4"), e.SetPerms("/local/domain/4", "r4"), e.Mkdir("/local/domain/4/shared")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	watcher, watcherEnded = e.pipe(3)
	watcher.Want(wire.Watch, 0, z("/local/domain/4", "t"), ok)
	flooder, flooderEnded = e.pipe(4)
	return e, watcher, watcherEnded, flooder, flooderEnded
}

func TestFlooderWaitsForWhoReads(t *testing.T) {
	for _, backlog := range []int{8 << 10, 128 << 10} { // less than a writer takes at once, and more
		synctest.Test(t, func(t *testing.T) {
			e, watcher, ended, flooder, _ := shared(t, server.Config{Backlog: backlog})
			heard := make(chan int)
			go func() {
				n := 0
				for {
					h, p, err := wire.ReadMessage(watcher.Conn, watcher.Buf[:])
					if err != nil || h.Op != wire.WatchEvent {
						heard <- n
						return
					}
					if strings.HasPrefix(string(p), "/local/domain/4/shared/") {
						n++
					}
					time.Sleep(time.Millisecond)
				}
			}()
			start := time.Now()
			flood(flooder, 3000)
			took := time.Since(start)
			watcher.Send(wire.GetDomainPath, 0, z("0"))
			if n := <-heard; n != 3000 {
				t.Errorf("heard %d of 3000 events", n)
			}
			if st := e.Stats(); st.Throttled == 0 || st.BacklogKills != 0 {
				t.Errorf("%+v", st)
			}
			if took < time.Second {
				t.Errorf("3000 writes took %v, with a reader of 1000 a second", took)
			}
			watcher.Conn.Close()
			if err := <-ended; err != nil {
				t.Errorf("the watcher ended with %v", err)
			}
		})
	}
}

func TestFlooderGoesOnOnceThereIsRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, watcher, _, flooder, ended := shared(t, server.Config{Backlog: 8 << 10})
		var written atomic.Int32
		go func() {
			for {
				msg, _ := wire.Append(nil, wire.Header{Op: wire.Write}, fmt.Sprintf("shared/%d\x00", written.Load()))
				if _, err := flooder.Conn.Write(msg); err != nil {
					return
				}
				if _, _, err := wire.ReadMessage(flooder.Conn, flooder.Buf[:]); err != nil {
					return
				}
				written.Add(1)
			}
		}()
		synctest.Wait()
		before := written.Load()
		// This unblocks the writer, which then takes everything that waits.
		if _, _, err := wire.ReadMessage(watcher.Conn, watcher.Buf[:]); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if after := written.Load(); before == 0 || after <= before {
			t.Errorf("%d writes, then %d", before, after)
		}
		// Without nodes its death makes no event that could wake it by chance.
		if err := e.Remove("/local/domain/4"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		start := time.Now()
		e.DomainDied(4)
		if err := <-ended; err != hypercall.ErrNoDomain || time.Since(start) != 0 {
			t.Errorf("a client that waits ended after %v, %v", time.Since(start), err)
		}
	})
}

func TestWhoStopsReadingHoldsNobodyUp(t *testing.T) {
	for _, privileged := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			cfg := server.Config{Backlog: 8 << 10}
			if privileged {
				cfg = server.Config{Backlog: 128, Privileged: []hypercall.DomID{3}} // privileged: times 64
			}
			_, _, ended, flooder, _ := shared(t, cfg)
			start := time.Now()
			flood(flooder, 3000)
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("the writer was held up for %v", took)
			}
			if err := <-ended; err != server.ErrBacklog {
				t.Errorf("the watcher ended with %v", err)
			}
		})
	}
}

// slowToClose is a connection whose Close takes time.
type slowToClose struct {
	net.Conn
	closed *atomic.Bool
}

func (c slowToClose) Close() error {
	time.Sleep(time.Minute)
	c.closed.Store(true)
	return c.Conn.Close()
}

func TestCloseWaitsForConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEmbedded(t, server.Config{})
		_, theirs := net.Pipe()
		var closed atomic.Bool
		go e.ServeConn(slowToClose{theirs, &closed}, 0)
		synctest.Wait()
		e.Close()
		if !closed.Load() {
			t.Error("Close left a connection")
		}
	})
}

// TestBacklogIsShortForWhoStandsStill makes domain 0 fill a backlog: domain 0 never has
// to wait.
func TestBacklogIsShortForWhoStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEmbedded(t, server.Config{Backlog: 64 << 10})
		e.Introduce(3)
		if err := errors.Join(e.Mkdir("/d"), e.SetPerms("/d", "r0")); err != nil {
			t.Fatal(err)
		}
		writes := func() (n int) { // until the watcher's connection ends
			for e.Stats().BacklogKills == 0 {
				if err := e.Write(fmt.Sprint("/d/", n), ""); err != nil {
					t.Fatal(err)
				}
				n++
			}
			return n
		}
		watch := func() <-chan error {
			w, ended := e.pipe(3)
			w.Want(wire.Watch, 0, z("/d", "t"), ok)
			w.Heard()
			return ended
		}
		ended := watch()
		for range 4 { // one for the writer, others to wait
			if err := e.Write("/d/x", ""); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		time.Sleep(2 * time.Second)
		still := writes()
		if err := <-ended; err != server.ErrBacklog {
			t.Errorf("ended with %v", err)
		}
		if still > 64<<10/128 {
			t.Errorf("took %d events for one that stands still", still)
		}
		// A client that had nothing to read is allowed twice as much.
		e = newEmbedded(t, server.Config{Backlog: 64 << 10})
		e.Introduce(3)
		if err := errors.Join(e.Mkdir("/d"), e.SetPerms("/d", "r0")); err != nil {
			t.Fatal(err)
		}
		ended = watch()
		time.Sleep(2 * time.Second) // with nothing to read
		if fresh := writes(); fresh < 3*still/2 {
			t.Errorf("took %d events for one that had nothing to read, %d for one that stands still", fresh, still)
		}
		<-ended
	})
}

func TestUnreadRepliesStopRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEmbedded(t, server.Config{})
		e.Introduce(3)
		c, ended := e.pipe(3)
		msg, _ := wire.Append(nil, wire.Header{Op: wire.GetDomainPath}, z("3"))
		var sent atomic.Int32
		go func() {
			for range 100 {
				if _, err := c.Conn.Write(msg); err != nil {
					t.Error(err)
					return
				}
				sent.Add(1)
			}
		}()
		synctest.Wait()
		if st := e.Stats(); sent.Load() != 20 || st.Requests != 20 || st.RepliesUnread != 1 {
			t.Errorf("took %d requests, %+v", sent.Load(), st)
		}
		other, _ := e.pipe(3)
		other.Want(wire.GetDomainPath, 0, z("3"), z("/local/domain/3"))
		for range 100 { // it continues once they are read
			c.Receive()
		}
		c.Conn.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestWriterBesideTransactionsIsSlowed is XSA-206: without a limit, a fast writer makes
// every commit of other domains fail.
func TestWriterBesideTransactionsIsSlowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEmbedded(t, server.Config{})
		e.Introduce(3)
		if err := errors.Join(e.Mkdir("/local/domain/3"), e.SetPerms("/local/domain/3", "n3")); err != nil {
			t.Fatal(err)
		}
		g, _ := e.pipe(3)
		start := time.Now()
		for range 5000 {
			g.Want(wire.Write, 0, "x\x00", ok)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("slowed by %v with nobody to disturb", took)
		}
		c, _ := e.pipe(0)
		tx := c.Start()
		for range 1400 {
			g.Want(wire.Write, 0, "x\x00", ok)
		}
		if took := time.Since(start); took < 1900*time.Millisecond || took > 2100*time.Millisecond {
			t.Errorf("1000 writes and 400 more took %v, want 2s", took)
		}
		if st := e.Stats(); st.RateLimited == 0 {
			t.Errorf("%+v", st)
		}
		c.Want(wire.TransactionEnd, tx, z("F"), ok)
		g.Heard()
		start = time.Now()
		for range 1000 {
			g.Want(wire.Write, 0, "x\x00", ok)
		}
		if took := time.Since(start); took > 10*time.Millisecond {
			t.Errorf("slowed by %v after the transaction", took)
		}
	})
}

func TestConnectionCutAnywhere(t *testing.T) {
	noLeak(t)
	e := newEmbedded(t, server.Config{})
	e.guest(3)
	var script []byte
	for _, m := range []struct {
		op      wire.Op
		tx      uint32
		payload string
	}{
		{wire.Watch, 0, z("x", "t")}, {wire.TransactionStart, 0, z("")}, {wire.Write, 1, "x/y\x00value"},
		{wire.TransactionEnd, 1, z("T")}, {wire.TransactionStart, 0, z("")}, {wire.Rm, 2, z("x")},
	} {
		script, _ = wire.Append(script, wire.Header{Op: m.op, TxID: m.tx}, m.payload)
	}
	for cut := range script {
		ours, ended := e.dial(3)
		if _, err := ours.Write(script[:cut]); err != nil {
			t.Fatal(err)
		}
		ours.Close()
		<-ended
		if err := e.Check(); err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		if st := e.Stats(); st.Watches != 0 || st.Transactions != 0 {
			t.Fatalf("cut at %d: %+v", cut, st)
		}
	}
}

func TestEndOfConnectionIsExplained(t *testing.T) {
	noLeak(t)
	e := newEmbedded(t, server.Config{})
	e.Introduce(3)
	header := func(length uint32) []byte {
		b, _ := wire.Append(nil, wire.Header{Op: wire.Read}, "")
		b[12], b[13], b[14], b[15] = byte(length), byte(length>>8), byte(length>>16), byte(length>>24)
		return b
	}
	for _, row := range []struct {
		send []byte
		want error
	}{
		{nil, nil},
		{header(4097), wire.ErrTooLong},
		{header(1<<32 - 1), wire.ErrTooLong},
		{header(0)[:9], io.ErrUnexpectedEOF},
		{header(4096), io.ErrUnexpectedEOF},
	} {
		ours, ended := e.dial(3)
		if _, err := ours.Write(row.send); err != nil {
			t.Fatal(err)
		}
		ours.(*net.UnixConn).CloseWrite()
		if err := <-ended; !errors.Is(err, row.want) {
			t.Errorf("after %d bytes: %v, want %v", len(row.send), err, row.want)
		}
		ours.Close()
	}
	if st := e.Stats(); st.ProtocolKills != 2 {
		t.Errorf("%+v", st)
	}

	for range 16 {
		e.connect(3)
	}
	until(t, "16 connections", func() bool { return e.Stats().Connections >= 16 })
	_, theirs := net.Pipe()
	if err := e.ServeConn(theirs, 3); err != server.ErrConnections {
		t.Errorf("17th connection: %v", err)
	}
	if err := e.ServeConn(theirs, 4); err != hypercall.ErrNoDomain {
		t.Errorf("unknown domain: %v", err)
	}
	e.DomainDied(3)
	_, ended := e.dial(0)
	until(t, "the connection of domain 0 alone", func() bool { return e.Stats().Connections == 1 })
	e.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := e.ServeConn(theirs, 0); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// lastWords is a connection whose client has sent its last request, and may still read.
type lastWords struct {
	net.Conn
	sent *strings.Reader
}

func (c lastWords) Read(p []byte) (int, error) { return c.sent.Read(p) }

func TestLastRepliesAreFlushed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEmbedded(t, server.Config{})
		var sent []byte
		for range 50 {
			sent, _ = wire.Append(sent, wire.Header{Op: wire.Read}, z("/tool"))
		}
		for _, reads := range []bool{true, false} {
			ours, theirs := net.Pipe()
			ended := make(chan error, 1)
			go func() { ended <- e.ServeConn(lastWords{theirs, strings.NewReader(string(sent))}, 0) }()
			synctest.Wait()
			start := time.Now()
			if c := wiretest.New(t, ours); reads {
				for range 50 {
					c.Receive()
				}
			}
			if err := <-ended; err != nil {
				t.Errorf("ended with %v", err)
			}
			if took := time.Since(start); reads != (took == 0) || took > time.Second {
				t.Errorf("reads %v: ended after %v", reads, took)
			}
		}
	})
}

// TestReusedDomidInheritsNothing is XSA-322, XSA-419 and XSA-483.
func TestReusedDomidInheritsNothing(t *testing.T) {
	noLeak(t)
	e := newEmbedded(t, server.Config{})
	first, ended := func() (*raw, <-chan error) {
		e.guest(3)
		return e.pipe(3)
	}()
	for i := range 400 {
		first.Want(wire.Mkdir, 0, z(fmt.Sprint("d", i)), ok)
		first.Want(wire.Mkdir, 0, z(fmt.Sprint("d", i, "/x")), ok)
	}
	for i := range 129 {
		first.Want(wire.Watch, 0, z("d0", strconv.Itoa(i)), ok)
		first.Heard()
	}
	for range 11 {
		first.Start()
	}
	for path, perms := range map[string][]string{"/left": {"n0", "b3"}, "/": {"n3"}, "/local": {"r0"}} {
		if err := errors.Join(e.Mkdir(path), e.SetPerms(path, perms...)); err != nil {
			t.Fatal(err)
		}
	}
	e.DomainDied(3)
	if err := <-ended; err != hypercall.ErrNoDomain {
		t.Errorf("its connection ended with %v", err)
	}
	e.DomainDied(3) // a second call is harmless
	e.DomainDied(0)
	e.DomainDied(77)
	if got := e.Dump(); strings.Contains(got, "/local/domain/3") {
		t.Errorf("it left\n%s", got)
	}
	second := e.guest(3)
	second.Want(wire.Read, 0, z("/left"), "EACCES")
	second.Want(wire.Directory, 0, z("/"), "EACCES")
	second.Want(wire.Mkdir, 0, z("fresh"), ok)
	for range 11 {
		second.Start()
	}
	for i := range 129 {
		second.Want(wire.Watch, 0, z("d0", strconv.Itoa(i)), ok)
	}
	e.dom0().Want(wire.GetPerms, 0, z("/"), z("n0"))
}

// TestMemoryQuota fills everything that a guest can fill.
func TestMemoryQuota(t *testing.T) {
	noLeak(t)
	e := newEmbedded(t, server.Config{})
	g := e.guest(3)
	before := heap()
	value := strings.Repeat("v", 2000)
	refused := make(map[string]int)
	for d := range 1000 {
		refused[g.Do(wire.Write, 0, fmt.Sprintf("d%d/x\x00%s", d, value))]++
	}
	for range 11 {
		tx := g.Start()
		for d := range 400 {
			refused[g.Do(wire.Write, tx, fmt.Sprintf("d%d/x\x00%s", d, value[1:]))]++
		}
	}
	for i := range 129 {
		refused[g.Do(wire.Watch, 0, z("d0/"+value, strconv.Itoa(i)+value))]++
	}
	if m := e.MemoryOf(3); m > 2560<<10 || m < 2<<20 {
		t.Errorf("it holds %d bytes", m)
	}
	if refused["ENOMEM"] == 0 || refused["ENOSPC"] == 0 || refused[ok] == 0 {
		t.Errorf("answers: %v", refused)
	}
	if grown := heap() - before; grown > 6<<20 {
		t.Errorf("heap grew by %d bytes", grown)
	}
	g.Conn.Close()
	e.DomainDied(3)
	until(t, "no connection", func() bool { return e.Stats().Connections == 0 })
	if grown := heap() - before; grown > 1<<20 {
		t.Errorf("%d bytes stay after its death", grown)
	}
}

// TestMostAGuestCanLeaveUnread fills the backlog of each of a guest's connections.
func TestMostAGuestCanLeaveUnread(t *testing.T) {
	noLeak(t)
	e := newEmbedded(t, server.Config{})
	e.Introduce(3)
	if err := errors.Join(e.Mkdir("/d"), e.SetPerms("/d", "r0")); err != nil {
		t.Fatal(err)
	}
	for range 16 {
		c, _ := e.pipe(3)
		c.Want(wire.Watch, 0, z("/d", "t"), ok)
		c.Heard()
	}
	before := heap()
	written := 0
	for ; e.Stats().BacklogKills == 0; written++ {
		path := fmt.Sprint("/d/", written)
		if err := errors.Join(e.Write(path, ""), e.Remove(path)); err != nil {
			t.Fatal(err)
		}
	}
	if grown := heap() - before; grown > 10<<20 {
		t.Errorf("%d events to each of 16 connections take %d bytes", written, grown)
	}
}

// TestEventsOverThePayloadAreNotSent is XSA-324.
func TestEventsOverThePayloadAreNotSent(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	g := e.guest(3)
	token := strings.Repeat("t", 4000)
	g.Want(wire.Watch, 0, z("w", token), ok)
	g.WantEvents("w " + token)
	g.Want(wire.Write, 0, "w/"+strings.Repeat("n", 91)+"\x00", ok) // 93 + 1 + 4000 + 1 = 4095
	if n := len(g.Heard()); n != 1 {
		t.Errorf("%d events that fit", n)
	}
	g.Want(wire.Write, 0, "w/"+strings.Repeat("n", 93)+"\x00", ok)
	if n := len(g.Heard()); n != 0 {
		t.Errorf("%d events over 4096 bytes", n)
	}
	if st := e.Stats(); st.EventsTooLong != 1 {
		t.Errorf("%+v", st)
	}
}

func TestDeepAndWideTrees(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	c := e.dom0()
	deep := strings.Repeat("/d", 1024) // 2048 characters
	c.Want(wire.Write, 0, deep+"\x00bottom", ok)
	c.Want(wire.Read, 0, z(deep), "bottom")
	tx := c.Start()
	c.Want(wire.Rm, tx, z("/d"), ok)
	c.Want(wire.TransactionEnd, tx, z("T"), ok)
	c.Want(wire.Read, 0, z(deep), "ENOENT")
	c.Want(wire.Write, 0, deep+"\x00bottom", ok)
	c.Want(wire.Rm, 0, z("/d"), ok)
	for i := range 50_000 {
		if err := e.Mkdir(fmt.Sprint("/wide/", i)); err != nil {
			t.Fatal(err)
		}
	}
	c.Want(wire.Directory, 0, z("/wide"), "E2BIG")
	c.Want(wire.Rm, 0, z("/wide"), ok)
	if st := e.Stats(); st.Nodes != 3 {
		t.Errorf("%d nodes left", st.Nodes)
	}
}

func TestStoreOfItsOwner(t *testing.T) {
	e := newEmbedded(t, server.Config{Privileged: []hypercall.DomID{9}})
	e.Introduce(3)
	c := e.dom0()
	c.Want(wire.Watch, 0, z("/a", "t"), ok)
	c.Heard()
	if err := e.Write("/a/b", "v\x00w"); err != nil {
		t.Error(err)
	}
	c.WantEvents("/a/b t")
	if v, err := e.Read("/a/b"); v != "v\x00w" || err != nil {
		t.Errorf("read %q, %v", v, err)
	}
	if err := e.SetPerms("/a/b", "n3", "r0"); err != nil {
		t.Error(err)
	}
	c.Want(wire.GetPerms, 0, z("/a/b"), z("n3", "r0"))
	for _, row := range []struct {
		err  error
		want server.Errno
	}{
		{e.Write("relative", ""), server.EINVAL},
		{e.Mkdir("/a//b"), server.EINVAL},
		{e.Remove("/"), server.EINVAL},
		{e.Remove("/none/none"), server.ENOENT},
		{e.SetPerms("/a/b"), server.EINVAL},
		{e.SetPerms("/a/b", "n8"), server.ENOENT},
		{e.SetPerms("/a/b", "n65539"), server.ENOENT}, // 3 in 16 bits
		{e.SetPerms("/none", "n0"), server.ENOENT},
	} {
		if row.err != row.want {
			t.Errorf("%v, want %v", row.err, row.want)
		}
	}
	if _, err := e.Read("/none"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "ENOENT") {
		t.Errorf("read of nothing: %v", err)
	}
	if !errors.Is(server.EACCES, fs.ErrPermission) || !errors.Is(server.EEXIST, fs.ErrExist) || errors.Is(server.EINVAL, fs.ErrExist) {
		t.Error("errors are not those of io/fs")
	}
	if err := e.Remove("/a"); err != nil {
		t.Error(err)
	}
	c.WantEvents("/a/b t", "/a t")

	if err := e.Write("/long", strings.Repeat("v", 5000)); err != nil {
		t.Error(err)
	}
	c.Want(wire.Read, 0, z("/long"), "E2BIG")

	e.Introduce(9)
	p := e.connect(9)
	p.Want(wire.Read, 0, z("/tool"), "")
	p.Want(wire.Watch, 0, z("@introduceDomain", "i"), ok)
	p.Heard()
	e.Introduce(3) // known already
	p.WantEvents()
	e.Introduce(4)
	p.WantEvents("@introduceDomain i")
	p.Want(wire.Write, 0, "own\x00", ok)
	p.Want(wire.GetPerms, 0, z("/local/domain/9/own"), z("n0"))
}

func TestIntroduceOnTheWire(t *testing.T) {
	e := newEmbedded(t, server.Config{Privileged: []hypercall.DomID{9}})
	c := e.dom0()
	c.Want(wire.Watch, 0, z("@introduceDomain", "i"), ok)
	c.Heard()
	c.Want(wire.Introduce, 0, z("3", "1", "5"), ok)
	c.WantEvents("@introduceDomain i")
	g := e.connect(3)
	g.Want(wire.Watch, 0, z("x", "t"), ok)
	tx := g.Start()
	c.Want(wire.Introduce, 0, z("3", "1", "5"), ok) // the domain has restarted
	c.WantEvents()
	g.Want(wire.Unwatch, 0, z("x", "t"), "ENOENT")
	g.Want(wire.TransactionEnd, tx, z("T"), "ENOENT")
	for _, id := range []string{"32752", "65539", "-1", "99999999999"} { // 65539 is 3 in 16 bits
		c.Want(wire.Introduce, 0, z(id, "1", "5"), "EINVAL")
		c.Want(wire.Release, 0, z(id), "ENOENT")
	}
	c.Want(wire.Control, 0, z("help"), "EINVAL")
	e.Introduce(4)
	if err := errors.Join(e.Mkdir("/for-4"), e.SetPerms("/for-4", "n0", "r4")); err != nil {
		t.Fatal(err)
	}
	g.Want(wire.Read, 0, z("/for-4"), "EACCES")
	c.Want(wire.SetTarget, 0, z("3", "4"), ok)
	g.Want(wire.Read, 0, z("/for-4"), "")
	e.DomainDied(4)
	g.Want(wire.Read, 0, z("/for-4"), "EACCES")
	c.Want(wire.SetTarget, 0, z("3", "0"), ok)
	g.Want(wire.Read, 0, z("/tool"), "")

	// A privileged domain can release itself, even in a transaction.
	e.Introduce(9)
	conn, ended := e.dial(9)
	p := wiretest.New(t, conn)
	p.Send(wire.Release, p.Start(), z("9"))
	if err := <-ended; err != hypercall.ErrNoDomain {
		t.Errorf("ended with %v", err)
	}
}

// TestOwnerThatDiedInATransaction gives a node to a domain in a transaction that commits
// after the domain's death. A later domain of that number must not own it.
func TestOwnerThatDiedInATransaction(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	e.Introduce(3)
	c := e.dom0()
	tx := c.Start()
	c.Want(wire.Mkdir, tx, z("/given"), ok)
	c.Want(wire.SetPerms, tx, z("/given", "n3"), ok)
	e.DomainDied(3)
	e.Introduce(3)
	c.Want(wire.TransactionEnd, tx, z("T"), "EAGAIN")
	c.Want(wire.Read, 0, z("/given"), "ENOENT")
}

func TestNodeQuotaHoldsAtTheCommit(t *testing.T) {
	e := newEmbedded(t, server.Config{Quota: server.Quota{Nodes: 10}})
	g := e.guest(3)
	tx := g.Start()
	for i := range 20 {
		g.Want(wire.Mkdir, tx, z(fmt.Sprint("n", i)), ok)
	}
	g.Want(wire.TransactionEnd, tx, z("T"), "ENOSPC")
	g.Want(wire.Directory, 0, z("/local/domain/3"), "")
	tx = g.Start()
	for i := range 8 { // and its home; C xenstored requires one place to stay free
		g.Want(wire.Mkdir, tx, z(fmt.Sprint("n", i)), ok)
	}
	g.Want(wire.TransactionEnd, tx, z("T"), ok)
}

// TestListsOfChildrenAreNotShared adds to one directory in a transaction and outside it.
func TestListsOfChildrenAreNotShared(t *testing.T) {
	for n := range 10 { // after some of these the list can grow in place
		e := newEmbedded(t, server.Config{})
		c, d := e.dom0(), e.dom0()
		var names []string
		for i := range n + 1 {
			names = append(names, fmt.Sprint("n", i))
			c.Want(wire.Mkdir, 0, z("/d/"+names[i]), ok)
		}
		tx := c.Start()
		c.Want(wire.Directory, tx, z("/d"), z(names...))
		d.Want(wire.Mkdir, 0, z("/d/outside"), ok)
		c.Want(wire.Mkdir, tx, z("/d/inside"), ok)
		c.Want(wire.Directory, tx, z("/d"), z(append(slices.Clone(names), "inside")...))
		d.Want(wire.Directory, 0, z("/d"), z(append(slices.Clone(names), "outside")...))
		c.Want(wire.TransactionEnd, tx, z("T"), "EAGAIN")
	}
}

// TestTransactionThatSawHalfADeletion reads a parent and its child at different times, in
// both orders.
func TestTransactionThatSawHalfADeletion(t *testing.T) {
	e := newEmbedded(t, server.Config{})
	c, d := e.dom0(), e.dom0()
	c.Want(wire.Write, 0, "/p/q/r\x00", ok)
	tx := c.Start()
	c.Want(wire.Directory, tx, z("/p/q"), z("r"))
	d.Want(wire.Rm, 0, z("/p"), ok)
	c.Want(wire.Rm, tx, z("/p/q"), ok)
	c.Want(wire.TransactionEnd, tx, z("T"), "EAGAIN")

	tx = c.Start()
	c.Want(wire.Directory, tx, z("/p"), "ENOENT")
	d.Want(wire.Write, 0, "/p/q\x00", ok)
	c.Want(wire.Rm, tx, z("/p/q"), ok)
	c.Want(wire.TransactionEnd, tx, z("T"), "EAGAIN")
	c.Want(wire.Read, 0, z("/p/q"), "")
}

func TestManyClientsWhileDomainsDie(t *testing.T) {
	noLeak(t)
	e := newEmbedded(t, server.Config{Backlog: 32 << 10})
	for i := range 4 {
		path := fmt.Sprint("/shared/", i)
		if err := errors.Join(e.Mkdir(path), e.SetPerms(path, "b0")); err != nil {
			t.Fatal(err)
		}
	}
	ops := []wire.Op{wire.Write, wire.Write, wire.Write, wire.Mkdir, wire.Rm, wire.Read, wire.Directory, wire.Watch,
		wire.Unwatch, wire.TransactionStart, wire.TransactionEnd, wire.TransactionEnd, wire.ResetWatches}
	var clients sync.WaitGroup
	for i := range 8 {
		dom := hypercall.DomID(i % 4)
		rnd := rand.New(rand.NewPCG(uint64(i), 4))
		clients.Go(func() {
			for range 20 {
				e.Introduce(dom)
				conn, ended := e.dial(dom)
				go io.Copy(io.Discard, conn)
				for range 100 {
					op := ops[rnd.IntN(len(ops))]
					payload := z(fmt.Sprintf("/shared/%d/%d", rnd.IntN(4), rnd.IntN(10)))
					switch op {
					case wire.Watch, wire.Unwatch:
						payload += z("t")
					case wire.TransactionEnd:
						payload = z("T")
					}
					b, _ := wire.Append(nil, wire.Header{Op: op, TxID: uint32(rnd.IntN(3))}, payload)
					if _, err := conn.Write(b); err != nil {
						break // the domain died
					}
				}
				if rnd.IntN(3) == 0 {
					e.DomainDied(dom)
				}
				conn.Close()
				<-ended
			}
		})
	}
	clients.Wait()
	if st := e.Stats(); st.Connections != 0 || st.Transactions != 0 || st.Watches != 0 {
		t.Errorf("%+v", st)
	}
	if st := e.Stats(); st.Requests < 1000 {
		t.Errorf("hardly anything happened: %+v", st)
	}
}

// A brokenListener fails a few times before it works, and again until it is closed.
type brokenListener struct {
	net.Listener
	failures int
}

func (l *brokenListener) Accept() (net.Conn, error) {
	if l.failures > 0 {
		l.failures--
		return nil, errors.New("too many open files")
	}
	return l.Listener.Accept()
}

func TestServeOutlastsAccept(t *testing.T) {
	noLeak(t)
	s := server.New(server.Config{})
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- s.Serve(&brokenListener{inner, 3}) }()
	conn, err := net.Dial("tcp", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	wiretest.New(t, conn).Want(wire.Read, 0, z("/tool"), "")
	inner.Close()
	if err := <-served; !errors.Is(err, net.ErrClosed) {
		t.Errorf("listener closed by its owner: %v", err)
	}
	s.Close()
	if err := s.Serve(inner); err != nil {
		t.Errorf("after Close: %v", err)
	}
}
