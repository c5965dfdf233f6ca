//go:build linux

package xendev

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl calls the driver behind fd and repeats the call when a signal interrupts it. arg
// points at the request's struct, or at memory that begins with it. The driver accesses
// that memory only during the call, and the conversion in Syscall's argument list keeps
// it in place until then.
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
