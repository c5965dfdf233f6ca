//go:build linux

// Package ioctl calls the drivers behind /dev/xen.
package ioctl

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Call calls the driver behind fd and repeats the call when a signal interrupts it. arg points
// at the request's struct, or at memory that begins with it. The driver accesses that memory
// only during the call, and the conversion in Syscall's argument list keeps it in place until
// then.
func Call(fd uintptr, request uintptr, arg unsafe.Pointer) (int, error) {
	for {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(arg))
		switch e {
		case 0:
			return int(r), nil
		case unix.EINTR:
		default:
			return 0, e
		}
	}
}
