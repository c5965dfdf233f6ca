package emu_test

import (
	"path/filepath"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/test/domainsuite"
)

func host(t testing.TB, cfg emu.Config) (*emu.Host, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "xen")
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

func TestSuiteThroughAHost(t *testing.T) {
	domainsuite.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
		_, path := host(t, emu.Config{})
		return join(t, path, 7), join(t, path, 300)
	})
}

// A domain of the host's own process and one of another meet.
func TestSuiteBetweenHostAndDomain(t *testing.T) {
	domainsuite.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
		h, path := host(t, emu.Config{})
		return domain(t, h.Machine, 7), join(t, path, 300)
	})
	domainsuite.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
		h, path := host(t, emu.Config{})
		return join(t, path, 7), domain(t, h.Machine, 300)
	})
}
