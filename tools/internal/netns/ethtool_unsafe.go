//go:build linux

package netns

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ifreqData is struct ifreq of linux/if.h with a pointer in its union.
type ifreqData struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [24 - unsafe.Sizeof(uintptr(0))]byte
}

// ethtoolValue is struct ethtool_value of linux/ethtool.h.
type ethtoolValue struct{ cmd, data uint32 }

// offloadsOff makes the card compute checksums, gather and segment in software. The
// kernel reads v, and the ifreq that points at it, only during the call; KeepAlive keeps
// both until then.
func offloadsOff(name string) error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(s)
	for _, cmd := range []uint32{unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_STXCSUM, unix.ETHTOOL_SSG} {
		v := &ethtoolValue{cmd: cmd}
		r := &ifreqData{data: unsafe.Pointer(v)}
		copy(r.name[:len(r.name)-1], name)
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(r)))
		runtime.KeepAlive(v)
		if errno != 0 {
			return os.NewSyscallError("SIOCETHTOOL", errno)
		}
	}
	return nil
}
