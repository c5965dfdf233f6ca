//go:build linux

package emu

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapOver replaces the mapping under b, which must be whole pages of a mapping of
// [unix.Mmap]. The address is inside that mapping, so nothing else is replaced, and
// unmapping all of it later removes this part too.
func mapOver(b []byte, f *os.File, offset, prot int) error {
	_, err := unix.MmapPtr(int(f.Fd()), int64(offset), unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b)),
		prot, unix.MAP_SHARED|unix.MAP_FIXED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("emu: mmap: %w", err)
	}
	return nil
}
