// Package anon reserves private memory of Linux, for domains that run on it. Reserved
// memory takes addresses, and is charged where the system does not overcommit, but is in
// memory only from its first use on, or from Populate on.
package anon

import (
	"golang.org/x/sys/unix"

	"barevif/arena/shm"
)

// Reserve gives zeroed memory that is not there yet. [unix.Munmap] gives it back.
//
// Huge pages are declined: the first byte that is used would bring 2 MiB of memory
// with it, more than most devices ever use.
func Reserve(pages int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, pages*shm.PageSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err == nil {
		_ = unix.Madvise(b, unix.MADV_NOHUGEPAGE) // a kernel without them refuses
	}
	return b, err
}

// Populate makes the kernel back b, part of what Reserve gave, with memory in one system
// call, so that its first use causes no page faults. No goroutine may use b meanwhile.
func Populate(b []byte) {
	if unix.Madvise(b, unix.MADV_POPULATE_WRITE) == nil {
		return
	}
	for i := 0; i < len(b); i += shm.PageSize { // Linux before 5.14, or pages larger than ours
		b[i] = 0
	}
}
