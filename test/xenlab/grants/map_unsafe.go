//go:build linux

package main

import (
	"fmt"
	"os"
	"structs"
	"unsafe"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
)

// mmapResource is struct privcmd_mmap_resource of include/uapi/xen/privcmd.h.
type mmapResource struct {
	_    structs.HostLayout
	Dom  uint16
	_    uint16
	Type uint32
	ID   uint32
	Idx  uint32
	Num  uint64
	Addr uint64
}

var _ [32]byte = [unsafe.Sizeof(mmapResource{})]byte{}

const (
	privcmdMmapResource = unsafe.Sizeof(mmapResource{})<<16 | 'P'<<8 | 7 // IOCTL_PRIVCMD_MMAP_RESOURCE
	grantTableResource  = 1                                              // XENMEM_resource_grant_table of xen/include/public/memory.h
)

// mapTable maps the first frames of a domain's grant table, for the life of the process. If
// the table has fewer frames, Xen makes it grow.
func mapTable(dom hypercall.DomID, frames int) ([]byte, error) {
	f, err := os.OpenFile("/dev/xen/privcmd", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), 0, frames*frameSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	// The kernel replaces the pages of b, to which only b points.
	r := mmapResource{
		Dom: uint16(dom), Type: grantTableResource,
		Num: uint64(frames), Addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))),
	}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), privcmdMmapResource, uintptr(unsafe.Pointer(&r))); e != 0 {
		return nil, fmt.Errorf("IOCTL_PRIVCMD_MMAP_RESOURCE: %w", e)
	}
	return b, nil
}
