//go:build linux

package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"

	"barevif/pvnet/link"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// childName is argv[0] of the child. Its end of the control socket is descriptor
// controlFD.
const (
	childName = "barevif-netns"
	controlFD = 3
)

// Main must be called first in the main function of every program that uses [Start], and
// in the TestMain of its tests:
//
//	if netns.Main() {
//		return
//	}
//
// It returns false at once, except in the child. There it serves requests until the
// program ends or closes the Sandbox, and then returns true.
func Main() bool {
	if len(os.Args) != 1 || os.Args[0] != childName {
		return false
	}
	f := os.NewFile(controlFD, "control")
	ctl, err := unixConn(f)
	f.Close()
	if err != nil {
		fmt.Fprintln(os.Stderr, childName+": no control socket:", err)
		return true
	}
	defer ctl.Close()
	for {
		var r request
		if _, err := readMessage(ctl, &r); err != nil {
			return true // the program has ended or closed the Sandbox
		}
		if err := serve(ctl, r); err != nil {
			return true
		}
	}
}

func serve(ctl *net.UnixConn, r request) error {
	var a answer
	var f *os.File
	var err error
	switch {
	case r.Card != nil:
		a, f, err = makeCard(*r.Card)
	case r.Socket != nil:
		f, err = makeSocket(*r.Socket)
	default:
		err = unix.EBADMSG
	}
	if err != nil {
		var errno syscall.Errno
		errors.As(err, &errno)
		return writeMessage(ctl, answer{Failed: err.Error(), Errno: uint(errno)}, -1)
	}
	defer runtime.KeepAlive(f)
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = conn.Control(func(fd uintptr) { sendErr = writeMessage(ctl, a, int(fd)) })
	return errors.Join(err, sendErr)
}

func makeSocket(r socketRequest) (*os.File, error) {
	fd, err := unix.Socket(r.Domain, r.Type|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, r.Protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return os.NewFile(uintptr(fd), "socket"), nil
}

// makeCard makes the card and opens its outside end.
func makeCard(cfg Config) (answer, *os.File, error) {
	if err := setUp("lo"); err != nil {
		return answer{}, nil, err
	}
	var note string
	if !cfg.NoTAP {
		a, f, err := makeTAP(cfg)
		if err == nil {
			return a, f, nil
		}
		if !noTAPs(err) {
			return answer{}, nil, err
		}
		note = "no TAP: " + err.Error()
	}
	a, f, err := makeVeth(cfg)
	a.Note = note
	return a, f, err
}

// noTAPs reports whether err is about opening the device node. EPERM from an ioctl on it
// is about our capabilities, and a veth pair would need the same ones.
func noTAPs(err error) bool {
	var oe *link.OpenError
	return errors.As(err, &oe) && oe.Step == "open /dev/net/tun"
}

func makeTAP(cfg Config) (answer, *os.File, error) {
	tap, err := link.OpenTAP(link.TAPConfig{Name: cfg.Name, MTU: cfg.MTU})
	if err != nil {
		return answer{}, nil, err
	}
	defer tap.Close()
	if err := address(cfg.Name, cfg.Addr); err != nil {
		return answer{}, nil, err
	}
	if err := local(cfg.Addr); err != nil {
		return answer{}, nil, err
	}
	f, err := tap.File()
	return answer{Kind: kindTAP, Info: tap.Info()}, f, err
}

func makeVeth(cfg Config) (answer, *os.File, error) {
	const far = "outside"
	pair := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: cfg.Name, MTU: cfg.MTU, TxQLen: -1},
		PeerName:  far,
		PeerMTU:   uint32(cfg.MTU),
	}
	if err := netlink.LinkAdd(pair); err != nil {
		return answer{}, nil, fmt.Errorf("make a veth pair: %w", err)
	}
	// The kernel leaves frames of a veth unfinished, with partial checksums and
	// unsegmented, for a device that would finish them. Ours must send complete frames.
	if err := offloadsOff(cfg.Name); err != nil {
		return answer{}, nil, fmt.Errorf("turn the offloads of %s off: %w", cfg.Name, err)
	}
	noIPv6(far)
	if err := noARP(far); err != nil {
		return answer{}, nil, err
	}
	if err := setUp(far); err != nil {
		return answer{}, nil, err
	}
	if err := address(cfg.Name, cfg.Addr); err != nil {
		return answer{}, nil, err
	}
	if err := setUp(cfg.Name); err != nil {
		return answer{}, nil, err
	}
	for _, name := range []string{cfg.Name, far} {
		if err := running(name); err != nil {
			return answer{}, nil, err
		}
	}
	if err := local(cfg.Addr); err != nil {
		return answer{}, nil, err
	}
	p, err := link.OpenPacket(far)
	if err != nil {
		return answer{}, nil, err
	}
	defer p.Close()
	f, err := p.File()
	return answer{Kind: kindVeth, Info: link.Info{Name: cfg.Name, MTU: p.MTU(), MAC: p.MAC()}}, f, err
}

// address gives the card its address. No other host is on the wire yet, so the kernel
// need not probe an IPv6 address for duplicates, which takes a second.
func address(name string, prefix netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	ip := prefix.Addr()
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   ip.AsSlice(),
		Mask: net.CIDRMask(prefix.Bits(), ip.BitLen()),
	}}
	if ip.Is6() {
		addr.Flags = unix.IFA_F_NODAD
	} else {
		noIPv6(name)
	}
	if err := netlink.AddrAdd(l, addr); err != nil {
		return fmt.Errorf("give %s the address %s: %w", name, prefix, err)
	}
	return nil
}

// noIPv6 prevents the kernel from sending IPv6 packets on its own. If /proc/sys is
// read-only it does send them, which only clutters a capture.
func noIPv6(name string) {
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0)
}

func noARP(name string) error {
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetARPOff(l)
	}
	if err != nil {
		return fmt.Errorf("turn ARP off on %s: %w", name, err)
	}
	return nil
}

func setUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}

// running waits until the kernel has noticed that the other end of a veth pair is up. It
// checks once a second, and drops frames until then.
func running(name string) error {
	return poll("wait for "+name+" to run", func() (bool, error) {
		l, err := netlink.LinkByName(name)
		return err == nil && l.Attrs().OperState == netlink.OperUp, err
	})
}

// local waits until the kernel accepts the address as its own. An IPv6 address is set at
// once, but a worker adds its route.
func local(prefix netip.Prefix) error {
	return poll("wait for the address "+prefix.Addr().String(), func() (bool, error) {
		routes, err := netlink.RouteGet(prefix.Addr().AsSlice())
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
			return false, nil
		}
		return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL, err
	})
}

// poll repeats ready until it holds, for conditions that the kernel does not announce
// conveniently.
func poll(what string, ready func() (bool, error)) error {
	for end := time.Now().Add(patience / 2); ; time.Sleep(time.Millisecond) {
		ok, err := ready()
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if ok {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: %w", what, unix.ETIMEDOUT)
		}
	}
}
