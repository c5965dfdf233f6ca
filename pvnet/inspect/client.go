//go:build linux

package inspect

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"barevif/pvnet"
)

var errBufferFull = bufio.ErrBufferFull

// A Vif is a device of another process.
type Vif struct {
	Name   string // as in "barevif stat": telemetry.Info.Name
	Up     bool   // the link, when it was listed
	PID    int    // of the process
	UID    int    // its user
	Socket string
}

// An Error is what the other process answered.
type Error struct {
	Vif string
	Say string
}

func (e *Error) Error() string { return fmt.Sprintf("%s: its process says: %s", e.Vif, e.Say) }

// How long a client waits for an answer.
const answerTimeout = 5 * time.Second

// List returns the vifs that processes of the users uids show in their directories, or in
// dir if it is not "". Sockets of dead processes count as none. With an error, which says
// what could not be asked, it also returns the vifs that it found.
func List(ctx context.Context, dir string, uids ...int) (vifs []Vif, err error) {
	err = each(dir, uids, func(path string, uid int) error {
		a, pid, err := listOne(ctx, path, uid)
		for _, o := range a.Vifs {
			vifs = append(vifs, Vif{Name: o.Name, Up: o.Up, PID: pid, UID: uid, Socket: path})
		}
		return err
	})
	return vifs, err
}

// each calls ask with the socket of each process of the users, in their directories, or in dir
// if it is not "". It returns all errors.
func each(dir string, uids []int, ask func(path string, uid int) error) (err error) {
	for _, uid := range uids {
		dirs := []string{dir}
		if dir == "" {
			dirs = Dirs(uid)
		}
		err = errors.Join(err, eachOf(dirs, uid, ask))
	}
	return err
}

// eachOf is each for the directories of one user. Any user of the machine can make the directory
// in /tmp before that user does. eachOf returns an error for it only if the user has no other
// directory: otherwise the user's processes have their sockets there, and eachOf finds them.
func eachOf(dirs []string, uid int, ask func(path string, uid int) error) error {
	var errs, strange error
	placed := false
	for _, d := range dirs {
		paths, err := sockets(d, uid)
		switch {
		case errors.Is(err, errStranger):
			strange = errors.Join(strange, err)
			continue
		case err != nil:
			errs = errors.Join(errs, err)
			continue
		}
		placed = placed || checkDir(d, uid) == nil || canMake(d, uid)
		for _, path := range paths {
			errs = errors.Join(errs, ask(path, uid))
		}
	}
	switch {
	case strange == nil:
	case len(dirs) == 1: // the one that the caller named
		errs = errors.Join(errs, strange)
	case !placed:
		errs = errors.Join(errs, fmt.Errorf("inspect: processes of uid %d have no place to be looked into, unless they were given one: %w", uid, strange))
	}
	return errs
}

// listOne asks the process at a socket what it shows. A process that has ended shows nothing.
func listOne(ctx context.Context, path string, uid int) (a answer, pid int, err error) {
	v := Vif{Name: path, Socket: path, UID: uid}
	c, err := v.dial(ctx)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return a, 0, nil
	}
	if err != nil {
		return a, 0, err
	}
	defer c.Close()
	if pid, _, err = peerOf(c.UnixConn); err != nil {
		return a, 0, err
	}
	got, err := c.ask(&request{Op: opList})
	if err != nil {
		return a, 0, err
	}
	return *got, pid, nil
}

// A State is what a process says of itself as a whole.
type State struct {
	PID    int // of the process
	UID    int // its user
	Socket string
	JSON   json.RawMessage // as it came
}

// States returns the states of that name which processes of the users uids show in their
// directories, or in dir if it is not "". Processes without one, and dead ones, count as none.
// With an error, which says what could not be asked, it also returns the states that it found.
func States(ctx context.Context, dir, name string, uids ...int) (states []State, err error) {
	err = each(dir, uids, func(path string, uid int) error {
		a, pid, err := listOne(ctx, path, uid)
		if err != nil || !slices.Contains(a.States, name) {
			return err
		}
		v := Vif{Name: path, Socket: path, UID: uid}
		got, err := v.ask(ctx, &request{Op: opState, Name: name})
		if err == nil && got.State == nil {
			err = &Error{path, "nothing"}
		}
		if err != nil {
			return err
		}
		states = append(states, State{PID: pid, UID: uid, Socket: path, JSON: got.State})
		return nil
	})
	return states, err
}

// A client is a connection to another process.
type client struct {
	*net.UnixConn
	vif *Vif
	r   *bufio.Reader
}

// dial connects to the process, and makes sure that it is one of the user.
func (v *Vif) dial(ctx context.Context) (*client, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", v.Socket)
	if err != nil {
		return nil, err
	}
	c := nc.(*net.UnixConn)
	if _, uid, err := peerOf(c); err != nil || uid != v.UID {
		c.Close()
		return nil, errors.Join(fmt.Errorf("inspect: the process at %s is of uid %d, not %d", v.Socket, uid, v.UID), err)
	}
	return &client{c, v, bufio.NewReaderSize(c, 128<<10)}, nil
}

// ask sends the request and reads its answer.
func (c *client) ask(q *request) (*answer, error) {
	b, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(answerTimeout))
	// A server that has too many clients answers without reading, and what it answered
	// may still be read.
	_, sent := c.Write(append(b, '\n'))
	var a answer
	if err := readLine(c.r, maxAnswer, &a); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("no answer within %v", answerTimeout)
		}
		return nil, fmt.Errorf("%s: %w", c.vif.Name, errors.Join(err, sent))
	}
	c.SetDeadline(time.Time{})
	if a.Error != "" {
		return nil, &Error{c.vif.Name, a.Error}
	}
	return &a, nil
}

func (v *Vif) ask(ctx context.Context, q *request) (*answer, error) {
	c, err := v.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.ask(q)
}

// Rings returns the state of the vif's rings.
func (v *Vif) Rings(ctx context.Context) (*pvnet.RingState, error) {
	a, err := v.ask(ctx, &request{Op: opRings, Vif: v.Name})
	if err == nil && a.Rings == nil {
		err = &Error{v.Name, "nothing"}
	}
	if err != nil {
		return nil, err
	}
	return a.Rings, nil
}

// Kick makes the process do what [pvnet.Device.Kick] does, and returns how many halves were
// reached.
func (v *Vif) Kick(ctx context.Context, peer bool) (halves int, err error) {
	a, err := v.ask(ctx, &request{Op: opKick, Vif: v.Name, Peer: peer})
	if err != nil {
		return 0, err
	}
	return a.Halves, nil
}

// ErrEnded says that the vif, or its process, has ended while its frames were copied.
var ErrEnded = errors.New("inspect: the vif or its process has ended")

// lastRecords is how long Dump waits, once it is to end, for the frames that were copied
// until then and for the last counts.
const lastRecords = 2 * time.Second

// Dump calls begun, if it is not nil, once frames are copied, and f with each of them, until f
// returns an error, which it returns, io.EOF as nil; ctx ends, which is no error; or the vif
// does, [ErrEnded]. The frame and its bytes are f's until it returns. stats are the last
// counts that the process told.
func (v *Vif) Dump(ctx context.Context, cfg DumpConfig, begun func(), f func(*pvnet.TapFrame) error) (stats pvnet.TapStats, err error) {
	c, err := v.dial(ctx)
	if err != nil {
		return stats, err
	}
	defer c.Close()
	if _, err := c.ask(&request{Op: opDump, Vif: v.Name, DumpConfig: &cfg}); err != nil {
		return stats, err
	}
	if begun != nil {
		begun()
	}
	leave := func() {
		c.CloseWrite() // the process sends what it has, and then the last counts
		c.SetReadDeadline(time.Now().Add(lastRecords))
	}
	stop := context.AfterFunc(ctx, leave)
	defer stop()
	var frame pvnet.TapFrame
	var data [pvnet.MaxFrame]byte
	over := false // f wants no more frames
	for {
		ended, err := c.next(&frame, data[:], &stats, func() error {
			if over {
				return nil
			}
			return f(&frame)
		})
		var own *stopped
		switch {
		case errors.As(err, &own):
			over = true
			if own.err != io.EOF {
				return stats, own.err
			}
			leave()
		case err != nil && (over || ctx.Err() != nil):
			return stats, nil
		case err != nil:
			return stats, fmt.Errorf("%w: %w", ErrEnded, err)
		case ended && !over && ctx.Err() == nil:
			return stats, ErrEnded
		case ended:
			return stats, nil
		}
	}
}

// stopped is an error of the caller's function.
type stopped struct{ err error }

func (s *stopped) Error() string { return s.err.Error() }

// next reads one record. For a frame it calls f.
func (c *client) next(frame *pvnet.TapFrame, data []byte, stats *pvnet.TapStats, f func() error) (ended bool, err error) {
	kind, err := c.r.ReadByte()
	if err != nil {
		return false, err
	}
	switch kind {
	case recordFrame:
		var head [frameHeader]byte
		head[0] = kind
		if _, err := io.ReadFull(c.r, head[1:]); err != nil {
			return false, err
		}
		n, err := parseFrame(&head, frame)
		if err != nil {
			return false, err
		}
		frame.Data = data[:n]
		if _, err := io.ReadFull(c.r, frame.Data); err != nil {
			return false, err
		}
		if err := f(); err != nil {
			return false, &stopped{err}
		}
	case recordStats:
		var b [statsRecord - 1]byte
		if _, err := io.ReadFull(c.r, b[:]); err != nil {
			return false, err
		}
		*stats = pvnet.TapStats{
			Captured: binary.LittleEndian.Uint64(b[0:]), Filtered: binary.LittleEndian.Uint64(b[8:]), Lost: binary.LittleEndian.Uint64(b[16:]),
		}
	case recordEnd:
		var b [2]byte
		if _, err := io.ReadFull(c.r, b[:]); err != nil {
			return false, err
		}
		reason := make([]byte, min(int(binary.LittleEndian.Uint16(b[:])), maxReason))
		if _, err := io.ReadFull(c.r, reason); err != nil {
			return false, err
		}
		return true, nil
	default:
		return false, errRecord
	}
	return false, nil
}
