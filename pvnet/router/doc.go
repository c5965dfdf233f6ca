// Package router decides what a router and firewall between vifs does with each packet: it
// forwards IPv4 and IPv6, translates addresses and ports, tracks flows and filters new ones.
//
// It knows no device, ring, goroutine or clock. [Router.Process] gets the first bytes of
// frames, rewrites them in place, and gives a [Verdict] for each. The caller moves frames.
//
//	for i := range frames { // a batch from one receiver
//		batch[i] = router.Packet{In: client, Head: frames[i].Bytes(), Total: frames[i].Len(), Partial: …, GSO: …}
//	}
//	r.Process(now, batch) // now: one clock read for the batch
//	for i := range batch {
//		switch p := &batch[i]; p.Verdict {
//		case router.VerdictForward: // send frame i out of port p.Out
//		case router.VerdictNeighbour: // keep it, send r.AppendSolicit(nil, p.Out, p.Next), and process it again after the answer
//		case router.VerdictReply: // send p.AppendReply(nil) out of p.Out, drop frame i
//		case router.VerdictLocal: // give it to the router's own TCP/IP
//		case router.VerdictFragment: // send what a Fragmenter makes of it
//		}
//	}
//
// # A packet's way
//
//  1. The Ethernet header: the frame is for the port's address or a group, and comes from
//     the port's source address if it guards one. Frames with VLAN tags are dropped. ARP and
//     neighbour discovery are answered, and learnt from; queries for multicast listeners are the
//     caller's to answer ([Port].Listens).
//  2. The IP header: checksum, lengths, no source routing, no multicast or loopback source.
//  3. The flow table. A packet of a known flow goes on at step 7, if it came in where packets
//     of this direction come in.
//  4. Anti-spoofing: the source is one of [Port].Sources, and the route to it leads out of
//     the port ([Port].AnySource switches the second off).
//  5. Port forwards ([Forward]) change the destination. Is it an address of the router's
//     own? Otherwise the route is looked up, by longest prefix.
//  6. The filter, for packets that begin a flow: the first [Rule] that matches decides,
//     after them [Config].Default. An accepted packet gets a flow, with its translation.
//  7. TTL, MTU and neighbour of the out port; then the head is rewritten: TTL, addresses,
//     ports, MSS, MACs, and checksums by RFC 1624.
//
// Nothing of the head changes with a verdict other than VerdictForward, VerdictLocal and
// VerdictFragment. So a reply quotes the packet as its sender sent it, and a packet that
// waits for a neighbour is processed again from the start.
//
// # Flows
//
// A flow has two keys, those of its packets as they arrive from either side. What a packet is
// rewritten to is the inverse of the other side's key. The table is fixed and allocated by
// [New], 264 bytes for each entry; a packet or a flow allocates nothing. TCP is followed by its
// flags (a table in flow.go) and its windows, of which each direction keeps what is acknowledged,
// what was sent and what there is room for, window scaling included (tcp.go). A RST or FIN that
// its receiver would not believe is dropped ([ReasonWindow]); any other segment outside of the
// windows is forwarded and changes nothing, so that a flow whose bounds were missed goes on. A RST
// within them shortens the life of a flow, which it gets back if the side that received the RST
// goes on. Selective acknowledgements move no bound, since the cumulative ones do. A TCP flow
// begins with its SYN, also after a restart: there is none whose windows are unknown but for
// the answers that have not come yet. Echo requests are told apart by their identifiers,
// protocols other than TCP and UDP by their addresses alone. An ICMP error belongs to the flow of the
// packet that it quotes, and is translated with it; one that quotes no known packet is dropped, and
// so is one that quotes a TCP segment which cannot be under way ([ReasonQuote]; RFC 5927).
//
// Each flow is charged to the port it began at. A port has at most [Limits].FlowsPerPort.
// At this bound a new flow takes the place of the port's own oldest flow that is half open or
// over; if all are established it is refused. A new flow of the router's own is never refused there: it
// takes the place of the oldest of them, whatever its state. If the whole table is full, a port with less than
// its even share gets the place of the oldest flow of the port with the most. So nobody's
// flows, up to an even share, are thrown out by another port.
//
// # Translation
//
// Masquerading ([Port].Masquerade, and for IPv6 Masquerade6) gives flows that begin elsewhere
// the address of the port they leave by. The port number is a keyed hash of the source: it
// cannot be guessed from outside, and is the same for all destinations (endpoint-independent
// mapping, RFC 4787) as long as it is free; otherwise it is random. Filtering is by
// address and port: only the destination of a flow can answer. A forward whose target lies
// behind the port the packet came from also changes the source (hairpin).
//
// # Fragments
//
// Nothing is reassembled. The first fragment has the transport header and is treated like a
// whole packet; the others follow it. One that comes before the first is dropped, and so is a
// first one without its whole transport header, and one that would overwrite part of it.
// Later fragments keep their identification: two hosts behind one address may collide in it.
//
// # The router's own packets
//
// What the router's own TCP/IP sends goes through Process with In: [LocalPort], so that it makes
// flows and their answers come back with VerdictLocal; its Ethernet addresses do not matter. Groups,
// broadcasts and link-local addresses name no port: such packets are sent by the caller
// itself. So are those of a DHCP client, which should ask for answers by broadcast, since a packet
// to an address that is not configured yet is not the router's.
//
// # Concurrency
//
// All methods of a Router may be called at any time, from any goroutine. Process holds
// the router's one lock for the batch, not for each packet. A packet of a known flow takes 100
// to 200 ns under it, while moving the frame through two vifs, outside, takes several times
// that; so a few processors share a Router before they wait for each other. Shards by flow
// would need two locks for each translated one, whose directions hash differently. [Router.Configure] compiles
// before it takes the lock. [Router.Stats] copies counters under it.
package router
