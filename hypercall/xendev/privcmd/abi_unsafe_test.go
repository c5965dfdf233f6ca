//go:build linux

package privcmd

import (
	"testing"
	"unsafe"
)

// TestLayoutsMatchXen compares the ioctl request, and the fields that the compile-time
// asserts omit, with the output of a C program that uses Xen's public headers.
func TestLayoutsMatchXen(t *testing.T) {
	for name, c := range map[string][2]uintptr{
		"IOCTL_PRIVCMD_HYPERCALL":         {privcmdHypercall, 0x00305000},
		"privcmd_hypercall.arg":           {unsafe.Offsetof(hypercallArg{}.Arg), 8},
		"gnttab_query_size.nr_frames":     {unsafe.Offsetof(querySize{}.Frames), 4},
		"gnttab_query_size.max_nr_frames": {unsafe.Offsetof(querySize{}.MaxFrames), 8},
		"evtchn_status.port":              {unsafe.Offsetof(evtchnStatus{}.Port), 4},
		"evtchn_status.status":            {unsafe.Offsetof(evtchnStatus{}.Status), 8},
		"evtchn_status.vcpu":              {unsafe.Offsetof(evtchnStatus{}.VCPU), 12},
	} {
		if c[0] != c[1] {
			t.Errorf("%s is %#x, not %#x", name, c[0], c[1])
		}
	}
	if xenVersion != 17 || grantTableOp != 20 || eventChannelOp != 32 {
		t.Error("numbers of hypercalls differ from xen.h")
	}
}
