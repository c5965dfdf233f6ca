//go:build linux

package xendev

import (
	"testing"
	"unsafe"
)

// TestRequestsMatchTheKernel compares the ioctl numbers with the output of a C program
// that uses include/uapi/xen/{evtchn,gntalloc,gntdev}.h on x86-64.
func TestRequestsMatchTheKernel(t *testing.T) {
	for name, c := range map[string][2]uintptr{
		"EVTCHN_BIND_INTERDOMAIN":  {evtchnBindInterdomain, 0x00084501},
		"EVTCHN_BIND_UNBOUND_PORT": {evtchnBindUnbound, 0x00044502},
		"EVTCHN_UNBIND":            {evtchnUnbind, 0x00044503},
		"EVTCHN_NOTIFY":            {evtchnNotify, 0x00044504},
		"EVTCHN_RESET":             {evtchnReset, 0x00004505},
		"GNTALLOC_ALLOC_GREF":      {gntallocAlloc, 0x00184705},
		"GNTALLOC_DEALLOC_GREF":    {gntallocDealloc, 0x00104706},
		"GNTDEV_MAP_GRANT_REF":     {gntdevMap, 0x00184700},
		"GNTDEV_UNMAP_GRANT_REF":   {gntdevUnmap, 0x00104701},
		"GNTDEV_GRANT_COPY":        {gntdevCopy, 0x00104708},
	} {
		if c[0] != c[1] {
			t.Errorf("%s is %#x, not %#x", name, c[0], c[1])
		}
	}
}

func TestFieldsAreWhereTheKernelHasThem(t *testing.T) {
	for name, c := range map[string][2]uintptr{
		"alloc_gref.flags":         {unsafe.Offsetof(allocGref{}.Flags), 2},
		"alloc_gref.count":         {unsafe.Offsetof(allocGref{}.Count), 4},
		"alloc_gref.index":         {unsafe.Offsetof(allocGref{}.Index), 8},
		"dealloc_gref.count":       {unsafe.Offsetof(deallocGref{}.Count), 8},
		"map_grant_ref.index":      {unsafe.Offsetof(mapGrantRef{}.Index), 8},
		"unmap_grant_ref.count":    {unsafe.Offsetof(unmapGrantRef{}.Count), 8},
		"bind_interdomain.port":    {unsafe.Offsetof(bindInterdomain{}.Port), 4},
		"grant_copy_segment.dest":  {unsafe.Offsetof(copySegment{}.Dest), 8},
		"grant_copy_segment.len":   {unsafe.Offsetof(copySegment{}.Len), 16},
		"grant_copy_segment.flags": {unsafe.Offsetof(copySegment{}.Flags), 18},
	} {
		if c[0] != c[1] {
			t.Errorf("%s is at %d, not %d", name, c[0], c[1])
		}
	}
}
