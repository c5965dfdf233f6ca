package main

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

const (
	nameEventfd    = "eventfd, blocking"
	nameEventfdTwo = "eventfd, blocking, two processes"
	nameNetpoller  = "eventfd, netpoller, free goroutines"
)

// An eventfdLink only wakes the other end and is woken by it. That is the minimal cost of a
// round trip whose parties block in the kernel, or park in the runtime's poller.
type eventfdLink struct{ there, back *os.File }

func eventfdPeer(poller bool) setupFunc {
	flags := unix.EFD_CLOEXEC
	if poller {
		flags |= unix.EFD_NONBLOCK // makes os.NewFile use the poller
	}
	return func(*job) (link, error) { return newEventfdLink(flags) }
}

func newEventfdLink(flags int) (*eventfdLink, error) {
	l := new(eventfdLink)
	for _, f := range []**os.File{&l.there, &l.back} {
		fd, err := unix.Eventfd(0, flags)
		if err != nil {
			l.close()
			return nil, &missing{"eventfd", "it needs a kernel with CONFIG_EVENTFD and free descriptors", err}
		}
		*f = os.NewFile(uintptr(fd), "eventfd")
	}
	return l, nil
}

func (l *eventfdLink) close() error {
	l.there.Close() // a nil *os.File returns an error, without a panic
	l.back.Close()
	return nil
}

var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

func (l *eventfdLink) interrupt() {
	l.there.Write(one)
	l.back.Write(one)
}

func (l *eventfdLink) ping(j *job, rtt []int64) error {
	b := make([]byte, 8)
	for i := range rtt {
		start := nano()
		if _, err := l.there.Write(one); err != nil {
			return err
		}
		if _, err := l.back.Read(b); err != nil {
			return err
		}
		rtt[i] = nano() - start
	}
	return nil
}

func (l *eventfdLink) echo(j *job) error {
	b := make([]byte, 8)
	for !j.stopped() {
		if _, err := l.there.Read(b); err != nil {
			return err
		}
		if _, err := l.back.Write(one); err != nil {
			return err
		}
	}
	return nil
}

// An eventfdProcess is an eventfdLink whose other end is in a process of its own.
type eventfdProcess struct {
	*eventfdLink
	child *child
}

func newEventfdProcess(j *job) (link, error) {
	ends, err := newEventfdLink(unix.EFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	l := &eventfdProcess{eventfdLink: ends}
	if l.child, err = startChild(j, childTask{Eventfd: true}, ends.there, ends.back); err != nil {
		return nil, errors.Join(err, l.close())
	}
	if err := l.child.awaitReady(j); err != nil {
		j.stop.Store(1)
		l.interrupt()
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

func (l *eventfdProcess) pid() int { return l.child.cmd.Process.Pid }

// echo waits for the process that answers.
func (l *eventfdProcess) echo(*job) error {
	<-l.child.ended
	return nil // close returns the child's error
}

// close ends the other process, which the job has told to stop.
func (l *eventfdProcess) close() error { return errors.Join(l.child.wait(), l.eventfdLink.close()) }

// echoEventfd answers in a child, whose eventfds follow the board.
func echoEventfd(j *job) error {
	l := &eventfdLink{there: os.NewFile(4, "eventfd"), back: os.NewFile(5, "eventfd")}
	defer l.close()
	j.pin(1)
	j.ready.Store(1)
	return l.echo(j)
}
