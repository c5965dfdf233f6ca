//go:build linux

package xenlab

import (
	"strings"

	"barevif/test/xenlab/image"
)

// Programs go into every domain, at image.ProgramDir.
func Programs() []image.Program { return nil }

// Plan is every scenario there is.
func Plan() []Boot {
	return []Boot{{
		Name: "dom0 with netback",
		Scenarios: []Scenario{
			{Name: "xl info", Roles: "dom0: toolstack", Run: xlInfo},
			{Name: "kernel ends, PV", Roles: "PV domU: netfront; dom0: netback", Run: kernelEnds(PV)},
			{Name: "kernel ends, PVH", Roles: "PVH domU: netfront; dom0: netback", Run: kernelEnds(PVH)},
		},
	}}
}

func xlInfo(t *T) {
	info := t.Dom0().Run("xl", "info").Text()
	for _, key := range [...]string{"release", "xen_version", "xen_caps", "total_memory"} {
		if !strings.Contains(info, "\n"+key+" ") && !strings.HasPrefix(info, key+" ") {
			t.Fatalf("xl info does not tell %s", key)
		}
	}
	if caps := t.Dom0().Sh("cat /proc/xen/capabilities"); caps != "control_d" {
		t.Fatalf("dom0's capabilities are %q", caps)
	}
}

// kernelEnds is the ground under everything else: Linux's netfront and netback,
// with the traffic that ours have to carry.
func kernelEnds(kind GuestType) func(*T) {
	return func(t *T) {
		t.Dom0().Run("modprobe", "xen-netback")
		guest := t.Create(Guest{Name: "domU", Type: kind, VIFs: []VIF{{}}})
		guest.Run("modprobe", "xen-netfront")
		dom0Addr, guestAddr := t.JoinKernel(guest, 0)
		for _, size := range [...]int{56, 1472} {
			t.Ping(guest, dom0Addr, size, 20)
			t.Ping(t.Dom0(), guestAddr, size, 20)
		}
		t.Iperf(guest, t.Dom0(), dom0Addr, 2)
		t.Iperf(t.Dom0(), guest, guestAddr, 2)
		t.Fetch(t.Dom0(), guest, guestAddr, 3<<20)
		t.Fetch(guest, t.Dom0(), dom0Addr, 3<<20)
	}
}
