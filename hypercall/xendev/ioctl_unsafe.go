//go:build linux

package xendev

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlNow is ioctl.Call for a request that does not wait in the kernel. It bypasses Go's
// scheduler, which then cannot take the processor away; see readNow.
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

// readNow reads from a non-blocking descriptor without telling Go's scheduler. The scheduler
// would wake its monitor thread after the call if that was asleep because the process was
// idle, and would hand the processor (the P) to another thread if the kernel ran another
// thread meanwhile. With one processor, both cost more than the call.
func readNow(fd uintptr, b []byte) (int, error) {
	n, _, e := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// writeNow writes to a non-blocking descriptor in the same way.
func writeNow(fd uintptr, b []byte) (int, error) {
	n, _, e := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}
