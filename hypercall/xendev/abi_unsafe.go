//go:build linux

package xendev

import (
	"structs"
	"unsafe"

	"barevif/hypercall"
	"barevif/hypercall/xendev/internal/ioctl"
)

// The requests of include/uapi/xen/{evtchn,gntalloc,gntdev}.h, all of them
// _IOC(_IOC_NONE, type, number, size of the struct).
const (
	evtchnBindInterdomain = unsafe.Sizeof(bindInterdomain{})<<16 | 'E'<<8 | 1
	evtchnBindUnbound     = unsafe.Sizeof(evtchnPort{})<<16 | 'E'<<8 | 2
	evtchnUnbind          = unsafe.Sizeof(evtchnPort{})<<16 | 'E'<<8 | 3
	evtchnNotify          = unsafe.Sizeof(evtchnPort{})<<16 | 'E'<<8 | 4
	evtchnReset           = 'E'<<8 | 5

	gntallocAlloc   = unsafe.Sizeof(allocGref{})<<16 | 'G'<<8 | 5
	gntallocDealloc = unsafe.Sizeof(deallocGref{})<<16 | 'G'<<8 | 6

	gntdevMap   = unsafe.Sizeof(mapGrantRef{})<<16 | 'G'<<8
	gntdevUnmap = unsafe.Sizeof(unmapGrantRef{})<<16 | 'G'<<8 | 1
	gntdevCopy  = unsafe.Sizeof(grantCopy{})<<16 | 'G'<<8 | 8
)

// bindInterdomain is struct ioctl_evtchn_bind_interdomain. The result of the
// call is our port.
type bindInterdomain struct {
	_      structs.HostLayout
	Domain uint32
	Port   uint32
}

// evtchnPort is what bind_unbound_port (a domain), unbind and notify take.
type evtchnPort struct {
	_     structs.HostLayout
	Value uint32
}

// allocGref is struct ioctl_gntalloc_alloc_gref; its last member is a variable-length
// array.
type allocGref struct {
	_     structs.HostLayout
	Domid uint16
	Flags uint16
	Count uint32
	Index uint64 // out
	Refs  [1]uint32
	_     uint32 // the C struct's padding, which the driver reads and writes too
}

const gntallocWritable = 1 // GNTALLOC_FLAG_WRITABLE

// deallocGref is struct ioctl_gntalloc_dealloc_gref.
type deallocGref struct {
	_     structs.HostLayout
	Index uint64
	Count uint32
	_     uint32
}

// mapGrantRef is struct ioctl_gntdev_map_grant_ref; its last member is a variable-length
// array.
type mapGrantRef struct {
	_     structs.HostLayout
	Count uint32
	_     uint32
	Index uint64 // out
	Refs  [1]gntdevRef
}

// gntdevRef is struct ioctl_gntdev_grant_ref.
type gntdevRef struct {
	_     structs.HostLayout
	Domid uint32
	Ref   uint32
}

// unmapGrantRef is struct ioctl_gntdev_unmap_grant_ref.
type unmapGrantRef struct {
	_     structs.HostLayout
	Index uint64
	Count uint32
	_     uint32
}

// grantCopy is struct ioctl_gntdev_grant_copy.
type grantCopy struct {
	_        structs.HostLayout
	Count    uint32
	_        uint32
	Segments *copySegment
}

// copySegment is struct gntdev_grant_copy_segment. Source and Dest are each an address,
// or {ref u32, offset u16, domid u16} in the order of a little-endian word.
type copySegment struct {
	_      structs.HostLayout
	Source uint64
	Dest   uint64
	Len    uint16
	Flags  uint16
	Status int16 // out
	_      uint16
}

const (
	copySourceGref = 1 // GNTCOPY_source_gref
	copyDestGref   = 2 // GNTCOPY_dest_gref
)

var (
	_ [8]byte  = [unsafe.Sizeof(bindInterdomain{})]byte{}
	_ [4]byte  = [unsafe.Sizeof(evtchnPort{})]byte{}
	_ [24]byte = [unsafe.Sizeof(allocGref{})]byte{}
	_ [16]byte = [unsafe.Offsetof(allocGref{}.Refs)]byte{}
	_ [16]byte = [unsafe.Sizeof(deallocGref{})]byte{}
	_ [24]byte = [unsafe.Sizeof(mapGrantRef{})]byte{}
	_ [16]byte = [unsafe.Offsetof(mapGrantRef{}.Refs)]byte{}
	_ [8]byte  = [unsafe.Sizeof(gntdevRef{})]byte{}
	_ [16]byte = [unsafe.Sizeof(unmapGrantRef{})]byte{}
	_ [16]byte = [unsafe.Sizeof(grantCopy{})]byte{}
	_ [8]byte  = [unsafe.Offsetof(grantCopy{}.Segments)]byte{}
	_ [24]byte = [unsafe.Sizeof(copySegment{})]byte{}
	_ [20]byte = [unsafe.Offsetof(copySegment{}.Status)]byte{}
)

// bindPeer is EVTCHN_BIND_INTERDOMAIN. The driver only reads the struct, during the call.
func bindPeer(fd int, peer hypercall.DomID, remote hypercall.PortID) (hypercall.PortID, error) {
	arg := bindInterdomain{Domain: uint32(peer), Port: uint32(remote)}
	p, err := ioctl.Call(uintptr(fd), evtchnBindInterdomain, unsafe.Pointer(&arg))
	return hypercall.PortID(p), err
}

// bindUnbound is EVTCHN_BIND_UNBOUND_PORT. The driver only reads the struct.
func bindUnbound(fd int, peer hypercall.DomID) (hypercall.PortID, error) {
	arg := evtchnPort{Value: uint32(peer)}
	p, err := ioctl.Call(uintptr(fd), evtchnBindUnbound, unsafe.Pointer(&arg))
	return hypercall.PortID(p), err
}

// unbind is EVTCHN_UNBIND. The driver only reads the struct.
func unbind(fd int, p hypercall.PortID) error {
	arg := evtchnPort{Value: uint32(p)}
	_, err := ioctl.Call(uintptr(fd), evtchnUnbind, unsafe.Pointer(&arg))
	return err
}

// notify is EVTCHN_NOTIFY, which is a hypercall that does not wait.
func notify(fd int, p hypercall.PortID) error {
	arg := evtchnPort{Value: uint32(p)}
	return ioctlNow(fd, evtchnNotify, unsafe.Pointer(&arg))
}

// resetEvents is EVTCHN_RESET, which has no struct.
func resetEvents(fd int) error {
	_, err := ioctl.Call(uintptr(fd), evtchnReset, nil)
	return err
}

// allocGrefs is GNTALLOC_ALLOC_GREF. The driver writes count refs from Refs on; buf has
// room for them.
func allocGrefs(fd int, peer hypercall.DomID, flags uint16, count int) (uint64, []hypercall.GrantRef, error) {
	buf := make([]uint64, 3+count/2)
	arg := (*allocGref)(unsafe.Pointer(&buf[0]))
	arg.Domid, arg.Flags, arg.Count = uint16(peer), flags, uint32(count)
	if _, err := ioctl.Call(uintptr(fd), gntallocAlloc, unsafe.Pointer(arg)); err != nil {
		return 0, nil, err
	}
	refs := make([]hypercall.GrantRef, count)
	for i, r := range unsafe.Slice(&arg.Refs[0], count) {
		refs[i] = hypercall.GrantRef(r)
	}
	return arg.Index, refs, nil
}

// deallocGrefs is GNTALLOC_DEALLOC_GREF. The driver only reads the struct.
func deallocGrefs(fd int, index uint64, count int) error {
	arg := deallocGref{Index: index, Count: uint32(count)}
	_, err := ioctl.Call(uintptr(fd), gntallocDealloc, unsafe.Pointer(&arg))
	return err
}

// addMap is GNTDEV_MAP_GRANT_REF. The driver reads len(refs) entries from Refs on, for
// which buf has room, and writes the head of the struct.
func addMap(fd int, peer hypercall.DomID, refs []hypercall.GrantRef) (uint64, error) {
	buf := make([]uint64, 2+len(refs))
	arg := (*mapGrantRef)(unsafe.Pointer(&buf[0]))
	arg.Count = uint32(len(refs))
	for i, r := range refs {
		unsafe.Slice(&arg.Refs[0], len(refs))[i] = gntdevRef{Domid: uint32(peer), Ref: uint32(r)}
	}
	_, err := ioctl.Call(uintptr(fd), gntdevMap, unsafe.Pointer(arg))
	return arg.Index, err
}

// removeMap is GNTDEV_UNMAP_GRANT_REF. The driver only reads the struct.
func removeMap(fd int, index uint64, count int) error {
	arg := unmapGrantRef{Index: index, Count: uint32(count)}
	_, err := ioctl.Call(uintptr(fd), gntdevUnmap, unsafe.Pointer(&arg))
	return err
}

// copyGrants is GNTDEV_GRANT_COPY. The driver writes the statuses in segs, and memory at
// the addresses in them: [Domain.Copy] has made sure that the memory holds Len bytes and
// is not on a stack.
//
// It bypasses Go's scheduler, as ioctlNow does: a backend makes it once per batch. The
// driver copies at once, unless a page is of a guest whose memory the toolstack pages out
// (xenpaging): then it waits for the page, for 33 s at most (gnttab_retry_eagain_gop of
// drivers/xen/grant-table.c), and goroutines may wait with it. See SECURITY.md.
func copyGrants(fd int, segs []copySegment) error {
	arg := grantCopy{Count: uint32(len(segs)), Segments: &segs[0]}
	return ioctlNow(fd, gntdevCopy, unsafe.Pointer(&arg))
}

// localEnd returns the address of b. It is passed only to the kernel, while the caller of
// [Domain.Copy] holds b.
func localEnd(b []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
}
