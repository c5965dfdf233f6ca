package main

import "golang.org/x/sys/unix"

// An eventfdLink wakes the other end and is woken: what any round trip costs whose
// parties block.
type eventfdLink struct{ there, back int }

func eventfdPeer(*job) (link, error) {
	l := &eventfdLink{-1, -1}
	for _, fd := range []*int{&l.there, &l.back} {
		var err error
		if *fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
			l.close()
			return nil, &missing{"eventfd", "it needs a kernel with CONFIG_EVENTFD and free descriptors", err}
		}
	}
	return l, nil
}

func (l *eventfdLink) close() error {
	for _, fd := range []int{l.there, l.back} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	return nil
}

var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

func (l *eventfdLink) interrupt() {
	unix.Write(l.there, one)
	unix.Write(l.back, one)
}

func (l *eventfdLink) ping(j *job, rtt []int64) error {
	b := make([]byte, 8)
	for i := range rtt {
		start := nano()
		if _, err := unix.Write(l.there, one); err != nil {
			return err
		}
		if _, err := readAgain(l.back, b); err != nil {
			return err
		}
		rtt[i] = nano() - start
	}
	return nil
}

func (l *eventfdLink) echo(j *job) error {
	b := make([]byte, 8)
	for !j.stopped() {
		if _, err := readAgain(l.there, b); err != nil {
			return err
		}
		if _, err := unix.Write(l.back, one); err != nil {
			return err
		}
	}
	return nil
}

// readAgain is read(2), again after a signal: Go's scheduler sends some.
func readAgain(fd int, b []byte) (int, error) {
	for {
		if n, err := unix.Read(fd, b); err != unix.EINTR {
			return n, err
		}
	}
}
