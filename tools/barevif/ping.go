package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"barevif/tools/ping"
)

// pingFrom sends an echo request through a raw ICMP socket, which it takes over, waits for
// the reply, and returns the round-trip time.
func pingFrom(ctx context.Context, socket *os.File, to netip.Addr, seq uint16) (time.Duration, error) {
	defer socket.Close()
	c, err := net.FilePacketConn(socket)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	took, err := ping.Trip(c, to.AsSlice(), seq)
	if cause := context.Cause(ctx); errors.Is(err, os.ErrDeadlineExceeded) && cause != nil {
		err = fmt.Errorf("no answer: %w", cause)
	}
	return took, err
}
