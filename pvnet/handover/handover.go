//go:build linux

// Package handover passes the vifs of a running backend, or of a running frontend, to another
// process of its domain, while the other end sends and receives: an upgrade without a lost
// frame.
//
// The process that has the vifs has a [Listener] and adds each [Vif] to it. The one that is
// to take over makes itself ready first: it has joined its domain and opened what it needs.
// Then it dials, gives [Client].TakeOver to [pvnet.Serve] or [pvnet.TakeOver], and calls
// Finish once the vifs have come. A vif is handed over in these steps; until the last one
// the old process goes on with it where it stopped, whatever fails:
//
//  1. The new process reads in xenstore what the connection was made of; a backend's maps the
//     rings. Then it asks for the vif.
//  2. The old process holds the link ([Vif].Hold) and stops the device between two frames. A
//     backend's closes the event channels.
//  3. It sends the connection's description and the link's descriptors, with those that a
//     frontend's pages and event channels belong to. The description has what was told on
//     the rings and is told to no other process: the multicast list, how frames are to be
//     hashed, static grants, and where the control ring is. The queue of a TAP, its addresses
//     and its place on a bridge are the kernel's and stay.
//  4. The new process checks all of it against xenstore and the rings. A frontend's adopts the
//     pages and event channels.
//  5. It says that it has taken the vif. As soon as that is in the old process's socket the
//     vif belongs to the new one, whatever becomes of the old one.
//  6. A backend's binds the event channels. Frames move. Only then does it map the static
//     grants, and show its counters; the old one unmaps its pages.
//
// The processes talk over a unix socket, one packet a message, with JSON in it; behind the
// message that gives a vif its description comes in packets of its own. The other
// end must be a process of this user or of root; everything that it sends is bounded and
// checked nevertheless. The first message has the version of the protocol: processes that
// speak different ones part with a [*RefusedError], and nothing has happened.
package handover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/xenbus"
)

const (
	// protocol is the version in the first message of each side.
	protocol = 2

	maxPacket = 128 << 10 // below the default SO_SNDBUF of 208 KiB, and longer than a hello with maxVifs
	chunk     = 64 << 10  // of a handover state: two of them are under way at a time
	maxFiles  = 253       // of one vif: SCM_MAX_FD of Linux's net/scm.h
	maxVifs   = 4096      // in a hello

	holdPatience   = 5 * time.Second // for the link to come to rest: milliseconds, unless processors are short
	answerPatience = 5 * time.Second // for the new process to accept or refuse a vif
	helloPatience  = 5 * time.Second // for the first message
)

// Operations of a message. The new process sends hello, take, took, cannot and done; the
// old one hello, no, given, none and bye.
const (
	opHello  = "hello"
	opNo     = "no" // the session is refused: Why
	opTake   = "take"
	opGiven  = "given"
	opNone   = "none" // the old process does not hand the vif over: Why
	opTook   = "took"
	opCannot = "cannot" // the new process does not take the vif: Why
	opDone   = "done"
	opBye    = "bye"
)

// notServed is the Why of none for a vif that the old process does not have.
const notServed = "this process does not serve it"

// A message is one packet.
type message struct {
	Op       string
	Protocol int      `json:",omitempty"` // of hello
	Program  string   `json:",omitempty"` // of hello: for people
	Domain   uint16   `json:",omitempty"` // of hello
	Type     string   `json:",omitempty"` // of hello: the backend type
	Frontend bool     `json:",omitempty"` // of hello: the vifs are frontends
	Vifs     []string `json:",omitempty"` // of the old process's hello
	Vif      string   `json:",omitempty"` // "1/0": frontend's domain, id
	State    int      `json:",omitempty"` // of given: the bytes of the handover state, which come in the packets behind it; 0: the vif has no connection
	Files    int      `json:",omitempty"` // of given: how many descriptors come with it
	Held     int64    `json:",omitempty"` // of given: how long the link needed to come to rest, in nanoseconds
	Why      string   `json:",omitempty"`
}

// An Identity says which vifs a process has.
type Identity struct {
	// Domain is the process's own. Frontends on a real Xen leave it 0: the number changes
	// when the domain is resumed.
	Domain hypercall.DomID

	Type     string // backend type; "" means "vif"
	Frontend bool   // the vifs are frontends
	Program  string // name and version, for the other process's messages
}

func (i Identity) typ() string {
	if i.Type == "" {
		return "vif"
	}
	return i.Type
}

func (i Identity) hello(vifs []string) *message {
	return &message{Op: opHello, Protocol: protocol, Program: i.Program, Domain: uint16(i.Domain), Type: i.typ(), Frontend: i.Frontend, Vifs: vifs}
}

// name is a vif in a message: the frontend's domain and the id. peer is the domain of the
// other end.
func (i Identity) name(peer hypercall.DomID, id string) string {
	front := peer
	if i.Frontend {
		front = i.Domain // the backend may be in another domain by and by
	}
	return xenbus.BackendID{Front: front, ID: id}.String()
}

// A RefusedError says that the process at the other end hands nothing over.
type RefusedError struct {
	Program string // as the other process calls itself; "" if it did not say
	Why     string
}

func (e *RefusedError) Error() string {
	if e.Program == "" {
		return "handover: refused: " + e.Why
	}
	return "handover: refused by " + e.Program + ": " + e.Why
}

// agree returns why two processes cannot hand over vifs to each other, "" if they can.
func (i Identity) agree(m *message) string {
	switch {
	case m.Op != opHello:
		return fmt.Sprintf("the first message is %q", clip(m.Op))
	case m.Protocol != protocol:
		return fmt.Sprintf("one process speaks version %d of the hand-over, the other version %d", protocol, m.Protocol)
	case m.Frontend != i.Frontend:
		return "one process has backends, the other frontends"
	case m.Domain != uint16(i.Domain):
		return fmt.Sprintf("one process is of domain %d, the other of domain %d", i.Domain, m.Domain)
	case m.Type != i.typ():
		return fmt.Sprintf("one process serves vifs of type %q, the other of type %q", i.typ(), clip(m.Type))
	case len(m.Vifs) > maxVifs:
		return fmt.Sprintf("%d vifs, at most %d", len(m.Vifs), maxVifs)
	}
	return ""
}

// clip bounds a text of the other process for a message to people.
func clip(s string) string {
	const most = 200
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}

// validName reports whether s is a name as Identity.name makes.
func validName(s string) bool {
	dom, id, ok := strings.Cut(s, "/")
	if _, err := strconv.ParseUint(dom, 10, 16); err != nil {
		return false
	}
	_, err := strconv.ParseUint(id, 10, 31)
	return ok && err == nil
}

// A conn sends and receives messages. One goroutine at a time receives.
type conn struct {
	*net.UnixConn
	buf []byte
}

func newConn(c *net.UnixConn) *conn { return &conn{c, make([]byte, maxPacket)} }

func (c *conn) send(m *message, files []*os.File) error {
	b, err := json.Marshal(m)
	if err == nil && len(b) > maxPacket {
		err = fmt.Errorf("handover: a message of %d bytes, at most %d", len(b), maxPacket)
	}
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, 0, len(files))
		for _, f := range files {
			rc, err := f.SyscallConn() // not Fd, which would make the descriptor block
			if err != nil {
				return err
			}
			if err := rc.Control(func(fd uintptr) { fds = append(fds, int(fd)) }); err != nil {
				return err
			}
		}
		rights = unix.UnixRights(fds...)
	}
	_ = c.SetWriteDeadline(time.Now().Add(answerPatience)) // fails only on a closed connection, as the write then does
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

// sendState sends the state that a message before it has announced.
func (c *conn) sendState(state []byte) error {
	for len(state) > 0 {
		n := min(len(state), chunk)
		if _, err := c.Write(state[:n]); err != nil {
			return err
		}
		state = state[n:]
	}
	return nil
}

// receiveState waits until end for the n bytes of a state that a message has announced.
func (c *conn) receiveState(n int, end time.Time) ([]byte, error) {
	if n < 0 || n > pvnet.MaxHandoverState {
		return nil, fmt.Errorf("handover: a state of %d bytes, at most %d", n, pvnet.MaxHandoverState)
	}
	if err := c.SetReadDeadline(end); err != nil {
		return nil, err
	}
	state := make([]byte, 0, n)
	for len(state) < n {
		got, err := c.Read(c.buf) // descriptors that come with it are closed by the kernel
		switch {
		case err != nil:
			return nil, err
		case got == 0:
			return nil, io.EOF
		case got > n-len(state):
			return nil, fmt.Errorf("handover: a state of more than the %d bytes that it was to have", n)
		}
		state = append(state, c.buf[:got]...)
	}
	return state, nil
}

// receive waits for a message until end; zero: for ever. The caller closes the files. The error is
// io.EOF itself if the other process has closed the connection.
func (c *conn) receive(end time.Time) (*message, []*os.File, error) {
	if err := c.SetReadDeadline(end); err != nil {
		return nil, nil, err
	}
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(c.buf, oob)
	if errors.Is(err, io.EOF) { // ReadMsgUnix wraps it, as Read does not
		return nil, nil, io.EOF
	}
	if err != nil {
		return nil, nil, err
	}
	files := rights(oob[:oobn])
	m := new(message)
	switch {
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("handover: a message is too long, or has too many descriptors")
	default:
		if err = json.Unmarshal(c.buf[:n], m); err != nil {
			err = fmt.Errorf("handover: a message that is none: %w", err)
		} else if m.Files != len(files) {
			err = fmt.Errorf("handover: a message with %d descriptors says that it has %d", len(files), m.Files)
		}
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return m, files, nil
}

// rights takes the descriptors of a control message over.
func rights(oob []byte) (files []*os.File) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil // the kernel made it
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// checkPeer refuses a process of another user, except root's, and returns its id. The
// kernel recorded both when that process called connect or listen.
func checkPeer(c syscall.Conn) (pid int, err error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := rc.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); e != nil {
		err = e
	}
	if err != nil {
		return 0, fmt.Errorf("handover: ask for the other process's user: %w", err)
	}
	return int(cred.Pid), checkUser(cred.Uid, os.Geteuid())
}

func checkUser(uid uint32, own int) error {
	if uid != 0 && int(uid) != own {
		return fmt.Errorf("handover: the other process belongs to user %d, not to user %d or root: %w", uid, own, os.ErrPermission)
	}
	return nil
}

// listen makes a socket of mode 0600 at path.
func listen(path string) (*net.UnixListener, error) {
	cfg := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) (err error) {
		// bind gives the file the mode of the socket, less the umask.
		if e := rc.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return os.NewSyscallError("fchmod", err)
	}}
	l, err := cfg.Listen(context.Background(), "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("handover: %w", err)
	}
	return l.(*net.UnixListener), nil
}
