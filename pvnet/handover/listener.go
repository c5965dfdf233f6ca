//go:build linux

package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"barevif/pvnet"
)

// A Vif is a device that may be handed over.
type Vif struct {
	Device *pvnet.Device

	// Hold stops whatever moves frames between the device and a link, such as
	// [barevif/pvnet/link.Joint.Hold], and returns the link's descriptors for the other
	// process, 64 at most. The Listener closes them. nil: there is nothing to hold.
	Hold func(ctx context.Context) ([]*os.File, error)

	// Resume goes on after a Hold: the vif stays with this process. nil: nothing to do.
	Resume func()
}

// A Listener hands the vifs of this process over to a process that asks for them, one
// process at a time. Its methods may be called from any goroutine.
type Listener struct {
	id   Identity
	log  *slog.Logger
	l    *net.UnixListener
	done chan struct{} // closed when another process has taken over
	wg   sync.WaitGroup

	mu        sync.Mutex
	vifs      map[string]*Vif // guarded by mu; by name
	active    *conn           // guarded by mu; the session; nil: none
	successor int             // guarded by mu; see Successor
	closed    bool            // guarded by mu
}

// Listen listens at path, which must not exist. Processes of this user and of root may
// connect; the directory should be one that nobody else can write. log gets a line for
// each session and each refusal; nil: none.
func Listen(path string, id Identity, log *slog.Logger) (*Listener, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s, err := listen(path)
	if err != nil {
		return nil, err
	}
	l := &Listener{id: id, log: log, l: s, done: make(chan struct{}), vifs: make(map[string]*Vif)}
	l.wg.Go(l.accept)
	return l, nil
}

// Done returns a channel that is closed once another process has taken over all vifs that
// it wants. This process then ends its Serve with [pvnet.ErrHandover] as the cause, which
// gives up the others. The path is free again.
func (l *Listener) Done() <-chan struct{} { return l.done }

// Successor returns the process id of the process that has taken over, once Done is closed; 0
// if this process cannot see it.
func (l *Listener) Successor() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.successor
}

// Close stops listening, ends a session under way, and removes the path. It is idempotent.
func (l *Listener) Close() error {
	l.mu.Lock()
	l.closed = true
	if l.active != nil {
		l.active.Close()
	}
	l.mu.Unlock()
	err := l.l.Close()
	l.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	return err
}

// Add makes a vif one that may be handed over, until remove is called. A hand-over of the
// vif that is under way then goes on.
func (l *Listener) Add(v Vif) (remove func()) {
	key := l.id.name(v.Device.Peer(), v.Device.ID())
	e := &v
	l.mu.Lock()
	defer l.mu.Unlock()
	l.vifs[key] = e
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.vifs[key] == e {
			delete(l.vifs, key)
		}
	}
}

func (l *Listener) accept() {
	for {
		c, err := l.l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors: some will be closed
			continue
		}
		pid, err := checkPeer(c)
		if err != nil {
			l.log.Warn("a process may not take the vifs over", "err", err)
			c.Close()
			continue
		}
		l.wg.Go(func() { l.session(newConn(c), pid) })
	}
}

// session serves one process that connected.
func (l *Listener) session(c *conn, pid int) {
	defer c.Close()
	over := make(chan struct{}) // closed if the other process may not keep what it has taken
	m, files, err := c.receive(time.Now().Add(helloPatience))
	closeAll(files)
	if err == io.EOF {
		return // it only looked whether anybody listens
	}
	if err != nil {
		l.log.Warn("a process that connected to take the vifs over did not say so", "err", err)
		return
	}
	why := l.id.agree(m)
	if why == "" {
		why = l.begin(c)
	}
	if why != "" {
		l.log.Warn("a process does not take the vifs over", "program", clip(m.Program), "why", why)
		_ = c.send(&message{Op: opNo, Program: l.id.Program, Why: why}, nil) // it may be gone
		return
	}
	l.mu.Lock()
	vifs := slices.Sorted(maps.Keys(l.vifs))
	l.mu.Unlock()
	l.log.Info("another process takes the vifs over", "program", clip(m.Program), "vifs", len(vifs))
	err = c.send(l.id.hello(vifs[:min(len(vifs), maxVifs)]), nil)
	for err == nil {
		err = l.serve(c, over)
	}
	l.mu.Lock()
	l.active = nil
	if err == errDone {
		l.successor = pid
	}
	l.mu.Unlock()
	if err == errDone {
		l.l.Close() // before the answer: the other process listens at the path next
		_ = c.send(&message{Op: opBye}, nil)
		close(l.done)
		return
	}
	close(over)
	l.log.Warn("the process that took vifs over has gone; those it does not have stay here", "err", err)
}

// begin makes c the session, unless there is one: why it cannot be.
func (l *Listener) begin(c *conn) (why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return "this process ends"
	case l.active != nil:
		return "another process is taking over"
	}
	l.active = c
	return ""
}

// errDone ends a session in order.
var errDone = errors.New("handover: done")

// serve answers one message.
func (l *Listener) serve(c *conn, over <-chan struct{}) error {
	m, files, err := c.receive(time.Time{})
	closeAll(files)
	switch {
	case err != nil:
		return err
	case len(files) > 0:
		return fmt.Errorf("handover: a message %q with descriptors", clip(m.Op))
	case m.Op == opDone:
		return errDone
	case m.Op != opTake || !validName(m.Vif):
		return fmt.Errorf("handover: a message %q for vif %q", clip(m.Op), clip(m.Vif))
	}
	l.mu.Lock()
	v := l.vifs[m.Vif]
	l.mu.Unlock()
	if v == nil {
		return c.send(&message{Op: opNone, Vif: m.Vif, Why: notServed}, nil)
	}
	g := giving{c: c, vif: m.Vif}
	if err := g.run(v, over); err != nil && g.broken == nil {
		if g.asked { // the other process refused it, and knows
			return nil
		}
		return c.send(&message{Op: opNone, Vif: m.Vif, Why: clip(err.Error())}, nil)
	}
	return g.broken
}

// A giving is the hand-over of one vif.
type giving struct {
	c      *conn
	vif    string
	held   time.Duration // how long the link needed to come to rest
	asked  bool          // the other process was offered the vif
	broken error         // why the session cannot go on
}

// run hands v over. With an error the vif stays here.
func (g *giving) run(v *Vif, over <-chan struct{}) error {
	var files []*os.File
	ctx, cancel := context.WithTimeout(context.Background(), holdPatience)
	defer cancel()
	if err := v.Device.PrepareHandOver(ctx); err != nil {
		return err
	}
	if v.Hold != nil {
		var err error
		began := time.Now()
		if files, err = v.Hold(ctx); err != nil {
			return err
		}
		defer closeAll(files)
		g.held = time.Since(began)
	}
	err := v.Device.HandOver(func(state []byte, own []*os.File) error { return g.offer(state, slices.Concat(own, files)) }, over)
	if err != nil && v.Resume != nil {
		v.Resume()
	}
	return err
}

// offer sends the vif, and returns nil once the other process has accepted it.
func (g *giving) offer(state []byte, files []*os.File) error {
	if len(files) > maxFiles {
		return fmt.Errorf("handover: a vif with %d descriptors, at most %d", len(files), maxFiles)
	}
	err := g.c.send(&message{Op: opGiven, Vif: g.vif, State: len(state), Files: len(files), Held: int64(g.held)}, files)
	if err == nil {
		err = g.c.sendState(state)
	}
	if err != nil {
		g.broken = err
		return err
	}
	g.asked = true
	m, got, err := g.c.receive(time.Now().Add(answerPatience))
	if err != nil {
		// From here on the other process cannot accept any more: a message that is in the
		// socket already counts, a later one is not sent.
		_ = g.c.CloseRead()
		g.broken = err
		var last error
		if m, got, last = g.c.receive(time.Now().Add(answerPatience)); last != nil {
			if err == io.EOF {
				err = errors.New("handover: the other process has ended before it accepted the vif")
			}
			return err
		}
	}
	closeAll(got)
	switch {
	case m.Vif != g.vif:
	case m.Op == opTook:
		return nil
	case m.Op == opCannot:
		return fmt.Errorf("handover: the other process cannot take it: %s", clip(m.Why))
	}
	g.broken = fmt.Errorf("handover: the answer for vif %s is %q for vif %q", g.vif, clip(m.Op), clip(m.Vif))
	_ = g.c.CloseRead()
	return g.broken
}
