//go:build linux

package guestinit

import (
	"syscall"
	"unsafe"
)

// initModule loads a kernel module. The kernel copies the module and the parameters, of which there are none,
// before it returns; both are alive until then.
func initModule(module []byte) error {
	if len(module) == 0 {
		return syscall.ENOEXEC
	}
	var none [1]byte
	_, _, errno := syscall.Syscall(syscall.SYS_INIT_MODULE, uintptr(unsafe.Pointer(&module[0])), uintptr(len(module)), uintptr(unsafe.Pointer(&none[0])))
	if errno != 0 {
		return errno
	}
	return nil
}

// ifreqFlags is struct ifreq of linux/if.h with the member ifr_flags.
type ifreqFlags struct {
	name  [syscall.IFNAMSIZ]byte
	flags uint16
	_     [22]byte
}

var _ [40]byte = [unsafe.Sizeof(ifreqFlags{})]byte{}

// loopbackUp sets the interface lo up. The request outlives both calls, which read and write only its 40 bytes.
func loopbackUp() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	req := ifreqFlags{name: [syscall.IFNAMSIZ]byte{'l', 'o'}}
	for _, op := range [...]uintptr{syscall.SIOCGIFFLAGS, syscall.SIOCSIFFLAGS} {
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), op, uintptr(unsafe.Pointer(&req))); errno != 0 {
			return errno
		}
		req.flags |= syscall.IFF_UP
	}
	return nil
}
