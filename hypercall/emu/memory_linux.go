package emu

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/hypercall/anon"
)

// seals keep the size of a memfd: access to a mapping of a shrunk one would fault. Only
// the machine makes memfds, and only sealed ones are mapped.
const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

func mappedMemory() (memory, error) { return fileMemory{}, nil }

// fileMemory is memory that other processes can map.
type fileMemory struct{}

func (fileMemory) private(pages int) (region, error) { return newRegion(anon.Reserve(pages)) }
func (fileMemory) populate(b []byte)                 { anon.Populate(b) }

func (fileMemory) shared(pages int) (backing, error) { return newFileBacking(pages * shm.PageSize) }

func (fileMemory) join(parts []part, access hypercall.Access) (region, error) {
	if len(parts) == 1 {
		return parts[0].view(parts[0].first, parts[0].n, access)
	}
	total := 0
	for _, p := range parts {
		total += p.n
	}
	// Reserve the addresses, then put each part at its place.
	b, err := unix.Mmap(-1, 0, total*shm.PageSize, unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	r, err := newRegion(b, err)
	if err != nil {
		return region{}, err
	}
	at := 0
	for _, p := range parts {
		f := p.backing.(*fileBacking)
		if err := mapOver(b[at*shm.PageSize:(at+p.n)*shm.PageSize], f.file, p.first*shm.PageSize, protection(access)); err != nil {
			r.free()
			return region{}, err
		}
		at += p.n
	}
	return r, nil
}

func newRegion(b []byte, err error) (region, error) {
	if err != nil {
		return region{}, fmt.Errorf("emu: mmap: %w", err)
	}
	m, err := shm.New(b)
	if err != nil {
		return region{}, err
	}
	return region{m, func() error { return unix.Munmap(b) }}, nil
}

func protection(access hypercall.Access) int {
	if access == hypercall.ReadWrite {
		return unix.PROT_READ | unix.PROT_WRITE
	}
	return unix.PROT_READ
}

// fileBacking is a sealed memfd.
type fileBacking struct{ file *os.File }

func newFileBacking(size int) (*fileBacking, error) {
	fd, err := unix.MemfdCreate("barevif", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("emu: memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd:barevif")
	if err := f.Truncate(int64(size)); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		f.Close()
		return nil, fmt.Errorf("emu: seal: %w", err)
	}
	return &fileBacking{f}, nil
}

func (b *fileBacking) view(first, n int, access hypercall.Access) (region, error) {
	return newRegion(unix.Mmap(int(b.file.Fd()), int64(first)*shm.PageSize, n*shm.PageSize,
		protection(access), unix.MAP_SHARED|unix.MAP_POPULATE))
}

func (b *fileBacking) reserve(n int) (region, error) {
	return newRegion(unix.Mmap(int(b.file.Fd()), 0, n*shm.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED))
}

func (b *fileBacking) dup() (backing, error) {
	fd, err := unix.FcntlInt(b.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("emu: dup: %w", err)
	}
	return &fileBacking{os.NewFile(uintptr(fd), b.file.Name())}, nil
}

func (b *fileBacking) close() error { return b.file.Close() }
