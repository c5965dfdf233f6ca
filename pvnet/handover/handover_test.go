//go:build linux

package handover

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
	"barevif/pvnet"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

var us = Identity{Domain: 2, Program: "this test"}

// A site is a backend with one vif that can be handed over, and its frontend.
type site struct {
	t     *testing.T
	path  string
	dom   *emu.Domain
	guest *emu.Domain // of front
	l     *Listener
	back  *pvnet.Device
	pipe  *os.File // the writing end of what comes with the vif

	front   *pvnet.Device
	held    chan bool // true: Hold, false: Resume
	stop    context.CancelCauseFunc
	stopped chan error
}

func newSite(t *testing.T) *site {
	t.Helper()
	lab := labtest.New(t, emu.Config{})
	s := &site{
		t: t, path: filepath.Join(emutest.SocketDir(t), "s"), dom: lab.Domain(2),
		held: make(chan bool, 64), stopped: make(chan error, 1),
	}
	s.guest = lab.Domain(1)
	lab.Add(toolstack.Vif{Front: 1, Back: 2})
	var err error
	if s.l, err = Listen(s.path, us, nil); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(context.Background())
	s.stop = stop
	came := make(chan *pvnet.Device, 8)
	go func() {
		s.stopped <- pvnet.Serve(ctx, s.dom, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) {
			defer s.l.Add(Vif{d, s.hold, func() { s.held <- false }})()
			came <- d
			<-d.Done()
		})
	}()
	t.Cleanup(func() {
		s.front.Disconnect()
		stop(context.Canceled)
		if err := <-s.stopped; err == nil {
			t.Error("Serve returned nil")
		}
		s.l.Close()
		if s.pipe != nil {
			s.pipe.Close()
		}
	})
	connecting, cancel := context.WithTimeout(t.Context(), labtest.Limit)
	defer cancel()
	if s.front, err = pvnet.Connect(connecting, s.guest, "0", pvnet.Config{}); err != nil {
		t.Fatal(err)
	}
	s.back = <-came
	s.awaitUp(s.back)
	return s
}

// hold passes the reading end of a pipe on.
func (s *site) hold(context.Context) ([]*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	if s.pipe != nil {
		s.pipe.Close()
	}
	s.pipe = w
	s.held <- true
	return []*os.File{r}, nil
}

func (s *site) awaitUp(d *pvnet.Device) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), labtest.Limit)
	defer cancel()
	for ev := range d.Links(ctx) {
		if ev.Up {
			return
		}
	}
	s.t.Fatal("the link is down")
}

func TestAVifGoesThroughTheSocket(t *testing.T) {
	s := newSite(t)
	c, err := Dial(t.Context(), s.path, us)
	if err != nil {
		t.Fatal(err)
	}
	if c.Program() != us.Program {
		t.Errorf("it calls itself %q", c.Program())
	}
	_, err = Dial(t.Context(), s.path, us)
	if r, ok := errors.AsType[*RefusedError](err); !ok || r.Why != "another process is taking over" || r.Program != us.Program {
		t.Errorf("a second session: %v", err)
	}
	ctx, stop := context.WithCancelCause(context.Background())
	came, served := make(chan *pvnet.Device, 1), make(chan error, 1)
	go func() {
		served <- pvnet.Serve(ctx, s.dom, pvnet.ServeConfig{Hotplug: true, TakeOver: c.TakeOver}, func(d *pvnet.Device) { came <- d })
	}()
	d := <-came
	s.awaitUp(d)
	files := d.TakenFiles()
	if len(files) != 1 || d.TakenFiles() != nil {
		t.Fatalf("%d descriptors came", len(files))
	}
	s.pipe.WriteString("x")
	if n, err := files[0].Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("the descriptor is another one: %d, %v", n, err)
	}
	files[0].Close()
	if err := c.Finish(t.Context()); err != nil || c.Taken() != 1 {
		t.Errorf("%d vifs, %v", c.Taken(), err)
	}
	<-s.l.Done()
	if pid := s.l.Successor(); pid != os.Getpid() {
		t.Errorf("the successor is process %d", pid)
	}
	if _, err := os.Lstat(s.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is there: %v", err)
	}
	select { // it leaves its connection and xenstore first
	case <-s.back.Done():
	case <-time.After(labtest.Limit):
		t.Fatal("the device of the old process does not end")
	}
	if _, err := s.back.OwnTX(0); !errors.Is(err, pvnet.ErrHandover) {
		t.Errorf("the device of the old process: %v", err)
	}
	s.stop(pvnet.ErrHandover)
	if in, err := c.TakeOver(t.Context(), 1, "0"); in != nil || err != nil {
		t.Errorf("after the end: %v, %v", in, err)
	}
	stop(pvnet.ErrHandover)
	if err := <-served; !errors.Is(err, pvnet.ErrHandover) {
		t.Error(err)
	}
}

// Finish does not wait for a vif that was declined, and that one goes on where it is.
func TestADeclinedVifStays(t *testing.T) {
	s := newSite(t)
	c, err := Dial(t.Context(), s.path, us)
	if err != nil {
		t.Fatal(err)
	}
	c.Decline(7, "0") // the other process does not have it
	select {
	case <-c.settled:
		t.Error("a vif of the other process is forgotten")
	default:
	}
	if !c.Offers(1, "0") || c.Offers(7, "0") {
		t.Error("it is not known which vifs the other process has")
	}
	c.Decline(1, "0")
	c.Decline(1, "0")
	if c.Offers(1, "0") {
		t.Error("a vif that was declined is offered")
	}
	select {
	case <-c.settled:
	default:
		t.Error("Finish waits for the vif that was declined")
	}
	c.Close()
	if c.Taken() != 0 || len(s.held) != 0 || s.back.SetDeadline(time.Time{}) != nil {
		t.Error("the vif was touched")
	}
}

func TestProcessesThatDoNotFitPart(t *testing.T) {
	s := newSite(t)
	for want, id := range map[string]Identity{
		"domain 3":   {Domain: 3},
		`type "vbd"`: {Domain: 2, Type: "vbd"},
	} {
		_, err := Dial(t.Context(), s.path, id)
		if r, ok := errors.AsType[*RefusedError](err); !ok || !strings.Contains(r.Error(), want) {
			t.Errorf("%+v: %v", id, err)
		}
	}
	raw := s.dial()
	defer raw.Close()
	m := us.hello(nil)
	m.Protocol = 7
	if err := raw.send(m, nil); err != nil {
		t.Fatal(err)
	}
	if m, _, err := raw.receive(time.Now().Add(labtest.Limit)); err != nil || m.Op != opNo || !strings.Contains(m.Why, "version 2") || !strings.Contains(m.Why, "version 7") {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := Dial(t.Context(), s.path+"x", us); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nobody listens: %v", err)
	}
	if st, err := os.Stat(s.path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, %v", st.Mode(), err)
	}
}

// Who only looks whether anybody listens, as a process does before it listens itself, is no cause for a warning.
func TestALookWhetherAnybodyListensIsNoFault(t *testing.T) {
	var log logtest.Log
	path := filepath.Join(emutest.SocketDir(t), "s")
	l, err := Listen(path, us, log.Logger())
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unixpacket", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := Dial(t.Context(), path, Identity{Domain: 3}); err == nil { // was accepted later
		t.Error("a process of another domain was accepted")
	}
	l.Close() // waits for both
	if lines := log.Lines("did not say so"); len(lines) > 0 {
		t.Errorf("%q", lines)
	}
}

// An old process may end as soon as it is told to, before it has answered.
func TestAnOldProcessThatEndsAtOnceHasEnded(t *testing.T) {
	path := filepath.Join(emutest.SocketDir(t), "s")
	l, err := net.Listen("unixpacket", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	old := make(chan error, 1)
	go func() {
		nc, err := l.Accept()
		if err != nil {
			old <- err
			return
		}
		c := newConn(nc.(*net.UnixConn))
		defer c.Close()
		if _, _, err = c.receive(time.Now().Add(labtest.Limit)); err == nil {
			err = c.send(us.hello(nil), nil)
		}
		if err == nil {
			_, _, err = c.receive(time.Now().Add(labtest.Limit)) // that it is done
		}
		old <- err
	}()
	c, err := Dial(t.Context(), path, us)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Finish(t.Context()); err != nil {
		t.Errorf("Finish: %v", err)
	}
	if err := <-old; err != nil {
		t.Errorf("the old process: %v", err)
	}
}

func TestOnlyOneselfAndRootMayTakeOver(t *testing.T) {
	for _, c := range []struct {
		uid uint32
		own int
		ok  bool
	}{{0, 0, true}, {0, 1000, true}, {1000, 1000, true}, {1001, 1000, false}, {1000, 0, false}, {65534, 1000, false}} {
		if err := checkUser(c.uid, c.own); (err == nil) != c.ok || err != nil && !errors.Is(err, os.ErrPermission) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func (s *site) dial() *conn {
	s.t.Helper()
	c, err := net.Dial("unixpacket", s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	return newConn(c.(*net.UnixConn))
}

// Whatever the other process sends or leaves out, the vif stays with this one, which closes
// what came and takes the next session.
func TestNonsenseLeavesTheVifWhereItIs(t *testing.T) {
	s := newSite(t)
	take := func(c *conn) {
		if err := c.send(&message{Op: opTake, Vif: "1/0"}, nil); err != nil {
			t.Fatal(err)
		}
		m, files, err := c.receive(time.Now().Add(labtest.Limit))
		if err != nil || m.Op != opGiven || len(files) != 1 || m.State == 0 {
			t.Fatalf("%+v, %d descriptors, %v", m, len(files), err)
		}
		closeAll(files)
		if state, err := c.receiveState(m.State, time.Now().Add(labtest.Limit)); err != nil || len(state) != m.State {
			t.Fatalf("a state of %d bytes, %d came: %v", m.State, len(state), err)
		}
	}
	raw := func(c *conn, b string) {
		if _, err := c.Write([]byte(b)); err != nil {
			t.Fatal(err)
		}
	}
	for name, f := range map[string]func(c *conn){
		"no JSON":              func(c *conn) { raw(c, "\x00\xff") },
		"another type":         func(c *conn) { raw(c, `{"Op":7}`) },
		"no operation":         func(c *conn) { raw(c, `{}`) },
		"an unknown operation": func(c *conn) { c.send(&message{Op: "dance"}, nil) },
		"its end":              func(c *conn) { c.Close() },
		"a path for a vif":     func(c *conn) { c.send(&message{Op: opTake, Vif: "../../1/0"}, nil) },
		"descriptors": func(c *conn) {
			r, w, _ := os.Pipe()
			c.send(&message{Op: opTake, Vif: "1/0", Files: 2}, []*os.File{r, w})
			r.Close()
			w.Close()
		},
		"descriptors that it hides": func(c *conn) {
			r, w, _ := os.Pipe()
			c.send(&message{Op: opDone}, []*os.File{r}) // and Files: 0
			r.Close()
			if _, err := w.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
				for end := time.Now().Add(labtest.Limit); !errors.Is(err, syscall.EPIPE) && time.Now().Before(end); _, err = w.Write([]byte("x")) {
				}
			}
			w.Close()
		},
		"its end after the offer":     func(c *conn) { take(c); c.Close() },
		"nonsense after the offer":    func(c *conn) { take(c); raw(c, "[") },
		"another vif after the offer": func(c *conn) { take(c); c.send(&message{Op: opTook, Vif: "1/1"}, nil) },
		"a refusal": func(c *conn) {
			take(c)
			c.send(&message{Op: opCannot, Vif: "1/0", Why: strings.Repeat("no ", 9999)}, nil)
			c.Close()
		},
		"an acceptance without offer":  func(c *conn) { c.send(&message{Op: opTook, Vif: "1/0"}, nil) },
		"nothing after the offer":      func(c *conn) { take(c) },
		"a packet beyond every length": func(c *conn) { c.Write(make([]byte, maxPacket+1)) },
	} {
		t.Run(name, func(t *testing.T) {
			for len(s.held) > 0 {
				<-s.held
			}
			c := s.dial()
			defer c.Close()
			for end := time.Now().Add(labtest.Limit); ; {
				if err := c.send(us.hello(nil), nil); err != nil {
					t.Fatal(err)
				}
				m, _, err := c.receive(time.Now().Add(labtest.Limit))
				if err != nil {
					t.Fatal(err)
				}
				if m.Op == opHello {
					if len(m.Vifs) != 1 || m.Vifs[0] != "1/0" {
						t.Fatalf("the vifs are %q", m.Vifs)
					}
					break
				}
				c.Close() // the session before ends in this moment
				if time.Now().After(end) {
					t.Fatal(m.Why)
				}
				c = s.dial()
			}
			f(c)
			if _, _, err := c.receive(time.Now().Add(labtest.Limit)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the session goes on: %v", err)
			}
			for len(s.held) > 0 {
				if on := <-s.held; on {
					if on := <-s.held; on {
						t.Error("held twice")
					}
				}
			}
			s.awaitUp(s.back)
			select {
			case <-s.back.Done():
				t.Error("the device has ended")
			default:
			}
		})
	}
}

// A stated is the gift of a vif whose state says that it has some bytes, and comes in packets.
// After a single packet the sender ends.
type stated struct {
	says    int
	packets []string
}

// A state that takes several packets comes whole, and so does the message behind it.
func TestALongStateComesInPackets(t *testing.T) {
	path := filepath.Join(emutest.SocketDir(t), "s")
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	state := make([]byte, pvnet.MaxHandoverState)
	for i := range state {
		state[i] = byte(i / 1000)
	}
	failed := make(chan error, 1)
	go func() {
		nc, err := l.AcceptUnix()
		if err != nil {
			failed <- err
			return
		}
		c := newConn(nc)
		defer c.Close()
		c.receive(time.Now().Add(labtest.Limit))
		c.send(us.hello([]string{"1/0", "1/1"}), nil)
		c.receive(time.Now().Add(labtest.Limit))
		g := giving{c: c, vif: "1/0", held: 7}
		failed <- g.offer(state, nil)
		c.receive(time.Now().Add(labtest.Limit))
		c.send(&message{Op: opNone, Vif: "1/1", Why: notServed}, nil)
	}()
	c, err := Dial(t.Context(), path, us)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in, err := c.TakeOver(t.Context(), 1, "0")
	if err != nil || in == nil || !bytes.Equal(in.State, state) || in.Held != 7 {
		t.Fatalf("%v", err)
	}
	if err := in.Accept(); err != nil {
		t.Error(err)
	}
	if err := <-failed; err != nil {
		t.Error(err)
	}
	if in, err := c.TakeOver(t.Context(), 1, "1"); in != nil || err != nil {
		t.Errorf("%+v, %v", in, err)
	}
}

// A process that was stopped does not answer. A call that asks it for a vif, waits for its turn to ask, or ends
// the session, returns when its context ends.
func TestAContextEndsTheWaitForAProcessThatDoesNotAnswer(t *testing.T) {
	enough := errors.New("enough")
	for name, f := range map[string]func(ctx context.Context, end func(), c *Client, got <-chan string) error{
		"it was asked": func(ctx context.Context, end func(), c *Client, got <-chan string) error {
			ended := make(chan error, 1)
			go func() {
				_, err := c.TakeOver(ctx, 1, "0")
				ended <- err
			}()
			<-got
			end()
			err := <-ended
			c.Decline(1, "1")
			if err := c.Finish(context.Background()); !errors.Is(err, enough) {
				t.Errorf("the session has ended with %v", err)
			}
			return err
		},
		"another vif is asked for": func(ctx context.Context, end func(), c *Client, got <-chan string) error {
			go c.TakeOver(context.Background(), 1, "0")
			<-got
			ended := make(chan error, 1)
			go func() {
				_, err := c.TakeOver(ctx, 1, "1")
				ended <- err
			}()
			end()
			return <-ended
		},
		"the end waits for a vif": func(ctx context.Context, end func(), c *Client, got <-chan string) error {
			go c.TakeOver(context.Background(), 1, "0")
			<-got
			c.Decline(1, "0")
			c.Decline(1, "1")
			ended := make(chan error, 1)
			go func() { ended <- c.Finish(ctx) }()
			time.Sleep(50 * time.Millisecond) // so that it waits for its turn, most likely
			end()
			return <-ended
		},
		"it was told to end": func(ctx context.Context, end func(), c *Client, got <-chan string) error {
			c.Decline(1, "0")
			c.Decline(1, "1")
			ended := make(chan error, 1)
			go func() { ended <- c.Finish(ctx) }()
			<-got
			end()
			return <-ended
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(emutest.SocketDir(t), "s")
			l, err := listen(path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			got := make(chan string, 1)
			over := make(chan error, 1)
			go func() {
				nc, err := l.AcceptUnix()
				if err != nil {
					over <- err
					return
				}
				p := newConn(nc)
				defer p.Close()
				p.receive(time.Now().Add(labtest.Limit))
				p.send(us.hello([]string{"1/0", "1/1"}), nil)
				if m, _, err := p.receive(time.Now().Add(labtest.Limit)); err == nil {
					got <- m.Op
				}
				_, _, err = p.receive(time.Now().Add(labtest.Limit)) // and does not answer
				over <- err
			}()
			c, err := Dial(t.Context(), path, us)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			if err := f(ctx, func() { cancel(enough) }, c, got); !errors.Is(err, enough) {
				t.Errorf("%v", err)
			}
			c.Close()
			if err := <-over; !errors.Is(err, io.EOF) {
				t.Errorf("the other process does not see the end of the session: %v", err)
			}
		})
	}
}

// A process of the first version of the protocol parts from one of this version with a
// refusal that names both, whichever of them takes over, and its vifs stay.
func TestTheFirstVersionParts(t *testing.T) {
	const hello = `{"Op":"hello","Protocol":1,"Program":"an old one","Domain":2,"Type":"vif"}`
	s := newSite(t)
	raw := s.dial()
	defer raw.Close()
	if _, err := raw.Write([]byte(hello)); err != nil {
		t.Fatal(err)
	}
	m, _, err := raw.receive(time.Now().Add(labtest.Limit))
	if want := "one process speaks version 2 of the hand-over, the other version 1"; err != nil || m.Op != opNo || m.Why != want {
		t.Errorf("%+v, %v", m, err)
	}
	path := filepath.Join(emutest.SocketDir(t), "s")
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // it answers a hello of another version with no
		nc, err := l.AcceptUnix()
		if err != nil {
			return
		}
		c := newConn(nc)
		defer c.Close()
		if m, _, err := c.receive(time.Now().Add(labtest.Limit)); err == nil && m.Protocol != 1 {
			c.Write([]byte(`{"Op":"no","Program":"an old one","Why":"one process speaks version 1 of the hand-over, the other version 2"}`))
		}
	}()
	_, err = Dial(t.Context(), path, us)
	if r, ok := errors.AsType[*RefusedError](err); !ok || r.Program != "an old one" || !strings.Contains(r.Why, "version 1") || !strings.Contains(r.Why, "version 2") {
		t.Errorf("%v", err)
	}
	if len(s.held) > 0 {
		t.Error("the vif was held for it")
	}
}

// Whatever a process that claims to serve vifs sends, Dial and TakeOver fail with an error,
// and close what came.
func TestNonsenseFromTheOldProcess(t *testing.T) {
	path := filepath.Join(emutest.SocketDir(t), "s")
	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	serve := func(answers ...any) {
		go func() {
			nc, err := l.AcceptUnix()
			if err != nil {
				return
			}
			c := newConn(nc)
			defer c.Close()
			for _, a := range answers {
				if _, _, err := c.receive(time.Now().Add(labtest.Limit)); err != nil {
					return
				}
				switch a := a.(type) {
				case string:
					c.Write([]byte(a))
				case *message:
					c.send(a, nil)
				case stated:
					c.send(&message{Op: opGiven, Vif: "1/0", State: a.says}, nil)
					for _, b := range a.packets {
						c.Write([]byte(b))
					}
					if len(a.packets) == 1 {
						return
					}
				}
			}
			c.receive(time.Now().Add(labtest.Limit))
		}()
	}
	many := us.hello(nil)
	for range 20000 {
		many.Vifs = append(many.Vifs, "0")
	}
	for name, a := range map[string]any{
		"no JSON": "{", "no hello": &message{Op: opGiven}, "another version": &message{Op: opHello, Protocol: protocol + 1, Domain: 2, Type: "vif"},
		"too many vifs": many, "a descriptor too few": &message{Op: opHello, Protocol: protocol, Domain: 2, Type: "vif", Files: 1},
	} {
		serve(a)
		if c, err := Dial(t.Context(), path, us); err == nil {
			c.Close()
			t.Errorf("%s: agreed", name)
		}
	}
	for name, a := range map[string]any{
		"no JSON": "nonsense", "an empty packet": "{}", "another vif": &message{Op: opGiven, Vif: "1/1"},
		"a negative state": &message{Op: opGiven, Vif: "1/0", State: -1}, "a state beyond every length": &message{Op: opGiven, Vif: "1/0", State: pvnet.MaxHandoverState + 1},
		"a state that is longer than said": stated{5, []string{"12", "3456"}}, "a state that ends early": stated{5, []string{"12"}},
		"another answer": &message{Op: opBye}, "descriptors that are not there": &message{Op: opGiven, Vif: "1/0", Files: 3},
	} {
		serve(us.hello([]string{"1/0", "x", "1/-1", "99999/0"}), a)
		c, err := Dial(t.Context(), path, us)
		if err != nil {
			t.Fatal(name, err)
		}
		if in, err := c.TakeOver(t.Context(), 1, "0"); in != nil || err == nil {
			t.Errorf("%s: %+v, %v", name, in, err)
		}
		if in, err := c.TakeOver(t.Context(), 1, "0"); in != nil || err != nil {
			t.Errorf("%s: a second try: %+v, %v", name, in, err)
		}
		if err := c.Finish(t.Context()); err == nil {
			t.Errorf("%s: finished in order", name)
		}
		c.Close()
	}
}

// A frontend goes through the socket, with the descriptors of its pages and event channels
// before those of its link.
func TestAFrontendGoesThroughTheSocket(t *testing.T) {
	s := newSite(t)
	path, id := filepath.Join(emutest.SocketDir(t), "f"), Identity{Domain: 1, Frontend: true}
	l, err := Listen(path, id, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer l.Add(Vif{s.front, s.hold, func() { s.held <- false }})()
	for name, other := range map[string]Identity{
		"one process has backends, the other frontends":                {Domain: 1},
		"one process is of domain 1, the other of domain 2":            {Domain: 2, Frontend: true},
		`one process serves vifs of type "vif", the other of type "x"`: {Domain: 1, Frontend: true, Type: "x"},
	} {
		_, err := Dial(t.Context(), path, other)
		if r, ok := errors.AsType[*RefusedError](err); !ok || r.Why != name {
			t.Errorf("%s: %v", name, err)
		}
	}
	c, err := Dial(t.Context(), path, id)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), labtest.Limit)
	defer cancel()
	type besideDomain struct{ *emu.Domain } // stands for the domain in another process
	d, err := pvnet.TakeOver(ctx, &besideDomain{s.guest}, "0", pvnet.Config{}, c.TakeOver)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Disconnect()
	s.awaitUp(d)
	files := d.TakenFiles()
	if len(files) != 1 {
		t.Fatalf("%d descriptors", len(files))
	}
	if _, err := s.pipe.Write([]byte("x")); err != nil {
		t.Error("the descriptor is not that of the pipe:", err)
	}
	closeAll(files)
	if err := c.Finish(ctx); err != nil || c.Taken() != 1 {
		t.Errorf("%d taken, %v", c.Taken(), err)
	}
	<-l.Done()
	<-s.front.Done()
	if _, err := s.back.Write(make([]byte, 60)); err != nil {
		t.Error(err)
	}
}
