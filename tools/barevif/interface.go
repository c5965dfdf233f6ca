package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/pvnet/packet"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A tap is a TAP with one queue or several. It is the link of its first queue, and closes
// all of them.
type tap struct {
	*link.TAP
	queues []link.Link
}

func (t *tap) Close() (err error) {
	for _, l := range t.queues {
		err = errors.Join(err, l.Close())
	}
	return err
}

// queuesOfLink returns the links to join to the queues of a vif.
func queuesOfLink(l link.Link) []link.Link {
	if t, ok := l.(*tap); ok {
		return t.queues
	}
	return []link.Link{l}
}

// openTAP opens a TAP with that many queues. It retries for 2 s, because a process that was
// just killed may still hold the name.
func openTAP(cfg link.TAPConfig, queues int) (*tap, error) {
	open := func() ([]*link.TAP, error) { return link.OpenTAPQueues(cfg, queues) }
	if queues == 1 {
		open = func() ([]*link.TAP, error) {
			t, err := link.OpenTAP(cfg)
			return []*link.TAP{t}, err
		}
	}
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		taps, err := open()
		if errors.Is(err, unix.EBUSY) && time.Now().Before(end) {
			continue
		}
		if err != nil {
			return nil, err
		}
		t := &tap{TAP: taps[0]}
		for _, q := range taps {
			t.queues = append(t.queues, q)
		}
		return t, nil
	}
}

// onInterface calls do with the interface of that name. The error says what was tried.
func onInterface(name, what string, do func(netlink.Link) error) error {
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = do(l)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// setMTU sets the interface's MTU, in bytes, unless it has that MTU already.
func setMTU(name string, mtu int) error {
	return onInterface(name, fmt.Sprintf("give %s the MTU %d", name, mtu), func(l netlink.Link) error {
		if l.Attrs().MTU == mtu {
			return nil
		}
		return netlink.LinkSetMTU(l, mtu)
	})
}

// setMAC sets the interface's Ethernet address.
func setMAC(name string, mac pvnet.MAC) error {
	return onInterface(name, fmt.Sprintf("give %s the address %s", name, mac), func(l netlink.Link) error {
		return netlink.LinkSetHardwareAddr(l, net.HardwareAddr(mac[:]))
	})
}

// setDown takes the interface down.
func setDown(name string) error {
	return onInterface(name, "take "+name+" down", func(l netlink.Link) error { return netlink.LinkSetDown(l) })
}

// addAddress adds addr to the interface, if addr is valid.
func addAddress(name string, addr netip.Prefix) error {
	if !addr.IsValid() {
		return nil
	}
	return onInterface(name, fmt.Sprintf("give %s the address %s", name, addr), func(l netlink.Link) error {
		a, err := netlink.ParseAddr(addr.String())
		if err != nil {
			return err
		}
		if addr.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // no duplicate address detection: no other station is on the link
		}
		return netlink.AddrReplace(l, a)
	})
}

// setBridge puts the interface on a bridge.
func setBridge(name, bridge string) error {
	return onInterface(name, fmt.Sprintf("put %s on bridge %s", name, bridge), func(l netlink.Link) error {
		br, err := netlink.LinkByName(bridge)
		if err != nil {
			return err
		}
		return netlink.LinkSetMaster(l, br)
	})
}

// announce has the interface send an announcement of each of its addresses, as
// netdev_notify_peers of Linux does: the switches and neighbours behind a backend learn
// from them where the addresses are now. The kernel itself does that for a TAP only if
// sysctl arp_notify or ndisc_notify asks for it.
func announce(name string) error {
	return onInterface(name, "announce the addresses of "+name, func(l netlink.Link) error {
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		var mac [6]byte
		copy(mac[:], l.Attrs().HardwareAddr)
		for _, a := range addrs {
			ip, _ := netip.AddrFromSlice(a.IP)
			if f := packet.AppendAnnouncement(nil, mac, ip); f != nil {
				if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index}); err != nil {
					return err
				}
			}
		}
		return nil
	})
}
