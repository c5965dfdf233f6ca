// Package ping measures round trips by ICMP echo, RFC 792.
package ping

import (
	"bytes"
	"net"
	"os"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// payload is what a request carries, of the size that ping sends.
var payload = bytes.Repeat([]byte{'b'}, 56)

// Request returns the ICMP message of an echo request, with its checksum. It carries this
// process's number.
func Request(seq uint16) ([]byte, error) {
	m := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: os.Getpid() & 0xffff, Seq: int(seq), Data: payload}}
	return m.Marshal(nil)
}

// IsReply reports whether the ICMP message b answers the request of that number. Its
// checksum is for who received b to check, which kernels do.
func IsReply(b []byte, seq uint16) bool {
	m, err := icmp.ParseMessage(ipv4.ICMPTypeEcho.Protocol(), b)
	if err != nil || m.Type != ipv4.ICMPTypeEchoReply {
		return false
	}
	e, ok := m.Body.(*icmp.Echo)
	return ok && e.ID == os.Getpid()&0xffff && e.Seq == int(seq) && bytes.Equal(e.Data, payload)
}

// Trip sends a request through c, a raw ICMP socket, and waits for the reply until the
// socket's deadline.
func Trip(c net.PacketConn, to net.IP, seq uint16) (time.Duration, error) {
	ask, err := Request(seq)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if _, err := c.WriteTo(ask, &net.IPAddr{IP: to}); err != nil {
		return 0, err
	}
	buf := make([]byte, 1500)
	for {
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			return 0, err
		}
		// A raw socket receives every ICMP message of the namespace, our own, too.
		if IsReply(buf[:n], seq) {
			return time.Since(began), nil
		}
	}
}
