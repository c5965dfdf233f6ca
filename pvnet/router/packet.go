package router

import "net/netip"

// A Packet is a frame for [Router.Process], and the answer about it.
type Packet struct {
	In PortID
	// Head are the first bytes of the frame, from the Ethernet header on, in private memory
	// that may be written. It must hold all headers, which [packet.MaxHeaders] bytes do, and
	// should hold what an ICMP error quotes: the first piece of a frame does. It is lent until
	// Process returns; AppendReply, Router.Unreachable and Fragmenter.Init read it again, as Process
	// left it.
	Head  []byte
	Total int // bytes in the frame
	// Partial says that the TCP or UDP checksum field holds the sum of the pseudo-header
	// alone. It stays so.
	Partial bool
	// GSO is the payload of each segment, in bytes, of a TCP packet to be cut; 0: none. It
	// needs Partial.
	GSO uint16

	// The fields below are set by Process.

	Verdict Verdict
	Reason  Reason // why Verdict is VerdictDrop, VerdictReply or VerdictNeighbour; otherwise ReasonNone
	// Out is where the frame, or the reply, goes.
	Out PortID
	// Next is the neighbour whose MAC address is missing, with VerdictNeighbour, should be
	// confirmed, with Ask, or was learnt, with Learnt; otherwise invalid.
	Next netip.Addr
	// Ask asks the caller to send [Router.AppendSolicit] of Out and Next: the neighbour has
	// not been heard of for some time. It does so once a second at most for each.
	Ask bool
	// Learnt says that the packet taught the router the MAC address of Next on port In: packets
	// that wait for Next there may be processed again.
	Learnt bool
	// MTU is, with VerdictFragment, the length in bytes that each fragment's IP packet may have: the
	// MTU of port Out. With other verdicts it is 0.
	MTU int
	// Translated says that addresses or ports changed: a hash that came with the frame is
	// no longer its hash.
	Translated bool
	// Hash is the same for all packets of one direction of a flow, and unpredictable to
	// peers: for choosing a queue. 0 for packets without a flow.
	Hash uint32

	reply reply
}

// A Verdict is what to do with a packet.
type Verdict uint8

const (
	VerdictDrop      Verdict = iota // drop it; Reason says why, ReasonNone for ARP and neighbour discovery that was learnt from
	VerdictForward                  // send the frame, whose head was rewritten, out of port Out
	VerdictLocal                    // the router itself is the receiver
	VerdictNeighbour                // process it again once the address of Next is learnt
	VerdictReply                    // drop it, and send what AppendReply makes out of port Out
	VerdictFragment                 // as VerdictForward, but cut to Packet.MTU by a Fragmenter; IPv4 only
)

func (v Verdict) String() string {
	if int(v) < len(verdictNames) {
		return verdictNames[v]
	}
	return "verdict unknown"
}

var verdictNames = [...]string{"drop", "forward", "local", "neighbour", "reply", "fragment"}

// A Reason says why a packet was not forwarded. Each has a counter for each port.
type Reason uint8

const (
	ReasonNone         Reason = iota
	ReasonNoPort              // In is no configured port
	ReasonMalformed           // headers are inconsistent, incomplete or not in Head, or the hop limit of neighbour discovery or of a listener query is wrong
	ReasonChecksum            // of the IPv4 header, of neighbour discovery, or of a listener query (Port.Listens)
	ReasonNotIP               // neither IP nor ARP
	ReasonTagged              // a VLAN tag
	ReasonNotForUs            // for another station, or a unicast packet in a group frame
	ReasonSourceMAC           // not Port.SourceMAC
	ReasonSpoofed             // the source may not come in here
	ReasonMartian             // an address that nobody forwards: loopback, multicast source, link-local…
	ReasonSourceRoute         // IPv4 source routing, or an IPv6 routing header with segments left
	ReasonFragment            // the first fragment was not seen, or not accepted
	ReasonTinyFragment        // a first fragment without its transport header, or one that overwrites it
	ReasonTTL                 // used up
	ReasonTooBig              // for the MTU, and not to be fragmented
	ReasonNoRoute             // to the destination
	ReasonNoNeighbour         // the neighbour's MAC address is unknown
	ReasonFiltered            // by a rule, or the default
	ReasonInvalid             // belongs to no flow and cannot begin one
	ReasonFlowQuota           // the port has too many flows
	ReasonFlowTable           // the table is full
	ReasonTranslation         // no free port number, or no address to translate to
	ReasonWindow              // a RST or FIN of TCP whose sequence number its receiver does not expect
	ReasonQuote               // an ICMP error that quotes a TCP segment which the flow does not have under way
	reasons                   // their number
)

// Reasons is the number of Reasons, for arrays of counters by Reason.
const Reasons = int(reasons)

var reasonNames = [reasons]string{
	"none", "no_port", "malformed", "checksum", "not_ip", "tagged", "not_for_us", "source_mac", "spoofed", "martian",
	"source_route", "fragment", "tiny_fragment", "ttl", "too_big", "no_route", "no_neighbour", "filtered", "invalid",
	"flow_quota", "flow_table", "translation", "window", "quote",
}

// String returns the reason's name in counters, as "flow_quota".
func (r Reason) String() string {
	if r < reasons {
		return reasonNames[r]
	}
	return "unknown"
}
