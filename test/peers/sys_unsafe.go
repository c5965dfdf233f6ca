package main

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// at returns the T at offset off of b, which must hold all of it. T has no pointers, and b is
// mapped memory: it is page-aligned, and all offsets in use are aligned.
func at[T any](b []byte, off int) *T {
	var t T
	return (*T)(unsafe.Pointer(unsafe.SliceData(b[off : off+int(unsafe.Sizeof(t))])))
}

// asBytes returns the memory of v, which has no pointers.
func asBytes[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// address returns the address of b for the kernel. b is mapped memory, which does not move.
func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

// getsockopt fills v, which has no pointers.
func getsockopt[T any](fd, level, opt int, v *T) error {
	n := uint32(unsafe.Sizeof(*v))
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt),
		uintptr(unsafe.Pointer(v)), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		return e
	}
	return nil
}

// An mmsg is struct mmsghdr of recvmmsg(2).
type mmsg struct {
	hdr unix.Msghdr
	n   uint32
	_   [4]byte
}

var _ [64]byte = [unsafe.Sizeof(mmsg{})]byte{}

// newMmsgs returns one message per buffer. The messages keep the buffers alive.
func newMmsgs(bufs [][]byte) []mmsg {
	iovs := make([]unix.Iovec, len(bufs))
	msgs := make([]mmsg, len(bufs))
	for i, b := range bufs {
		iovs[i].Base = unsafe.SliceData(b)
		iovs[i].SetLen(len(b))
		msgs[i].hdr.Iov = &iovs[i]
		msgs[i].hdr.SetIovlen(1)
	}
	return msgs
}

// mmsgCall calls sendmmsg(2) or recvmmsg(2) and returns how many messages were moved.
func mmsgCall(trap uintptr, fd int, msgs []mmsg, flags int) (int, error) {
	n, _, e := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs)), uintptr(flags), 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// A memory is a mapped memfd. With a child process both processes map it.
type memory struct {
	fd int
	b  []byte
}

func newMemory(name string, size int) (*memory, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("memfd of %d bytes: %w", size, err)
	}
	b, err := mapMemory(fd, size)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &memory{fd: fd, b: b}, nil
}

func mapMemory(fd, size int) ([]byte, error) {
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("mmap of %d bytes: %w", size, err)
	}
	return b, nil
}

func (m *memory) close() {
	unix.Munmap(m.b)
	unix.Close(m.fd)
}
