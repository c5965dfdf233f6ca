// Package anon reserves private memory of Linux, for domains that run on it. Reserved
// memory takes addresses, and counts as committed where the system does not overcommit,
// but takes memory only from its first use or from Populate on.
package anon

import (
	"golang.org/x/sys/unix"

	"barevif/arena/shm"
)

// Reserve returns zeroed memory that is not populated. [unix.Munmap] frees it.
//
// It declines huge pages: the first byte used would populate 2 MiB, more than most
// devices ever use.
func Reserve(pages int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, pages*shm.PageSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err == nil {
		_ = unix.Madvise(b, unix.MADV_NOHUGEPAGE) // fails on a kernel without huge pages
	}
	return b, err
}

// Populate makes the kernel back b, part of the memory of Reserve, in one system call, so
// that its first use causes no page faults. No goroutine may use b meanwhile.
func Populate(b []byte) {
	if unix.Madvise(b, unix.MADV_POPULATE_WRITE) == nil {
		return
	}
	for i := 0; i < len(b); i += shm.PageSize { // Linux before 5.14, or pages larger than ours
		b[i] = 0
	}
}
