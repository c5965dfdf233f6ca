package pvnet

import (
	"context"
	"net/netip"

	"barevif/pvnet/packet"
)

// Announce tells the neighbours, each time the link comes up, that the device has addrs: by
// a gratuitous ARP request for an IPv4 address, by an unsolicited neighbour advertisement
// for an IPv6 one. It does so at once if the link is up. The switches behind the backend
// learn from it where the card is now, and the neighbours which MAC it has, as after a
// migration.
//
// Announce returns when ctx ends or the device does, with the cause, and with [ErrOwned] if
// every queue of the connection has an owner. It sends as WriteBatch does, so it may have to
// wait for room or for the next connection first. An owner sends what [packet.AppendAnnouncement] makes, on each
// [LinkEvent] that says Up. The stack of pvnet/netstack announces its addresses by itself.
func (d *Device) Announce(ctx context.Context, addrs ...netip.Addr) error {
	for ev := range d.Links(ctx) {
		if !ev.Up {
			continue
		}
		var frames [][]byte
		for _, addr := range addrs {
			if f := packet.AppendAnnouncement(nil, ev.MAC, addr); f != nil {
				frames = append(frames, f)
			}
		}
		if _, err := d.WriteBatch(frames); err != nil && ctx.Err() == nil {
			return err
		}
	}
	if err := d.endError(); err != nil && ctx.Err() == nil {
		return err
	}
	return context.Cause(ctx)
}
