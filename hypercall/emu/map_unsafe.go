//go:build linux

package emu

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapOver replaces the mapping under b, which must be whole pages of one that
// [unix.Mmap] made: the address is inside it, so that nothing else is replaced, and
// unmapping all of it later takes this away too.
func mapOver(b []byte, f *os.File, offset, prot int) error {
	_, err := unix.MmapPtr(int(f.Fd()), int64(offset), unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b)),
		prot, unix.MAP_SHARED|unix.MAP_FIXED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("emu: mmap: %w", err)
	}
	return nil
}
