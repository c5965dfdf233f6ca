package emu_test

import (
	"fmt"
	"os"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/domaintest"
	"barevif/hypercall/emu"
)

func TestSuiteWithHostInAnotherProcess(t *testing.T) {
	p, path := hostProcess(t)
	domaintest.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
		return join(t, path, frontID), join(t, path, backID)
	})
	l := p.ledger(t)
	l.Domains = 0 // the host may not have noticed yet that the last two have ended
	if l != (emu.Ledger{}) {
		t.Errorf("left behind: %+v", l)
	}
	p.in.Close()
	if err := p.Wait(); err != nil {
		t.Error("the host:", err)
	}
}

// One domain is in the host's process, the other in another process, in both roles.
func TestSuiteBetweenHostAndDomain(t *testing.T) {
	for _, hostIsFront := range []bool{true, false} {
		t.Run(fmt.Sprintf("front=%v", hostIsFront), func(t *testing.T) {
			domaintest.Run(t, func(t testing.TB) (front, back hypercall.Domain) {
				h, path := host(t, emu.Config{})
				if hostIsFront {
					return domain(t, h.Machine, frontID), join(t, path, backID)
				}
				return join(t, path, frontID), domain(t, h.Machine, backID)
			})
		})
	}
}

// Several processes are the domain: here by connections of their own.
func TestHandoverBetweenProcesses(t *testing.T) {
	h, path := host(t, emu.Config{})
	beside := func(t testing.TB) *emu.Domain {
		t.Helper()
		d, err := emu.JoinBeside(t.Context(), path, frontID)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for _, self := range []bool{false, true} {
		t.Run(fmt.Sprintf("to itself=%v", self), func(t *testing.T) {
			domaintest.RunHandover(t, func(t testing.TB) domaintest.Trio {
				d := domaintest.Trio{Peer: domain(t, h.Machine, backID), Stray: os.Stderr}
				old := beside(t)
				d.Old, d.New = old, old
				keeper := beside(t) // the domain lives on without the others
				if !self {
					next := beside(t)
					d.New, d.EndOld = next, old.Destroy
					t.Cleanup(next.Destroy)
				}
				t.Cleanup(func() {
					old.Destroy()
					if err := h.CheckClean(); err != nil {
						t.Error(err)
					}
					keeper.Destroy()
					h.Destroy(backID)
				})
				return d
			})
		})
	}
}
