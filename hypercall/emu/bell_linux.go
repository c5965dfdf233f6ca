package emu

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// fdBell is an eventfd, which rings in another process, too. Parking waits in the
// runtime's poller.
type fdBell struct {
	file  *os.File
	one   [8]byte
	count [8]byte   // of the parked goroutine only
	until time.Time // of the parked goroutine only: the deadline of file
}

func newFDBell() (bell, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("emu: eventfd: %w", err)
	}
	return openFDBell(fd), nil
}

// openFDBell takes over a non-blocking eventfd.
func openFDBell(fd int) *fdBell {
	b := &fdBell{file: os.NewFile(uintptr(fd), "eventfd")}
	binary.NativeEndian.PutUint64(b.one[:], 1)
	return b
}

// ring may fail when the bell is closed: then nobody listens.
func (b *fdBell) ring() { _, _ = b.file.Write(b.one[:]) }

func (b *fdBell) park(until time.Time) {
	if until != b.until {
		if b.file.SetReadDeadline(until) != nil {
			return // closed: the caller looks before it parks again
		}
		b.until = until
	}
	_, _ = b.file.Read(b.count[:]) // rung, past the deadline or closed: the caller looks
}

func (b *fdBell) close() { _ = b.file.Close() }
