package main

import (
	"testing"

	"barevif/pvnet/link"
	"barevif/telemetry"
)

func TestLostFramesAreSaidByReason(t *testing.T) {
	for _, c := range []struct {
		st       link.JointStats
		to, from string
	}{
		{link.JointStats{ToLink: 5, FromLink: 5}, " (0 lost)", " (0 lost)"},
		{link.JointStats{Unsent: 12345, Uncut: 2}, " (12 345 lost: 12 345 not taken there)", " (2 lost: 2 malformed or not to be segmented)"},
		{link.JointStats{Oversize: 1000, Refused: 2, Uncut: 3, Unread: 4}, " (0 lost)",
			" (1 009 lost: 1 000 longer than the vif's MTU, 2 longer than the other end takes, 3 malformed or not to be segmented, 4 not handed over by the kernel)"},
	} {
		if got := toNetworkLost(&c.st, c.st.ToLink+c.st.Unsent); got != c.to {
			t.Errorf("%+v: %q, want %q", c.st, got, c.to)
		}
		if got := fromNetworkLost(&c.st, c.st.FromLink); got != c.from {
			t.Errorf("%+v: %q, want %q", c.st, got, c.from)
		}
	}
}

// Every frame of a direction is in the number of the other end of the line, or lost.
func TestATallyAccountsForEveryFrame(t *testing.T) {
	set := telemetry.NewSet(1)
	set.RX(0).Add(telemetry.Packets, 107)
	set.RX(0).Drop(telemetry.DropTooLong, 1)
	set.TX(0).Add(telemetry.Packets, 50)
	set.TX(0).Drop(telemetry.DropDisconnected, 4)
	set.RX(0).Flush()
	set.TX(0).Flush()
	st := set.Snapshot()
	js := link.JointStats{ToLink: 98, Unsent: 2, FromLink: 53}
	got := tallied(&st, &js, "frontend")
	want := "107 frames from the frontend (1 lost: 1 longer than allowed), 98 to the network (9 lost: 2 not taken there, 7 not passed on when it ended); " +
		"53 from the network (3 lost: 3 not passed on when it ended), 50 to the frontend (4 lost: 4 in flight when the connection ended)"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
