//go:build linux

package bpf

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A memfd holds what the maps would: the info record in its first page, the
// events from eventsAt on, the counters from countersAt on.
const (
	memfdPrefix = "barevif:"
	eventsAt    = 64 << 10
	countersAt  = 128 << 10
)

// memfdSeals forbid every other process to resize the file or to write to it,
// root included. Our mapping is older than the seals and stays writable.
const memfdSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_FUTURE_WRITE | unix.F_SEAL_SEAL

// newMemfd makes the file for a device. Other processes find it by its name
// among our descriptors in /proc.
func newMemfd(name string, queues int) (*os.File, [3]region, error) {
	var parts [3]region
	fd, err := unix.MemfdCreate(memfdPrefix+name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, parts, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), memfdPrefix+name)
	undo := func(err error) (*os.File, [3]region, error) {
		for i := range parts {
			parts[i].unmap()
		}
		f.Close()
		return nil, parts, fmt.Errorf("memfd: %w", err)
	}
	if err := f.Truncate(countersAt + int64(queues*queueBytes)); err != nil {
		return undo(err)
	}
	for i, p := range [...]struct{ at, bytes int }{
		{countersAt, queues * queueBytes}, {0, infoBytes}, {eventsAt, eventSlots * eventBytes},
	} {
		if parts[i], err = mapRegion(fd, int64(p.at), p.bytes); err != nil {
			return undo(err)
		}
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, memfdSeals); err != nil {
		return undo(fmt.Errorf("seal: %w", err))
	}
	return f, parts, nil
}
