package main

import (
	"testing"

	"barevif/pvnet/link"
	"barevif/telemetry"
)

// Each frame that came in on one side of a vif went out on the other, or was lost.
func TestTallyAddsUp(t *testing.T) {
	set := telemetry.NewSet(1)
	set.RX(0).Add(telemetry.Packets, 93)
	set.RX(0).Drop(telemetry.DropBadGref, 2)
	set.TX(0).Add(telemetry.Packets, 50)
	set.TX(0).Drop(telemetry.DropDisconnected, 4)
	set.RX(0).Publish()
	set.TX(0).Publish()
	st := set.Snapshot()
	js := link.JointStats{ToLink: 88, Unsent: 5, Uncut: 2, FromLink: 50, Oversize: 5, Refused: 1, Unfed: 7}
	for peer, want := range map[string]string{
		"frontend": "95 frames from the frontend, 88 to the network, 7 lost (5 not taken there); 65 from the network, 46 to the frontend, 19 lost (5 longer than the vif's MTU, 1 longer than the other end takes, 2 malformed or not to be segmented)",
		"backend":  "95 frames from the backend, 88 to the network, 7 lost (5 not taken there); 65 from the network, 46 to the backend, 19 lost (5 longer than the vif's MTU, 1 longer than the other end takes, 2 malformed or not to be segmented)",
	} {
		if got := tally(peer, &st, js); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
	js.FromLink, js.Oversize, js.Uncut, js.Refused, js.Unread = 20, 0, 0, 0, 8 // the other 16 frames are segments
	if got, want := tally("frontend", &st, js), "95 frames from the frontend, 88 to the network, 7 lost (5 not taken there); 35 from the network, 16 to the frontend, 19 lost (8 not handed over by the kernel), cut into 50"; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
