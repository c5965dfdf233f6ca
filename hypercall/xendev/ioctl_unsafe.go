//go:build linux

package xendev

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

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
