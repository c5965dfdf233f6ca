//go:build !linux

package emu_test

import (
	"testing"

	"barevif/hypercall/emu"
)

func hostMachine(t testing.TB) *emu.Machine {
	t.Fatal("there are hosts on Linux only")
	return nil
}
