//go:build linux

package xendev

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"barevif/xenbus/xenstore/wire"
)

// maxLanes is how many requests of one connection xenstored may work on at once. It stops
// reading from a domain that has 20 of them open (quota "outstanding").
const maxLanes = 8

// maxOwn bounds our own answers that wait for Read.
const maxOwn = 64

// A store is a connection to xenstore over open files of the device. To its user it is one
// stream: requests go in, and answers and watch events come out as whole messages.
type store struct {
	open  func() (io.ReadWriteCloser, error) // another file of the device
	in    chan []byte                        // messages that a lane has read; unbuffered, so that a slow reader holds up the kernel
	own   chan []byte                        // our answers to requests that the driver refused
	ended chan struct{}                      // closed when err is set

	mu    sync.Mutex
	lanes []*lane // guarded by mu; the first has the watches and the transactions
	err   error   // guarded by mu; why the connection has ended, nil: it has not

	rest []byte // used by Read only: the part of a message that the caller has not read yet
}

// A lane is one open file. The driver takes a request from it once the one before is
// answered.
type lane struct {
	file  io.ReadWriteCloser
	busy  bool     // guarded by store.mu; a request was written and is not answered
	queue [][]byte // guarded by store.mu; requests that wait for that answer
}

func newStore(first io.ReadWriteCloser, open func() (io.ReadWriteCloser, error)) *store {
	s := &store{open: open, in: make(chan []byte), own: make(chan []byte, maxOwn), ended: make(chan struct{})}
	s.addLocked(first)
	return s
}

// Pipeline tells [barevif/xenbus/xenstore.Client] how many requests it may send at once.
func (s *store) Pipeline() int { return maxLanes }

// Write sends whole messages.
func (s *store) Write(b []byte) (int, error) {
	for rest := b; ; {
		if len(rest) < wire.HeaderSize || uint64(len(rest)) < wire.HeaderSize+uint64(binary.LittleEndian.Uint32(rest[12:])) {
			return 0, errors.New("xendev: write to xenstore of what are not whole messages")
		}
		n := wire.HeaderSize + int(binary.LittleEndian.Uint32(rest[12:]))
		if rest = rest[n:]; len(rest) == 0 {
			break
		}
	}
	for rest := b; len(rest) > 0; {
		n := wire.HeaderSize + int(binary.LittleEndian.Uint32(rest[12:]))
		if err := s.send(rest[:n]); err != nil {
			return len(b) - len(rest), err
		}
		rest = rest[n:]
	}
	return len(b), nil
}

// send writes a message to a lane that is free for it, or queues it for the first lane.
func (s *store) send(message []byte) error {
	s.mu.Lock()
	if s.err != nil {
		defer s.mu.Unlock()
		return s.err
	}
	if len(message) > wire.HeaderSize+maxRequest {
		s.mu.Unlock()
		return s.refuse(message, unix.E2BIG)
	}
	l := s.lanes[0]
	if onlyReads(message) {
		l = s.freeLocked()
	}
	if l.busy {
		l.queue = append(l.queue, slices.Clone(message))
		s.mu.Unlock()
		return nil
	}
	l.busy = true
	s.mu.Unlock()
	return s.put(l, message)
}

// onlyReads reports whether a request changes nothing and belongs to no transaction, so that its
// order among others does not matter.
func onlyReads(message []byte) bool {
	if binary.LittleEndian.Uint32(message[8:]) != 0 {
		return false
	}
	switch wire.Op(binary.LittleEndian.Uint32(message)) {
	case wire.Read, wire.Directory, wire.DirectoryPart, wire.GetPerms, wire.GetDomainPath, wire.IsDomainIntroduced:
		return true
	}
	return false
}

// freeLocked returns a lane that is not busy, and opens one if all are. It returns the first lane
// if there can be no other.
func (s *store) freeLocked() *lane {
	if i := slices.IndexFunc(s.lanes, func(l *lane) bool { return !l.busy }); i >= 0 {
		return s.lanes[i]
	}
	if len(s.lanes) < maxLanes {
		// An error, such as too many open files, costs time and nothing else.
		if f, err := s.open(); err == nil {
			return s.addLocked(f)
		}
	}
	return s.lanes[0]
}

func (s *store) addLocked(f io.ReadWriteCloser) *lane {
	l := &lane{file: f}
	s.lanes = append(s.lanes, l)
	go s.receive(l)
	return l
}

// put writes a message to a busy lane. If the driver refuses it, put writes those that wait for it.
func (s *store) put(l *lane, message []byte) error {
	for message != nil {
		_, err := l.file.Write(message)
		var no unix.Errno
		switch {
		case err == nil:
			return nil
		case errors.Is(err, os.ErrClosed):
			return net.ErrClosed
		case !errors.As(err, &no) || unix.ErrnoName(no) == "":
			return err
		}
		if err := s.refuse(message, no); err != nil {
			return err
		}
		message = s.answered(l)
	}
	return nil
}

// answered notes that the lane's request has its answer, and returns the next one, nil if none waits.
func (s *store) answered(l *lane) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(l.queue) == 0 {
		l.busy = false
		return nil
	}
	next := l.queue[0]
	l.queue = slices.Delete(l.queue, 0, 1)
	return next
}

// refuse answers a message as xenstore would, with the error no.
func (s *store) refuse(message []byte, no unix.Errno) error {
	h := wire.Header{
		Op:    wire.Error,
		ReqID: binary.LittleEndian.Uint32(message[4:]),
		TxID:  binary.LittleEndian.Uint32(message[8:]),
	}
	answer, err := wire.Append(nil, h, unix.ErrnoName(no), "\x00")
	if err != nil {
		return err
	}
	select {
	case s.own <- answer:
		return nil
	default: // nobody reads the answers
		return no
	}
}

// receive reads the messages of a lane until the connection ends, and sends the lane's next request
// after each answer.
func (s *store) receive(l *lane) {
	buf := make([]byte, wire.HeaderSize+wire.MaxPayload)
	for {
		h, payload, err := wire.ReadMessage(l.file, buf)
		if err != nil {
			s.end(readError(err))
			return
		}
		if h.Op != wire.WatchEvent {
			if next := s.answered(l); next != nil {
				err = s.put(l, next)
			}
		}
		select {
		case s.in <- slices.Clone(buf[:wire.HeaderSize+len(payload)]):
		case <-s.ended:
			return
		}
		if err != nil {
			s.end(err)
			return
		}
	}
}

func readError(err error) error {
	switch {
	case errors.Is(err, os.ErrClosed):
		return net.ErrClosed
	case errors.Is(err, io.ErrUnexpectedEOF): // the device is gone, as it is between two messages
		return io.EOF
	}
	return err
}

// Read returns bytes of the stream. It blocks until there are some, or until Close.
func (s *store) Read(b []byte) (int, error) {
	if len(s.rest) == 0 {
		select {
		case s.rest = <-s.in:
		case s.rest = <-s.own:
		case <-s.ended:
			s.mu.Lock()
			defer s.mu.Unlock()
			return 0, s.err
		}
	}
	n := copy(b, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// end ends the connection for all its lanes. The first reason counts.
func (s *store) end(why error) error {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return nil
	}
	s.err = why
	close(s.ended)
	lanes := s.lanes // none is added any more
	s.mu.Unlock()
	var errs []error
	for _, l := range lanes { // outside of mu: Close waits for a Write that is in the kernel
		errs = append(errs, l.file.Close())
	}
	return errors.Join(errs...)
}

// Close ends the connection with its watches and open transactions, and unblocks Read. It
// is idempotent.
func (s *store) Close() error { return s.end(net.ErrClosed) }
