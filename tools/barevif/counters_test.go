package main

import (
	"testing"

	"barevif/pvnet/link"
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
		if got := toNetworkLost(&c.st); got != c.to {
			t.Errorf("%+v: %q, want %q", c.st, got, c.to)
		}
		if got := fromNetworkLost(&c.st); got != c.from {
			t.Errorf("%+v: %q, want %q", c.st, got, c.from)
		}
	}
}
