package pvnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"barevif/pvnet/netif"
	"barevif/xenbus/xenstore"
)

// GuestAddresses are the addresses that the toolstack has for the guest of a vif: the key "ip"
// in the backend's directory, which is ip= in a domain's configuration. It has one of two
// forms. libxl documents a list: "10.0.0.7/24 fd00::7". Frontends such as Mini-OS's and
// Unikraft's, for which the list is no use, read one IPv4 address with its netmask and perhaps
// a router: "10.0.0.7 255.255.255.0 10.0.0.1".
type GuestAddresses struct {
	// Addrs has at most 64 addresses, each with its host bits. One of which the key says no
	// length has all bits in its prefix.
	Addrs []netip.Prefix

	Gateway netip.Addr // router to other networks; zero: the key names none
}

// Equal reports whether g and o are the same addresses, in the same order, with the same router.
func (g GuestAddresses) Equal(o GuestAddresses) bool {
	return slices.Equal(g.Addrs, o.Addrs) && g.Gateway == o.Gateway
}

// wantIPs describes a usable value of the key.
var wantIPs = fmt.Sprintf("a list of at most %d addresses of stations, separated by blanks, or an IPv4 address with a netmask and perhaps a router", mostIPs)

// GuestAddresses reads which addresses the toolstack has for this domain's vif. It is for
// programs that configure TCP/IP on it and were told no address; the device itself uses none.
// The backend's domain may write the key too, so that it can give a guest any address, as a
// DHCP server could.
//
// The result is empty if there is no key, or if this domain may not read it. The error is a
// [*xenstore.ValueError] for a key that cannot be used, [ErrNotFrontend], [ErrDisconnected],
// or what xenstore refuses.
func (d *Device) GuestAddresses(ctx context.Context) (GuestAddresses, error) {
	if err := d.endError(); err != nil {
		return GuestAddresses{}, err
	}
	if d.fromBackend == nil {
		return GuestAddresses{}, ErrNotFrontend
	}
	v, path, err := d.fromBackend(ctx, netif.KeyIP)
	switch {
	case errors.Is(err, xenstore.ErrAccess):
		return GuestAddresses{}, nil
	case err != nil:
		return GuestAddresses{}, fmt.Errorf("pvnet: vif %s: %w", d.id, err)
	case v == "":
		return GuestAddresses{}, nil
	}
	g, ok := parseAddresses(v)
	if !ok {
		return GuestAddresses{}, fmt.Errorf("pvnet: vif %s: %w", d.id, &xenstore.ValueError{Path: path, Value: xenstore.Clip(v), Want: wantIPs})
	}
	return g, nil
}

// GuestAddressChanges yields the addresses that [Device.GuestAddresses] returns now, and then
// those that replace them, as the toolstack or the backend changes the key, until ctx or the
// device ends. Changes that follow each other fast may be one.
//
// A key that cannot be used yields its error, and the addresses before it are to be kept: a
// later value that can be used is yielded, even if it is the one from before. While the
// backend's directory is gone, as between two backends, there is no change either. For the
// device of a backend it yields [ErrNotFrontend] and ends.
func (d *Device) GuestAddressChanges(ctx context.Context) iter.Seq2[GuestAddresses, error] {
	return func(yield func(GuestAddresses, error) bool) {
		var last string // what was yielded last; of no element: it is empty
		for {
			d.mu.Lock()
			changed := d.addressed // before the key is read: a later change is not missed
			d.mu.Unlock()
			g, err := d.GuestAddresses(ctx)
			if ctx.Err() != nil || d.endError() != nil {
				return
			}
			now := fmt.Sprint(g, err)
			if now != last && (last == "" || !d.unaddressed(ctx, g, err)) {
				if last = now; !yield(g, err) || errors.Is(err, ErrNotFrontend) {
					return
				}
			}
			select {
			case <-changed:
			case <-d.done:
				return
			case <-ctx.Done():
				return
			}
		}
	}
}

// unaddressed reports whether g is empty because the backend's whole directory is gone, or is
// only being made: the key "frontend" is written with it, and stays.
func (d *Device) unaddressed(ctx context.Context, g GuestAddresses, err error) bool {
	if err != nil || len(g.Addrs) > 0 {
		return false
	}
	v, _, err := d.fromBackend(ctx, netif.KeyFrontend)
	return err != nil || v == ""
}

// readdress has the readers of GuestAddressChanges look at the key again.
func (d *Device) readdress() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.addressed)
	d.addressed = make(chan struct{})
}

// parseAddresses parses either form of the key "ip".
func parseAddresses(s string) (g GuestAddresses, ok bool) {
	if g, ok = parseMasked(s); ok {
		return g, true
	}
	g.Addrs, ok = parseList(s)
	return g, ok
}

// parseIPs returns the addresses of either form for routes to them: a netmask says nothing of
// what is behind the vif.
func parseIPs(s string) (ips []netip.Prefix, ok bool) {
	if g, ok := parseMasked(s); ok {
		a := g.Addrs[0].Addr()
		return []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}, true
	}
	return parseList(s)
}

// parseMasked parses an IPv4 address with a netmask and perhaps a router. No address of a
// station looks like a netmask.
func parseMasked(s string) (g GuestAddresses, ok bool) {
	words := strings.Fields(s)
	if len(words) != 2 && len(words) != 3 {
		return g, false
	}
	var addrs [3]netip.Addr
	for i, w := range words {
		a, err := netip.ParseAddr(w)
		if err != nil || !a.Is4() {
			return g, false
		}
		addrs[i] = a
	}
	mask := binary.BigEndian.Uint32(addrs[1].AsSlice())
	ones := bits.LeadingZeros32(^mask)
	if mask<<ones != 0 || ones < 8 || !station(addrs[0]) { // a one after the first zero
		return g, false
	}
	p := netip.PrefixFrom(addrs[0], ones)
	if gw := addrs[2]; gw.IsValid() {
		if !station(gw) || !p.Contains(gw) || gw == addrs[0] {
			return g, false
		}
		g.Gateway = gw
	}
	g.Addrs = []netip.Prefix{p}
	return g, true
}

// parseList parses a list of addresses, each with or without the length of a prefix.
func parseList(s string) (ips []netip.Prefix, ok bool) {
	for field := range strings.FieldsSeq(s) {
		p, err := netip.ParsePrefix(field)
		if err != nil {
			a, err := netip.ParseAddr(field)
			if err != nil || a.Zone() != "" {
				return nil, false
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
		if len(ips) == mostIPs || !station(p.Addr()) {
			return nil, false
		}
		ips = append(ips, p)
	}
	return ips, len(ips) > 0
}

// station reports whether a can be the address of one station: 240.0.0.0/4 is reserved, and
// holds the netmasks too.
func station(a netip.Addr) bool {
	return !a.Is4In6() && !a.IsUnspecified() && !a.IsMulticast() && !(a.Is4() && a.As4()[0] >= 240)
}
