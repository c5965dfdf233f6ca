package netstack

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
)

// Config configures a Stack. It needs a source of addresses: Addr, Addrs, DHCP, RA or Later.
// [Auto] finds out which.
type Config struct {
	Addr    netip.Prefix // our address and the network it is in, of at least one bit
	Gateway netip.Addr   // router to all other networks; zero for none
	MTU     int          // size of the largest IP packet in bytes, 68 (IPv6: 1280) to the device's MTU; 0 means the device's

	Addrs    []netip.Prefix // further addresses, of any family
	Gateways []netip.Addr   // further routers; with Gateway, one per family at most
	DNS      []netip.Addr   // name servers that are asked before those that DHCP and routers name

	Later bool // SetAddresses may give addresses of any family: listeners for any address take them, too

	DHCP bool // lease an IPv4 address
	RA   bool // follow router advertisements: IPv6 addresses, routes and name servers

	Hostname string       // told to the DHCP server, at most 255 bytes; empty: none
	Logger   *slog.Logger // addresses that come and go, and what is refused; nil: silent
}

// addrs returns all addresses that the caller has assigned.
func (cfg *Config) addrs() []netip.Prefix {
	if cfg.Addr.IsValid() {
		return append([]netip.Prefix{cfg.Addr}, cfg.Addrs...)
	}
	return cfg.Addrs
}

// gateways returns all routers that the caller has named.
func (cfg *Config) gateways() []netip.Addr {
	if cfg.Gateway.IsValid() {
		return append([]netip.Addr{cfg.Gateway}, cfg.Gateways...)
	}
	return cfg.Gateways
}

// families reports for which families the stack has, or may get, addresses.
func (cfg *Config) families() (has4, has6 bool) {
	has4, has6 = cfg.DHCP || cfg.Later, cfg.RA || cfg.Later
	for _, p := range cfg.addrs() {
		has4 = has4 || p.Addr().Is4()
		has6 = has6 || p.Addr().Is6()
	}
	return has4, has6
}

// leastMTU6 is the smallest MTU of IPv6 (RFC 8200, section 5).
const leastMTU6 = 1280

// mostHostname is the length of the longest option of a DHCP message, in bytes (RFC 2132, section 2).
const mostHostname = 255

// station reports whether an address can be that of a station, here or elsewhere. Of IPv4 those of
// 0.0.0.0/8 and 240.0.0.0/4 cannot (RFC 6890).
func station(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && !a.IsUnspecified() && !a.IsMulticast() && !(a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240))
}

func (cfg *Config) check(mtu int) error {
	has4, has6 := cfg.families()
	if !has4 && !has6 {
		return errors.New("no source of addresses: set Config.Addr, Addrs, DHCP, RA or Later")
	}
	if cfg.Addr != (netip.Prefix{}) && !cfg.Addr.IsValid() {
		return fmt.Errorf("Config.Addr %v is no address for a host", cfg.Addr)
	}
	if err := cfg.checkStatic(); err != nil {
		return err
	}
	if len(cfg.Hostname) > mostHostname {
		return fmt.Errorf("Config.Hostname has %d bytes, %d at most fit a DHCP message's option", len(cfg.Hostname), mostHostname)
	}
	for _, a := range cfg.DNS {
		if !station(a) || a.Zone() != "" {
			return fmt.Errorf("Config.DNS %v is no address of a server", a)
		}
	}
	least := 68
	if has6 {
		least = leastMTU6
	}
	if cfg.MTU != 0 && (cfg.MTU < least || cfg.MTU > mtu) {
		return fmt.Errorf("Config.MTU %d is not between %d and the device's %d", cfg.MTU, least, mtu)
	}
	return nil
}

// checkStatic checks the addresses and routers that the caller has assigned.
func (cfg *Config) checkStatic() error {
	seen := map[netip.Addr]bool{}
	for _, p := range cfg.addrs() {
		a := p.Addr()
		switch {
		case !p.IsValid() || !station(a) || a.IsLoopback():
			return fmt.Errorf("Config.Addr %v is no address for a host", p)
		case p.Bits() == 0:
			return fmt.Errorf("Config.Addr %v has all addresses in its network: write the length of the network's", p)
		case groupOf(p, a):
			return fmt.Errorf("Config.Addr %v is the network's own or its broadcast address: write that of a host", p)
		}
		if seen[a] {
			return fmt.Errorf("Config.Addrs has %v twice", a)
		}
		seen[a] = true
	}
	return cfg.checkGateways()
}

// groupOf reports whether a is the first or the last address of the network of p, which are no
// host's where a network of IPv4 has more than two.
func groupOf(p netip.Prefix, a netip.Addr) bool {
	return a.Is4() && p.Addr().Is4() && p.Bits() < 31 && (a == p.Masked().Addr() || a == lastOf(p))
}

// lastOf returns the last address of an IPv4 prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

func (cfg *Config) checkGateways() error {
	var count [2]int
	for _, g := range cfg.gateways() {
		if !cfg.reaches(g) {
			return fmt.Errorf("Config.Gateway %v is not another station of the stack's networks %v", g, cfg.networks())
		}
		family := 0
		if g.Is6() {
			family = 1
		}
		if count[family]++; count[family] > 1 {
			return fmt.Errorf("Config.Gateways has two routers of one family, the second is %v", g)
		}
	}
	return nil
}

// reaches reports whether g may be another station of one of the stack's networks. An
// IPv6 router may have its link-local address alone.
func (cfg *Config) reaches(g netip.Addr) (ok bool) {
	for _, p := range cfg.addrs() {
		if p.Addr() == g || groupOf(p, g) {
			return false
		}
		ok = ok || p.Contains(g) || g.Is6() && g.IsLinkLocalUnicast() && p.Addr().Is6()
	}
	return ok && g.Zone() == ""
}

func (cfg *Config) networks() (list []netip.Prefix) {
	for _, p := range cfg.addrs() {
		list = append(list, p.Masked())
	}
	return list
}
