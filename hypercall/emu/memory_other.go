//go:build !linux

package emu

import (
	"errors"
	"fmt"
)

func mappedMemory() (memory, error) {
	return nil, fmt.Errorf("emu: mapped memory needs Linux's memfds: %w", errors.ErrUnsupported)
}
