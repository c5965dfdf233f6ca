package xenstore_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/wire"
	"barevif/xenbus/xenstore/wire/wiretest"
)

// bubble runs a test with a synthetic clock. The test fails if a goroutine is left.
func bubble(t *testing.T, f func(t *testing.T, s *scripted)) {
	synctest.Test(t, func(t *testing.T) { f(t, newScripted(t)) })
}

// dialled is bubble with a client of the scripted server.
func dialled(t *testing.T, cfg xenstore.Config, f func(t *testing.T, s *scripted, c *xenstore.Client)) {
	bubble(t, func(t *testing.T, s *scripted) {
		c := s.client(cfg)
		defer c.Close()
		f(t, s, c)
	})
}

func TestRepliesAreMatchedInAnyOrder(t *testing.T) {
	dialled(t, xenstore.Config{Pipeline: 3}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		c.StartIDs(1<<32 - 2) // ids wrap past 0
		go func() {
			p := s.accept()
			var got []wiretest.Message
			for range 3 {
				got = append(got, p.Expect(wire.Read))
			}
			slices.Reverse(got)
			for _, m := range got {
				if m.ReqID == 0 {
					t.Error("request with id 0")
				}
				p.Reply(m, "value of "+m.Payload)
			}
		}()
		var wg sync.WaitGroup
		for _, path := range []string{"/a", "/b", "/c"} {
			wg.Go(func() {
				if v, err := c.Read(t.Context(), path); v != "value of "+path+"\x00" || err != nil {
					t.Errorf("%s: %q, %v", path, v, err)
				}
			})
		}
		wg.Wait()
	})
}

func TestNoMoreRequestsAreOutThanThePipelineAllows(t *testing.T) {
	for _, pipeline := range []int{0, 1, 5} {
		dialled(t, xenstore.Config{Pipeline: pipeline}, func(t *testing.T, s *scripted, c *xenstore.Client) {
			var out atomic.Int32
			answer := make(chan struct{})
			go func() {
				p := s.accept()
				p.Serve(func(m wiretest.Message) {
					out.Add(1)
					go func() {
						<-answer
						out.Add(-1)
						p.Reply(m, "")
					}()
				})
			}()
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					if _, err := c.Read(t.Context(), "/a"); err != nil {
						t.Error(err)
					}
				})
			}
			for range 20 {
				synctest.Wait()
				if n := out.Load(); int(n) > max(pipeline, 1) {
					t.Errorf("%d requests out, pipeline %d", n, pipeline)
				}
				answer <- struct{}{}
			}
			wg.Wait()
		})
	}
}

func TestRequestNobodyWaitsForKeepsItsPlace(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		p := s.accept()
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("tired of waiting")
		ended := make(chan error)
		go func() { _, err := c.Read(ctx, "/late"); ended <- err }()
		late := p.Expect(wire.Read)
		cancel(why)
		if err := <-ended; !errors.Is(err, why) {
			t.Errorf("error %v, want the context's cause", err)
		}
		go func() {
			v, err := c.Read(t.Context(), "/next")
			if v != "2" {
				err = fmt.Errorf("%q, %w", v, err)
			}
			ended <- err
		}()
		synctest.Wait() // the second must not be sent before the reply to the first
		p.Reply(late, "1")
		p.Reply(p.Expect(wire.Read), "2")
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if n := c.Stats().Reconnects; n != 0 {
			t.Errorf("%d reconnects", n)
		}
	})
}

func TestServerThatBreaksTheProtocolIsLeft(t *testing.T) {
	for name, breach := range map[string]func(*wiretest.Peer, wiretest.Message){
		"unknown id":        func(p *wiretest.Peer, m wiretest.Message) { p.Send(wire.Read, m.ReqID+1, 0, "x") },
		"answered twice":    func(p *wiretest.Peer, m wiretest.Message) { p.Reply(m, "1"); p.Reply(m, "1") },
		"wrong type":        func(p *wiretest.Peer, m wiretest.Message) { p.Send(wire.Directory, m.ReqID, 0, "x\x00") },
		"no such type":      func(p *wiretest.Peer, m wiretest.Message) { p.Send(20, m.ReqID, 0, "") },
		"4097 bytes":        func(p *wiretest.Peer, m wiretest.Message) { p.Claim(wire.Read, m.ReqID, 4097) },
		"2^32-1 bytes":      func(p *wiretest.Peer, m wiretest.Message) { p.Claim(wire.Read, m.ReqID, 1<<32-1) },
		"huge event":        func(p *wiretest.Peer, m wiretest.Message) { p.Claim(wire.WatchEvent, 0, 1<<31) },
		"event of nothing":  func(p *wiretest.Peer, m wiretest.Message) { p.Send(wire.WatchEvent, 0, 0, "") },
		"event, no token":   func(p *wiretest.Peer, m wiretest.Message) { p.Send(wire.WatchEvent, 0, 0, "/path\x00token") },
		"error for no one":  func(p *wiretest.Peer, m wiretest.Message) { p.Send(wire.Error, m.ReqID+7, 0, "EIO\x00") },
		"reply to a future": func(p *wiretest.Peer, m wiretest.Message) { p.Send(wire.Write, m.ReqID+1, 0, "OK\x00") },
	} {
		t.Run(name, func(t *testing.T) {
			dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
				go func() {
					p := s.accept()
					breach(p, p.Expect(wire.Read))
					if m, ok := p.Next(); ok && name != "answered twice" {
						t.Errorf("the client goes on with %+v", m)
					}
					p.Close()
					for len(s.conns) > 0 || c.Stats().Reconnects == 0 {
						p = s.accept()
						p.Serve(func(m wiretest.Message) { p.Reply(m, "good") })
					}
				}()
				for range 2 { // the first may have had its reply
					if v, err := c.Read(t.Context(), "/a"); err != nil || v != "good" && v != "1" {
						t.Errorf("%q, %v", v, err)
					}
					synctest.Wait()
				}
				if st := c.Stats(); st.Violations != 1 || st.Reconnects != 1 {
					t.Errorf("%+v", st)
				}
			})
		})
	}
}

func TestChangeIsNotRepeatedWhenTheConnectionBreaks(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		go func() {
			p := s.accept()
			p.Expect(wire.Write)
			p.Close()
			p = s.accept()
			p.Serve(func(m wiretest.Message) {
				if m.Op == wire.Write {
					t.Error("a write was sent again")
				}
				p.Reply(m, "")
			})
		}()
		if err := c.Write(t.Context(), "/a", "1"); !errors.Is(err, xenstore.ErrLost) || !errors.Is(err, io.EOF) {
			t.Errorf("%v, want ErrLost and its cause", err)
		}
		if _, err := c.Read(t.Context(), "/a"); err != nil {
			t.Error(err)
		}
	})
}

func TestWhatWasNotSentSurvivesTheConnection(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		p := s.accept()
		ended := make(chan error, 2)
		go func() { _, err := c.Read(t.Context(), "/a"); ended <- err }()
		p.Expect(wire.Read)
		go func() { ended <- c.Write(t.Context(), "/b", "1") }() // queued behind the other
		synctest.Wait()
		p.Close()
		p = s.accept()
		p.Reply(p.Expect(wire.Read), "")
		p.Reply(p.Expect(wire.Write), "OK\x00")
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestRequestIsNotRepeatedForEver(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		sent := 0
		go func() {
			for conn := range s.conns {
				p := wiretest.NewPeer(t, conn)
				p.Expect(wire.Read)
				sent++
				p.Claim(wire.Read, 0, 1<<20)
				conn.Close()
			}
		}()
		start := time.Now()
		_, err := c.Read(t.Context(), "/a")
		var violation *xenstore.ProtocolError
		if !errors.Is(err, xenstore.ErrLost) || !errors.As(err, &violation) || sent != 8 {
			t.Errorf("sent %d times: %v", sent, err)
		}
		// The delay between connections has grown, because none answered anything.
		if took := time.Since(start); took < 300*time.Millisecond || took > 3*time.Second {
			t.Errorf("eight connections in %v", took)
		}
		c.Close()
		close(s.conns)
	})
}

func TestErrorsAreTyped(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		var name string
		go func() {
			p := s.accept()
			p.Serve(func(m wiretest.Message) { p.Send(wire.Error, m.ReqID, m.TxID, name) })
		}()
		for _, e := range []struct {
			name string
			is   []error
		}{
			{"ENOENT\x00", []error{xenstore.ErrNotFound, fs.ErrNotExist}},
			{"ENOENT", []error{xenstore.ErrNotFound}},
			{"EACCES\x00", []error{xenstore.ErrAccess, fs.ErrPermission}},
			{"EPERM\x00", []error{xenstore.ErrPerm, fs.ErrPermission}},
			{"EEXIST\x00", []error{xenstore.ErrExists, fs.ErrExist}},
			{"EINVAL\x00", []error{xenstore.ErrInvalid, fs.ErrInvalid}},
			{"ENOSYS\x00", []error{xenstore.ErrNoSys, errors.ErrUnsupported}},
			{"ENOSPC\x00", []error{xenstore.ErrNoSpace, xenstore.ErrQuota}},
			{"EQUOTA\x00", []error{xenstore.ErrQuota}},
			{"EBUSY\x00", []error{xenstore.ErrBusy}},
			{"E2BIG\x00", []error{xenstore.ErrTooBig}},
			{"EDQUOT\x00", []error{xenstore.ErrUnknown}},
			{"", []error{xenstore.ErrUnknown}},
			{"\x00", []error{xenstore.ErrUnknown}},
			{"ENOENT\x00\x00", []error{xenstore.ErrUnknown}},
			{strings.Repeat("E", 4096), []error{xenstore.ErrUnknown}},
		} {
			name = e.name
			_, err := c.Perms(t.Context(), "/some/path")
			var typed *xenstore.Error
			if !errors.As(err, &typed) || typed.Op != "get-perms" || typed.Path != "/some/path" {
				t.Errorf("%.20q: %v", name, err)
				continue
			}
			for _, target := range e.is {
				if !errors.Is(err, target) {
					t.Errorf("%.20q: %v is not %v", name, err, target)
				}
			}
			if len(err.Error()) > 400 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		}
		name = "E2BIG\x00"
		if _, err := c.Watch(t.Context(), "/a"); !errors.Is(err, xenstore.ErrQuota) || !errors.Is(err, xenstore.ErrTooBig) {
			t.Errorf("too many watches: %v", err)
		}
		if err := c.Write(t.Context(), "/a", ""); errors.Is(err, xenstore.ErrQuota) {
			t.Errorf("%v is not about a quota", err)
		}
	})
}

func TestEventMayComeBeforeTheReply(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		go func() {
			p := s.accept()
			m := p.Expect(wire.Watch)
			path, token, _ := strings.Cut(strings.TrimSuffix(m.Payload, "\x00"), "\x00")
			p.Send(wire.WatchEvent, m.ReqID, 7, path+"\x00"+token+"\x00") // the ids of an event are undefined
			p.Reply(m, "OK\x00")
		}()
		w, err := c.Watch(t.Context(), "/a")
		if err != nil {
			t.Fatal(err)
		}
		<-w.C()
		if paths, all := w.Paths(); all || !slices.Equal(paths, []string{"/a"}) {
			t.Errorf("%q, %v", paths, all)
		}
	})
}

func TestFloodOfEventsIsMerged(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		var p *wiretest.Peer
		var token string
		const flood = 20_000
		go func() {
			p = s.accept()
			m := p.Expect(wire.Watch)
			_, token, _ = strings.Cut(strings.TrimSuffix(m.Payload, "\x00"), "\x00")
			p.Reply(m, "OK\x00")
			huge := "/a/" + strings.Repeat("x", 4000)
			for i := range flood {
				p.Event(fmt.Sprint(huge, i), token)
				p.Event("/other", token)
				p.Event("/a", "not ours")
			}
			p.Reply(p.Expect(wire.Read), "")
		}()
		w, err := c.Watch(t.Context(), "/a")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(t.Context(), "/a"); err != nil { // answered although nobody receives from w
			t.Fatal(err)
		}
		<-w.C()
		if paths, all := w.Paths(); !all || len(paths) != 0 {
			t.Errorf("%d paths, all %v", len(paths), all)
		}
		st := c.Stats()
		if st.Events != 3*flood || st.UnknownTokens != flood || st.Coalesced != 2*flood-1 || st.Violations != 0 {
			t.Errorf("%+v", st)
		}
	})
}

func TestPathThatIsNotBelowTheWatchMeansEverything(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		go func() {
			p := s.accept()
			for range 2 {
				m := p.Expect(wire.Watch)
				_, token, _ := strings.Cut(strings.TrimSuffix(m.Payload, "\x00"), "\x00")
				p.Reply(m, "OK\x00")
				p.Event("/dirt", token)
			}
		}()
		for path, want := range map[string]bool{"/dir": true, "/": false} {
			w, err := c.Watch(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			<-w.C()
			if _, all := w.Paths(); all != want {
				t.Errorf("watch on %s: all is %v", path, all)
			}
		}
	})
}

func TestWatchThatIsNotWaitedForIsTakenBack(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		p := s.accept()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { _, err := c.Watch(ctx, "/a"); ended <- err }()
		m := p.Expect(wire.Watch)
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		p.Reply(m, "OK\x00")
		if un := p.Expect(wire.Unwatch); un.Payload != m.Payload {
			t.Errorf("%q is taken back as %q", m.Payload, un.Payload)
		} else {
			p.Reply(un, "OK\x00")
		}
		synctest.Wait()
		if c.Tokens() != 0 {
			t.Error("its token is kept")
		}
		// Nor does a request that was never sent.
		go func() { _, err := c.Read(t.Context(), "/slow"); ended <- err }()
		slow := p.Expect(wire.Read)
		ctx, cancel = context.WithCancel(t.Context())
		go func() { _, err := c.Watch(ctx, "/b"); ended <- err }()
		synctest.Wait()
		cancel()
		<-ended
		p.Reply(slow, "")
		<-ended
		if c.Tokens() != 0 {
			t.Error("a token that was never sent is kept")
		}
	})
}

func TestWatchThatCannotBeSetAgainEnds(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		go func() {
			p := s.accept()
			for range 2 {
				p.Reply(p.Expect(wire.Watch), "OK\x00")
			}
			p.Close()
			p = s.accept()
			for range 2 {
				m := p.Expect(wire.Watch)
				if strings.HasPrefix(m.Payload, "/a\x00") {
					p.Refuse(m, "E2BIG")
				} else {
					p.Reply(m, "OK\x00")
				}
			}
		}()
		a, err := c.Watch(t.Context(), "/a")
		if err != nil {
			t.Fatal(err)
		}
		b, err := c.Watch(t.Context(), "/b")
		if err != nil {
			t.Fatal(err)
		}
		if _, open := <-a.C(); open || !errors.Is(a.Err(), xenstore.ErrQuota) {
			t.Errorf("open %v, %v", open, a.Err())
		}
		if _, open := <-b.C(); !open {
			t.Errorf("the other ended too: %v", b.Err())
		}
		if _, all := b.Paths(); !all {
			t.Error("set again without saying that anything may have changed")
		}
	})
}

// widens brings a Client, which has a watch on domain 1's node, to the broad watch for which it drops that one:
// the server has refused a watch on domain 2's node for its quota. It returns the watch and the requests.
func widens(t *testing.T, ctx context.Context, p *wiretest.Peer, c *xenstore.Client) (w *xenstore.Watch, second <-chan error, first, drop wiretest.Message) {
	got := make(chan *xenstore.Watch, 1)
	go func() {
		w, err := c.Watch(t.Context(), "/local/domain/1/state")
		if err != nil {
			t.Error(err)
		}
		got <- w
	}()
	first = p.Expect(wire.Watch)
	p.Reply(first, "OK\x00")
	w = <-got
	ended := make(chan error, 1)
	go func() { _, err := c.Watch(ctx, "/local/domain/2/state"); ended <- err }()
	p.Refuse(p.Expect(wire.Watch), "E2BIG") // of domain 2's node
	p.Refuse(p.Expect(wire.Watch), "E2BIG") // the broad one
	return w, ended, first, p.Expect(wire.Unwatch)
}

// A watch that was dropped to make room for a broad one is set again if its caller has left, and tells of
// events.
func TestWatchDroppedForNothingIsSetAgain(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		p := s.accept()
		ctx, cancel := context.WithCancel(t.Context())
		w, second, first, drop := widens(t, ctx, p, c)
		synctest.Wait() // the broad one is queued again
		cancel()
		if err := <-second; err == nil {
			t.Error("a watch without its context")
		}
		p.Reply(drop, "OK\x00")
		again := p.Expect(wire.Watch)
		if again.Payload != first.Payload {
			t.Fatalf("%q", again.Payload)
		}
		p.Reply(again, "OK\x00")
		<-w.C() // set again
		_, token, _ := strings.Cut(strings.TrimSuffix(again.Payload, "\x00"), "\x00")
		p.Event("/local/domain/1/state", token)
		synctest.Wait()
		select {
		case <-w.C():
		default:
			t.Errorf("it says nothing of an event: %+v", c.Stats())
		}
		c.Close()
		if _, open := <-w.C(); open {
			t.Error("Close of the Client does not close it")
		}
	})
}

// A Client may end once the server has accepted a broad watch, and before that covers the others. Their channels
// are closed then.
func TestClientEndsWhileItsWatchesAreReplaced(t *testing.T) {
	for range 200 {
		dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
			p := s.accept()
			w, second, _, drop := widens(t, t.Context(), p, c)
			p.Reply(drop, "OK\x00")
			p.Reply(p.Expect(wire.Watch), "OK\x00")
			c.Close()
			<-second
			for range w.C() { // until it is closed
			}
		})
	}
}

// The server answers a WATCH as /dev/xen/xenbus may: with an error of the write.
type node struct {
	net.Conn
	refuse error
}

func (n node) Write(b []byte) (int, error) {
	if wire.Op(b[0]) == wire.Watch {
		return 0, n.refuse
	}
	return n.Conn.Write(b)
}

func TestWatchRefusedByTheWriteIsAnAnswer(t *testing.T) {
	for _, e := range []struct {
		errno syscall.Errno
		want  error
	}{{syscall.EACCES, xenstore.ErrAccess}, {syscall.EEXIST, xenstore.ErrExists}, {syscall.EINVAL, xenstore.ErrUnknown}} {
		bubble(t, func(t *testing.T, s *scripted) {
			c, err := xenstore.Dial(t.Context(), func(ctx context.Context) (io.ReadWriteCloser, error) {
				conn, err := s.open(ctx)
				return node{conn.(net.Conn), &fs.PathError{Op: "write", Path: "/dev/xen/xenbus", Err: e.errno}}, err
			}, xenstore.Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			go func() {
				p := s.accept()
				p.Serve(func(m wiretest.Message) { p.Reply(m, "") })
			}()
			for range 3 {
				if _, err := c.Watch(t.Context(), "/a"); !errors.Is(err, e.want) {
					t.Errorf("%v: %v", e.errno, err)
				}
			}
			if _, err := c.Read(t.Context(), "/a"); err != nil {
				t.Error(err)
			}
			if n := c.Stats().Reconnects; n != 0 || c.Tokens() != 0 {
				t.Errorf("%d reconnects, %d tokens", n, c.Tokens())
			}
		})
	}
}

func TestBrokenFileIsNotAnAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, s *scripted) {
		broken := true
		c, err := xenstore.Dial(t.Context(), func(ctx context.Context) (io.ReadWriteCloser, error) {
			conn, err := s.open(ctx)
			if broken {
				broken = false
				return node{conn.(net.Conn), &fs.PathError{Op: "write", Path: "x", Err: fs.ErrClosed}}, err
			}
			return conn, err
		}, xenstore.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go func() {
			s.accept()
			p := s.accept()
			p.Reply(p.Expect(wire.Watch), "OK\x00")
		}()
		if _, err := c.Watch(t.Context(), "/a"); err != nil {
			t.Error(err)
		}
	})
}

func TestTransactionInConflictForEverIsGivenUp(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		open := 0
		go func() {
			p := s.accept()
			p.Serve(func(m wiretest.Message) {
				switch {
				case m.Op == wire.TransactionStart:
					open++
					p.Reply(m, "17\x00")
				case m.Op == wire.TransactionEnd:
					open--
					p.Refuse(m, "EAGAIN")
				case m.Op == wire.Read && m.TxID == 0:
					p.Reply(m, "")
				default:
					t.Errorf("unexpected %+v", m)
				}
			})
		}()
		// Other callers are not delayed.
		other := make(chan error)
		go func() {
			time.Sleep(time.Second)
			_, err := c.Read(t.Context(), "/a")
			other <- errors.Join(err, c.Transact(t.Context(), func(xenstore.Tx) error { return io.EOF }))
		}()
		runs, start := 0, time.Now()
		err := c.Transact(t.Context(), func(xenstore.Tx) error { runs++; return nil })
		var conflict *xenstore.ConflictError
		if !errors.As(err, &conflict) || !errors.Is(err, xenstore.ErrAgain) || conflict.Attempts != 100 || runs != 100 {
			t.Errorf("%d runs: %v", runs, err)
		}
		if took := time.Since(start); took < time.Second || took > 10*time.Second {
			t.Errorf("given up after %v", took)
		}
		if err := <-other; !errors.Is(err, io.EOF) {
			t.Error(err)
		}
		synctest.Wait()
		if open != 0 {
			t.Errorf("%d transactions left open", open)
		}
	})
}

func TestTransactionForgottenByTheServerRunsAgain(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		go func() {
			p := s.accept()
			p.Reply(p.Expect(wire.TransactionStart), "5\x00")
			p.Refuse(p.Expect(wire.TransactionEnd), "ENOENT")
			p.Reply(p.Expect(wire.TransactionStart), "6\x00")
			if m := p.Expect(wire.TransactionEnd); m.TxID != 6 || m.Payload != "T\x00" {
				t.Errorf("%+v", m)
			} else {
				p.Reply(m, "OK\x00")
			}
		}()
		if err := c.Transact(t.Context(), func(xenstore.Tx) error { return nil }); err != nil {
			t.Error(err)
		}
	})
}

func TestTransactionThatNobodyWaitsForIsEnded(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		p := s.accept()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Transact(ctx, func(xenstore.Tx) error { return nil }) }()
		start := p.Expect(wire.TransactionStart)
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		p.Reply(start, "9\x00")
		if m := p.Expect(wire.TransactionEnd); m.TxID != 9 || m.Payload != "F\x00" {
			t.Errorf("%+v", m)
		}
	})
}

func TestTransactionIDsAreChecked(t *testing.T) {
	for _, id := range []string{"", "0\x00", "-1\x00", "4294967296\x00", "x\x00", " 1\x00", "1\x002\x00"} {
		dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
			go func() {
				p := s.accept()
				p.Reply(p.Expect(wire.TransactionStart), id)
			}()
			err := c.Transact(t.Context(), func(xenstore.Tx) error { t.Error("runs"); return nil })
			var violation *xenstore.ProtocolError
			if !errors.As(err, &violation) {
				t.Errorf("id %q: %v", id, err)
			}
		})
	}
}

func TestPanicInATransactionEndsIt(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		aborted := make(chan wiretest.Message, 1)
		go func() {
			p := s.accept()
			p.Reply(p.Expect(wire.TransactionStart), "3\x00")
			m := p.Expect(wire.TransactionEnd)
			aborted <- m
			p.Reply(m, "OK\x00")
			p.Reply(p.Expect(wire.TransactionStart), "4\x00")
			p.Reply(p.Expect(wire.TransactionEnd), "OK\x00")
		}()
		func() {
			defer func() {
				if recover() == nil {
					t.Error("the panic was swallowed")
				}
			}()
			c.Transact(t.Context(), func(xenstore.Tx) error { panic("fn's own") })
		}()
		if m := <-aborted; m.Payload != "F\x00" {
			t.Errorf("%+v", m)
		}
		if err := c.Transact(t.Context(), func(xenstore.Tx) error { return nil }); err != nil {
			t.Error(err)
		}
	})
}

func TestDirectoryInParts(t *testing.T) {
	type part struct{ offset, reply string }
	many := make([]part, 32)
	for i := range many {
		many[i] = part{fmt.Sprint(i % 2 * 2), fmt.Sprintf("%d\x00a\x00", i)}
	}
	endless := func() (parts []part) {
		chunk := strings.Repeat("n", 4000)
		for n := 0; n <= 1<<20; n += 4000 {
			parts = append(parts, part{fmt.Sprint(n), "1\x00" + chunk})
		}
		return parts
	}()
	for _, d := range []struct {
		name  string
		parts []part
		want  []string
		err   error
	}{
		{"one part", []part{{"0", "1\x00a\x00b\x00\x00"}}, []string{"a", "b"}, nil},
		{"cut in a name", []part{{"0", "1\x00ab\x00c"}, {"4", "1\x00d\x00\x00"}}, []string{"ab", "cd"}, nil},
		{"end comes alone", []part{{"0", "1\x00a\x00"}, {"2", "1\x00\x00"}}, []string{"a"}, nil},
		{"emptied meanwhile", []part{{"0", "1\x00\x00"}}, nil, nil},
		{"changes", []part{{"0", "1\x00a\x00b\x00"}, {"4", "2\x00c\x00"}, {"0", "2\x00x\x00\x00"}}, []string{"x"}, nil},
		{"never stands still", many, nil, xenstore.ErrAgain},
		{"never ends", endless, nil, xenstore.ErrTooBig},
		{"a part of nothing", []part{{"0", "1\x00"}}, nil, &xenstore.ProtocolError{}},
		{"no generation", []part{{"0", "12"}}, nil, &xenstore.ProtocolError{}},
		{"a name with a slash", []part{{"0", "1\x00a/b\x00\x00"}}, nil, &xenstore.ProtocolError{}},
	} {
		t.Run(d.name, func(t *testing.T) {
			dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
				left := d.parts
				go func() {
					p := s.accept()
					p.Refuse(p.Expect(wire.Directory), "E2BIG")
					p.Serve(func(m wiretest.Message) {
						if len(left) == 0 || m.Op != wire.DirectoryPart {
							t.Errorf("unexpected %+v", m)
							p.Refuse(m, "EIO")
							return
						}
						if want := "/d\x00" + left[0].offset + "\x00"; m.Payload != want && d.name != "never stands still" {
							t.Errorf("asks %q, want %q", m.Payload, want)
						}
						p.Reply(m, left[0].reply)
						left = left[1:]
					})
				}()
				got, err := c.Directory(t.Context(), "/d")
				if violation := (*xenstore.ProtocolError)(nil); errors.As(d.err, &violation) {
					if !errors.As(err, &violation) {
						t.Errorf("%v, want a ProtocolError", err)
					}
				} else if !errors.Is(err, d.err) || !slices.Equal(got, d.want) {
					t.Errorf("%q, %v; want %q, %v", got, err, d.want, d.err)
				}
			})
		})
	}
}

func TestCloseEndsAWriteNobodyReads(t *testing.T) {
	bubble(t, func(t *testing.T, s *scripted) {
		c := s.client(xenstore.Config{Pipeline: 4})
		s.accept() // and never reads
		ended := make(chan error, 4)
		for range cap(ended) {
			go func() { ended <- c.Write(t.Context(), "/a", "1") }()
		}
		synctest.Wait()
		c.Close()
		for range cap(ended) {
			if err := <-ended; !errors.Is(err, net.ErrClosed) && !errors.Is(err, xenstore.ErrLost) {
				t.Error(err)
			}
		}
	})
}

func TestConnectionIsTriedWithGrowingPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tries []time.Time
		first, theirs := net.Pipe()
		c, err := xenstore.Dial(t.Context(), func(context.Context) (io.ReadWriteCloser, error) {
			if tries = append(tries, time.Now()); len(tries) == 1 {
				return first, nil
			}
			return nil, errors.New("nobody there")
		}, xenstore.Config{})
		if err != nil {
			t.Fatal(err)
		}
		theirs.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if _, err := c.Read(ctx, "/a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		c.Close()
		if len(tries) < 30 || len(tries) > 80 {
			t.Errorf("%d attempts in 30 s", len(tries))
		}
		if soon := tries[1].Sub(tries[0]); soon > 10*time.Millisecond {
			t.Errorf("first attempt after %v", soon)
		}
	})
}

func TestDialRefusesWhatItCannotKeep(t *testing.T) {
	for _, cfg := range []xenstore.Config{{MaxPayload: 4097}, {MaxPayload: -1}, {Pipeline: -1}, {Watches: -1}} {
		if _, err := xenstore.Dial(t.Context(), nil, cfg); err == nil {
			t.Errorf("%+v is taken", cfg)
		}
	}
	why := errors.New("no xenstore here")
	_, err := xenstore.Dial(t.Context(), func(context.Context) (io.ReadWriteCloser, error) { return nil, why }, xenstore.Config{})
	if !errors.Is(err, why) {
		t.Errorf("%v, want open's own error", err)
	}
}

func TestRequestsOfTheToolstack(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		var sent wiretest.Message
		var answer string
		go func() {
			p := s.accept()
			p.Serve(func(m wiretest.Message) { sent = m; p.Reply(m, answer) })
		}()
		ctx := t.Context()
		var text string
		for _, q := range []struct {
			name    string
			call    func() error
			op      wire.Op
			payload string
			answer  string
		}{
			{"introduce", func() error { return c.Introduce(ctx, 5, 1<<40, 3) }, wire.Introduce, "5\x001099511627776\x003\x00", "OK\x00"},
			{"release", func() error { return c.Release(ctx, 5) }, wire.Release, "5\x00", "OK\x00"},
			{"target", func() error { return c.SetTarget(ctx, 5, 6) }, wire.SetTarget, "5\x006\x00", "OK\x00"},
			{"path", func() (err error) { text, err = c.GetDomainPath(ctx, 5); return }, wire.GetDomainPath, "5\x00", "/local/domain/5\x00"},
		} {
			answer = q.answer
			if err := q.call(); err != nil || sent.Op != q.op || sent.Payload != q.payload {
				t.Errorf("%s: sent %d %q, %v", q.name, sent.Op, sent.Payload, err)
			}
		}
		if text != "/local/domain/5" {
			t.Errorf("%q", text)
		}
		answer = "maybe\x00"
		var violation *xenstore.ProtocolError
		for name, call := range map[string]func() error{
			"introduced": func() error { _, err := c.IsIntroduced(ctx, 5); return err },
			"perms":      func() error { _, err := c.Perms(ctx, "/a"); return err },
		} {
			if err := call(); !errors.As(err, &violation) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestPermsOfGarbageAreRefused(t *testing.T) {
	dialled(t, xenstore.Config{}, func(t *testing.T, s *scripted, c *xenstore.Client) {
		var answer string
		go func() {
			p := s.accept()
			p.Serve(func(m wiretest.Message) { p.Reply(m, answer) })
		}()
		for _, answer = range []string{"", "\x00", "r", "x1\x00", "r-1\x00", "r65536\x00", "r1\x00\x00r2\x00", "r1\x00 r2\x00"} {
			if perms, err := c.Perms(t.Context(), "/a"); err == nil {
				t.Errorf("%q gives %v", answer, perms)
			}
		}
		answer = "b0\x00r65535\x00"
		want := []xenstore.Perm{{Dom: 0, Access: xenstore.ReadWrite}, {Dom: hypercall.DomID(65535), Access: xenstore.ReadOnly}}
		if perms, err := c.Perms(t.Context(), "/a"); err != nil || !slices.Equal(perms, want) {
			t.Errorf("%v, %v", perms, err)
		}
	})
}

// When open reports that the domain has ended, the client never calls it again: waiting
// requests fail at once, and so do later ones.
func TestAClientEndsWithItsDomain(t *testing.T) {
	bubble(t, func(t *testing.T, s *scripted) {
		opened := 0
		c, err := xenstore.Dial(t.Context(), func(ctx context.Context) (io.ReadWriteCloser, error) {
			if opened++; opened > 1 {
				return nil, fmt.Errorf("the domain is gone: %w", net.ErrClosed)
			}
			return s.open(ctx)
		}, xenstore.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go func() {
			p := s.accept()
			p.Expect(wire.Read)
			p.Close()
		}()
		began := time.Now()
		for range 2 {
			if _, err := c.Read(t.Context(), "/a"); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the request ended with %v", err)
			}
		}
		if d := time.Since(began); d > 100*time.Millisecond {
			t.Errorf("known after %v", d)
		}
		time.Sleep(time.Minute)
		if opened != 2 {
			t.Errorf("asked for %d connections", opened)
		}
	})
}

// A wide transport is a Pipeliner for several requests.
type wide struct {
	io.ReadWriteCloser
	pipeline int
}

func (w wide) Pipeline() int { return w.pipeline }

// Independent requests are sent together if the transport allows it: the keys of a
// directory take one round trip.
func TestKeysAreAskedForTogetherWhereTheTransportTakesThem(t *testing.T) {
	for _, pipeline := range []int{1, 3, 16} {
		bubble(t, func(t *testing.T, s *scripted) {
			open := func(ctx context.Context) (io.ReadWriteCloser, error) {
				conn, err := s.open(ctx)
				return wide{conn, pipeline}, err
			}
			c, err := xenstore.Dial(t.Context(), open, xenstore.Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			p := s.accept()
			var out, most atomic.Int32
			answer := make(chan struct{})
			go p.Serve(func(m wiretest.Message) {
				most.Store(max(most.Load(), out.Add(1)))
				go func() {
					<-answer
					out.Add(-1)
					p.Reply(m, "1")
				}()
			})
			var v xenstore.Values
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				if v, err = c.ReadKeys(t.Context(), "dir", "a", "b", "c", "d", "e"); err != nil {
					t.Error(err)
				}
			}()
			rounds := 0
			for over := false; !over; rounds++ {
				synctest.Wait()
				for range out.Load() {
					answer <- struct{}{}
				}
				synctest.Wait()
				select {
				case <-ended:
					over = true
				default:
				}
			}
			if want := map[int]int{1: 5, 3: 2, 16: 1}[pipeline]; rounds != want || int(most.Load()) != min(pipeline, 5) || len(v) != 5 {
				t.Errorf("pipeline %d: %d round trips, want %d; %d requests at once; %d keys", pipeline, rounds, want, most.Load(), len(v))
			}
		})
	}
}
