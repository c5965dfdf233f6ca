// Package dhcp is a client of DHCP for IPv4 (RFC 2131) that knows neither sockets nor cards: it
// is given functions that send and channels that tell what arrived. It gets a lease, renews it
// with its server, rebinds it with any, gives it up when it expires or a server takes it back,
// confirms it when the link comes up again, and gets another when the card has another MAC.
//
// What servers send is checked before it is used. An offer that cannot be is refused: of an
// address that no host can have, of a network whose mask is none, for less than [MinExpire]. A
// client that restarts waits before it asks again, longer each time, whatever servers answer.
//
// A lease that is in use when the client ends is not released, so that a program that is
// started again gets the same address.
package dhcp

import (
	"context"
	"crypto/rand"
	"log/slog"
	mathrand "math/rand/v2"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// A Link is the state of the card.
type Link struct {
	Up   bool
	Ups  int     // how often it came up
	MAC  [6]byte // of the last time
	Room int     // the longest IP packet it takes, in bytes
}

// Config configures a client. All fields but Hostname, InUse, Acquire and Logger are required.
type Config struct {
	Broadcast func(m []byte) error                   // sends m from 0.0.0.0, port 68, to all stations, port 67
	Unicast   func(m []byte, to netip.Addr) error    // sends m from the lease's address, port 68, to port 67 of a server
	Received  <-chan []byte                          // messages that arrived at port 68
	Links     <-chan Link                            // each state of the link, at least the latest
	Leased    func(l *Lease) error                   // a lease is now, or still, in use; nil: none is any more
	InUse     func(context.Context, netip.Addr) bool // whether another station has the address; nil: not asked

	// Acquire says whether the client has no address, and so wants what is sent to the one
	// that it will have; nil: it gets what is broadcast.
	Acquire func(on bool)

	Hostname string       // told to the server; empty: none
	Logger   *slog.Logger // nil: silent
}

// Times of RFC 2131, section 4.1, or shorter.
const (
	firstPause = 2 * time.Second // before a request is repeated; then twice as long each time
	lastPause  = 64 * time.Second
	// A server that answers a request for a lease of its own answers at once.
	requests = 3
	// Between two requests to extend a lease.
	leastExtend = time.Minute
	// After a station was found that has the address.
	declinePause = 10 * time.Second
)

// A client is a client's state. One goroutine uses it.
type client struct {
	Config
	link  Link
	xid   dhcpv4.TransactionID // of the latest request
	begun time.Time            // when the client began to want a lease
	told  bool                 // a refusal was logged since the last request

	lease *Lease    // nil: none
	since time.Time // when the request was sent that the server acknowledged
}

// Run runs a client until ctx ends.
func Run(ctx context.Context, cfg Config) {
	c := &client{Config: cfg}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	for ctx.Err() == nil {
		if c.acquire(ctx) {
			c.keep(ctx)
		}
	}
}

// What ended a wait.
type wake int

const (
	timeout wake = iota
	answered
	linkChanged
	ended
)

// wait waits until then, a change of the link, or an answer that accept takes.
func (c *client) wait(ctx context.Context, then time.Time, accept func(reply) bool) wake {
	t := time.NewTimer(time.Until(then))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ended
		case <-t.C:
			return timeout
		case l := <-c.Links:
			changed := l.Up != c.link.Up || l.Ups != c.link.Ups || l.MAC != c.link.MAC
			c.link = l
			if changed {
				return linkChanged
			}
		case b := <-c.Received:
			r, err := parse(b, c.xid, c.link.MAC)
			if err == errForeign || accept == nil {
				continue
			}
			if err != nil {
				c.refuse(r, err)
				continue
			}
			if accept(r) {
				return answered
			}
		}
	}
}

// refuse logs why a message is not used, once per request.
func (c *client) refuse(r reply, why error) {
	if !c.told {
		c.told = true
		c.Logger.Warn("a DHCP server's message is refused", "server", r.server, "why", why)
	}
}

// never is a time that does not come.
func never() time.Time { return time.Now().Add(1000 * time.Hour) }

// acquire gets a lease. It reports false if ctx ended.
func (c *client) acquire(ctx context.Context) bool {
	c.acquiring(true)
	defer c.acquiring(false)
	c.begun = time.Now()
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		for !c.link.Up {
			if c.wait(ctx, never(), nil) == ended {
				return false
			}
			pause, c.begun = firstPause, time.Now()
		}
		again := time.Now().Add(jitter(pause))
		got, why := c.try(ctx, again)
		switch {
		case why == ended:
			return false
		case got:
			return true
		case why == linkChanged:
			pause = firstPause / 2 // doubled by the loop
			continue
		}
		if why = c.wait(ctx, again, nil); why == ended {
			return false
		}
	}
}

func (c *client) acquiring(on bool) {
	if c.Acquire != nil {
		c.Acquire(on)
	}
}

// jitter spreads the requests of guests that started together (RFC 2131, section 4.1).
func jitter(d time.Duration) time.Duration {
	return d*3/4 + time.Duration(mathrand.Int64N(int64(d/2)))
}

// try asks for a lease once: it discovers servers until then, and takes the first offer.
func (c *client) try(ctx context.Context, then time.Time) (got bool, why wake) {
	var offer reply
	c.send(dhcpv4.MessageTypeDiscover, nil)
	if why = c.wait(ctx, then, func(r reply) bool {
		offer = r
		return r.typ == dhcpv4.MessageTypeOffer
	}); why != answered {
		return false, why
	}
	ack, why := c.request(ctx, offer)
	if why != answered {
		return false, why
	}
	if ack.lease == nil {
		c.Logger.Info("a DHCP server takes its offer back", "server", offer.server, "address", offer.lease.Addr)
		return false, timeout
	}
	addr := ack.lease.Addr.Addr()
	if c.InUse != nil && c.InUse(ctx, addr) {
		c.Logger.Warn("another station has the address that a DHCP server leased", "server", ack.server, "address", addr)
		c.send(dhcpv4.MessageTypeDecline, ack.lease)
		return false, c.wait(ctx, time.Now().Add(declinePause), nil)
	}
	return c.bind(ack.lease, "leased"), timeout
}

// request requests what a server has offered, and returns its ACK or NAK.
func (c *client) request(ctx context.Context, offer reply) (ack reply, why wake) {
	pause := firstPause
	for range requests {
		c.since = time.Now()
		c.send(dhcpv4.MessageTypeRequest, offer.lease)
		why = c.wait(ctx, time.Now().Add(jitter(pause)), func(r reply) bool {
			if ack = r; r.server != offer.server {
				return false
			}
			return r.typ == dhcpv4.MessageTypeNak ||
				r.typ == dhcpv4.MessageTypeAck && r.lease.Addr.Addr() == offer.lease.Addr.Addr()
		})
		if why != timeout {
			break
		}
		pause *= 2
	}
	return ack, why
}

// bind puts a lease to use. It reports false if that is not possible.
func (c *client) bind(l *Lease, how string) bool {
	if err := c.Leased(l); err != nil {
		c.Logger.Error("a DHCP lease cannot be used", "server", l.Server, "address", l.Addr, "err", err)
		return false
	}
	c.lease = l
	c.Logger.Info("DHCP: "+how, "address", l.Addr, "server", l.Server, "for", l.Expire)
	return true
}

// drop gives the lease up.
func (c *client) drop(why string) {
	c.Logger.Warn("DHCP: "+why, "address", c.lease.Addr, "server", c.lease.Server)
	c.lease = nil
	_ = c.Leased(nil) // there is nothing that could fail
}

// keep keeps the lease until it is given up or ctx ends.
func (c *client) keep(ctx context.Context) {
	for c.lease != nil {
		mac, ups := c.link.MAC, c.link.Ups
		switch c.extend(ctx) {
		case ended:
			return
		case linkChanged:
			if c.link.MAC != mac {
				c.drop("the card has another MAC, and the lease was for the old one")
			} else if c.link.Up && c.link.Ups != ups {
				if c.confirm(ctx) == ended {
					return
				}
			}
		}
	}
}

// extend waits until the lease can be extended, and asks for it: first the server that granted
// it, then any. It returns after each request.
func (c *client) extend(ctx context.Context) wake {
	renew, rebind, expire := c.since.Add(c.lease.Renew), c.since.Add(c.lease.Rebind), c.since.Add(c.lease.Expire)
	now := time.Now()
	var until time.Time
	switch {
	case now.Before(renew):
		return c.wait(ctx, renew, nil)
	case now.Before(rebind):
		until = next(now, rebind)
	case now.Before(expire):
		until = next(now, expire)
	default:
		c.drop("the lease has expired")
		return timeout
	}
	if !c.link.Up {
		return c.wait(ctx, until, nil)
	}
	to := c.lease.Server
	if !now.Before(rebind) {
		to = netip.Addr{}
	}
	c.sendTo(to, dhcpv4.MessageTypeRequest, c.lease, func(m *dhcpv4.DHCPv4) {
		m.ClientIPAddr = c.lease.Addr.Addr().AsSlice()
		m.Options.Del(dhcpv4.OptionServerIdentifier)
		m.Options.Del(dhcpv4.OptionRequestedIPAddress)
	})
	return c.settle(ctx, now, until, "renewed")
}

// next returns when a request is repeated: half-way to the end, but not soon after the last.
func next(now, end time.Time) time.Time {
	return now.Add(min(end.Sub(now), max(end.Sub(now)/2, leastExtend)))
}

// settle waits until then for the answer to a request, sent at now, to keep the lease.
func (c *client) settle(ctx context.Context, now, then time.Time, how string) wake {
	var got reply
	why := c.wait(ctx, then, func(r reply) bool {
		got = r
		return r.typ == dhcpv4.MessageTypeNak ||
			r.typ == dhcpv4.MessageTypeAck && r.lease.Addr.Addr() == c.lease.Addr.Addr()
	})
	switch {
	case why != answered:
	case got.lease == nil:
		c.drop("a server takes the lease back")
	default:
		old := c.since
		if c.since = now; !c.bind(got.lease, how) {
			c.since = old
		}
	}
	return why
}

// confirm asks, after the link was down, whether the lease holds on the network that the card
// is in now (INIT-REBOOT). If no server answers, it does until it expires.
func (c *client) confirm(ctx context.Context) (why wake) {
	for pause := firstPause; pause <= 2*firstPause; pause *= 2 {
		now := time.Now()
		c.sendTo(netip.Addr{}, dhcpv4.MessageTypeRequest, c.lease, func(m *dhcpv4.DHCPv4) {
			m.Options.Del(dhcpv4.OptionServerIdentifier)
		})
		mac := c.link.MAC
		if why = c.settle(ctx, now, now.Add(jitter(pause)), "confirmed"); why == answered || why == ended {
			return why
		}
		if c.link.MAC != mac {
			c.drop("the card has another MAC, and the lease was for the old one")
			return why
		}
		if !c.link.Up {
			return why
		}
	}
	return why
}

// send broadcasts a message of a client that has no address.
func (c *client) send(typ dhcpv4.MessageType, l *Lease) { c.sendTo(netip.Addr{}, typ, l, nil) }

// sendTo sends a message, to all servers if to is zero. A message that is not sent is like one
// that is lost on its way.
func (c *client) sendTo(to netip.Addr, typ dhcpv4.MessageType, l *Lease, change func(*dhcpv4.DHCPv4)) {
	if l == nil || l == c.lease { // the next messages of an exchange keep its number
		_, _ = rand.Read(c.xid[:])
	}
	c.told = false
	m := c.message(typ, l)
	if change != nil {
		change(m)
	}
	var err error
	if b := m.ToBytes(); to.IsValid() {
		err = c.Unicast(b, to)
	} else {
		err = c.Broadcast(b)
	}
	if err != nil {
		c.Logger.Debug("a DHCP message was not sent", "type", typ, "err", err)
	}
}

// wanted are the options that a server is asked for.
var wanted = []dhcpv4.OptionCode{
	dhcpv4.OptionSubnetMask, dhcpv4.OptionClasslessStaticRoute, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer,
	dhcpv4.OptionInterfaceMTU, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue,
}

// message returns a message about l, which may be nil.
func (c *client) message(typ dhcpv4.MessageType, l *Lease) *dhcpv4.DHCPv4 {
	m := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootRequest, HWType: 1, TransactionID: c.xid, ClientHWAddr: c.link.MAC[:],
		NumSeconds: uint16(min(time.Since(c.begun)/time.Second, 1<<16-1)),
		Options:    dhcpv4.Options{},
	}
	zero := netip.IPv4Unspecified().AsSlice()
	m.ClientIPAddr, m.YourIPAddr, m.ServerIPAddr, m.GatewayIPAddr = zero, zero, zero, zero
	if c.Acquire == nil && c.lease == nil {
		m.SetBroadcast()
	}
	m.UpdateOption(dhcpv4.OptMessageType(typ))
	if l != nil {
		m.UpdateOption(dhcpv4.OptRequestedIPAddress(l.Addr.Addr().AsSlice()))
		m.UpdateOption(dhcpv4.OptServerIdentifier(l.Server.AsSlice()))
	}
	if typ == dhcpv4.MessageTypeDecline {
		return m
	}
	m.UpdateOption(dhcpv4.OptParameterRequestList(wanted...))
	m.UpdateOption(dhcpv4.OptMaxMessageSize(uint16(max(MinMTU, min(c.link.Room, maxMessage)))))
	if c.Hostname != "" {
		m.UpdateOption(dhcpv4.OptHostName(c.Hostname))
	}
	return m
}
