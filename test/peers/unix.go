package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// A fdLink has two descriptors that keep frame boundaries: sockets, or TAP devices. The kernel
// may lose frames between them.
type fdLink struct {
	a, b  int
	batch int  // more than 1: sendmmsg(2) and recvmmsg(2)
	lossy bool // do not compare frames, because some are lost
	end   func()
	wake  func()
}

func (l *fdLink) close() error {
	l.end()
	return nil
}

func (l *fdLink) interrupt() {
	if l.wake != nil {
		l.wake()
	}
}

// unixPeer is a pair of unix sockets of one type.
func unixPeer(socketType, batch int) peer {
	return setupFunc(func(j *job) (link, error) {
		fds, err := unix.Socketpair(unix.AF_UNIX, socketType|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("socketpair: %w", err)
		}
		l := &fdLink{a: fds[0], b: fds[1], batch: batch, end: func() { unix.Close(fds[0]); unix.Close(fds[1]) }}
		for _, fd := range fds {
			if err := errors.Join(setTimeouts(fd), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 2<<20)); err != nil {
				l.end()
				return nil, err
			}
		}
		return l, nil
	})
}

// setTimeouts makes blocking calls return after 20 ms, to check whether the job was stopped.
func setTimeouts(fd int) error {
	t := unix.Timeval{Usec: 20_000}
	return errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &t))
}

// shouldRetry reports whether the call should be repeated after err: no frame came in time, there
// was no room, or a signal interrupted it.
func shouldRetry(err error) bool {
	return err == unix.EAGAIN || err == unix.EINTR || err == unix.ENOBUFS
}

func (l *fdLink) send(j *job) error {
	src, sent := j.batchSource(l.batch), tally{to: &j.sent}
	msgs := newMmsgs(src.frames)
	for !j.stopped() {
		frames := src.next()
		for done := 0; done < l.batch && !j.stopped(); {
			n, err := 1, error(nil)
			if l.batch == 1 {
				_, err = unix.Write(l.a, frames[0])
			} else {
				n, err = mmsgCall(unix.SYS_SENDMMSG, l.a, msgs[done:], 0)
			}
			if shouldRetry(err) {
				continue
			} else if err != nil {
				return err
			}
			done += n
			sent.add(n)
		}
	}
	return nil
}

func (l *fdLink) receive(j *job) error {
	s, rcvd := j.sink(), tally{to: &j.rcvd}
	s.want.verify = j.verify && !l.lossy
	bufs := make([][]byte, l.batch)
	for i := range bufs {
		bufs[i] = make([]byte, j.size)
	}
	msgs := newMmsgs(bufs)
	for !j.stopped() {
		n, err := 1, error(nil)
		if l.batch == 1 {
			var k int
			if k, err = unix.Read(l.b, bufs[0]); err == nil && k < j.size {
				continue // not a frame of ours
			}
		} else {
			n, err = mmsgCall(unix.SYS_RECVMMSG, l.b, msgs, unix.MSG_WAITFORONE)
		}
		if shouldRetry(err) {
			continue
		} else if err != nil {
			return err
		}
		for _, b := range bufs[:n] {
			if err := s.check(b); err != nil {
				return err
			}
		}
		rcvd.add(n)
	}
	return nil
}

func (l *fdLink) ping(j *job, rtt []int64) error {
	frame := j.source().frame
	b := make([]byte, j.size)
	for i := range rtt {
		start := nano()
		if err := l.moveOne(j, unix.Write, l.a, frame); err != nil {
			return err
		}
		if err := l.moveOne(j, unix.Read, l.a, b); err != nil || j.stopped() {
			return err
		}
		rtt[i] = nano() - start
	}
	return nil
}

func (l *fdLink) echo(j *job) error {
	frame := j.source().frame
	copy(frame, macA[:])
	copy(frame[6:], macB[:])
	b := make([]byte, j.size)
	for !j.stopped() {
		if err := l.moveOne(j, unix.Read, l.b, b); err != nil || j.stopped() {
			return err
		}
		if err := l.moveOne(j, unix.Write, l.b, frame); err != nil {
			return err
		}
	}
	return nil
}

// moveOne reads or writes one whole frame, and skips shorter ones.
func (l *fdLink) moveOne(j *job, call func(int, []byte) (int, error), fd int, b []byte) error {
	for !j.stopped() {
		n, err := call(fd, b)
		if err == nil && n == len(b) {
			return nil
		}
		if err != nil && !shouldRetry(err) {
			return err
		}
	}
	return nil
}
