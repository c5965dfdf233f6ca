package emu_test

import (
	"path/filepath"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
)

func host(t testing.TB, cfg emu.Config) (*emu.Host, string) {
	t.Helper()
	path := filepath.Join(emutest.SocketDir(t), "xen")
	h, err := emu.Listen(path, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.CheckClean(); err != nil {
			t.Error(err)
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h, path
}

func join(t testing.TB, path string, id hypercall.DomID) *emu.Domain {
	t.Helper()
	d, err := emu.Join(t.Context(), path, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Destroy)
	return d
}

// hostMachine returns the machine of a host.
func hostMachine(t testing.TB) *emu.Machine {
	h, _ := host(t, emu.Config{})
	return h.Machine
}
