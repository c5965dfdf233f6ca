//go:build linux

package link

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// vector is the iovec array of one direction. It is part of a struct on the heap and
// refers to the buffers by pointers that the garbage collector sees, so array and buffers
// stay in place while the kernel uses them. Each Len is the length of the slice of Base.
type vector struct {
	iov  [MaxPieces + 2]unix.Iovec // the header, the pieces, a spare byte
	n    int
	size int // total bytes
}

// add appends b. The caller ensures that the array has room.
func (v *vector) add(b []byte) {
	if len(b) == 0 {
		return
	}
	v.iov[v.n].Base = unsafe.SliceData(b)
	v.iov[v.n].SetLen(len(b))
	v.n++
	v.size += len(b)
}

// clear drops the references to the buffers.
func (v *vector) clear() {
	clear(v.iov[:v.n])
	v.n, v.size = 0, 0
}

// readv and writev pass the array itself. The kernel reads its first v.n entries, which
// add has set. mayWait means that the descriptor may be a blocking one; see port.
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

// message holds what recvmsg fills beside the buffers. It and its vector are part of one
// struct on the heap, so the pointers between them stay valid.
type message struct {
	hdr     unix.Msghdr
	control [64]byte
}

// recvmsg receives into v. It returns the number of bytes received, the control bytes and
// the message's flags. It never waits, also if another process has made the descriptor a
// blocking one, so it bypasses Go's runtime; see port. The kernel never writes more control
// bytes than the array holds, but the length it returns is limited to the array all the same.
func (m *message) recvmsg(fd uintptr, v *vector) (n int, control []byte, flags int32, errno syscall.Errno) {
	m.hdr = unix.Msghdr{Iov: &v.iov[0], Control: &m.control[0]}
	m.hdr.SetIovlen(v.n)
	m.hdr.SetControllen(len(m.control))
	r, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&m.hdr)), unix.MSG_DONTWAIT)
	return int(r), m.control[:min(int(m.hdr.Controllen), len(m.control))], m.hdr.Flags, errno
}
