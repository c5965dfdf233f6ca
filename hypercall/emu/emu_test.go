package emu_test

import (
	"runtime"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
)

// machine makes a machine that must hold nothing at the end of the test.
func machine(t testing.TB, cfg emu.Config) *emu.Machine {
	t.Helper()
	m, err := emu.New(cfg)
	return checked(t, m, err)
}

// machineWithoutSystem makes a machine that takes nothing of the operating system.
func machineWithoutSystem(t testing.TB) *emu.Machine {
	t.Helper()
	m, err := emu.NewWithoutSystem(emu.Config{})
	return checked(t, m, err)
}

func checked(t testing.TB, m *emu.Machine, err error) *emu.Machine {
	t.Helper()
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

// canMap reports whether machines with mapped memory work here.
const canMap = runtime.GOOS == "linux"

// machines runs f on every kind of machine that works on this system, with its domains in
// this process.
func machines(t *testing.T, f func(t *testing.T, m *emu.Machine)) {
	t.Run("heap", func(t *testing.T) { f(t, machine(t, emu.Config{})) })
	t.Run("no system", func(t *testing.T) { f(t, machineWithoutSystem(t)) })
	if canMap {
		t.Run("mapped", func(t *testing.T) { f(t, machine(t, emu.Config{Mapped: true})) })
		t.Run("host", func(t *testing.T) { f(t, hostMachine(t)) })
	}
}
