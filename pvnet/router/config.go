package router

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// A PortID names a port of a [Router]: less than [MaxPorts], chosen by the caller.
type PortID uint16

const (
	// MaxPorts bounds the PortIDs.
	MaxPorts = 1024
	// LocalPort is the router itself: its own TCP/IP. As [Packet].In it stands for a packet that the
	// router's TCP/IP sends; in a rule's Out for packets to the router.
	LocalPort PortID = 0xffff
)

// Bounds of a configuration.
const (
	MaxRules    = 4096
	MaxRoutes   = 16384
	MaxForwards = 1024
	MaxMTU      = 65535 - 14
	MinMTU      = 576 // with an IPv6 prefix 1280 (RFC 8200)
)

// Limits are the fixed sizes of a Router's tables. The zero Limits are the defaults.
type Limits struct {
	Flows        int // in the whole table; 0 means 65536, at most 1<<24. About 280 bytes each
	FlowsPerPort int // that began at one port; 0 means a quarter of Flows
	NATPerPort   int // of these, with a translated source; 0 means 16384, a quarter of all port numbers
	Fragments    int // fragmented packets in flight per port; 0 means 256
	Neighbours   int // per port; 0 means 1024
	Replies      int // ICMP errors and TCP resets a second per port, and as many at once; 0 means 100
}

// A Port is one interface of the router: a vif, usually.
type Port struct {
	ID   PortID
	Name string // for errors and counters
	// Group is a name that rules may use for several ports; empty: none.
	Group string
	MAC   [6]byte // the router's address on this port
	MTU   int     // bytes of an IP packet; 0 means 1500

	// Addrs are the router's own addresses on this port, each with the prefix that is on
	// link: 10.137.0.1/24. The IPv6 link-local address that follows from the MAC is added
	// if there is any IPv6 address.
	Addrs []netip.Prefix

	// Tentative are IPv6 addresses that the caller means to have on this port once it knows that
	// no other station of the link has them (RFC 4862, 5.4). The router does not answer for them.
	// Neighbour solicitations and advertisements for such an address get VerdictLocal, whichever
	// station sent them.
	Tentative []netip.Addr

	// Listens says that the caller answers who asks on this port's link which groups are listened to
	// (Multicast Listener Discovery, RFC 3810 and RFC 2710). Queries of the link then get VerdictLocal,
	// whatever the rules say, as neighbour discovery does not ask them either. Otherwise a query is a
	// packet to the router, which the rules decide about.
	Listens bool

	// Sources, unless empty, are the only source addresses of packets that come in here.
	// Link-local and unspecified ones may still talk to the router itself, as DHCP
	// and neighbour discovery do.
	Sources []netip.Prefix
	// SourceMAC, unless zero, is the only source of frames that come in here.
	SourceMAC [6]byte
	// AnySource admits sources that are not routed out of this port, as with several
	// uplinks. Sources holds all the same.
	AnySource bool

	// Masquerade gives IPv4 flows that leave here from another port's source this port's
	// address. Masquerade6 does the same for IPv6 (NAT66).
	Masquerade, Masquerade6 bool
}

// A Route sends packets to Prefix out of port Out, to the router Via, or, with no Via, to
// the destination itself. The prefixes of Port.Addrs are routes already.
type Route struct {
	Prefix netip.Prefix
	Out    PortID
	Via    netip.Addr
}

// A PortRange is First to Last, both included.
type PortRange struct{ First, Last uint16 }

// A Forward gives packets to Ports of an address of the router's to a host behind it
// (destination NAT). The filter sees the new destination and decides.
type Forward struct {
	In    Match      // ports where it applies; empty: all
	Addr  netip.Addr // destination before; invalid: any address of the router's, of To's family
	Proto uint8      // packet.TCP or packet.UDP
	Ports PortRange
	To    netip.Addr
	// ToPort is what Ports.First becomes; the others follow it. 0: ports stay.
	ToPort uint16
}

// A Match is a set of ports: the listed ones, and those of the groups. An empty Match is
// every port but [LocalPort]. A port or group that is not there now matches nothing.
type Match struct {
	Ports  []PortID
	Groups []string
}

// An Action is what a rule does with a packet.
type Action uint8

const (
	Drop   Action = iota // drops the packet silently
	Accept               // accepts the packet, and with it its flow
	Reject               // drops the packet and answers it: TCP with a reset from the receiver's address, others with an ICMP error (administratively prohibited)
)

// States is a set of states of a packet. The empty set means StateNew.
type States uint8

const (
	StateNew     States = 1 << iota // begins a flow
	StateRelated                    // an ICMP error about a packet of a flow; accepted unless a rule says otherwise
	StateInvalid                    // belongs to no flow and cannot begin one, as TCP without SYN
	// StateEstablished is a packet of a flow. These pass because a rule accepted the flow,
	// without being compared with rules. A rule may name the state, to say so; Configure
	// refuses one that would drop such packets: leave out the rule that accepts the flow.
	StateEstablished
)

// A Rule matches a packet that has all of its properties. What is left empty matches
// everything. The addresses and ports are those behind a [Forward], and before masquerading.
type Rule struct {
	Name string // for its counter, which survives a Configure under the same name
	// In and Out are where the packet comes from and goes to. LocalPort is matched only if
	// it is listed: an empty Out does not match packets to the router itself, an empty In
	// does not match the router's own.
	In, Out   Match
	Family    int            // 4, 6, or 0 for both
	Src, Dst  []netip.Prefix // sets
	Protocols []uint8
	SrcPorts  []PortRange // need Protocols of TCP and UDP alone
	DstPorts  []PortRange
	ICMPTypes []uint8 // need Protocols of ICMP or ICMPv6 alone
	States    States
	Action    Action
}

// Timeouts are how long a flow lives without a packet. Zero means the default.
type Timeouts struct {
	TCPOpening     time.Duration // handshake not finished: 60 s
	TCPEstablished time.Duration // 2 h 4 min (RFC 5382)
	TCPClosing     time.Duration // one side has finished: 4 min
	TCPClosed      time.Duration // both have: 60 s
	TCPReset       time.Duration // 10 s
	UDPNew         time.Duration // not answered yet: 30 s
	UDP            time.Duration // 5 min (RFC 4787)
	ICMP           time.Duration // 60 s (RFC 5508)
	Other          time.Duration // 10 min
}

// A Config is all that may change while a Router runs.
type Config struct {
	Ports    []Port
	Routes   []Route
	Forwards []Forward // the first that matches counts
	Rules    []Rule    // the first that matches counts
	Default  Action    // for packets to forward that no rule matches
	// LocalDefault is the same for packets to the router itself. Its own packets are
	// accepted unless a rule with In: LocalPort matches; ARP and neighbour discovery always.
	LocalDefault Action
	// ClampMSS lowers the MSS of TCP connections to what fits the MTUs of both ports.
	ClampMSS bool
	Timeouts Timeouts
}

// A ConfigError says which entry of a Config is wrong and what to do. Configure joins all
// of them with [errors.Join].
type ConfigError struct {
	Where  string // "port 3 (uplink)", "rule 2", "route 0"
	Reason string
}

func (e *ConfigError) Error() string { return "router: " + e.Where + ": " + e.Reason }

// Check reports what Configure would refuse.
func (c *Config) Check() error {
	_, err := compile(c)
	return err
}

// complaints collects the errors of a Config.
type complaints []error

func (c *complaints) add(where, format string, args ...any) {
	*c = append(*c, &ConfigError{where, fmt.Sprintf(format, args...)})
}

func (c complaints) err() error { return errors.Join(c...) }
