//go:build linux

package link

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// vector is the iovec array of one direction. It is part of a struct on the heap
// and holds the buffers by pointers the garbage collector sees, so both stay
// where they are while the kernel uses them. Each Len is the length of the slice
// Base came from.
type vector struct {
	iov  [MaxPieces + 2]unix.Iovec // before the pieces the header, after them a spare byte
	n    int
	size int // bytes in all
}

// add appends b. The caller keeps the number of calls within the array.
func (v *vector) add(b []byte) {
	if len(b) == 0 {
		return
	}
	v.iov[v.n].Base = unsafe.SliceData(b)
	v.iov[v.n].SetLen(len(b))
	v.n++
	v.size += len(b)
}

// clear lets go of the buffers.
func (v *vector) clear() {
	clear(v.iov[:v.n])
	v.n, v.size = 0, 0
}

// readv and writev pass the array itself; the kernel reads v.n entries of it, all
// set by add. mayWait says that the descriptor may not be a non-blocking one; see port.
func (v *vector) readv(fd uintptr, mayWait bool) (int, syscall.Errno) {
	return v.call(unix.SYS_READV, fd, mayWait)
}

func (v *vector) writev(fd uintptr, mayWait bool) (int, syscall.Errno) {
	return v.call(unix.SYS_WRITEV, fd, mayWait)
}

func (v *vector) call(trap, fd uintptr, mayWait bool) (int, syscall.Errno) {
	var n uintptr
	var errno syscall.Errno
	if mayWait {
		n, _, errno = unix.Syscall(trap, fd, uintptr(unsafe.Pointer(&v.iov)), uintptr(v.n))
	} else {
		n, _, errno = unix.RawSyscall(trap, fd, uintptr(unsafe.Pointer(&v.iov)), uintptr(v.n))
	}
	return int(n), errno
}

// message is what recvmsg fills beside the buffers. It is part of the same struct
// as its vector, so the pointers between them stay good.
type message struct {
	hdr     unix.Msghdr
	control [64]byte
}

// recvmsg receives into v. It returns the bytes received, the control bytes and
// the message's flags. The kernel never writes more control bytes than the
// array has; its answer is checked against it all the same.
func (m *message) recvmsg(fd uintptr, v *vector) (n int, control []byte, flags int32, errno syscall.Errno) {
	m.hdr = unix.Msghdr{Iov: &v.iov[0], Control: &m.control[0]}
	m.hdr.SetIovlen(v.n)
	m.hdr.SetControllen(len(m.control))
	r, _, errno := unix.Syscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&m.hdr)), 0)
	return int(r), m.control[:min(int(m.hdr.Controllen), len(m.control))], m.hdr.Flags, errno
}
