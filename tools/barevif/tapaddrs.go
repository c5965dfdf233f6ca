package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tapAddresses are the addresses that this program has given to a TAP. The TAP may have others,
// of this machine's administrator: they stay what they are.
type tapAddresses struct {
	tap   string
	addrs []netip.Prefix
}

// adoptAddresses returns those of addrs that the TAP has already, given to it by the process from
// which it was taken over, and gives it the others.
func adoptAddresses(tap string, addrs []netip.Prefix) (*tapAddresses, error) {
	t := &tapAddresses{tap: tap}
	err := onInterface(tap, "read the addresses of "+tap, func(l netlink.Link) error {
		there, err := addressesOn(l)
		for _, a := range there {
			if p := prefixOf(a); slices.Contains(addrs, p) {
				t.addrs = append(t.addrs, p)
			}
		}
		return err
	})
	if err == nil {
		_, err = t.set(addrs)
	}
	return t, err
}

// set makes addrs the addresses that this program has given to the TAP: it takes the others away,
// and adds those that are missing. One that the TAP has from others stays theirs. It reports
// whether there was something to change. After an error the next call goes on.
func (t *tapAddresses) set(addrs []netip.Prefix) (changed bool, err error) {
	addrs = slices.DeleteFunc(slices.Clone(addrs), func(p netip.Prefix) bool { return !p.IsValid() })
	var over []netip.Prefix
	for _, p := range t.addrs {
		if !slices.Contains(addrs, p) {
			over = append(over, p)
		}
	}
	missing := slices.DeleteFunc(slices.Clone(addrs), func(p netip.Prefix) bool { return slices.Contains(t.addrs, p) })
	if len(over) == 0 && len(missing) == 0 {
		return false, nil
	}
	err = onInterface(t.tap, "change the addresses of "+t.tap, func(l netlink.Link) error {
		before, err := addressesOn(l)
		if err != nil {
			return err
		}
		for _, p := range over {
			changed = true
			if err := t.remove(l, p); err != nil {
				return err
			}
		}
		if err := t.restore(l, before, over); err != nil {
			return err
		}
		for _, p := range missing {
			if slices.ContainsFunc(before, func(a netlink.Addr) bool { return prefixOf(a) == p }) && !slices.Contains(over, p) {
				continue // others'
			}
			changed = true
			if err := addAddress(t.tap, p); err != nil {
				return err
			}
			t.addrs = append(t.addrs, p)
		}
		return nil
	})
	return changed, err
}

// remove takes one address away. It may be gone already.
func (t *tapAddresses) remove(l netlink.Link, p netip.Prefix) error {
	if p.Addr().Is4() {
		// Without, Linux removes all other addresses of a network with the first of it. Where
		// the setting cannot be written, as in some containers, restore adds them again.
		_ = os.WriteFile("/proc/sys/net/ipv4/conf/"+t.tap+"/promote_secondaries", []byte("1"), 0o644)
	}
	err := netlink.AddrDel(l, &netlink.Addr{IPNet: ipNet(p)})
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("take %s away: %w", p, err)
	}
	t.addrs = slices.DeleteFunc(t.addrs, func(q netip.Prefix) bool { return q == p })
	return nil
}

// restore adds the addresses again that are gone, but for those that were to go.
func (t *tapAddresses) restore(l netlink.Link, before []netlink.Addr, over []netip.Prefix) error {
	if len(over) == 0 {
		return nil
	}
	now, err := addressesOn(l)
	if err != nil {
		return err
	}
	for _, a := range before {
		if slices.Contains(over, prefixOf(a)) || slices.ContainsFunc(now, func(b netlink.Addr) bool { return prefixOf(a) == prefixOf(b) }) {
			continue
		}
		a.Flags &^= unix.IFA_F_SECONDARY // the kernel says which are
		if err := netlink.AddrReplace(l, &a); err != nil {
			return fmt.Errorf("add %s again: %w", prefixOf(a), err)
		}
	}
	return nil
}

// addressesOn returns the addresses of an interface.
func addressesOn(l netlink.Link) ([]netlink.Addr, error) {
	return netlink.AddrList(l, netlink.FAMILY_ALL)
}

// prefixOf returns an address of an interface with its host bits; the zero Prefix if it has none.
func prefixOf(a netlink.Addr) netip.Prefix {
	if a.IPNet == nil {
		return netip.Prefix{}
	}
	ip, _ := netip.AddrFromSlice(a.IP)
	ones, _ := a.Mask.Size()
	return netip.PrefixFrom(ip.Unmap(), ones)
}
