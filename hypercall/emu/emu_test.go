package emu_test

import (
	"runtime"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/test/domainsuite"
)

// machine makes a machine that must be clean at the end of the test.
func machine(t testing.TB, cfg emu.Config) *emu.Machine {
	t.Helper()
	m, err := emu.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.CheckClean(); err != nil {
			t.Error(err)
		}
		m.Close()
	})
	return m
}

func domain(t testing.TB, m *emu.Machine, id hypercall.DomID) *emu.Domain {
	t.Helper()
	d, err := m.NewDomain(id)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// canMap says whether there are machines with mapped memory here.
const canMap = runtime.GOOS == "linux"

func pairOn(cfg emu.Config) func(testing.TB) (front, back hypercall.Domain) {
	return func(t testing.TB) (front, back hypercall.Domain) {
		m := machine(t, cfg)
		return domain(t, m, 7), domain(t, m, 300)
	}
}

func TestSuiteOnTheHeap(t *testing.T) { domainsuite.Run(t, pairOn(emu.Config{})) }

func TestSuiteOnMappedMemory(t *testing.T) {
	if !canMap {
		t.Skip("memfds are Linux's")
	}
	domainsuite.Run(t, pairOn(emu.Config{Mapped: true}))
}
