package netstack

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Ping sends one ICMP echo request to a station and waits for its answer. It returns the time
// between the two. It waits as long as ctx lets it: a station that is not there does not say so.
//
// Errors are *net.OpError: ENETUNREACH, the context's cause, net.ErrClosed after the stack has
// ended.
func (s *Stack) Ping(ctx context.Context, to netip.Addr) (time.Duration, error) {
	took, err := s.ping(ctx, to.Unmap())
	if err != nil {
		return 0, &net.OpError{Op: "ping", Net: "icmp", Addr: &net.IPAddr{IP: to.AsSlice()}, Err: err}
	}
	return took, nil
}

func (s *Stack) ping(ctx context.Context, to netip.Addr) (time.Duration, error) {
	if s.ending.Err() != nil {
		return 0, net.ErrClosed
	}
	if !s.has(to) {
		return 0, &net.AddrError{Err: noFamily, Addr: to.String()}
	}
	transport := icmp.ProtocolNumber4
	if to.Is6() {
		transport = icmp.ProtocolNumber6
	}
	var queue waiter.Queue
	ep, refused := s.network.net.NewEndpoint(transport, protocol(to), &queue)
	if refused != nil {
		return 0, s.errorOf(refused)
	}
	defer ep.Close()
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	queue.EventRegister(&entry)
	defer queue.EventUnregister(&entry)
	if refused = ep.Connect(s.full(to, 0)); refused != nil {
		return 0, s.errorOf(refused)
	}
	request := echoRequest(to)
	s.card.clock.expire()
	begun := time.Now()
	if _, refused = ep.Write(bytes.NewReader(request), tcpip.WriteOptions{}); refused != nil {
		return 0, s.errorOf(refused)
	}
	for {
		select {
		case <-ready:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-s.ending.Done():
			return 0, net.ErrClosed
		}
		if answered(ep, request) {
			return time.Since(begun), nil
		}
	}
}

// echoRequest returns a request with a payload that nobody guesses. The stack fills in the
// identifier and the checksum.
func echoRequest(to netip.Addr) []byte {
	b := make([]byte, header.ICMPv4MinimumSize+32)
	b[0] = byte(header.ICMPv4Echo)
	if to.Is6() {
		b[0] = byte(header.ICMPv6EchoRequest)
	}
	_, _ = rand.Read(b[header.ICMPv4MinimumSize:]) // never fails
	return b
}

// answered reads what has arrived, and reports whether the answer to request is among it.
func answered(ep tcpip.Endpoint, request []byte) bool {
	for {
		var b bytes.Buffer
		if _, err := ep.Read(&b, tcpip.ReadOptions{}); err != nil {
			return false
		}
		const body = header.ICMPv4MinimumSize
		if b.Len() == len(request) && bytes.Equal(b.Bytes()[body:], request[body:]) {
			return true
		}
	}
}

// errorText is an error of gVisor's stack, with the step at which it came.
func errorText(step string, refused tcpip.Error) error {
	return fmt.Errorf("%s: %s", step, refused)
}
