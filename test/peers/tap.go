package main

import (
	"fmt"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tapPeer is two TAP devices on a bridge: write(2) on one, read(2) on the other. The bridge
// needs a second until it forwards, so all measurements share one bridge.
func (n *network) tapPeer(j *job) (link, error) {
	if n.err != nil {
		return nil, n.err
	}
	if n.tap[0] == nil {
		if err := n.newTaps(j); err != nil {
			return nil, err
		}
	}
	a, b := int(n.tap[0].Fd()), int(n.tap[1].Fd())
	for _, fd := range []int{a, b} {
		if err := drain(fd); err != nil {
			return nil, err
		}
	}
	there, back := j.source().frame, j.source().frame
	copy(back, macA[:])
	copy(back[6:], macB[:])
	return &fdLink{a: a, b: b, batch: 1, lossy: true, end: func() {}, wake: func() {
		unix.Write(a, there)
		unix.Write(b, back)
	}}, nil
}

func (n *network) newTaps(j *job) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(bridge); err != nil {
		return &missing{"a bridge", "load the module bridge as root", err}
	}
	for i, name := range []string{"peers-ta", "peers-tb"} {
		f, err := openTap(name)
		if err != nil {
			netlink.LinkDel(bridge)
			return err
		}
		n.tap[i] = f
		l, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetMTU(l, 65521)
		}
		if err == nil {
			err = netlink.LinkSetMaster(l, bridge)
		}
		if err == nil {
			err = netlink.LinkSetUp(l)
		}
		if err != nil {
			return fmt.Errorf("TAP device %s: %w", name, err)
		}
	}
	if err := netlink.LinkSetMTU(bridge, 65521); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	// Ports forward once the link watcher has run, within a second or so. Then each port
	// sends a frame, from which the bridge learns the port's address.
	time.Sleep(1500 * time.Millisecond)
	for i, from := range [][6]byte{macA, macB} {
		frame := j.source().frame[:60]
		copy(frame[6:], from[:])
		if _, err := n.tap[i].Write(frame); err != nil {
			return fmt.Errorf("TAP device: %w", err)
		}
	}
	return nil
}

func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &missing{"/dev/net/tun", "load the module tun as root, or let this user open it", err}
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, &missing{"a TAP device", "it needs CAP_NET_ADMIN in its network namespace", err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// drain reads the frames that are left from the previous measurement.
func drain(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	b := make([]byte, 1<<16)
	for {
		if _, err := unix.Read(fd, b); err != nil && err != unix.EINTR {
			break
		}
	}
	return unix.SetNonblock(fd, false)
}
