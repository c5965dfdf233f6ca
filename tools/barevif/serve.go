package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"barevif/pvnet"
	"barevif/pvnet/handover"
	"barevif/pvnet/netstack"
	"barevif/tools/appliance"
	"barevif/tools/cli"
	"barevif/tools/domain"

	"github.com/spf13/cobra"
)

func serveCommand(p *cli.Program) *cobra.Command {
	s := serve{front: front{Program: p, offload: true}}
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Be a guest: own vifs and serve web pages through them",
		Long: `serve is an appliance: it connects to a vif of its domain, runs a TCP/IP stack on it
(gVisor's, in this process) and serves HTTP, until a signal ends it:

  /                 a page that says what served it, or the files of --root
  /bytes/N          N pseudo-random bytes, the same every time
  /bytes/N.sha256   their SHA-256
  /sum              the SHA-256 of what is sent there: curl -T FILE
  /metrics          the card's counters as OpenMetrics text

With --check it answers datagrams, too: go run ./test/check finds out whether what
the card carries arrives as it was sent.

Its address is that of --addr. Without, it is what the toolstack has for the guest
of the vif, which is ip= in a domain's configuration: "ip=192.0.2.7/24", or as Mini-OS
and Unikraft read it "ip=192.0.2.7 255.255.255.0 192.0.2.1", with the router. Of several
addresses it takes all, and when the toolstack changes them it follows. If there is none, it asks for one on a real Xen, as with
"--addr dhcp"; on an emulated host, where nobody answers, it is ` + defaultAddr.String() + `.

With "--addr dhcp" it leases an IPv4 address by DHCP, takes IPv6 addresses that routers
advertise, and says which come and go. It goes on asking until it has one.

With --vif several times it is that many appliances, which have a TCP/IP stack each and
serve the same; --addr and --gateway then say whose they are: --addr 1=10.9.1.2/24.
` + severalVifs + `

The machine's own network has no part in it. When the backend goes, or the toolstack
takes the vif away, serve says so, waits, and connects again when one comes back. A
signal takes the card down in good order: the backend sees it close.

An upgrade loses no frame: serve --take-over takes the vif over from the serve that has
it now, within milliseconds, and that one ends with status 0; the backend notices
nothing. Pings and datagrams go on: the old one answers what it has received before it
gives the vif away, and what comes later waits for the new one. TCP connections do not go
on: they are in the process that ends, and the new one answers their next segment with
a RST. SIGUSR2 makes a running serve start itself again in this way: with the file that is
at its program's path now, and the same arguments. If the new one cannot take the vif,
the old one says why and goes on.

On a real Xen (--xen) the kernel's xen-netfront must not own the vif; --take takes
it away from it.`,
		Example: `  barevif serve --addr 10.9.0.2/24
  barevif serve --addr 10.9.0.2/24 --take-over
  barevif serve --vif 0 --vif 1 --addr 0=10.9.0.2/24 --addr 1=10.9.1.2/24
  barevif serve --addr 10.9.0.2/24 --gateway 10.9.0.1 --root ./public
  barevif serve --xen --take --vif 1 --addr 192.0.2.7/24 --gateway 192.0.2.1
  barevif serve --xen --addr auto/24
  barevif serve --xen --take --addr dhcp`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	s.register(cmd)
	cmd.Flags().StringArrayVar(&s.addrs, "addr", []string{autoAddr}, "`address` of the appliance: IP/BITS; dhcp: what DHCP and routers give; auto: what the toolstack has for it, else dhcp on Xen and "+defaultAddr.String()+" elsewhere; auto/BITS: the same, for a toolstack that says no BITS. Of several vifs: ID=IP/BITS; repeatable")
	cli.FixedValues(cmd, "addr", autoAddr, dhcpAddr)
	cmd.Flags().StringArrayVar(&s.gateways, "gateway", nil, "`address` of the router to other networks, of several vifs ID=IP; repeatable; default: the toolstack's, if the address is")
	cmd.Flags().Uint16Var(&s.port, "port", 80, "TCP `port` to serve HTTP on")
	cmd.Flags().StringVar(&s.root, "root", "", "serve the files of this `directory`")
	cmd.Flags().Uint16Var(&s.check, "check", 0, fmt.Sprintf("UDP `port` to answer \"go run ./test/check\" at, which asks at %d; 0: none", appliance.DatagramPort))
	completes(cmd, completeNothing, "gateway", "port", "check")
	return cmd
}

type serve struct {
	front
	addrs, gateways []string
	root            string
	port, check     uint16
}

// A site is what serve has for one vif.
type site struct {
	applianceConfig
	auto     autoAddress          // of --addr
	took     pvnet.GuestAddresses // of the toolstack, which are the appliance's; zero: it had none
	only     bool                 // no other vif could have the default address too
	routerOf string               // --gateway; "": none
}

func (s *serve) run(ctx context.Context) error {
	sites, err := s.sites()
	if err != nil {
		return err
	}
	var root *os.Root
	if s.root != "" {
		if root, err = os.OpenRoot(s.root); err != nil {
			return &cli.Advice{Err: fmt.Errorf("--root: %w", err), Next: "name a directory this user can read", Usage: errors.Is(err, fs.ErrNotExist)}
		}
		defer root.Close()
	}
	return s.own(ctx, func(dom *domain.Domain, dev *pvnet.Device) (*use, error) {
		site := sites[dev.ID()]
		site.own, site.root = uint16(dom.ID()), root
		for _, file := range dev.TakenFiles() { // of an attach, whose TAP ends here
			file.Close()
		}
		site.log = s.Log()
		site.say = s.Say
		if !site.only { // the lines of several vifs
			site.say = func(format string, args ...any) { s.Say("vif %s: "+format, append([]any{dev.ID()}, args...)...) }
		}
		from, err := site.address(ctx, dev, s.domain.Xen)
		if err != nil {
			return nil, err
		}
		site.later = site.auto.on
		app, err := startAppliance(dev, site.applianceConfig)
		if err != nil {
			return nil, err
		}
		if site.auto.on {
			app.serving.Go(func() { site.follow(dev, app.stack) })
		}
		return &use{
			says: from, failed: app.failed, close: app.close,
			hold: &handover.Vif{Device: dev, Resume: app.stack.Resume, Hold: func(ctx context.Context) ([]*os.File, error) {
				return nil, app.stack.Hold(ctx)
			}},
		}, nil
	})
}

// sites parses the flags that cobra does not check.
func (s *serve) sites() (map[string]*site, error) {
	if s.port == 0 {
		return nil, cli.BadValue("port", "0", "a port from 1 to 65535")
	}
	addrs, err := (&vifValues{flag: "addr", given: s.addrs}).of(s.vifs, isLiteral)
	if err != nil {
		return nil, err
	}
	gateways, err := (&vifValues{flag: "gateway", given: s.gateways}).of(s.vifs, func(string) bool { return true })
	if err != nil {
		return nil, err
	}
	sites := make(map[string]*site)
	for _, vif := range s.vifs {
		addr, ok := addrs[vif]
		if !ok { // others have some
			addr = autoAddr
		}
		if sites[vif], err = newSite(addr, gateways[vif]); err != nil {
			return nil, err
		}
		sites[vif].port, sites[vif].check, sites[vif].only = s.port, s.check, len(s.vifs) == 1
	}
	return sites, nil
}

func newSite(addr, gateway string) (s *site, err error) {
	s = &site{routerOf: gateway}
	if addr == dhcpAddr {
		s.auto.dhcp = true
	} else if s.auto, err = parseAuto(addr); err != nil {
		return nil, err
	}
	if s.auto.dhcp && gateway != "" {
		return nil, &cli.Advice{Err: errors.New("--gateway is for an address of --addr or of the toolstack"), Next: "leave it away: DHCP and routers say what the routers are", Usage: true}
	}
	if gateway != "" {
		if s.gateway, err = netip.ParseAddr(gateway); err != nil {
			return nil, cli.BadValue("gateway", gateway, "an address")
		}
	}
	if s.auto.on || s.auto.dhcp {
		return s, nil
	}
	s.addr = s.auto.addr
	return s, s.checkGateway()
}

// checkGateway checks --gateway against the appliance's address.
func (s *site) checkGateway() error {
	if s.routerOf != "" && (!s.addr.Contains(s.gateway) || s.gateway == s.addr.Addr()) {
		return cli.BadValue("gateway", s.routerOf, "another address of the network "+s.addr.Masked().String())
	}
	return nil
}

// address finds the appliance's address out, where --addr leaves that to the toolstack. It
// returns what to say about it.
func (s *site) address(ctx context.Context, dev *pvnet.Device, xen bool) (from string, err error) {
	if s.auto.dhcp {
		s.dynamic = true
		return asks, nil
	}
	serving := func() string { return "serving " + urlOf(s.addr.Addr(), s.port) }
	if !s.auto.on {
		return serving(), nil
	}
	g, err := s.auto.of(ctx, dev)
	if err != nil {
		return "", err
	}
	if len(g.Addrs) == 0 && xen && s.routerOf == "" {
		s.dynamic = true
		return "the toolstack has no address for it\n" + asks, nil
	}
	if len(g.Addrs) == 0 && !s.only {
		return "", &cli.Advice{
			Err:  fmt.Errorf("vif %s: the toolstack has no address for it", dev.ID()),
			Next: fmt.Sprintf("give it one with --addr %s=IP/BITS", dev.ID()),
		}
	}
	if len(g.Addrs) == 0 {
		s.addr = defaultAddr
		return fmt.Sprintf("the toolstack has no address for it, so it is %s\n%s", s.addr, serving()), s.checkGateway()
	}
	if err := s.take(g); err != nil {
		return "", err
	}
	return s.fromToolstack() + "\n" + serving(), nil
}

// take makes the toolstack's addresses, of which there are some, the appliance's.
func (s *site) take(g pvnet.GuestAddresses) error {
	s.took = g
	addrs := distinct(g.Addrs)
	s.addr, s.addrs = addrs[0], addrs[1:]
	if s.addr.IsSingleIP() {
		return noLength(s.addr.Addr())
	}
	if s.routerOf == "" {
		s.gateway = g.Gateway
	}
	return s.checkGateway()
}

// fromToolstack says which addresses the toolstack has.
func (s *site) fromToolstack() string {
	if len(s.addrs) == 0 {
		return fmt.Sprintf("address %s, from the toolstack", s.addr)
	}
	return fmt.Sprintf("addresses %s, from the toolstack", join(append([]netip.Prefix{s.addr}, s.addrs...)))
}

// follow gives the stack the addresses that the toolstack has for it later, until the device ends.
// Those of DHCP and routers, which it asked for because the toolstack had none, stay beside them.
// It has a copy of the site for its own.
func (s site) follow(dev *pvnet.Device, stack *netstack.Stack) {
	s.auto.follow(context.Background(), dev, s.log, func(g pvnet.GuestAddresses) error {
		next := s
		next.addr, next.addrs, next.gateway, next.took = netip.Prefix{}, nil, netip.Addr{}, g
		if next.took.Equal(s.took) {
			return nil
		}
		var addrs []netip.Prefix
		var gateways []netip.Addr
		if len(g.Addrs) > 0 {
			if s.routerOf != "" {
				next.gateway = netip.MustParseAddr(s.routerOf) // newSite has parsed it
			}
			if err := next.take(g); err != nil {
				return err
			}
			addrs = append(addrs, next.addr)
			addrs = append(addrs, next.addrs...)
			if next.gateway.IsValid() {
				gateways = append(gateways, next.gateway)
			}
		}
		if err := stack.SetAddresses(addrs, gateways); err != nil {
			return err
		}
		s = next
		if len(addrs) == 0 {
			s.say("the toolstack has no address for it any more")
		} else {
			s.say("%s\nserving %s", s.fromToolstack(), urlOf(s.addr.Addr(), s.port))
		}
		return nil
	})
}

// distinct leaves out addresses that come twice.
func distinct(list []netip.Prefix) (out []netip.Prefix) {
	for _, p := range list {
		if !slices.ContainsFunc(out, func(q netip.Prefix) bool { return q.Addr() == p.Addr() }) {
			out = append(out, p)
		}
	}
	return out
}

// dhcpAddr is the value of --addr of a guest that takes the addresses of DHCP and routers, and asks
// is what it says then.
const (
	dhcpAddr = "dhcp"
	asks     = "waits for an address: DHCP and router advertisements"
)
