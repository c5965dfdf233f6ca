package main

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	bpflink "github.com/cilium/ebpf/link"

	"golang.org/x/sys/unix"
)

// An xdpLink has an AF_XDP socket at each end of a veth pair. veth has no zero-copy mode, so
// the kernel copies.
type xdpLink struct {
	a, b *xdpSocket
	spin bool // spin instead of poll(2)
}

const (
	xdpRing  = 2048 // entries
	xdpFrame = 4096 // bytes
)

// An xdpSocket has one area of frames: the kernel fills the first half, the socket sends from
// the second.
type xdpSocket struct {
	fd                        int
	area                      []byte
	maps                      [][]byte
	fill, completions, rx, tx xdpIndexes
	fillSlots, completed      *[xdpRing]uint64
	rxSlots, txSlots          *[xdpRing]unix.XDPDesc
	free                      []uint64
	redirect                  *ebpf.Map
	program                   *ebpf.Program
	attached                  bpflink.Link
}

// xdpIndexes are the shared indexes of a ring, and this side's private index.
type xdpIndexes struct {
	prod, cons *atomic.Uint32
	own        uint32
}

func (n *network) xdpPeer(spin bool) peer {
	return setupFunc(func(*job) (link, error) {
		if n.err != nil {
			return nil, n.err
		}
		l := &xdpLink{spin: spin}
		var err error
		if l.a, err = newXDPSocket(xdpA); err == nil {
			l.b, err = newXDPSocket(xdpB)
		}
		if err != nil {
			l.close()
			return nil, &missing{"AF_XDP", "it needs root outside of any user namespace, and a kernel with CONFIG_XDP_SOCKETS, 5.10 or newer", err}
		}
		return l, nil
	})
}

func (l *xdpLink) close() error {
	for _, x := range []*xdpSocket{l.a, l.b} {
		if x != nil {
			x.close()
		}
	}
	return nil
}

func newXDPSocket(device string) (x *xdpSocket, err error) {
	x = &xdpSocket{fd: -1}
	defer func() {
		if err != nil {
			x.close()
			x = nil
		}
	}()
	if x.fd, err = unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return x, fmt.Errorf("socket: %w", err)
	}
	x.area, err = unix.Mmap(-1, 0, 2*xdpRing*xdpFrame, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return x, fmt.Errorf("mmap: %w", err)
	}
	area := unix.XDPUmemReg{Addr: address(x.area), Len: uint64(len(x.area)), Size: xdpFrame}
	if err := unix.SetsockoptString(x.fd, unix.SOL_XDP, unix.XDP_UMEM_REG, string(asBytes(&area))); err != nil {
		return x, fmt.Errorf("XDP_UMEM_REG: %w", err)
	}
	for _, ring := range []int{unix.XDP_UMEM_FILL_RING, unix.XDP_UMEM_COMPLETION_RING, unix.XDP_RX_RING, unix.XDP_TX_RING} {
		if err := unix.SetsockoptInt(x.fd, unix.SOL_XDP, ring, xdpRing); err != nil {
			return x, fmt.Errorf("ring %d: %w", ring, err)
		}
	}
	if err := x.mapRings(); err != nil {
		return x, err
	}
	for i := range uint64(xdpRing) {
		x.fillSlots[i] = i * xdpFrame
		x.free = append(x.free, (xdpRing+i)*xdpFrame)
	}
	x.fill.own = xdpRing
	x.fill.prod.Store(xdpRing)
	return x, x.attach(device)
}

func (x *xdpSocket) mapRings() error {
	var off unix.XDPMmapOffsets
	if err := getsockopt(x.fd, unix.SOL_XDP, unix.XDP_MMAP_OFFSETS, &off); err != nil {
		return fmt.Errorf("XDP_MMAP_OFFSETS: %w", err)
	}
	ring := func(o unix.XDPRingOffset, offset int64, entry int) (ix xdpIndexes, slots []byte, err error) {
		b, err := unix.Mmap(x.fd, offset, int(o.Desc)+xdpRing*entry, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return ix, nil, fmt.Errorf("mmap of a ring: %w", err)
		}
		x.maps = append(x.maps, b)
		return xdpIndexes{prod: at[atomic.Uint32](b, int(o.Producer)), cons: at[atomic.Uint32](b, int(o.Consumer))}, b[o.Desc:], nil
	}
	var slots [4][]byte
	var errs [4]error
	x.fill, slots[0], errs[0] = ring(off.Fr, unix.XDP_UMEM_PGOFF_FILL_RING, 8)
	x.completions, slots[1], errs[1] = ring(off.Cr, unix.XDP_UMEM_PGOFF_COMPLETION_RING, 8)
	x.rx, slots[2], errs[2] = ring(off.Rx, unix.XDP_PGOFF_RX_RING, 16)
	x.tx, slots[3], errs[3] = ring(off.Tx, unix.XDP_PGOFF_TX_RING, 16)
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	x.fillSlots, x.completed = at[[xdpRing]uint64](slots[0], 0), at[[xdpRing]uint64](slots[1], 0)
	x.rxSlots, x.txSlots = at[[xdpRing]unix.XDPDesc](slots[2], 0), at[[xdpRing]unix.XDPDesc](slots[3], 0)
	return nil
}

// attach binds the socket to the device, and attaches a program that redirects all frames to
// the socket.
func (x *xdpSocket) attach(device string) (err error) {
	index, err := ifIndex(device)
	if err != nil {
		return err
	}
	// A previous socket releases the queue some time after it was closed.
	for range 100 {
		if err = unix.Bind(x.fd, &unix.SockaddrXDP{Flags: unix.XDP_COPY, Ifindex: uint32(index)}); err != unix.EBUSY {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("bind to %s: %w", device, err)
	}
	if x.redirect, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: 1}); err != nil {
		return err
	}
	if err := x.redirect.Put(uint32(0), uint32(x.fd)); err != nil {
		return err
	}
	const pass = 2 // XDP_PASS: what happens to frames of another queue
	x.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 16, asm.Word), // xdp_md.rx_queue_index
		asm.LoadMapPtr(asm.R1, x.redirect.FD()),
		asm.Mov.Imm(asm.R3, pass),
		asm.FnRedirectMap.Call(),
		asm.Return(),
	}})
	if err != nil {
		return fmt.Errorf("program: %w", err)
	}
	x.attached, err = bpflink.AttachXDP(bpflink.XDPOptions{Program: x.program, Interface: index, Flags: bpflink.XDPDriverMode})
	return err
}

func (x *xdpSocket) close() {
	if x.attached != nil {
		x.attached.Close()
	}
	x.program.Close()
	x.redirect.Close()
	for _, b := range x.maps {
		unix.Munmap(b)
	}
	if x.fd >= 0 {
		unix.Close(x.fd)
	}
	if x.area != nil {
		unix.Munmap(x.area)
	}
}

// send queues up to n frames, makes the kernel take them, and returns how many.
func (x *xdpSocket) send(src *source, n int) (int, error) {
	done := x.completions.prod.Load()
	for ; x.completions.own != done; x.completions.own++ {
		x.free = append(x.free, x.completed[x.completions.own%xdpRing])
	}
	x.completions.cons.Store(done)
	n = min(n, len(x.free))
	for range n {
		last := len(x.free) - 1
		addr := x.free[last]
		x.free = x.free[:last]
		k := copy(x.area[addr:], src.next())
		x.txSlots[x.tx.own%xdpRing] = unix.XDPDesc{Addr: addr, Len: uint32(k)}
		x.tx.own++
	}
	x.tx.prod.Store(x.tx.own)
	if err := unix.Send(x.fd, nil, unix.MSG_DONTWAIT); err != nil && !shouldRetry(err) && err != unix.EBUSY {
		return n, fmt.Errorf("send: %w", err)
	}
	return n, nil
}

// receive copies out the frames that are there and returns their buffers to the kernel.
func (x *xdpSocket) receive(s *sink) (n int) {
	prod := x.rx.prod.Load()
	if prod == x.rx.own {
		return 0
	}
	for ; x.rx.own != prod; x.rx.own++ {
		d := x.rxSlots[x.rx.own%xdpRing]
		copy(s.frame, x.area[d.Addr:][:d.Len])
		x.fillSlots[x.fill.own%xdpRing] = d.Addr &^ (xdpFrame - 1)
		x.fill.own++
		n++
	}
	x.rx.cons.Store(x.rx.own)
	x.fill.prod.Store(x.fill.own)
	return n
}

func (l *xdpLink) wait(x *xdpSocket) {
	if l.spin {
		spinPause()
		return
	}
	// A signal, or nothing in time: the caller looks again either way.
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(x.fd), Events: unix.POLLIN}}, 20)
}

func (l *xdpLink) send(j *job) error {
	src, sent := j.source(), tally{to: &j.sent}
	for !j.stopped() {
		n, err := l.a.send(src, 32)
		if err != nil {
			return err
		}
		sent.add(n)
	}
	return nil
}

func (l *xdpLink) receive(j *job) error {
	s, rcvd := j.sink(), tally{to: &j.rcvd}
	for !j.stopped() {
		n := l.b.receive(s)
		if n == 0 {
			l.wait(l.b)
			continue
		}
		rcvd.add(n)
	}
	return nil
}

func (l *xdpLink) ping(j *job, rtt []int64) error {
	src, s := j.source(), j.sink()
	for i := range rtt {
		start := nano()
		if _, err := l.a.send(src, 1); err != nil {
			return err
		}
		for l.a.receive(s) == 0 {
			if l.wait(l.a); j.stopped() {
				return nil
			}
		}
		rtt[i] = nano() - start
	}
	return nil
}

func (l *xdpLink) echo(j *job) error {
	src, s := j.source(), j.sink()
	for !j.stopped() {
		n := l.b.receive(s)
		if n == 0 {
			l.wait(l.b)
			continue
		}
		if _, err := l.b.send(src, n); err != nil {
			return err
		}
	}
	return nil
}
