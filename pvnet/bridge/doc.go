// Package bridge is an Ethernet bridge between vifs of one process.
//
// A [Bridge] learns which stations are behind which of its ports, from the source addresses of
// frames, as IEEE 802.1D says. It sends a frame for a station that it knows to that station's
// port alone, and other frames to all ports but the one they came from. It passes VLAN tags on
// and does not look at them: one table holds the stations of all VLANs. Frames to the reserved
// groups 01-80-C2-00-00-00 to -0F, which no bridge forwards, end here. It speaks no spanning
// tree: who connects two bridges twice makes a loop.
//
// Frames for many ports are not copied for each: all ports hold the page into which the frame
// was received, until each has copied it to its own peer ([pvnet.Frame.Retain]).
//
// # Tenants
//
// Ports are vifs of domains that do not trust each other. A port with a [PortConfig].Guard
// sends from these addresses only. No other port can send from them, or have the bridge
// believe that it has them; and as all its addresses are known, frames for unknown stations do
// not go there. An Isolated port reaches, and is reached by, only ports that are not: put
// tenants on isolated ports and their router on another.
//
// What a port sends concerns the others as little as can be: each has its own queue at each
// port, and those take turns ([forward.Sender]). What a port does not take is dropped, and
// nobody waits for it. The table is bounded for each port and in all. What does not fit is not
// learned, so a port that invents addresses cannot make the bridge forget those of others; it
// only makes frames for its own addresses go to all ports. But without guards a station moves to
// the port that last sent from its address, as on any bridge.
//
// The vifs of tenants should not lend pages ([pvnet.Config].LendRx): a guest could change the
// addresses of a frame after the bridge has read them, and so pass by its Guard. That another guest
// stops holds up none of them, lent pages or not ([forward]). With a [Config].Pool the bridge receives
// from all ports in turns, a batch of each, however much one of them sends.
package bridge
