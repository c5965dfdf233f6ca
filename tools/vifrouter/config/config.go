// Package config reads the configuration file of the router: one statement a line, words
// separated by blanks, "#" begins a comment. [Example] is a complete one with every statement.
//
// A wrong line is an [Error], which names the line, what is wrong, and what to write
// instead. [Parse] goes on after it and returns all of them at once, up to [MaxErrors]. Nothing is
// ignored: a statement, a word or a combination that the router does not honour is an error.
package config

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/router"
)

// Bounds of a file. A longer file, or one with more statements of a kind, is refused.
const (
	MaxFile     = 1 << 20 // bytes
	MaxLine     = 4096    // bytes
	MaxNetworks = 64
	MaxGuests   = 1000
	MaxRoutes   = 1024
	MaxRules    = 2048 // together with the forwards and the router's own rules, less than router.MaxRules
	MaxForwards = router.MaxForwards
	MaxErrors   = 100 // errors, after which the rest of a file is not read
	MaxServers  = 4   // name servers
	MaxName     = 32
	MaxPool     = 1 << 16 // addresses of one pool
)

// A Config is a file that was checked as a whole. It is immutable.
type Config struct {
	Uplink   Uplink
	Networks []Network
	Guests   []Guest
	Routes   []Route
	Forwards []Forward
	Rules    []Rule
	Default  Action // of packets that no rule matches
	DNS      DNS
	Lease    time.Duration // how long a DHCP lease lasts; 0: there is no DHCP server
	Metrics  Metrics
	Limits   Limits
}

// An Uplink is the card that leads to the world: a frontend of the router's domain.
type Uplink struct {
	Vif        string
	DHCP       bool         // IPv4 by DHCP; then there is no IPv4
	Auto6      bool         // IPv6 by router advertisements; then there is no IPv6
	IPv4, IPv6 netip.Prefix // own address, zero: none
	Via4, Via6 netip.Addr   // the next router, zero: none
	NAT4, NAT6 bool         // guests leave with the uplink's address
	line       int
}

// A Network is what guests have in common: the prefix of their addresses, and the rules that
// name it. Each vif in it is a link of its own: guests of one network reach each other through
// the router alone, if a rule allows it.
type Network struct {
	Name        string
	IPv4        netip.Prefix // zero: none
	Router      netip.Addr   // the router's address in IPv4
	First, Last netip.Addr   // pool for guests without a fixed address; zero: none
	IPv6        netip.Prefix // /48 to /64; each vif gets a /64 of it; zero: none
	line        int
}

// A Guest says to which network a vif belongs, and which address it has. All that it names
// must be as it says.
type Guest struct {
	Name    string     // "*": the vifs that no other guest matches
	Network string     //
	MAC     pvnet.MAC  // as the toolstack wrote it; zero: any
	Domain  uint16     // 0: any
	Vif     string     // empty: any
	Addr    netip.Addr // fixed IPv4 address; zero: from the toolstack's ip=, or from the pool
	line    int
}

// A Route leads to a network behind another router at the uplink.
type Route struct {
	Prefix netip.Prefix
	Via    netip.Addr
	line   int
}

// A Forward leads ports of the uplink's address to a guest.
type Forward struct {
	Proto       uint8 // 6 or 17
	First, Last uint16
	To          netip.Addr
	ToPort      uint16     // of First
	At          netip.Addr // the address at the uplink; zero: any
	line        int
}

// An Action is what a rule does.
type Action uint8

const (
	Drop Action = iota
	Allow
	Reject
)

func (a Action) String() string { return [...]string{"drop", "allow", "reject"}[a] }

// A Place is where a packet comes from or goes to.
type Place struct {
	Kind PlaceKind
	Name string // of the network or the guest
}

// A PlaceKind says what a Place is.
type PlaceKind uint8

const (
	Anywhere PlaceKind = iota // every vif, but not the router itself
	AtUplink
	AtRouter
	InNetwork
	AtGuest
)

// Ports are the ports from First to Last.
type Ports struct{ First, Last uint16 }

// A Rule decides on packets that begin a flow. The first that matches does.
type Rule struct {
	Name               string
	Action             Action
	From, To           Place
	Family             int // 4, 6, or 0
	Source, Dest       []netip.Prefix
	Proto              []uint8
	SrcPorts, DstPorts []Ports
	Types              []uint8 // of ICMP or ICMPv6
	Related, Invalid   bool    // packets of that state instead of new ones
	line               int
}

// DNS configures the forwarder.
type DNS struct {
	Off      bool
	Upstream []netip.AddrPort // empty: the servers of the uplink's DHCP lease and its routers
	line     int
}

// Metrics says where the counters are served.
type Metrics struct {
	Addr    netip.AddrPort // zero: nowhere
	Machine bool           // by the kernel of this machine, not by the router's own TCP/IP
	line    int
}

// Limits are sizes of tables. Another size takes a new start of the router.
type Limits struct {
	Flows, FlowsPerGuest int // 0: the router's default
}

// An Error is about a line of a file.
type Error struct {
	File    string
	Line    int    // from 1; 0: the file as a whole
	What    string // what is wrong
	Instead string // what to write
}

func (e *Error) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s: %s", e.File, e.What, e.Instead)
	}
	return fmt.Sprintf("%s:%d: %s: %s", e.File, e.Line, e.What, e.Instead)
}

// Errors are all errors of a file, in the order of its lines.
type Errors []*Error

func (e Errors) Error() string {
	var b strings.Builder
	for i, one := range e {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(one.Error())
	}
	return b.String()
}

// Load reads and checks a file. The error is the system's or Errors.
func Load(name string) (*Config, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, err
	}
	return Parse(name, b)
}

// NetworkOf returns the network of that name, or nil.
func (c *Config) NetworkOf(name string) *Network {
	for i := range c.Networks {
		if c.Networks[i].Name == name {
			return &c.Networks[i]
		}
	}
	return nil
}

// GuestOf returns the guest that a vif is: the first that matches, else "*", else nil.
func (c *Config) GuestOf(domain uint16, vif string, mac pvnet.MAC) *Guest {
	var rest *Guest
	for i := range c.Guests {
		g := &c.Guests[i]
		if g.Name == "*" {
			rest = g
			continue
		}
		if (g.MAC == pvnet.MAC{} || g.MAC == mac) && (g.Domain == 0 || g.Domain == domain) && (g.Vif == "" || g.Vif == vif) {
			return g
		}
	}
	return rest
}

// Example is a complete configuration, with every statement that there is.
const Example = `# The card that leads to the world: a vif of this domain. Its address is static or by DHCP.
uplink vif 0
uplink ipv4 dhcp                        # or: uplink ipv4 192.0.2.2/24 via 192.0.2.1
uplink ipv6 2001:db8::2/64 via 2001:db8::1  # or: uplink ipv6 auto, what its routers announce
uplink nat ipv4                         # or: ipv4 ipv6, or: none
route 2001:db8:5::/48 via 2001:db8::9    # a network behind another router at the uplink

# The networks of the guests. A guest without an address of its own gets one of the pool. In
# IPv6 each vif gets a /64 of the prefix, which it is told by router advertisements.
network office ipv4 10.137.0.0/24 router 10.137.0.1 pool 10.137.0.100-10.137.0.199
network office ipv6 fd00:137::/56
network dmz ipv4 10.137.1.0/24 router 10.137.1.1

# Which vif belongs where. What a vif must be: its MAC, its guest's domain, its number.
guest web in dmz mac 00:16:3e:00:00:07 ipv4 10.137.1.7
guest admin in office domain 3 vif 0 ipv4 10.137.0.10
guest * in office                       # all others; without it they are refused

# What may begin. Answers pass because their flow was allowed. The first line that matches
# decides. Places: any (every vif), uplink, router, a network, a guest. To the router itself
# guests may send DHCP, names and echo requests, unless a line says otherwise; all else takes a
# line that allows it, whatever the default.
allow from office to uplink
allow from office to web proto tcp port 80,443
allow from admin to router proto tcp port 9100
reject from web to office name keep-out
drop from dmz to uplink proto udp port 1-52,54-65535 family ipv4
allow from dmz to uplink dest 198.51.100.0/24,2001:db8:1::/48
allow from uplink to office source 203.0.113.0/24 proto udp sport 123
allow from uplink to router proto icmp type 8
drop from any to any state related proto icmp type 5
default drop                            # or: reject, allow

# Ports of the uplink for a guest. A forward allows what it forwards, after the lines above.
forward tcp 8080 to 10.137.1.7:80
forward udp 5000-5010 to 10.137.0.10 at 192.0.2.2

dhcp lease 12h                          # or: dhcp off
dns to 192.0.2.53 192.0.2.54:5353       # or: dns uplink, those of the lease and of routers; or: dns off
metrics router 10.137.0.1:9100          # or: metrics machine 127.0.0.1:9100
flows 65536 per-guest 16384             # tables are made at the start
`
