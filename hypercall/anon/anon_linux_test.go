package anon

import (
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"barevif/arena/shm"
)

func TestReservedMemoryIsThereOnceItIsUsed(t *testing.T) {
	const pages = 1024
	b, err := Reserve(pages)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	check := func(when string, want int) {
		t.Helper()
		n, err := there(b)
		if err != nil {
			t.Fatal(err)
		}
		if n != want {
			t.Errorf("%s: %d pages are in memory, want %d", when, n, want)
		}
	}
	per := unix.Getpagesize() / shm.PageSize // 1 if pages are as large as the protocol's
	if per != 1 {
		t.Skipf("the system's pages are %d of ours", per)
	}
	check("reserved", 0)
	Populate(b[5*shm.PageSize : 8*shm.PageSize])
	check("populated", 3)
	b[7*shm.PageSize] = 1
	b[600*shm.PageSize] = 1
	check("used", 4)
}

// there returns how many pages of b are in memory, or were and are swapped out: bits 63
// and 62 of Documentation/admin-guide/mm/pagemap.rst.
func there(b []byte) (n int, err error) {
	address, err := strconv.ParseUint(fmt.Sprintf("%p", b), 0, 64)
	if err != nil {
		return 0, err
	}
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	entries := make([]byte, 8*len(b)/unix.Getpagesize())
	if _, err := f.ReadAt(entries, int64(8*address/uint64(unix.Getpagesize()))); err != nil {
		return 0, err
	}
	for ; len(entries) > 0; entries = entries[8:] {
		if binary.NativeEndian.Uint64(entries)>>62 != 0 {
			n++
		}
	}
	return n, nil
}
