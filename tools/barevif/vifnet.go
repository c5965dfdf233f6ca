package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/pvnet/netif"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// lookAgain is how often a vif that is refused is looked at again, for what no event tells:
// a key that the toolstack corrected, a name that is free now.
const lookAgain = 5 * time.Second

// attach joins a vif to what the plan for it says, and offers it to its frontend. While that
// cannot be done it tells the toolstack, the frontend and the log why, and tries again. It
// returns nil once the device or ctx has ended. The link of a vif that was taken over, if
// taken is not nil, is the one that it had.
func (b *back) attach(ctx context.Context, dev *pvnet.Device, vif string, taken link.Link) (link.Link, plan) {
	var l link.Link
	var p plan
	ok, joined := b.offer(ctx, dev, vif, func(ctx context.Context) (_ []*keyError, _ bool, err error) {
		l, p, err = b.tryAttach(ctx, dev, vif, taken)
		return p.notes, p.script, err
	})
	if ok {
		return l, p
	}
	if joined && l != taken {
		l.Close()
	}
	return nil, p
}

// missing returns the interface that err is about, "" if none.
func missing(err error) string {
	if e, ok := errors.AsType[*keyError](err); ok && e.key != netif.KeyIP {
		return e.value
	}
	return ""
}

func (b *back) tryAttach(ctx context.Context, dev *pvnet.Device, vif string, taken link.Link) (l link.Link, p plan, err error) {
	ts, err := dev.Toolstack(ctx)
	if err != nil {
		return nil, p, err
	}
	tap := strings.NewReplacer("%d", strconv.Itoa(int(dev.Peer())), "%i", dev.ID()).Replace(b.tap)
	if p, err = b.plan(vif, tap, ts); err != nil {
		return nil, p, err
	}
	if taken != nil {
		return taken, p, nil
	}
	l, err = b.open(dev, vif, p)
	return l, p, err
}

// open opens the link of a vif and sets its interface up.
func (b *back) open(dev *pvnet.Device, vif string, p plan) (link.Link, error) {
	if b.packet != "" {
		return asLink(link.OpenPacket(b.packet))
	}
	if err := p.checkBridge(); err != nil {
		return nil, err
	}
	tap, err := openTAP(link.TAPConfig{Name: p.tap, MTU: dev.MTU()}, dev.Queues())
	if p.named && (errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EINVAL)) {
		return nil, &keyError{netif.KeyVifName, p.tap, "there is an interface of that name, of another vif or of this machine", "choose another, or rename that one"}
	}
	if err != nil {
		return nil, linkRefused(err)
	}
	// The address that Linux's netback gives to each of its interfaces. A bridge takes the
	// lowest address of its ports. If that were a random one, a restart would change the
	// bridge's address, and neighbours that know the old one could not reach this machine.
	if err = setMAC(tap.Name(), dev.MAC()); err == nil && !p.keyed {
		err = addAddress(tap.Name(), b.addressOf(vif, false))
	}
	if err == nil && p.bridge != "" {
		err = p.putOnBridge(tap.Name())
	}
	if err == nil && p.script { // as netback's interface is: Linux before 6.2 renames none that is up
		err = setDown(tap.Name())
	}
	if err == nil && p.routed {
		err = b.route(tap.Name(), vif, p)
	}
	if err != nil {
		tap.Close()
		return nil, err
	}
	return tap, nil
}

// checkBridge checks that the bridge of the plan is there.
func (p *plan) checkBridge() error {
	if p.bridge == "" {
		return nil
	}
	e := &keyError{key: netif.KeyBridge, value: p.bridge}
	if !p.keyed {
		e.key = "--bridge"
	}
	l, err := netlink.LinkByName(p.bridge)
	switch {
	case err == nil && l.Type() == "bridge":
		return nil
	case err == nil:
		e.what, e.next = fmt.Sprintf("it is a %s, no bridge", l.Type()), "name a bridge"
	case errors.As(err, new(netlink.LinkNotFoundError)):
		e.what, e.next = "there is no such bridge", "make it, and the vif connects: ip link add "+p.bridge+" type bridge"
	default:
		e.what = err.Error()
	}
	return e
}

// putOnBridge puts the TAP on its bridge, and holds it to one address if the plan says so. It
// is locked before the bridge takes a frame from it.
func (p *plan) putOnBridge(tap string) error {
	if p.mac == (pvnet.MAC{}) {
		return setBridge(tap, p.bridge)
	}
	return onInterface(tap, fmt.Sprintf("hold %s to the address %s", tap, p.mac), func(l netlink.Link) error {
		if err := netlink.LinkSetDown(l); err != nil {
			return err
		}
		if err := setBridge(tap, p.bridge); err != nil {
			return err
		}
		if err := lockPort(l.Attrs().Index); err != nil {
			return err
		}
		err := netlink.NeighSet(&netlink.Neigh{
			LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, State: netlink.NUD_NOARP, HardwareAddr: p.mac[:],
		})
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	})
}

// lockPort makes a bridge take frames from a port only if their address is known to be there
// (BR_PORT_LOCKED of net/bridge/br_input.c), and learn none. A Linux before 5.18 ignores the
// attribute that it does not know, so lockPort reads it again.
func lockPort(index int) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(index)
	req.AddData(msg)
	port := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	port.AddRtAttr(unix.IFLA_BRPORT_LEARNING, []byte{0})
	port.AddRtAttr(unix.IFLA_BRPORT_LOCKED, []byte{1})
	req.AddData(port)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return err
	}
	locked, err := portLocked(index)
	if err == nil && !locked {
		err = errors.New("this kernel cannot lock a port of a bridge; Linux 5.18 can")
	}
	return err
}

// portLocked reports whether a bridge's port is locked.
func portLocked(index int) (bool, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_BRIDGE))
	ports, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil {
		return false, err
	}
	for _, m := range ports {
		info := nl.DeserializeIfInfomsg(m)
		if int(info.Index) != index {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[info.Len():])
		if err != nil {
			return false, err
		}
		for _, a := range attrs {
			if a.Attr.Type != unix.IFLA_PROTINFO|unix.NLA_F_NESTED {
				continue
			}
			flags, err := nl.ParseRouteAttr(a.Value)
			if err != nil {
				return false, err
			}
			for _, f := range flags {
				if f.Attr.Type == unix.IFLA_BRPORT_LOCKED {
					return len(f.Value) > 0 && f.Value[0] != 0, nil
				}
			}
		}
	}
	return false, nil
}

// routeMetric is the metric that vif-route gives to its routes.
const routeMetric = 2

// route does what vif-route does: the TAP has the address of another interface of this
// machine, answers ARP for whatever is routed elsewhere, and leads to the guest's addresses.
func (b *back) route(tap, vif string, p plan) error {
	own := b.addressOf(vif, false).Addr()
	if !own.IsValid() {
		var err error
		if own, err = p.gatewayAddress(); err != nil {
			return err
		}
		if own.IsValid() {
			if err := addAddress(tap, netip.PrefixFrom(own, own.BitLen())); err != nil {
				return err
			}
		}
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+tap+"/proxy_arp", []byte("1"), 0o644); err != nil {
		b.slog.Warn("a routed vif answers no ARP for other networks", "vif", vif, "err", err, "next", "write 1 to that file")
	}
	return onInterface(tap, "route to "+join(p.routes), func(l netlink.Link) error {
		for _, dst := range p.routes {
			r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(dst.Masked()), Priority: routeMetric}
			if dst.Addr().Is4() {
				r.Scope = netlink.SCOPE_LINK
				if own.Is4() {
					r.Src = own.AsSlice()
				}
			}
			if err := netlink.RouteAdd(r); errors.Is(err, unix.EEXIST) {
				return &keyError{netif.KeyIP, join([]netip.Prefix{dst}), "there is a route to it already, as to another vif's", `"ip route" shows it; detach that vif, or correct the key`}
			} else if err != nil {
				return &keyError{netif.KeyIP, join([]netip.Prefix{dst}), err.Error(), ""}
			}
		}
		return nil
	})
}

// gatewayAddress returns the first IPv4 address of the interface that "gatewaydev" names, or
// of eth0 if it names none, as vif-route does. Without eth0 it returns none.
func (p *plan) gatewayAddress() (a netip.Addr, err error) {
	name := p.via
	if name == "" {
		name = "eth0"
	}
	l, err := netlink.LinkByName(name)
	var addrs []netlink.Addr
	if err == nil {
		addrs, err = netlink.AddrList(l, netlink.FAMILY_V4)
	}
	for _, found := range addrs {
		if a, ok := netip.AddrFromSlice(found.IP.To4()); ok {
			return a, nil
		}
	}
	switch {
	case p.via == "":
		return a, nil
	case err == nil:
		err = errors.New("it has no IPv4 address")
	}
	return a, &keyError{netif.KeyGatewayDev, p.via, err.Error(), "name the interface that leads to the other networks"}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// keepOnBridge puts the interface of a vif on its bridge again when the bridge was removed and
// made again, until ctx ends.
func (b *back) keepOnBridge(ctx context.Context, vif string, index int, p plan) {
	news, stop := b.news.of(p.bridge)
	defer stop()
	gone := false
	for ctx.Err() == nil {
		switch err := p.checkBridge(); {
		case err != nil && !gone:
			gone = true
			b.slog.Error("a vif's bridge is gone, and its frames go nowhere", "vif", vif, "bridge", p.bridge, "err", err)
		case err == nil && gone:
			name, err := nameOf(index)
			if err == nil {
				err = p.putOnBridge(name)
			}
			if err == nil {
				gone = false
				b.Say("vif %s: on bridge %s again", vif, p.bridge)
			}
		}
		pause := time.Duration(0) // nothing to do before the next event
		if gone {
			pause = lookAgain
		}
		await(ctx, news, pause)
	}
}

// recheck reads the toolstack's keys again when the vif connects. One that was written after
// the vif was joined is named, since it has no effect before the vif is given anew.
func (b *back) recheck(ctx context.Context, dev *pvnet.Device, vif string, was plan) {
	ts, err := dev.Toolstack(ctx)
	if err != nil || was.script {
		return // being removed, or no business of ours
	}
	ts.Done = true // by ourselves
	now, err := b.plan(vif, was.tap, ts)
	changed := ""
	switch {
	case err != nil:
		b.slog.Warn("a key of the toolstack was changed, and is not honoured", "vif", vif, "err", err)
		return
	case now.bridge != was.bridge:
		changed = netif.KeyBridge + "=" + now.bridge
	case now.tap != was.tap:
		changed = netif.KeyVifName + "=" + now.tap
	case now.routed != was.routed:
		changed = netif.KeyScript + "=" + ts.Script
	case join(now.routes) != join(was.routes):
		changed = netif.KeyIP + "=" + join(now.routes)
	default:
		return
	}
	b.changed(vif, changed)
}

// nameOf returns the present name of an interface, which a script may have changed.
func nameOf(index int) (string, error) {
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return "", err
	}
	return l.Attrs().Name, nil
}

// linkNews tells of interfaces of this machine that come, change or go, once run does.
type linkNews struct {
	mu      sync.Mutex
	waiting map[chan struct{}]string // guarded by mu: the name that each waits for
}

// run listens to the kernel until ctx ends.
func (n *linkNews) run(ctx context.Context) {
	for ctx.Err() == nil {
		updates := make(chan netlink.LinkUpdate, 16)
		err := netlink.LinkSubscribe(updates, ctx.Done())
		n.tell("") // what happened before, or while the kernel had no room for events
		if err == nil {
			for u := range updates { // until ctx ends, or an event was lost
				n.tell(u.Attrs().Name)
			}
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// tell wakes those that wait for an interface; "" wakes all.
func (n *linkNews) tell(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c, wanted := range n.waiting {
		if name == "" || wanted == name {
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}
}

// of returns a channel that holds news of an interface, until stop.
func (n *linkNews) of(name string) (c chan struct{}, stop func()) {
	c = make(chan struct{}, 1)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.waiting == nil {
		n.waiting = make(map[chan struct{}]string)
	}
	n.waiting[c] = name
	return c, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.waiting, c)
	}
}

// await waits for news, at most a while if it is not 0, or until ctx ends.
func await(ctx context.Context, news <-chan struct{}, most time.Duration) {
	var timeout <-chan time.Time
	if most > 0 {
		timeout = time.After(most)
	}
	select {
	case <-news:
	case <-timeout:
	case <-ctx.Done():
	}
}
