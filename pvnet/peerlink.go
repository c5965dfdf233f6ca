package pvnet

import (
	"barevif/hypercall"
	"barevif/telemetry"
)

// A peerLink is what an engine has besides its ring: the event channel to the other end,
// and the counters.
type peerLink struct {
	name  string // of the ring, as the frontend calls it: "tx" or "rx"
	port  hypercall.Port
	count *telemetry.Block
}

// notify notifies the other end if it asked for that when moved slots were published.
func (p *peerLink) notify(asked bool, moved int) {
	if asked {
		p.count.Add(telemetry.NotifiesSent, 1)
		p.port.Notify()
	} else if moved > 0 {
		p.count.Add(telemetry.NotifiesSpared, 1)
	}
}

// fail counts a violation at a slot of the ring, and returns the error that ends the
// device.
func (p *peerLink) fail(slot uint32, reason string) error {
	p.count.Add(telemetry.Violations, 1)
	return &PeerError{Ring: p.name, Slot: slot, Reason: reason}
}
