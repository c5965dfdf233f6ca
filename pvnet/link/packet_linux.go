package link

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"barevif/pvnet"

	"golang.org/x/sys/unix"
)

// A Packet is a packet socket on an interface that exists already. It reads every
// frame that the interface receives, whatever its destination, but no frame that this
// machine sends through the interface. It writes frames to the interface's driver.
//
// The kernel still handles the frames that a Packet reads, so the interface should have
// no addresses of its own. Frames may have work left to do, also those from another
// interface of this machine; see [Offload]. If the kernel took a VLAN tag off a frame,
// ReadFrame puts the tag back.
type Packet struct {
	port
	msg     message
	control []byte // of the last recvmsg, inside msg
	flags   int32
	down    atomic.Bool // the kernel reported ENETDOWN, which it does once, to a reader or a writer
}

var _ Link = (*Packet)(nil)

// receiveBuffer is the wanted size of the socket's receive buffer, in bytes;
// net.core.rmem_max may limit it. The default holds some 250 small frames.
const receiveBuffer = 4 << 20

// OpenPacket opens a packet socket on the interface, which it makes promiscuous
// until Close. It needs CAP_NET_RAW in the network namespace.
//
// The error is an [*OpenError]: EPERM (no permission), ENODEV (no such interface),
// ENETDOWN (it is down), ENOPROTOOPT (a kernel before 4.20).
func OpenPacket(ifname string) (*Packet, error) {
	iface, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil, packetError(ifname, "find the interface", err)
	}
	info := Info{Name: iface.Name, MTU: iface.MTU}
	copy(info.MAC[:], iface.HardwareAddr)
	// Protocol 0 until bind, so that the socket queues no frames of other interfaces.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, packetError(ifname, "open a packet socket", err)
	}
	if err := bindPacket(fd, info, iface.Index); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return newPacket(fd, info)
}

// NewPacket takes over f, a packet socket that another process got from [Packet.File]. The
// socket's interface may be in a network namespace that this process cannot see, so
// NewPacket trusts info. It closes f, also if it fails.
func NewPacket(f *os.File, info Info) (*Packet, error) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, packetError(info.Name, "duplicate the descriptor", err)
	}
	if err := checkPacket(fd, info.Name); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return newPacket(fd, info)
}

func checkPacket(fd int, name string) error {
	if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil {
		return packetError(name, "SO_DOMAIN", err)
	} else if domain != unix.AF_PACKET {
		return packetError(name, "use a socket that is not a packet socket", unix.EINVAL)
	}
	for _, opt := range []int{unix.PACKET_VNET_HDR, unix.PACKET_AUXDATA} {
		if on, err := unix.GetsockoptInt(fd, unix.SOL_PACKET, opt); err != nil {
			return packetError(name, "read the socket's options", err)
		} else if on == 0 {
			return packetError(name, "use a packet socket without PACKET_VNET_HDR and PACKET_AUXDATA", unix.EINVAL)
		}
	}
	return nil
}

func newPacket(fd int, info Info) (*Packet, error) {
	p := new(Packet)
	if err := p.init(fd, info, ErrDown, ErrOffload); err != nil {
		return nil, packetError(info.Name, "make pollable", err)
	}
	p.rd.try = func(fd uintptr) bool {
		for {
			p.rd.n, p.control, p.flags, p.rd.errno = p.msg.recvmsg(fd, &p.rd.vec)
			if p.rd.errno != unix.EINTR {
				return p.rd.errno != unix.EAGAIN
			}
		}
	}
	return p, nil
}

// bindPacket sets the options before it binds, because frames arrive from bind on.
func bindPacket(fd int, info Info, index int) error {
	for _, opt := range []struct {
		number int
		name   string
	}{
		{unix.PACKET_VNET_HDR, "PACKET_VNET_HDR"},
		{unix.PACKET_AUXDATA, "PACKET_AUXDATA"},
		{unix.PACKET_IGNORE_OUTGOING, "PACKET_IGNORE_OUTGOING"},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, opt.number, 1); err != nil {
			return packetError(info.Name, "set "+opt.name, err)
		}
	}
	// The system may allow less; with a smaller buffer the kernel only drops sooner.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	all := binary.NativeEndian.Uint16([]byte{unix.ETH_P_ALL >> 8, unix.ETH_P_ALL & 0xff})
	addr := &unix.SockaddrLinklayer{Protocol: all, Ifindex: index}
	if err := unix.Bind(fd, addr); err != nil {
		return packetError(info.Name, "bind to the interface", err)
	}
	mreq := &unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_PROMISC}
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, mreq); err != nil {
		return packetError(info.Name, "make the interface promiscuous", err)
	}
	return nil
}

// ReadFrame: see [Link].
func (p *Packet) ReadFrame(bufs [][]byte) (n int, off Offload, err error) { return p.read(bufs, true) }

func (p *Packet) read(bufs [][]byte, wait bool) (n int, off Offload, err error) {
	if len(bufs) > MaxPieces {
		return 0, off, ErrTooManyPieces
	}
	r := &p.rd
	r.mu.Lock()
	defer r.mu.Unlock()
	if p.down.Load() {
		if err := p.state(); err != nil {
			return 0, off, err
		}
		p.down.Store(false)
	}
	r.vec.add(r.header[:])
	for _, b := range bufs {
		r.vec.add(b)
	}
	err = p.receive(wait)
	r.vec.clear()
	if err != nil {
		p.noteDown(err)
		return 0, off, err
	}
	off.decode(&r.header)
	n = max(r.n-headerSize, 0)
	if p.flags&unix.MSG_TRUNC != 0 {
		err = ErrTruncated
	}
	if tag, ok := strippedTag(p.control); ok && n >= 12 {
		var lost bool
		n, lost = insertTag(bufs, n, tag)
		off.shift(uint16(len(tag)))
		if lost {
			err = ErrTruncated
		}
	}
	return n, off, err
}

func (p *Packet) maxRead() int { return MaxRead }

// setOffloads changes nothing: a packet socket reads frames with the work that their
// senders left, and cannot ask for another.
func (p *Packet) setOffloads(bool) error { return nil }

// setCarrier changes nothing: the interface carries frames of others too.
func (p *Packet) setCarrier(bool) error { return nil }

// attach changes nothing: a packet socket gets all frames of its interface.
func (p *Packet) attach(bool) error { return nil }

// attached reports true: see attach.
func (p *Packet) attached() bool { return true }

// steer changes nothing: the interface has no queues that end here.
func (p *Packet) steer(*pvnet.Steering) error { return nil }

// mtuNow returns the interface's current MTU, or the MTU at opening if the interface is
// gone.
func (p *Packet) mtuNow() (mtu int) {
	mtu = p.info.MTU
	_ = p.conn.Control(func(fd uintptr) {
		if ifr, err := boundTo(int(fd)); err == nil && unix.IoctlIfreq(int(fd), unix.SIOCGIFMTU, ifr) == nil {
			mtu = int(ifr.Uint32())
		}
	})
	return mtu
}

// WriteFrame: see [Link].
func (p *Packet) WriteFrame(off Offload, bufs [][]byte) (n int, err error) {
	n, err = p.port.WriteFrame(off, bufs)
	p.noteDown(err)
	return n, err
}

func (p *Packet) noteDown(err error) {
	if err == ErrDown {
		p.down.Store(true)
	}
}

// state reads the interface's flags. The kernel reports to a packet socket only once that
// its interface went down, and never that it was removed after that.
func (p *Packet) state() (err error) {
	ctlErr := p.conn.Control(func(fd uintptr) { err = interfaceState(int(fd)) })
	if ctlErr != nil {
		return p.failure(ctlErr)
	}
	return err
}

// boundTo returns the current name of the interface to which the socket is bound.
func boundTo(fd int) (*unix.Ifreq, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return nil, os.NewSyscallError("getsockname", err)
	}
	ll, ok := sa.(*unix.SockaddrLinklayer)
	if !ok || ll.Ifindex <= 0 { // the index is -1 once the interface was removed
		return nil, ErrGone
	}
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return nil, err
	}
	ifr.SetUint32(uint32(ll.Ifindex))
	if unix.IoctlIfreq(fd, unix.SIOCGIFNAME, ifr) != nil {
		return nil, ErrGone
	}
	return ifr, nil
}

func interfaceState(fd int) error {
	ifr, err := boundTo(fd)
	if err != nil {
		return err
	}
	if unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr) != nil {
		return ErrGone
	}
	if ifr.Uint16()&unix.IFF_UP == 0 {
		return ErrDown
	}
	return nil
}

// struct tpacket_auxdata of linux/if_packet.h.
const (
	auxSize = 20
	auxTCI  = 16
	auxTPID = 18
)

// strippedTag returns the VLAN tag that the kernel took out of the frame, in wire order.
func strippedTag(control []byte) (tag [4]byte, ok bool) {
	const data = (unix.SizeofCmsghdr + 7) &^ 7
	if len(control) < data+auxSize {
		return tag, false
	}
	level := binary.NativeEndian.Uint32(control[unix.SizeofCmsghdr-8:])
	kind := binary.NativeEndian.Uint32(control[unix.SizeofCmsghdr-4:])
	if level != unix.SOL_PACKET || kind != unix.PACKET_AUXDATA {
		return tag, false
	}
	aux := control[data:]
	status := binary.NativeEndian.Uint32(aux)
	if status&unix.TP_STATUS_VLAN_VALID == 0 {
		return tag, false
	}
	tpid := uint16(unix.ETH_P_8021Q)
	if status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
		tpid = binary.NativeEndian.Uint16(aux[auxTPID:])
	}
	binary.BigEndian.PutUint16(tag[:], tpid)
	binary.BigEndian.PutUint16(tag[2:], binary.NativeEndian.Uint16(aux[auxTCI:]))
	return tag, true
}

// insertTag inserts the tag behind the two addresses of a frame of n bytes and returns
// the new size. lost means that bufs had no room for the end of the frame.
func insertTag(bufs [][]byte, n int, tag [4]byte) (size int, lost bool) {
	carry := tag
	at := 0
	for _, b := range bufs {
		begin, end := max(12-at, 0), min(len(b), n+len(tag)-at)
		at += len(b)
		if begin >= end {
			continue
		}
		part := b[begin:end]
		if len(part) < len(carry) {
			var next [4]byte
			k := copy(next[:], carry[len(part):])
			copy(next[k:], part)
			copy(part, carry[:])
			carry = next
			continue
		}
		var next [4]byte
		copy(next[:], part[len(part)-len(next):])
		copy(part[len(carry):], part)
		copy(part, carry[:])
		carry = next
	}
	if at < n+len(tag) {
		return at, true
	}
	return n + len(tag), false
}

func packetError(name, step string, err error) error {
	e := &OpenError{Link: "packet socket on " + name, Step: step, Err: err}
	if step == "find the interface" {
		// The net package does not export its error for an unknown interface.
		if !errors.Is(err, syscall.EPERM) {
			e.Err = unix.ENODEV
		}
	}
	switch {
	case errors.Is(e.Err, unix.EPERM), errors.Is(e.Err, unix.EACCES):
		e.Next = "run with CAP_NET_RAW, or in a user and network namespace of its own"
	case errors.Is(e.Err, unix.ENODEV), errors.Is(e.Err, unix.ENXIO):
		e.Next = "there is no such interface in this network namespace (ip link show)"
	case errors.Is(e.Err, unix.ENETDOWN):
		e.Next = "bring it up first (ip link set " + name + " up)"
	case errors.Is(e.Err, unix.ENOPROTOOPT):
		e.Next = "the kernel is too old: packet sockets need Linux 4.20"
	case errors.Is(e.Err, unix.EAFNOSUPPORT):
		e.Next = "the kernel has no packet sockets: modprobe af_packet"
	}
	return e
}
