//go:build linux

// Package privcmd makes hypercalls from a Linux program: a typed layer over
// /dev/xen/privcmd. Arguments are in memory from /dev/xen/hypercall, which the kernel
// promises not to move.
//
// In the control domain every process that may open the node may make hypercalls. In
// other domains kernels of 2026 and later refuse all of them ([ErrRestricted]) unless the
// module was loaded with unrestricted=1. So nothing that has to work in a domU may need
// this package.
//
// Xen checks a hypercall like one of the kernel's own: it can do to this domain whatever
// the kernel could. The package makes only calls that query or that fire an event channel.
package privcmd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
)

// ErrRestricted is wrapped by the error of a hypercall that the kernel or Xen refused
// with EPERM. That error also wraps os.ErrPermission.
var ErrRestricted = errors.New("hypercall not permitted: outside the control domain the kernel allows one" +
	" only if the module was loaded as: modprobe xen-privcmd unrestricted=1")

// pageSize is the size of a call's argument memory, in bytes.
const pageSize = 4096

// A Conn makes hypercalls. It is safe for concurrent use.
type Conn struct {
	file *os.File
	raw  syscall.RawConn
	hyp  *os.File // the file behind the argument memory

	mu     sync.Mutex // held for a whole call, because there is one page of arguments
	arg    []byte     // guarded by mu; nil once closed
	bells  []byte     // one word per doorbell
	free   []int      // guarded by mu; free words of bells
	closed bool       // guarded by mu
}

// Open opens the nodes privcmd and hypercall in the directory dev ("/dev/xen").
func Open(dev string) (*Conn, error) {
	c := &Conn{}
	var err error
	if c.file, err = os.OpenFile(filepath.Join(dev, "privcmd"), os.O_RDWR|syscall.O_CLOEXEC, 0); err != nil {
		return nil, err
	}
	if c.hyp, err = os.OpenFile(filepath.Join(dev, "hypercall"), os.O_RDWR|syscall.O_CLOEXEC, 0); err != nil {
		return nil, errors.Join(err, c.file.Close())
	}
	if c.raw, err = c.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if err := c.mapArgs(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	for i := pageSize/4 - 1; i >= 0; i-- {
		c.free = append(c.free, i)
	}
	return c, nil
}

func (c *Conn) mapArgs() error {
	conn, err := c.hyp.SyscallConn()
	if err != nil {
		return err
	}
	cerr := conn.Control(func(fd uintptr) {
		if c.arg, err = unix.Mmap(int(fd), 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			c.bells, err = unix.Mmap(int(fd), 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		}
	})
	if err = errors.Join(cerr, err); err != nil {
		return fmt.Errorf("privcmd: argument memory: %w", err)
	}
	return nil
}

// Close ends the connection. No doorbell may be rung afterwards. It is idempotent.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	var errs []error
	for _, b := range [][]byte{c.arg, c.bells} {
		if b != nil {
			errs = append(errs, unix.Munmap(b))
		}
	}
	c.arg = nil
	return errors.Join(append(errs, c.hyp.Close(), c.file.Close())...)
}

// explain adds how to permit a refused call.
func explain(call string, err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%s: %w (%w)", call, ErrRestricted, err)
	}
	return fmt.Errorf("%s: %w", call, err)
}

// call makes hypercall op with command cmd. If the call has arguments, fill writes them
// to the argument memory, and read reads the results there.
func (c *Conn) call(name string, op, cmd uint64, fill, read func(arg []byte)) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return 0, net.ErrClosed
	}
	h := hypercallArg{Op: op, Arg: [5]uint64{cmd}}
	if fill != nil {
		clear(c.arg)
		h.Arg[1] = address(c.arg)
		fill(c.arg)
	}
	if op == grantTableOp {
		h.Arg[2] = 1 // array form: one element
	}
	var n int
	var err error
	if cerr := c.raw.Control(func(fd uintptr) { n, err = issue(fd, &h) }); cerr != nil {
		return 0, net.ErrClosed
	}
	if err != nil {
		return 0, explain(name, err)
	}
	if read != nil {
		read(c.arg)
	}
	return n, nil
}

// Version is XENVER_version: it returns the major and the minor number.
func (c *Conn) Version() (major, minor int, err error) {
	n, err := c.call("XENVER_version", xenVersion, 0, nil, nil)
	return n >> 16, n & 0xffff, err
}

// A GrantTable is the size of a domain's grant table, in frames of 512 entries of version
// 1.
type GrantTable struct {
	Frames, MaxFrames int
}

// GrantTable is GNTTABOP_query_size. An unprivileged caller passes [hypercall.DomSelf].
func (c *Conn) GrantTable(dom hypercall.DomID) (t GrantTable, err error) {
	var status hypercall.Status
	_, err = c.call("GNTTABOP_query_size", grantTableOp, 6,
		func(arg []byte) { querySizeArg(arg).Dom = uint16(dom) },
		func(arg []byte) {
			q := querySizeArg(arg)
			t = GrantTable{Frames: int(q.Frames), MaxFrames: int(q.MaxFrames)}
			status = hypercall.Status(q.Status)
		})
	if err == nil && status != hypercall.OK {
		err = fmt.Errorf("GNTTABOP_query_size of domain %d: %v", dom, status)
	}
	return t, err
}

// PortKind is the kind of a port's other end (EVTCHNSTAT_ of
// xen/include/public/event_channel.h).
type PortKind uint32

const (
	PortClosed PortKind = iota
	PortUnbound
	PortInterdomain
	PortPIRQ
	PortVIRQ
	PortIPI
)

// A Port is the state of one port.
type Port struct {
	Kind   PortKind
	VCPU   int
	Peer   hypercall.DomID  // of an unbound or interdomain port
	Remote hypercall.PortID // of an interdomain port
}

// Port is EVTCHNOP_status for port p of dom. The error is EINVAL for a port beyond the
// last one that the domain ever had.
func (c *Conn) Port(dom hypercall.DomID, p hypercall.PortID) (port Port, err error) {
	_, err = c.call("EVTCHNOP_status", eventChannelOp, 5,
		func(arg []byte) {
			s := portStatus(arg)
			s.Dom, s.Port = uint16(dom), uint32(p)
		},
		func(arg []byte) {
			s := portStatus(arg)
			port = Port{Kind: PortKind(s.Status), VCPU: int(s.VCPU)}
			switch port.Kind {
			case PortUnbound:
				port.Peer = hypercall.DomID(s.Peer)
			case PortInterdomain:
				port.Peer, port.Remote = hypercall.DomID(s.Peer), hypercall.PortID(s.Remote)
			}
		})
	return port, err
}

// A Doorbell is EVTCHNOP_send on one port, prepared so that [Doorbell.Ring] allocates
// nothing and shares no lock with other calls.
type Doorbell struct {
	c    *Conn
	word int

	mu   sync.Mutex // held while it rings
	h    hypercallArg
	ring func(fd uintptr)
	err  error // guarded by mu; the error of ring
}

// Doorbell prepares a doorbell for p. A Conn has 1024 doorbells.
func (c *Conn) Doorbell(p hypercall.PortID) (*Doorbell, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, net.ErrClosed
	}
	if len(c.free) == 0 {
		return nil, errors.New("privcmd: no doorbell left")
	}
	word := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	*port(c.bells, word) = uint32(p)
	b := &Doorbell{c: c, word: word}
	b.h = hypercallArg{Op: eventChannelOp, Arg: [5]uint64{4, address(c.bells[4*word:])}}
	b.ring = func(fd uintptr) { _, b.err = issue(fd, &b.h) }
	return b, nil
}

// Ring fires the port. Any goroutine may call it.
func (b *Doorbell) Ring() error {
	b.mu.Lock()
	err := b.c.raw.Control(b.ring)
	if err == nil {
		err = b.err
	} else {
		err = net.ErrClosed
	}
	b.mu.Unlock()
	if err != nil && err != net.ErrClosed {
		return explain("EVTCHNOP_send", err)
	}
	return err
}

// Close gives the doorbell back. It must be called once, and Ring not afterwards.
func (b *Doorbell) Close() {
	b.c.mu.Lock()
	b.c.free = append(b.c.free, b.word)
	b.c.mu.Unlock()
}
