//go:build linux

package bpf

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A region is memory shared with other processes: a mapped BPF array, or part of a memfd.
// It is not Go memory: nothing may access it after unmap.
type region struct {
	b []byte
}

// mapRegion maps bytes of fd, readable and writable, from offset on, which must be a
// multiple of the page size.
func mapRegion(fd int, offset int64, bytes int) (region, error) {
	page := unix.Getpagesize()
	b, err := unix.Mmap(fd, offset, (bytes+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return region{}, fmt.Errorf("map %d bytes: %w", bytes, err)
	}
	return region{b}, nil
}

// words returns n words from word i on. They are aligned, because the mapping begins on a
// page; the slice expression panics if they are not all inside.
func (r region) words(i, n int) []uint64 {
	b := r.b[8*i : 8*(i+n) : 8*(i+n)]
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), n)
}

func (r *region) unmap() error {
	if r.b == nil {
		return nil
	}
	err := unix.Munmap(r.b)
	r.b = nil
	return err
}
