package emu_test

import (
	"fmt"
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
