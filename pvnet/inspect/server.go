//go:build linux

package inspect

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"barevif/pvnet"
	"barevif/telemetry"
)

// A Config holds the options of a [Server]. The zero Config suits most programs.
type Config struct {
	// Dir is the directory of the socket; "" means the first of [Dirs] that this user may
	// use. It is made if it is missing, and must belong to this user alone (mode 0700).
	Dir string

	// Logger gets a line for each client that copies frames. nil: silent.
	Logger *slog.Logger
}

// Limits of a server.
const (
	maxClients     = 16               // at once
	requestTimeout = 5 * time.Second  // for the whole request
	lastWrites     = time.Second      // for the client to take the rest, once the server is closed
	writeTimeout   = 10 * time.Second // for the client to take some of what it asked for
	dumpMemory     = 32 << 20         // bytes of frames that one client's copies take, over all queues
)

// A Server answers the processes that want to look. It is a [pvnet.Inspector]: give it to
// pvnet.Config. Its methods may be called from any goroutine.
type Server struct {
	path string
	log  *slog.Logger
	l    *net.UnixListener
	wg   sync.WaitGroup
	done chan struct{} // closed by Close

	mu     sync.Mutex
	closed bool                   // guarded by mu
	vifs   []*shown               // guarded by mu; in the order of their names
	conns  map[*net.UnixConn]bool // guarded by mu: the clients
	states map[string]*state      // guarded by mu: by name

	asking sync.Mutex // taken while a state is made: one at a time
}

// A state is what the program shows of itself.
type state struct{ of func() any }

var _ pvnet.Inspector = (*Server)(nil)

type shown struct {
	name string
	dev  *pvnet.Device
}

// Listen opens the socket and serves it until Close.
func Listen(cfg Config) (*Server, error) {
	dirs := []string{cfg.Dir}
	if cfg.Dir == "" {
		dirs = places(os.Geteuid())
	}
	dir, err := place(dirs)
	if err != nil {
		return nil, fmt.Errorf("inspect: no place for a socket: %w", err)
	}
	removeDead(dir)
	s := &Server{
		path: filepath.Join(dir, fmt.Sprintf("%s%d-%s%s", socketPrefix, os.Getpid(), strings.ToLower(rand.Text()[:socketRandom]), socketSuffix)),
		log:  cfg.Logger, done: make(chan struct{}), conns: make(map[*net.UnixConn]bool),
		states: make(map[string]*state),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) (err error) {
		// bind gives the file this mode, less the umask: there is no moment in which
		// another user could connect.
		if e := rc.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return os.NewSyscallError("fchmod", err)
	}}
	l, err := lc.Listen(context.Background(), "unix", s.path)
	if err != nil {
		return nil, fmt.Errorf("inspect: %w", err)
	}
	s.l = l.(*net.UnixListener)
	s.wg.Go(s.accept)
	return s, nil
}

// Path returns the path of the socket.
func (s *Server) Path() string { return s.path }

// Open shows a device; see [pvnet.Inspector].
func (s *Server) Open(info telemetry.Info, d *pvnet.Device) (hide func()) {
	v := &shown{name: info.Name(), dev: d}
	s.mu.Lock()
	defer s.mu.Unlock()
	at, _ := slices.BinarySearchFunc(s.vifs, v.name, func(v *shown, name string) int { return strings.Compare(v.name, name) })
	s.vifs = slices.Insert(s.vifs, at, v)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.vifs = slices.DeleteFunc(s.vifs, func(o *shown) bool { return o == v })
	}
}

// Show shows a state of the program under a name, until hide is called. of returns it, for
// encoding/json: 16 MiB of text at most. It is called for each client that asks, but never by
// two at once, and a client waits five seconds for it. A second state of a name takes the
// place of the first.
func (s *Server) Show(name string, of func() any) (hide func()) {
	one := &state{of}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states[name] = one
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.states[name] == one {
			delete(s.states, name)
		}
	}
}

// Close removes the socket, and ends what clients do. The devices go on.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	close(s.done)
	err := s.l.Close() // removes the path, too
	for c := range s.conns {
		c.SetReadDeadline(time.Unix(1, 0))
		c.SetWriteDeadline(time.Now().Add(lastWrites))
	}
	s.mu.Unlock()
	s.wg.Wait()
	return err
}

func (s *Server) accept() {
	for {
		c, err := s.l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptor is free, or memory
			select {
			case <-time.After(100 * time.Millisecond):
			case <-s.done:
			}
			continue
		}
		if _, uid, err := peerOf(c); err != nil || uid != 0 && uid != os.Geteuid() {
			c.Close()
			continue
		}
		s.mu.Lock()
		room := len(s.conns) < maxClients && !s.closed
		if room {
			s.conns[c] = true
		}
		s.mu.Unlock()
		if !room {
			c.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
			writeAnswer(c, &answer{Error: fmt.Sprintf("this process has %d clients already", maxClients)})
			c.Close()
			continue
		}
		s.wg.Go(func() {
			s.serve(c)
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
			c.Close()
		})
	}
}

func writeAnswer(c net.Conn, a *answer) error {
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	_, err = c.Write(append(b, '\n'))
	return err
}

// readUntil sets the read deadline of a client's connection; the zero Time: none. It does nothing once the
// server is closed, because Close has set a deadline that has passed.
func (s *Server) readUntil(c *net.UnixConn, end time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		c.SetReadDeadline(end)
	}
}

// allowWrite sets the write deadline of a client's connection: writeTimeout from now, or lastWrites once
// the server is closed.
func (s *Server) allowWrite(c *net.UnixConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	patience := writeTimeout
	if s.closed {
		patience = lastWrites
	}
	c.SetWriteDeadline(time.Now().Add(patience))
}

// serve answers one client.
func (s *Server) serve(c *net.UnixConn) {
	s.readUntil(c, time.Now().Add(requestTimeout))
	r := bufio.NewReader(c)
	var q request
	err := readLine(r, maxRequest, &q)
	s.allowWrite(c)
	if err != nil {
		writeAnswer(c, &answer{Error: err.Error()})
		return
	}
	switch q.Op {
	case opList:
		writeAnswer(c, s.list())
		return
	case opState:
		writeAnswer(c, s.state(q.Name))
		return
	}
	dev := s.find(q.Vif)
	if dev == nil {
		writeAnswer(c, &answer{Error: fmt.Sprintf("this process has no vif %.80q", q.Vif)})
		return
	}
	switch q.Op {
	case opRings:
		writeAnswer(c, &answer{Rings: dev.Rings()})
	case opKick:
		writeAnswer(c, &answer{Halves: dev.Kick(q.Peer)})
	case opDump:
		cfg := q.DumpConfig
		if cfg == nil {
			cfg = new(DumpConfig)
		}
		s.dump(c, q.Vif, dev, cfg)
	default:
		writeAnswer(c, &answer{Error: fmt.Sprintf("no request is called %.80q", q.Op)})
	}
}

func (s *Server) list() *answer {
	s.mu.Lock()
	vifs := slices.Clone(s.vifs)
	a := &answer{Vifs: make([]offered, 0, len(vifs)), States: slices.Sorted(maps.Keys(s.states))}
	s.mu.Unlock()
	for _, v := range vifs {
		a.Vifs = append(a.Vifs, offered{v.name, v.dev.Counters().Status().Up})
	}
	return a
}

// state returns what the program shows under a name.
func (s *Server) state(name string) *answer {
	s.mu.Lock()
	one := s.states[name]
	s.mu.Unlock()
	if one == nil {
		return &answer{Error: fmt.Sprintf("this process has no state %.80q", name)}
	}
	s.asking.Lock()
	b, err := json.Marshal(one.of())
	s.asking.Unlock()
	if err == nil && len(b) > maxAnswer-maxReason {
		err = fmt.Errorf("it is %d bytes, and may be %d", len(b), maxAnswer-maxReason)
	}
	if err != nil {
		return &answer{Error: fmt.Sprintf("the state %.80q cannot be shown: %.300v", name, err)}
	}
	return &answer{State: b}
}

func (s *Server) find(name string) *pvnet.Device {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.vifs {
		if v.name == name {
			return v.dev
		}
	}
	return nil
}

// dump sends the frames that dev moves, until the client has had enough or is gone, or the
// device or the server ends.
func (s *Server) dump(c *net.UnixConn, name string, dev *pvnet.Device, cfg *DumpConfig) {
	tap, err := tapOf(dev, cfg)
	if err != nil {
		writeAnswer(c, &answer{Error: err.Error()})
		return
	}
	defer tap.Close()
	if writeAnswer(c, &answer{}) != nil {
		return
	}
	s.log.Info("frames of a vif are copied", "vif", name)
	defer s.log.Info("frames of a vif are no longer copied", "vif", name)
	enough := make(chan struct{})
	s.readUntil(c, time.Time{})
	s.wg.Go(func() {
		defer close(enough)
		var b [64]byte
		for { // the client sends nothing more, and shuts its end down in the end
			if _, err := c.Read(b[:]); err != nil {
				return
			}
		}
	})
	w := &recordWriter{w: bufio.NewWriterSize(&patientWriter{s, c}, 128<<10)}
	reason := w.copyAll(tap, enough, dev.Done())
	tap.Close()
	w.some(tap)
	w.stats(tap)
	w.end(reason)
	c.CloseRead() // ends the goroutine above if the client has not
	<-enough
}

func tapOf(dev *pvnet.Device, cfg *DumpConfig) (*pvnet.Tap, error) {
	filter, err := filterOf(cfg.Program)
	if err != nil {
		return nil, err
	}
	lanes := 2 * dev.Queues()
	if cfg.Queues != nil {
		lanes = 2 * min(len(cfg.Queues), dev.Queues())
	}
	return dev.Tap(pvnet.TapConfig{
		Queues: cfg.Queues, Sent: cfg.Sent, Received: cfg.Received, Snaplen: cfg.Snaplen, Filter: filter,
		Buffer: max(128<<10, min(8<<20, dumpMemory/max(lanes, 1))),
	})
}

// A patientWriter gives the client some time for each piece that it takes.
type patientWriter struct {
	s *Server
	c *net.UnixConn
}

func (p *patientWriter) Write(b []byte) (int, error) {
	p.s.allowWrite(p.c)
	return p.c.Write(b)
}

// A recordWriter writes records. After an error it writes nothing more.
type recordWriter struct {
	w   *bufio.Writer
	err error
	b   []byte
}

// How long the copying pauses when there was nothing to copy: the shorter pause while
// frames come, so that they find room.
const (
	pauseLeast = time.Millisecond
	pauseMost  = 20 * time.Millisecond
	statsEvery = time.Second
)

// copyAll copies until something ends it, and returns what.
func (w *recordWriter) copyAll(tap *pvnet.Tap, enough, gone <-chan struct{}) (reason string) {
	t := time.NewTimer(0)
	defer t.Stop()
	next := time.Now().Add(statsEvery)
	for pause := pauseLeast; ; {
		if w.some(tap) > 0 {
			pause = pauseLeast
		} else {
			pause = min(2*pause, pauseMost)
		}
		if now := time.Now(); now.After(next) {
			w.stats(tap)
			next = now.Add(statsEvery)
		}
		w.flush()
		if w.err != nil {
			return ""
		}
		t.Reset(pause)
		select {
		case <-t.C:
		case <-enough: // the client's word, or Close
			return ""
		case <-gone:
			return "the vif has ended"
		}
	}
}

// some writes what the tap has now.
func (w *recordWriter) some(tap *pvnet.Tap) int {
	return tap.Read(func(f *pvnet.TapFrame) bool {
		w.b = appendFrame(w.b[:0], f)
		w.write(w.b)
		w.write(f.Data)
		return w.err == nil
	})
}

func (w *recordWriter) stats(tap *pvnet.Tap) { w.write(appendStats(w.b[:0], tap.Stats())) }

func (w *recordWriter) end(reason string) {
	w.write(appendEnd(w.b[:0], reason))
	w.flush()
}

func (w *recordWriter) write(b []byte) {
	if w.err == nil {
		_, w.err = w.w.Write(b)
	}
}

func (w *recordWriter) flush() {
	if w.err == nil {
		w.err = w.w.Flush()
	}
}
