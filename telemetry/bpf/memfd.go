//go:build linux

package bpf

import (
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// A memfd holds the same records as the maps: the info record in its first page, the
// events from eventsAt on, the counters from countersAt on.
const (
	memfdPrefix = "barevif:"
	eventsAt    = 64 << 10
	countersAt  = 128 << 10
)

// memfdSeals prevent every other process, root's included, from resizing the file and
// writing to it. Our own mapping is older than the seals and stays writable.
const memfdSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_FUTURE_WRITE | unix.F_SEAL_SEAL

// newMemfd makes the file for a device. Other processes find it by name among our
// descriptors in /proc.
func newMemfd(name string, queues int) (*os.File, [3]region, error) {
	var parts [3]region
	fd, err := unix.MemfdCreate(memfdPrefix+name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, parts, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), memfdPrefix+name)
	undo := func(err error) (*os.File, [3]region, error) {
		for i := range parts {
			parts[i].unmap()
		}
		f.Close()
		return nil, parts, fmt.Errorf("memfd: %w", err)
	}
	if err := f.Truncate(countersAt + int64(queues*queueBytes)); err != nil {
		return undo(err)
	}
	for i, p := range [...]struct{ at, bytes int }{
		{countersAt, queues * queueBytes}, {0, infoBytes}, {eventsAt, eventSlots * eventBytes},
	} {
		if parts[i], err = mapRegion(fd, int64(p.at), p.bytes); err != nil {
			return undo(err)
		}
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, memfdSeals); err != nil {
		return undo(fmt.Errorf("seal: %w", err))
	}
	return f, parts, nil
}

// fileElements are the records in a memfd. They are read, not mapped, so that a file that
// shrinks causes an error and not a fault.
type fileElements struct{ f *os.File }

func openMemfd(src Source) (elements, error) {
	// The link leads to the file that the other process now has at that descriptor.
	// O_PATH shows what it is without an open that a device could notice.
	fd, err := unix.Open(src.Path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: src.Path, Err: err}
	}
	defer unix.Close(fd)
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: src.Path, Err: err}
	}
	to, err := os.Readlink(self)
	if err != nil {
		return nil, err
	}
	if name, ok := memfdName(to); !ok || name != src.Name || int(st.Uid) != src.UID || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%w: not the memfd of that name and owner", ErrLayout)
	}
	f, err := os.OpenFile(self, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	e := &fileElements{f}
	if seals, bad := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); bad != nil || seals&memfdSeals != memfdSeals {
		err = fmt.Errorf("%w: not a sealed memfd", ErrLayout)
	} else {
		_, err = e.info()
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return e, nil
}

func (e *fileElements) at(offset, n int) ([]byte, error) {
	b := make([]byte, n)
	if _, err := e.f.ReadAt(b, int64(offset)); err != nil {
		if err == io.EOF {
			err = fmt.Errorf("%w: the file is too short", ErrLayout)
		}
		return nil, err
	}
	return b, nil
}

func (e *fileElements) info() (*infoRecord, error) {
	return wholeInfo(func() ([]byte, error) { return e.at(0, infoBytes) })
}

func (e *fileElements) counters(q int) ([]byte, error) {
	return e.at(countersAt+q*queueBytes, queueBytes)
}

func (e *fileElements) event(slot int) ([]byte, error) {
	return e.at(eventsAt+slot*eventBytes, eventBytes)
}

func (e *fileElements) Close() error { return e.f.Close() }
