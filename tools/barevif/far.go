package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/pvnet/netstack"
	"barevif/tools/cli"
	"barevif/tools/internal/netns"

	"golang.org/x/sys/unix"
)

// A far is the network at the backend's side of the demonstration, from which the appliance
// is fetched.
type far struct {
	describe string
	dial     func(ctx context.Context, network, address string) (net.Conn, error)
	ping     func(ctx context.Context, to netip.Addr, seq uint16) (time.Duration, error) // nil: see noPing
	noPing   string

	// join forwards frames until ctx ends or the device does.
	join  func(ctx context.Context, dev *pvnet.Device) error
	joint *link.Joint // nil: there is no link
	close func()
}

// openFar opens the far end of --network, or the best one that the machine allows.
func (d *demo) openFar(ctx context.Context) (*far, error) {
	switch d.network {
	case "userspace":
		return userspaceFar(""), nil
	case "auto", "tap", "veth":
	default:
		return nil, cli.BadValue("network", d.network, "auto, tap, veth or userspace")
	}
	s, err := netns.Start(ctx, netns.Config{Addr: demoFar, NoTAP: d.network == "veth"})
	if err != nil {
		refused, ok := errors.AsType[*netns.RefusedError](err)
		switch {
		case ok && d.network == "auto":
			return userspaceFar(" (" + refused.Error() + ")"), nil
		case ok:
			return nil, &cli.Advice{Err: err, Refused: true, Next: "allow it, run as root, or leave --network away: gVisor's TCP/IP takes the kernel's place"}
		}
		return nil, fmt.Errorf("make a network of our own: %w", err)
	}
	if _, ok := s.Link().(*link.TAP); !ok && d.network == "tap" {
		err := fmt.Errorf("no TAP: %s", s.Describe())
		s.Close()
		return nil, &cli.Advice{Err: err, Refused: true, Next: "let this user open /dev/net/tun (chmod 0666, as most systems have it), or leave --network away: a veth pair takes its place"}
	}
	f := &far{
		describe: s.Describe(),
		dial:     s.DialContext,
		joint:    new(link.Joint),
		close:    func() { s.Close() },
	}
	f.join = func(ctx context.Context, dev *pvnet.Device) error { return f.joint.Run(ctx, dev, s.Link()) }
	f.ping = func(ctx context.Context, to netip.Addr, seq uint16) (time.Duration, error) {
		socket, err := s.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
		if err != nil {
			return 0, err
		}
		return pingFrom(ctx, socket, to, seq)
	}
	return f, nil
}

// userspaceFar returns a far end with a second gVisor stack on the backend. why says why a
// better far end was refused, if one was tried.
func userspaceFar(why string) *far {
	stacks := make(chan *netstack.Stack, 1)
	return &far{
		describe: "gVisor's TCP/IP on the backend, address " + demoFar.String() + why,
		noPing:   "the far end is not the kernel",
		join: func(ctx context.Context, dev *pvnet.Device) error {
			s, err := netstack.New(dev, netstack.Config{Addr: demoFar})
			if err != nil {
				return err
			}
			defer s.Close()
			stacks <- s
			select {
			case <-ctx.Done():
			case <-dev.Done():
			}
			return nil
		},
		dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			select {
			case s := <-stacks:
				stacks <- s
				return s.DialContext(ctx, network, address)
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		},
		close: func() {},
	}
}
