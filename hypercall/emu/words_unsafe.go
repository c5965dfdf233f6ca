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

// words64 is words32 for 64-bit words. If the memory is mapped read-only, the words must
// only be loaded.
func words64(m shm.Memory) []atomic.Uint64 {
	b := m.Bytes()
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}
