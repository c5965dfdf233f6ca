package link

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"

	"barevif/pvnet/steer"

	"golang.org/x/sys/unix"
)

// TAPConfig describes a TAP. The zero TAPConfig describes a new TAP with a name that the
// kernel picks and an MTU of 1500.
type TAPConfig struct {
	Name string // at most 15 bytes; "tap%d" has the kernel put in a number
	MTU  int    // 68 to 65521; 0 leaves it as it is

	// Attach joins an existing TAP that no process holds, such as one made by "ip tuntap
	// add mode tap user NAME"; NAME then needs no privilege. Without Attach a name in
	// use is an error.
	Attach bool
}

// A TAP is the outside of a virtual Ethernet card of this kernel: ReadFrame reads the
// frames that the kernel sends through the card, and the card receives the frames of
// WriteFrame.
//
// Except while a [Joint] runs, the kernel sends only complete, unsegmented frames through
// the card. In the other direction WriteFrame takes any Offload. A TAP that OpenTAP made
// disappears when its last descriptor is closed.
type TAP struct {
	port
	spare [1]byte  // behind the caller's buffers: only a frame too large for them reaches it
	asks  *os.File // a socket of the interface's network namespace, for ioctls; nil if another process opened the TAP

	steerMu sync.Mutex
	program *steer.Program // guarded by steerMu; nil: not loaded yet
}

var _ Link = (*TAP)(nil)

// OpenTAP makes or joins a TAP, and brings its interface up. It needs CAP_NET_ADMIN in the
// network namespace, or an existing TAP that belongs to this user. No other user may open
// further queues of the TAP.
//
// The error is an [*OpenError]: EPERM or EACCES (no permission), EBUSY (the name is in
// use), ENOENT or ENODEV (the kernel has no TAPs), EINVAL (a name or an MTU no
// interface can have).
func OpenTAP(cfg TAPConfig) (*TAP, error) {
	taps, err := openTAPs(cfg, 1, 0)
	if err != nil {
		return nil, err
	}
	return taps[0], nil
}

// OpenTAPQueues is OpenTAP for a card with n queues, 1 to 256. It returns one link per
// queue, all with the same name. The kernel spreads its flows over the open queues.
func OpenTAPQueues(cfg TAPConfig, n int) ([]*TAP, error) {
	if n < 1 || n > 256 { // MAX_TAP_QUEUES of drivers/net/tun.c
		return nil, &OpenError{Link: tapLabel(cfg.Name), Step: fmt.Sprintf("open %d queues", n), Err: unix.EINVAL}
	}
	return openTAPs(cfg, n, unix.IFF_MULTI_QUEUE)
}

func openTAPs(cfg TAPConfig, n int, flags uint16) (taps []*TAP, err error) {
	defer func() {
		if err != nil {
			for _, t := range taps {
				t.Close()
			}
			taps = nil
		}
	}()
	if !cfg.Attach {
		flags |= unix.IFF_TUN_EXCL
	}
	info := Info{Name: cfg.Name}
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, tapError(info.Name, "open a socket for ioctls", err)
	}
	defer unix.Close(s)
	for len(taps) < n {
		fd, err := openQueue(&info, flags)
		if err != nil {
			return taps, err
		}
		if len(taps) == 0 {
			if err := setUp(s, &info, cfg.MTU); err != nil {
				unix.Close(fd)
				return taps, err
			}
		}
		flags &^= unix.IFF_TUN_EXCL // the name is ours now
		t := new(TAP)
		if err := t.init(fd, info); err != nil {
			return taps, tapError(info.Name, "make pollable", err)
		}
		taps = append(taps, t)
		asks, err := unix.FcntlInt(uintptr(s), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return taps, tapError(info.Name, "duplicate a socket for ioctls", err)
		}
		t.asks = os.NewFile(uintptr(asks), info.Name)
	}
	return taps, nil
}

// openQueue opens a queue of info.Name and learns the name the kernel gave it.
func openQueue(info *Info, flags uint16) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, openError(info.Name, err)
	}
	name, err := attachQueue(fd, info.Name, flags)
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	info.Name = name
	return fd, nil
}

func attachQueue(fd int, name string, flags uint16) (string, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return "", tapError(name, "name the interface", err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return "", tapError(name, "TUNSETIFF", err)
	}
	name = ifr.Name()
	// Without an owner any user could open a further queue, and read frames of this
	// card there.
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, os.Geteuid()); err != nil {
		return "", tapError(name, "TUNSETOWNER", err)
	}
	return name, configureQueue(fd, name)
}

// configureQueue sets the size of the virtio_net_hdr and turns all offloads off.
func configureQueue(fd int, name string) error {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, headerSize); err != nil {
		return tapError(name, "TUNSETVNETHDRSZ", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return tapError(name, "TUNSETOFFLOAD", err)
	}
	return nil
}

// Close: see [Link].
func (t *TAP) Close() error {
	if t.asks != nil {
		_ = t.asks.Close() // fails from the second call on
	}
	err := t.port.Close() // before closeSteering: no program is loaded after that
	t.closeSteering()
	return err
}

// mtuNow returns the card's current MTU, or 0 if this process cannot read it.
func (t *TAP) mtuNow() (mtu int) {
	if t.asks == nil {
		return 0
	}
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return 0
	}
	ctlErr := t.conn.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, ifr) })
	if ctlErr != nil || err != nil {
		return 0
	}
	asks, err := t.asks.SyscallConn()
	if err != nil {
		return 0
	}
	ctlErr = asks.Control(func(fd uintptr) {
		if unix.IoctlIfreq(int(fd), unix.SIOCGIFMTU, ifr) == nil {
			mtu = int(ifr.Uint32())
		}
	})
	if ctlErr != nil {
		return 0
	}
	return mtu
}

// setOffloads turns TCP segmentation and checksum offload on or off for all queues of the
// card.
func (t *TAP) setOffloads(on bool) (err error) {
	left := 0
	if on {
		left = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	}
	ctlErr := t.conn.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, left) })
	return errors.Join(ctlErr, err)
}

// setCarrier is SetCarrier, for a Joint.
func (t *TAP) setCarrier(on bool) error { return t.SetCarrier(on) }

// attach makes the kernel spread its flows over this queue too, or no more. Frames that
// wait in a queue that is detached are lost.
func (t *TAP) attach(on bool) (err error) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_DETACH_QUEUE)
	if on {
		ifr.SetUint16(unix.IFF_ATTACH_QUEUE)
	}
	ctlErr := t.conn.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), unix.TUNSETQUEUE, ifr) })
	return errors.Join(ctlErr, err)
}

// attached reports whether the kernel spreads its flows over this queue.
func (t *TAP) attached() bool {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return true
	}
	ctlErr := t.conn.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, ifr) })
	return ctlErr != nil || err != nil || ifr.Uint16()&unix.IFF_DETACH_QUEUE == 0
}

// SetCarrier says whether the card is connected to something, as a cable would: without a
// carrier the kernel sends nothing through it, and its routes and a bridge know. A new
// TAP has a carrier. It needs Linux 5.0.
func (t *TAP) SetCarrier(on bool) (err error) {
	carrier := 0
	if on {
		carrier = 1
	}
	ctlErr := t.conn.Control(func(fd uintptr) { err = unix.IoctlSetPointerInt(int(fd), unix.TUNSETCARRIER, carrier) })
	if err = errors.Join(ctlErr, err); err != nil {
		return tapError(t.Name(), "TUNSETCARRIER", err)
	}
	return nil
}

// setUp sets the interface's MTU unless mtu is 0, brings the interface up, and fills in
// info. s is a socket of the interface's network namespace.
func setUp(s int, info *Info, mtu int) error {
	name := info.Name
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return tapError(name, "name the interface", err)
	}
	if mtu != 0 {
		if err := unix.IoctlIfreq(s, unix.SIOCGIFMTU, ifr); err != nil {
			return tapError(name, "read the MTU", err)
		}
		if ifr.Uint32() != uint32(mtu) {
			ifr.SetUint32(uint32(mtu))
			if err := unix.IoctlIfreq(s, unix.SIOCSIFMTU, ifr); err != nil {
				return tapError(name, fmt.Sprintf("set the MTU to %d", mtu), err)
			}
		}
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, ifr); err != nil {
		return tapError(name, "read the flags", err)
	}
	if flags := ifr.Uint16(); flags&unix.IFF_UP == 0 {
		ifr.SetUint16(flags | unix.IFF_UP)
		if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr); err != nil {
			return tapError(name, "bring the interface up", err)
		}
	}
	*info, err = interfaceInfo(name)
	if err != nil {
		return tapError(name, "read the interface", err)
	}
	return nil
}

func interfaceInfo(name string) (Info, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return Info{}, err
	}
	info := Info{Name: i.Name, MTU: i.MTU}
	copy(info.MAC[:], i.HardwareAddr)
	return info, nil
}

// NewTAP takes over f, a TAP that another process opened: it comes from [TAP.File], or was
// opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. The interface may be in a network
// namespace that this process cannot see, so NewTAP trusts info. It closes f, also if it
// fails.
func NewTAP(f *os.File, info Info) (*TAP, error) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, tapError(info.Name, "duplicate the descriptor", err)
	}
	if err := checkQueue(fd, info.Name); err != nil {
		unix.Close(fd)
		return nil, err
	}
	t := new(TAP)
	t.shared.Store(true)
	if err := t.init(fd, info); err != nil {
		return nil, tapError(info.Name, "make pollable", err)
	}
	return t, nil
}

// AdoptTAP takes over f, a TAP of this network namespace that another process opened, as
// it is: the queue of the kernel, the addresses and the place on a bridge stay. It learns
// from the kernel which interface f belongs to. It closes f, also if it fails. The error is
// an [*OpenError]: EINVAL for a descriptor that is no such TAP, ENODEV for one of another
// network namespace.
func AdoptTAP(f *os.File) (*TAP, error) {
	defer f.Close()
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return nil, tapError("", "name the interface", err)
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, tapError("", "use the descriptor", err)
	}
	if e := rc.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, ifr) }); e != nil {
		err = e
	}
	if err != nil {
		return nil, &OpenError{Link: "tap", Step: "ask a descriptor for its interface", Err: unix.EINVAL, Next: "it is no TAP: " + err.Error()}
	}
	info, err := interfaceInfo(ifr.Name())
	if err != nil {
		return nil, &OpenError{Link: tapLabel(ifr.Name()), Step: "find the interface", Err: unix.ENODEV, Next: "it is in another network namespace: " + err.Error()}
	}
	asks, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, tapError(info.Name, "open a socket for ioctls", err)
	}
	t, err := NewTAP(f, info)
	if err != nil {
		unix.Close(asks)
		return nil, err
	}
	t.asks = os.NewFile(uintptr(asks), info.Name)
	return t, nil
}

func checkQueue(fd int, name string) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return tapError(name, "name the interface", err)
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return tapError(name, "TUNGETIFF", err)
	}
	const want = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	if got := ifr.Uint16(); got&(want|unix.IFF_TUN) != want {
		return tapError(name, fmt.Sprintf("use a descriptor with flags %#x", got), unix.EINVAL)
	}
	return configureQueue(fd, name)
}

func (t *TAP) init(fd int, info Info) error {
	// When the removal of the interface wakes a reader, the kernel returns EFAULT.
	if err := t.port.init(fd, info, ErrGone, ErrGone); err != nil {
		return err
	}
	r := &t.rd
	r.try = func(fd uintptr) bool {
		r.n, r.errno = again(fd, &t.shared, r.vec.readv)
		return r.errno != unix.EAGAIN
	}
	return nil
}

// ReadFrame: see [Link].
func (t *TAP) ReadFrame(bufs [][]byte) (n int, off Offload, err error) { return t.read(bufs, true) }

func (t *TAP) read(bufs [][]byte, wait bool) (n int, off Offload, err error) {
	if len(bufs) > MaxPieces {
		return 0, off, ErrTooManyPieces
	}
	r := &t.rd
	r.mu.Lock()
	defer r.mu.Unlock()
	r.vec.add(r.header[:])
	for _, b := range bufs {
		r.vec.add(b)
	}
	room := r.vec.size
	// A TAP does not report that it cut a frame short. A frame that fills the spare
	// byte, too, was larger than the caller's buffers.
	r.vec.add(t.spare[:])
	err = t.receive(wait)
	r.vec.clear()
	if err != nil {
		return 0, off, err
	}
	off.decode(&r.header)
	if r.n > room {
		return room - headerSize, off, ErrTruncated
	}
	return max(r.n-headerSize, 0), off, nil
}

// tapLabel returns the name of a TAP for an error. A TAP has no name of its own until the
// kernel has picked the number.
func tapLabel(name string) string {
	if name == "" || strings.Contains(name, "%") {
		return "new tap"
	}
	return "tap " + name
}

func openError(name string, err error) error {
	e := &OpenError{Link: tapLabel(name), Step: "open /dev/net/tun", Err: err}
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		e.Next = "run as root, or let this user open it (chmod 0666 /dev/net/tun), or use a packet socket"
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		e.Next = "the kernel has no TAPs: modprobe tun, and in a container pass /dev/net/tun on to it"
	}
	return e
}

func tapError(name, step string, err error) error {
	e := &OpenError{Link: tapLabel(name), Step: step, Err: err}
	switch {
	case errors.Is(err, unix.EPERM):
		e.Next = "run with CAP_NET_ADMIN, or in a user and network namespace of its own, or attach to one made for this user (ip tuntap add mode tap user NAME)"
	case errors.Is(err, unix.EBUSY):
		e.Next = "the name is in use: choose another, or end the program that holds it (ip -d link show)"
	case errors.Is(err, unix.EINVAL) && step == "TUNSETIFF":
		e.Next = "an interface of that name but of another kind exists, or the name is none an interface can have"
	case errors.Is(err, syscall.EINVAL):
		e.Next = "names have at most 15 bytes, a TAP's MTU is 68 to 65521"
	}
	return e
}
