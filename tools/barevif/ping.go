package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"barevif/pvnet/packet"
)

// ICMP echo, RFC 792.
const (
	echoReply   = 0
	echoRequest = 8
	echoHeader  = 8
)

// ping sends an echo request through a raw ICMP socket, which it takes over, waits for the
// reply, and returns the round-trip time.
func ping(ctx context.Context, socket *os.File, to netip.Addr, seq uint16) (time.Duration, error) {
	defer socket.Close()
	c, err := net.FilePacketConn(socket)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()

	ask := make([]byte, echoHeader, echoHeader+56)
	ask = append(ask, bytes.Repeat([]byte{'b'}, 56)...)
	ask[0] = echoRequest
	id := uint16(os.Getpid())
	binary.BigEndian.PutUint16(ask[4:], id)
	binary.BigEndian.PutUint16(ask[6:], seq)
	binary.BigEndian.PutUint16(ask[2:], packet.Checksum(ask))

	began := time.Now()
	if _, err := c.WriteTo(ask, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return 0, err
	}
	buf := make([]byte, 1500)
	for {
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			if cause := context.Cause(ctx); errors.Is(err, os.ErrDeadlineExceeded) && cause != nil {
				err = fmt.Errorf("no answer: %w", cause)
			}
			return 0, err
		}
		// A raw socket receives every ICMP message of the namespace, our own, too.
		if got := buf[:n]; n == len(ask) && got[0] == echoReply && bytes.Equal(got[4:], ask[4:]) {
			return time.Since(began), nil
		}
	}
}
