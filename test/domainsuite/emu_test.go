package domainsuite_test

import (
	"runtime"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/test/domainsuite"
)

// frontID and backID are numbers that an implementation does not use by accident.
const (
	frontID = 7
	backID  = 300
)

// ours closes the machine after the test, and fails if the test left anything in it.
func ours(t testing.TB, m interface {
	CheckClean() error
	Close() error
}) {
	t.Cleanup(func() {
		if err := m.CheckClean(); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
}

func domain(t testing.TB, m *emu.Machine, id hypercall.DomID) *emu.Domain {
	t.Helper()
	d, err := m.NewDomain(id)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func onMachine(cfg emu.Config) func(testing.TB) (front, back hypercall.Domain) {
	return func(t testing.TB) (front, back hypercall.Domain) {
		m, err := emu.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ours(t, m)
		return domain(t, m, frontID), domain(t, m, backID)
	}
}

func TestEmulatorOnTheHeap(t *testing.T) { domainsuite.Run(t, onMachine(emu.Config{})) }

func TestEmulatorOnMappedMemory(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memfds are Linux's")
	}
	domainsuite.Run(t, onMachine(emu.Config{Mapped: true}))
}

// The suite runs with one domain as its own peer, as in a single domain on a real Xen.
func TestEmulatorAsItsOwnPeer(t *testing.T) {
	domainsuite.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
		m, err := emu.New(emu.Config{})
		if err != nil {
			t.Fatal(err)
		}
		ours(t, m)
		d := domain(t, m, frontID)
		return d, d
	})
}
