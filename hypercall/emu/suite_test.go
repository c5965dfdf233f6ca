package emu_test

import (
	"os"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/domaintest"
	"barevif/hypercall/emu"
)

// frontID and backID are numbers that an implementation does not use by accident.
const (
	frontID = 7
	backID  = 300
)

func TestSuiteOnTheHeap(t *testing.T) { runSuite(t, emu.Config{}) }

func TestSuiteOnMappedMemory(t *testing.T) {
	if !canMap {
		t.Skip("memfds are Linux's")
	}
	runSuite(t, emu.Config{Mapped: true})
}

// A machine that takes nothing of the operating system passes the suite here as it does where
// there is none, and here the race detector watches.
func TestSuiteWithoutSystem(t *testing.T) {
	domaintest.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
		m := machineWithoutSystem(t)
		return domain(t, m, frontID), domain(t, m, backID)
	})
}

func runSuite(t *testing.T, cfg emu.Config) {
	domaintest.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
		m := machine(t, cfg)
		return domain(t, m, frontID), domain(t, m, backID)
	})
}

// The suite runs with one domain as its own peer, as in a single domain on a real Xen.
func TestSuiteWithOneDomain(t *testing.T) {
	domaintest.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
		d := domain(t, machine(t, emu.Config{}), frontID)
		return d, d
	})
}

// In the machine's process there is one domain, which hands over to itself.
func TestHandoverInOneProcess(t *testing.T) {
	machines(t, func(t *testing.T, m *emu.Machine) {
		domaintest.RunHandover(t, func(t testing.TB) domaintest.Trio {
			d := domain(t, m, frontID)
			peer := domain(t, m, backID)
			t.Cleanup(func() {
				if err := m.CheckClean(); err != nil {
					t.Error(err)
				}
				d.Destroy()
				peer.Destroy()
			})
			return domaintest.Trio{Old: d, New: d, Peer: peer, Stray: os.Stderr}
		})
	})
}
