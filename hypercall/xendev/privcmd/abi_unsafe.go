//go:build linux

package privcmd

import (
	"structs"
	"unsafe"

	"barevif/hypercall/xendev/internal/ioctl"
)

// Numbers of hypercalls (__HYPERVISOR_ of xen/include/public/xen.h).
const (
	xenVersion     = 17
	grantTableOp   = 20
	eventChannelOp = 32
)

// privcmdHypercall is IOCTL_PRIVCMD_HYPERCALL (include/uapi/xen/privcmd.h).
const privcmdHypercall = unsafe.Sizeof(hypercallArg{})<<16 | 'P'<<8

// hypercallArg is struct privcmd_hypercall.
type hypercallArg struct {
	_   structs.HostLayout
	Op  uint64
	Arg [5]uint64
}

// querySize is struct gnttab_query_size of xen/include/public/grant_table.h.
type querySize struct {
	_         structs.HostLayout
	Dom       uint16
	_         uint16
	Frames    uint32 // out
	MaxFrames uint32 // out
	Status    int16  // out
	_         uint16
}

// evtchnStatus is struct evtchn_status of xen/include/public/event_channel.h.
type evtchnStatus struct {
	_      structs.HostLayout
	Dom    uint16
	_      uint16
	Port   uint32
	Status uint32 // out
	VCPU   uint32 // out
	Peer   uint16 // out, for an unbound or interdomain port
	_      uint16
	Remote uint32 // out, for an interdomain port
}

var (
	_ [48]byte = [unsafe.Sizeof(hypercallArg{})]byte{}
	_ [16]byte = [unsafe.Sizeof(querySize{})]byte{}
	_ [12]byte = [unsafe.Offsetof(querySize{}.Status)]byte{}
	_ [24]byte = [unsafe.Sizeof(evtchnStatus{})]byte{}
	_ [16]byte = [unsafe.Offsetof(evtchnStatus{}.Peer)]byte{}
	_ [20]byte = [unsafe.Offsetof(evtchnStatus{}.Remote)]byte{}
)

// issue makes the hypercall. h is read only during the call. h.Arg points to argument
// memory, which nothing but Close unmaps.
func issue(fd uintptr, h *hypercallArg) (int, error) {
	return ioctl.Call(fd, privcmdHypercall, unsafe.Pointer(h))
}

// address returns the address of b, which is argument memory.
func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

// view returns the struct at byte off of argument memory, which is one aligned page. The
// index panics if T does not begin in the page. Every T is small and its offset a
// multiple of its size.
func view[T any](b []byte, off int) *T { return (*T)(unsafe.Pointer(&b[off])) }

func querySizeArg(arg []byte) *querySize  { return view[querySize](arg, 0) }
func portStatus(arg []byte) *evtchnStatus { return view[evtchnStatus](arg, 0) }
func port(b []byte, word int) *uint32     { return view[uint32](b, 4*word) }
