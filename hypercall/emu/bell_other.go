//go:build !linux

package emu

import (
	"errors"
	"fmt"
)

func newFDBell() (bell, error) {
	return nil, fmt.Errorf("emu: blocking a thread needs Linux's eventfds: %w", errors.ErrUnsupported)
}

func newThreadBell(b bell) (bell, error) { return b, nil }
