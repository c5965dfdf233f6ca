//go:build linux

package xendev

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlNow is ioctl of a request that does not wait. Go's runtime is not told of it, and so
// takes no processor away that is needed again at once; see readNow.
func ioctlNow(fd int, request uintptr, arg unsafe.Pointer) error {
	for {
		_, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		switch e {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return e
		}
	}
}

// readNow reads from a descriptor that does not wait. Go's runtime is not told of it: it
// would wake its monitor thread when the call is over and there had been nothing to do
// before, and hand the processor (the P) to another thread if the kernel ran somebody
// else meanwhile. Both cost more than the call, where there is one processor.
func readNow(fd uintptr, b []byte) (int, error) {
	n, _, e := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// writeNow is readNow the other way.
func writeNow(fd uintptr, b []byte) (int, error) {
	n, _, e := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// ioctl calls the driver behind fd until no signal interrupts it. arg points at
// the request's struct, or at memory that begins with it, which the driver reads
// and writes only during the call: the conversion in the argument list of Syscall
// keeps it in place until then.
func ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, error) {
	for {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		switch e {
		case 0:
			return int(r), nil
		case unix.EINTR:
		default:
			return 0, e
		}
	}
}
