//go:build linux

package xendev

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/wire"
)

// idTimeout bounds the request for our own domid. A running xenstore answers in
// milliseconds.
const idTimeout = 5 * time.Second

// maxRequest is the largest payload of a request to the device: the driver's
// buffer has 4096 bytes with the header (drivers/xen/xenbus/xenbus_dev_frontend.c).
const maxRequest = wire.MaxPayload - wire.HeaderSize

// Store opens a connection to xenstore: a new open file of the kernel's device. It also
// asks again for this domain's id, which changes when the domain is migrated.
//
// A client must have only one request in flight, because the driver keeps one per file,
// and must write each request in one call. For a request that the driver cannot pass on,
// its write fails. The connection instead answers such a request with an error message,
// so that the stream stays in step: E2BIG for a payload over 4080 bytes, else the
// driver's errno.
//
// ctx bounds the opening only.
func (d *Domain) Store(ctx context.Context) (io.ReadWriteCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := openStore(d.cfg)
	if err != nil {
		return nil, err
	}
	id, err := readID(ctx, d.cfg, f)
	if err == nil {
		err = f.SetReadDeadline(time.Time{})
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	d.id.Store(uint32(id))
	return &store{file: f}, nil
}

func openStore(cfg Config) (*os.File, error) {
	path := cfg.path("dev/xen/xenbus")
	f, err := openFile(path, unix.O_NONBLOCK)
	if errors.Is(err, fs.ErrNotExist) {
		// The module is older than the node, or nothing populates /dev.
		if g, gerr := openFile(cfg.path("proc/xen/xenbus"), unix.O_NONBLOCK); gerr == nil {
			return g, nil
		}
	}
	if err != nil {
		return nil, cfg.explain(path, "xenfs", err)
	}
	return f, nil
}

// askID is readID on a file that it opens.
func askID(cfg Config) (hypercall.DomID, error) {
	f, err := openStore(cfg)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return readID(context.Background(), cfg, f)
}

// readID reads this domain's node domid, which the toolstack writes. A control domain is
// domain 0 if there is no such node or if xenstore does not run yet.
func readID(ctx context.Context, cfg Config, f *os.File) (hypercall.DomID, error) {
	if err := f.SetReadDeadline(time.Now().Add(idTimeout)); err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(past) })
	v, err := readNode(f, "domid")
	if !stop() {
		return 0, ctx.Err()
	}
	if err != nil {
		if b, cerr := os.ReadFile(cfg.path("proc/xen/capabilities")); cerr == nil && strings.Contains(string(b), "control_d") {
			return 0, nil
		}
		return 0, fmt.Errorf("xendev: ask xenstore for our domid: %w", err)
	}
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil || hypercall.DomID(n) >= hypercall.DomSelf {
		return 0, fmt.Errorf("xendev: xenstore says our domid is %q", v)
	}
	return hypercall.DomID(n), nil
}

// readNode makes one READ request, on a file without a watch.
func readNode(f *os.File, path string) (string, error) {
	b, err := wire.Append(nil, wire.Header{Op: wire.Read}, path, "\x00")
	if err != nil {
		return "", err
	}
	if _, err := f.Write(b); err != nil {
		return "", err
	}
	h, p, err := wire.ReadMessage(f, make([]byte, wire.HeaderSize+wire.MaxPayload))
	switch {
	case err != nil:
		return "", err
	case h.Op == wire.Error:
		return "", errors.New(string(bytes.TrimRight(p, "\x00")))
	case h.Op != wire.Read:
		return "", fmt.Errorf("xenstore answered a read with a message of type %d", h.Op)
	}
	return string(p), nil
}

// A store is a connection to xenstore over the device. It reads whole messages, so that
// an answer of our own can go between two of them.
type store struct {
	file *os.File

	mu      sync.Mutex
	refused []byte // guarded by mu; our own answers that were not read yet
	closed  bool   // guarded by mu

	// Used by the goroutine in Read only.
	buf  [wire.HeaderSize + wire.MaxPayload]byte
	have int    // bytes of buf read so far
	rest []byte // the part of a whole message that the caller has not read yet
}

// Write sends one whole message.
func (s *store) Write(b []byte) (int, error) {
	if len(b) < wire.HeaderSize || uint64(len(b)) != wire.HeaderSize+uint64(binary.LittleEndian.Uint32(b[12:])) {
		return 0, errors.New("xendev: write to xenstore of what is not one whole message")
	}
	if len(b) > wire.HeaderSize+maxRequest {
		return s.refuse(b, unix.E2BIG)
	}
	_, err := s.file.Write(b)
	var no unix.Errno
	switch {
	case err == nil:
		return len(b), nil
	case errors.Is(err, os.ErrClosed):
		return 0, net.ErrClosed
	case errors.As(err, &no) && unix.ErrnoName(no) != "":
		return s.refuse(b, no)
	}
	return 0, err
}

// maxRefused bounds the bytes of our own answers that wait for Read. A client with one
// request in flight has one of them.
const maxRefused = 4096

// refuse answers the message b as xenstore would, with the error no.
func (s *store) refuse(b []byte, no unix.Errno) (int, error) {
	h := wire.Header{
		Op:    wire.Error,
		ReqID: binary.LittleEndian.Uint32(b[4:]),
		TxID:  binary.LittleEndian.Uint32(b[8:]),
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return 0, net.ErrClosed
	}
	if len(s.refused) > maxRefused {
		s.mu.Unlock()
		return 0, no
	}
	var err error
	s.refused, err = wire.Append(s.refused, h, unix.ErrnoName(no), "\x00")
	s.mu.Unlock()
	if err != nil {
		return 0, err
	}
	// This wakes a Read. It can fail only if the file is closed.
	_ = s.file.SetReadDeadline(past)
	return len(b), nil
}

// Read returns bytes of the stream. It blocks until there are some, or until Close.
func (s *store) Read(b []byte) (int, error) {
	for len(s.rest) == 0 {
		if err := s.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// next waits for a whole message, or until refuse wakes it between two messages.
func (s *store) next() error {
	if s.have == 0 && s.takeRefused() {
		return nil
	}
	for {
		want := wire.HeaderSize
		if s.have >= wire.HeaderSize {
			n := binary.LittleEndian.Uint32(s.buf[12:])
			if n > wire.MaxPayload {
				return wire.ErrTooLong
			}
			want += int(n)
			if s.have == want {
				s.rest, s.have = s.buf[:want], 0
				return nil
			}
		}
		n, err := s.file.Read(s.buf[s.have:want])
		s.have += n
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			// refuse has queued an answer and set a deadline in the past. Clear the
			// deadline before looking for the answer, so that no later one is missed.
			if err := s.file.SetReadDeadline(time.Time{}); err != nil {
				return net.ErrClosed
			}
			if s.have == 0 && s.takeRefused() {
				return nil
			}
		case errors.Is(err, os.ErrClosed):
			return net.ErrClosed
		default:
			return err
		}
	}
}

func (s *store) takeRefused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.refused) == 0 {
		return false
	}
	s.rest, s.refused = s.refused, nil
	return true
}

// Close ends the connection with its watches and open transactions, and unblocks Read. It
// is idempotent.
func (s *store) Close() error {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	return s.file.Close()
}
