package pvnet_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"

	"barevif/pvnet"
)

func TestOrderlyTellsTheEndsOfADeviceApart(t *testing.T) {
	for err, orderly := range map[error]bool{
		pvnet.ErrDisconnected: true,
		pvnet.ErrHandover:     true,

		&pvnet.PeerError{Ring: "tx", Reason: "a slot that is not there"}: false,
		&pvnet.UnknownError{Op: "wait for an event", Err: net.ErrClosed}: false,
		pvnet.ErrOwned:    false,
		pvnet.ErrLinkDown: false,
		net.ErrClosed:     false, // of a link, or of whatever else the caller has beside the device
		context.Canceled:  false,
	} {
		if pvnet.Orderly(err) != orderly || pvnet.Orderly(fmt.Errorf("receive: %w", err)) != orderly {
			t.Errorf("%v: want %t", err, orderly)
		}
	}
	if pvnet.Orderly(nil) {
		t.Error("no error is no end")
	}
	// Whatever is said beside it, a peer that broke the protocol is in it.
	if pvnet.Orderly(errors.Join(pvnet.ErrDisconnected, &pvnet.PeerError{})) {
		t.Error("a violation beside an orderly end")
	}
}
