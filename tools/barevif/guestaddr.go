package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"

	"barevif/pvnet"
	"barevif/pvnet/netif"
	"barevif/tools/cli"
	"barevif/xenbus/xenstore"
)

// autoAddr is the value of --addr of a guest that takes the toolstack's addresses.
const autoAddr = "auto"

// defaultAddr is the address of a guest that was given none.
var defaultAddr = netip.MustParsePrefix("10.9.0.2/24")

// An autoAddress is a value of --addr of a guest.
type autoAddress struct {
	dhcp bool         // the addresses are those of DHCP and routers
	on   bool         // the addresses are the toolstack's
	bits int          // the length of those of which it says none; 0: not given
	addr netip.Prefix // if neither
}

// parseAuto parses a value of --addr: an address with a prefix, auto or auto/BITS.
func parseAuto(s string) (a autoAddress, err error) {
	bits, on := strings.CutPrefix(s, autoAddr)
	switch {
	case on && bits == "":
		return autoAddress{on: true}, nil
	case on && bits[0] == '/':
		if n, err := strconv.Atoi(bits[1:]); err == nil && n >= 1 && n <= 128 {
			return autoAddress{on: true, bits: n}, nil
		}
	}
	p, err := parseAddr(s, s, "10.9.0.2/24, or auto, or auto/24")
	return autoAddress{addr: p}, err
}

// parseAddr parses the address of a value of --addr, which a host can have. like is what to write.
func parseAddr(value, s, like string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, cli.BadValue("addr", value, "an address with a prefix, like "+like)
	}
	if !isHost(p) {
		return netip.Prefix{}, cli.BadValue("addr", value, "an address that a host can have in a network of that length, like "+like)
	}
	return p, nil
}

// isHost reports whether a host can have the address of p: not those that RFC 6890 has for other
// purposes, nor the first or the last of a network of IPv4 with more than two.
func isHost(p netip.Prefix) bool {
	a := p.Addr()
	if p.Bits() == 0 || a.IsMulticast() || a.IsUnspecified() || a.IsLoopback() {
		return false
	}
	if !a.Is4() || p.Bits() > 30 {
		return a.Is6() || a.As4()[0] != 0 && a.As4()[0] < 240
	}
	b := a.As4()
	host, all := binary.BigEndian.Uint32(b[:]), ^uint32(0)>>p.Bits()
	return b[0] != 0 && b[0] < 240 && host&all != 0 && host&all != all
}

// of returns the toolstack's addresses for the guest of a vif.
func (a *autoAddress) of(ctx context.Context, dev *pvnet.Device) (pvnet.GuestAddresses, error) {
	return a.complete(dev.GuestAddresses(ctx))
}

// complete gives addresses of the toolstack the length that --addr has for those without one. An
// error of theirs it advises on.
func (a *autoAddress) complete(g pvnet.GuestAddresses, err error) (pvnet.GuestAddresses, error) {
	if _, bad := errors.AsType[*xenstore.ValueError](err); bad {
		return g, &cli.Advice{Err: err, Next: "correct ip=... in the domain's configuration, or give the address with --addr IP/BITS"}
	}
	if err != nil {
		return g, err
	}
	for i, p := range g.Addrs {
		if a.bits == 0 || !p.IsSingleIP() {
			continue
		}
		if a.bits > p.Addr().BitLen() {
			return g, &cli.Advice{Err: fmt.Errorf("--addr %s/%d: %s=%s has no network of %d bits", autoAddr, a.bits, netif.KeyIP, p.Addr(), a.bits), Usage: true}
		}
		g.Addrs[i] = netip.PrefixFrom(p.Addr(), a.bits)
	}
	return g, nil
}

// follow calls set with the toolstack's addresses when they are others than those of before, until
// ctx or the device ends. What the toolstack writes and cannot be used, or set refuses, is
// logged, and the addresses stay.
func (a *autoAddress) follow(ctx context.Context, dev *pvnet.Device, log *slog.Logger, set func(g pvnet.GuestAddresses) error) {
	for g, err := range dev.GuestAddressChanges(ctx) {
		if g, err = a.complete(g, err); err == nil {
			err = set(g)
		}
		if err == nil || errors.Is(err, pvnet.ErrDisconnected) {
			continue
		}
		attrs := []any{"vif", dev.ID(), "key", netif.KeyIP, "err", err}
		if advice, ok := errors.AsType[*cli.Advice](err); ok && advice.Next != "" {
			attrs = append(attrs, "next", advice.Next)
		}
		log.Error("the toolstack has other addresses for a vif, which keeps those it has", attrs...)
	}
}

// isLiteral reports whether a value of --addr is one address, which two vifs cannot have.
func isLiteral(value string) bool {
	return !strings.HasPrefix(value, autoAddr) && value != dhcpAddr
}

// noLength is the error for an address of the toolstack's that does not say its network.
func noLength(a netip.Addr) error {
	return &cli.Advice{
		Err:  fmt.Errorf("the toolstack's %s=%s does not say which network the address is in", netif.KeyIP, a),
		Next: fmt.Sprintf("write %s=%s/24 in the domain's configuration, or give --addr %s/24: with the number of bits of that network", netif.KeyIP, a, autoAddr),
	}
}
