//go:build linux

package emu

import (
	"sync/atomic"
	"unsafe"

	"barevif/arena/shm"
)

// words32 views mapped memory as words. shm.New has checked that it is whole pages
// aligned to 8; the mapping must outlive the words.
func words32(m shm.Memory) []atomic.Uint32 {
	b := m.Bytes()
	return unsafe.Slice((*atomic.Uint32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}

// words64 is the same for 64 bits. The memory may be mapped read-only: then the
// words must only be loaded.
func words64(m shm.Memory) []atomic.Uint64 {
	b := m.Bytes()
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}
