package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/link"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// openTAP opens a TAP. It retries for 2 s, because a process that was just killed may still
// hold the name.
func openTAP(cfg link.TAPConfig) (*link.TAP, error) {
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		tap, err := link.OpenTAP(cfg)
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return tap, err
		}
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
