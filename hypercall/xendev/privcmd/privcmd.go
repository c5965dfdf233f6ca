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
// the kernel could. The package makes only calls that query, that fire an event channel,
// or that copy between grants.
package privcmd

import (
	"bytes"
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
	if read != nil || fill != nil {
		clear(c.arg)
		h.Arg[1] = address(c.arg)
	}
	if fill != nil {
		fill(c.arg)
	}
	if op == grantTableOp {
		h.Arg[2] = 1 // array form: one element, unless CopyGrants says more
	}
	return c.do(name, &h, read)
}

// do makes the hypercall and reads its results. The caller holds mu.
func (c *Conn) do(name string, h *hypercallArg, read func(arg []byte)) (int, error) {
	var n int
	var err error
	if cerr := c.raw.Control(func(fd uintptr) { n, err = issue(fd, h) }); cerr != nil {
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

// Extra is XENVER_extraversion: it returns the text after the minor number, such as ".7".
func (c *Conn) Extra() (string, error) { return c.text("XENVER_extraversion", 1, 16) }

// Capabilities is XENVER_capabilities: it returns the kinds of guest that this Xen can
// run.
func (c *Conn) Capabilities() (string, error) { return c.text("XENVER_capabilities", 3, 1024) }

// Changeset is XENVER_changeset.
func (c *Conn) Changeset() (string, error) { return c.text("XENVER_changeset", 4, 64) }

func (c *Conn) text(name string, cmd uint64, size int) (s string, err error) {
	_, err = c.call(name, xenVersion, cmd, nil, func(arg []byte) {
		b, _, _ := bytes.Cut(arg[:size], []byte{0})
		s = string(b)
	})
	return s, err
}

// Features returns submap i of XENVER_get_features (xen/include/public/features.h).
func (c *Conn) Features(i uint32) (bits uint32, err error) {
	_, err = c.call("XENVER_get_features", xenVersion, 6,
		func(arg []byte) { featureInfo(arg).Index = i },
		func(arg []byte) { bits = featureInfo(arg).Bits })
	return bits, err
}

// Pages returns how many pages dom has now (XENMEM_current_reservation) and may have
// (XENMEM_maximum_reservation). An unprivileged caller passes [hypercall.DomSelf].
func (c *Conn) Pages(dom hypercall.DomID) (now, most int, err error) {
	fill := func(arg []byte) { *domid(arg) = uint16(dom) }
	if now, err = c.call("XENMEM_current_reservation", memoryOp, 3, fill, nil); err != nil {
		return 0, 0, err
	}
	most, err = c.call("XENMEM_maximum_reservation", memoryOp, 4, fill, nil)
	return now, most, err
}

// Yield is SCHEDOP_yield: the virtual CPU of this thread yields to others.
func (c *Conn) Yield() error {
	_, err := c.call("SCHEDOP_yield", schedOp, 0, nil, nil)
	return err
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

// MaxCopies is how many copies one CopyGrants takes.
const MaxCopies = pageSize / copySize

var errCopies = fmt.Errorf("privcmd: CopyGrants takes 1 to %d copies between grants", MaxCopies)

// CopyGrants is GNTTABOP_copy for 1 to [MaxCopies] copies between grants. Neither end may
// be local, because a program does not know the frames of its own memory. It sets the
// Status of each operation.
func (c *Conn) CopyGrants(ops []hypercall.CopyOp) error {
	if len(ops) == 0 || len(ops) > MaxCopies {
		return errCopies
	}
	for i := range ops {
		if ops[i].Src.Local != nil || ops[i].Dst.Local != nil || ops[i].Len > pageSize {
			return errCopies
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	args := copies(c.arg)
	for i := range ops {
		args[i] = copyArg(&ops[i])
	}
	h := hypercallArg{Op: grantTableOp, Arg: [5]uint64{5, address(c.arg), uint64(len(ops))}}
	_, err := c.do("GNTTABOP_copy", &h, func(arg []byte) {
		for i := range ops {
			ops[i].Status = hypercall.Status(args[i].Status)
		}
	})
	return err
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

var portKinds = [...]string{"closed", "unbound", "interdomain", "physical interrupt", "virtual interrupt", "ipi"}

func (k PortKind) String() string {
	if int(k) >= len(portKinds) {
		return fmt.Sprintf("port kind %d", uint32(k))
	}
	return portKinds[k]
}

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

// Send is EVTCHNOP_send. The kernel does not check that p is a port of this process.
func (c *Conn) Send(p hypercall.PortID) error {
	_, err := c.call("EVTCHNOP_send", eventChannelOp, 4,
		func(arg []byte) { *port(arg, 0) = uint32(p) }, nil)
	return err
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
