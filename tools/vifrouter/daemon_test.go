package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/netstack"
	"barevif/pvnet/netstack/dhcp"
	"barevif/pvnet/pvnettest"
	"barevif/pvnet/router"
	"barevif/telemetry/logtest"
	"barevif/tools/vifrouter/config"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"

	"golang.org/x/net/dns/dnsmessage"
)

// limit bounds every wait of these tests. The machine may be busy.
const limit = labtest.Limit

// Domains of a site.
const (
	routerDom hypercall.DomID = iota + 1
	worldDom
	firstDom // of guests
)

// What the site's world has.
var (
	worldAddr  = netip.MustParseAddr("192.0.2.1")
	worldAddr6 = netip.MustParseAddr("2001:db8::1")
)

// standard is the configuration of most tests: one network, whose guests may begin what they
// like at the uplink.
const standard = `uplink vif 0
uplink ipv4 192.0.2.2/24 via 192.0.2.1
uplink ipv6 2001:db8::2/64 via 2001:db8::1
network office ipv4 10.137.0.0/24 router 10.137.0.1 pool 10.137.0.100-10.137.0.110
network office ipv6 fd00:137::/56
guest * in office
dns to 192.0.2.1
dhcp lease 10m
allow from office to uplink name out
`

// A site is a router in a domain of an emulated machine, between the world, which has a server at
// the other end of the uplink, and guests.
type site struct {
	*testing.T
	ctx   context.Context
	lab   *labtest.Lab
	d     *daemon
	world *netstack.Stack

	said    logtest.Log
	devices chan *pvnet.Device
}

func parse(t testing.TB, text string) *config.Config {
	t.Helper()
	c, err := config.Parse("test.conf", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newSite(t *testing.T, text string) *site {
	t.Helper()
	s := newWorldless(t, text)
	s.connectWorld()
	return s
}

// newWorldless makes a site whose world has only the device at the other end of the uplink.
func newWorldless(t *testing.T, text string) *site {
	t.Helper()
	s := &site{T: t, lab: labtest.New(t, emu.Config{}), devices: make(chan *pvnet.Device, 8)}
	var cancel context.CancelFunc
	s.ctx, cancel = context.WithTimeout(context.Background(), limit)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the router said:\n%s", s.said.String())
		}
	})
	worldDomain, own := s.lab.Domain(worldDom), s.lab.Domain(routerDom)
	s.lab.Add(toolstack.Vif{Front: routerDom, Back: worldDom})
	serving, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- pvnet.Serve(serving, worldDomain, pvnet.ServeConfig{Config: pvnet.Config{Offload: true}, Hotplug: true}, func(dev *pvnet.Device) {
			s.devices <- dev
			<-dev.Done()
		})
	}()
	log := s.said.Logger()
	say := func(format string, args ...any) { fmt.Fprintf(&s.said, format+"\n", args...) }
	d, err := newDaemon(own, parse(t, text), pvnet.Config{Offload: true, StaticGrants: true}, say, log)
	if err != nil {
		t.Fatal(err)
	}
	s.d = d
	running, end := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- d.run(running) }()
	t.Cleanup(func() {
		end()
		if err := <-ran; err != nil {
			t.Error(err)
		}
		if s.world != nil {
			s.world.Close()
		}
		stop()
		<-served
		cancel()
	})
	return s
}

// uplinkDevice waits for the world's end of the uplink.
func (s *site) uplinkDevice() *pvnet.Device {
	s.Helper()
	select {
	case dev := <-s.devices:
		return dev
	case <-s.ctx.Done():
		s.Fatal("the router does not connect to its uplink")
	}
	return nil
}

// connectWorld puts TCP/IP on the world's end of the uplink.
func (s *site) connectWorld() {
	s.Helper()
	var err error
	s.world, err = netstack.New(s.uplinkDevice(), netstack.Config{
		Addrs:    []netip.Prefix{netip.PrefixFrom(worldAddr, 24), netip.PrefixFrom(worldAddr6, 64)},
		Gateways: []netip.Addr{netip.MustParseAddr("2001:db8::2")},
	})
	if err != nil {
		s.Fatal(err)
	}
	s.listenDNS(s.world, "udp4")
	s.listenTCP(s.world, ":80")
}

// comes waits until what is so.
func (s *site) comes(what string, ok func() bool) {
	s.Helper()
	for !ok() {
		select {
		case <-s.ctx.Done():
			s.Fatalf("never: %s", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// listenDNS answers queries: web.test has the world's address, and big.test more than fits a
// datagram.
func (s *site) listenDNS(w *netstack.Stack, network string) {
	s.Helper()
	c, err := w.ListenPacket(network, ":53")
	if err != nil {
		s.Fatal(err)
	}
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			r := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, RecursionAvailable: true}, Questions: m.Questions}
			h := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60}
			switch {
			case !strings.EqualFold(q.Name.String(), "web.test."):
				r.RCode = dnsmessage.RCodeNameError
			case q.Type == dnsmessage.TypeA:
				r.Answers = append(r.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: worldAddr.As4()}})
			case q.Type == dnsmessage.TypeAAAA:
				r.Answers = append(r.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: worldAddr6.As16()}})
			}
			if out, err := r.Pack(); err == nil {
				c.WriteTo(out, from)
			}
		}
	}()
}

// listenTCP says who is connected, and then the SHA-256 of what it gets.
func (s *site) listenTCP(w *netstack.Stack, at string) {
	s.Helper()
	l, err := w.Listen("tcp", at)
	if err != nil {
		s.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				fmt.Fprintf(c, "%s\n", c.RemoteAddr())
				h := sha256.New()
				if _, err := io.Copy(h, c); err == nil {
					fmt.Fprintf(c, "%x\n", h.Sum(nil))
				}
			}()
		}
	}()
}

// guest connects a guest's TCP/IP, which takes its addresses from the router.
func (s *site) guest(dom hypercall.DomID) (*netstack.Stack, *emu.Domain) {
	s.Helper()
	domain := s.lab.Domain(dom)
	s.lab.Add(toolstack.Vif{Front: dom, Back: routerDom})
	return s.connectGuest(domain), domain
}

func (s *site) connectGuest(domain *emu.Domain) *netstack.Stack {
	s.Helper()
	stack, err := netstack.Connect(s.ctx, domain, "0", netstack.Config{DHCP: true, RA: true, Hostname: "guest"})
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { stack.Close() })
	return stack
}

// settled waits until a guest has an address of each family and a name server.
func (s *site) settled(g *netstack.Stack) netstack.Settings {
	s.Helper()
	for now := range g.Changes(s.ctx) {
		four, six := false, false
		for _, a := range now.Addrs {
			four, six = four || a.Addr().Is4(), six || a.Addr().Is6()
		}
		if four && six && len(now.DNS) >= 2 {
			return now
		}
	}
	s.Fatalf("a guest gets no addresses: %+v", g.Settings())
	return netstack.Settings{}
}

// ask connects to a server, which says who we are.
func ask(ctx context.Context, g *netstack.Stack, at string) (string, error) {
	c, err := g.DialContext(ctx, "tcp", at)
	if err != nil {
		return "", err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	var b [64]byte
	n, err := c.Read(b[:])
	host, _, _ := net.SplitHostPort(strings.TrimSpace(string(b[:n])))
	return host, err
}

func TestGuestLeasesResolvesAndConnects(t *testing.T) {
	s := newSite(t, standard)
	g, _ := s.guest(firstDom)
	now := s.settled(g)
	if now.Addrs[0].Prefix != netip.MustParsePrefix("10.137.0.100/32") && now.Addrs[1].Prefix != netip.MustParsePrefix("10.137.0.100/32") {
		t.Errorf("%+v", now)
	}
	who, err := ask(s.ctx, g, "web.test:80")
	if err != nil || who != "192.0.2.2" && !strings.HasPrefix(who, "fd00:137:") {
		t.Errorf("by name: %q, %v", who, err)
	}
	if who, err = ask(s.ctx, g, "192.0.2.1:80"); err != nil || who != "192.0.2.2" {
		t.Errorf("over IPv4 the server sees %q, %v", who, err)
	}
	if who, err = ask(s.ctx, g, "[2001:db8::1]:80"); err != nil || !strings.HasPrefix(who, "fd00:137:") {
		t.Errorf("over IPv6 the server sees %q, %v", who, err)
	}
	for _, to := range []string{"10.137.0.1", "192.0.2.1", "fd00:137::1", "2001:db8::1"} {
		if _, err := g.Ping(s.ctx, netip.MustParseAddr(to)); err != nil {
			t.Errorf("ping %s: %v", to, err)
		}
	}
	if st := s.d.names.Stats(); st.Upstream == 0 || st.Answered == 0 {
		t.Errorf("%+v", st)
	}
	var missing *net.DNSError
	if _, err := g.DialContext(s.ctx, "tcp", "none.test:80"); !errors.As(err, &missing) || !missing.IsNotFound {
		t.Errorf("a name that is none: %v", err)
	}
}

// unanswered requires that a connection of g gets no answer, although dropped reports that its
// first packet was dropped, and the one that repeats it.
func (s *site) unanswered(g *netstack.Stack, at string, dropped func() bool) {
	s.Helper()
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := ask(ctx, g, at)
		ended <- err
	}()
	s.comes("the packets to "+at+" are dropped", func() bool {
		select {
		case err := <-ended:
			s.Fatalf("a connection to %s: %v", at, err)
		default:
		}
		return dropped()
	})
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		s.Errorf("a connection to %s: %v", at, err)
	}
}

func TestRulesDropAndReject(t *testing.T) {
	s := newSite(t, `uplink vif 0
uplink ipv4 192.0.2.2/24 via 192.0.2.1
network office ipv4 10.137.0.0/24 router 10.137.0.1 pool 10.137.0.100-10.137.0.110
network dmz ipv4 10.137.1.0/24 router 10.137.1.1
guest web in dmz domain 4 ipv4 10.137.1.7
guest * in office
dns off
allow from office to web proto tcp port 80
reject from office to uplink proto tcp port 81 name shut
drop from office to uplink proto tcp port 82 name silent
allow from office to uplink
forward tcp 8080 to 10.137.1.7:80
`)
	g, _ := s.guest(firstDom)
	web, _ := s.guest(firstDom + 1)
	for _, one := range []*netstack.Stack{g, web} {
		if _, err := one.Ready(s.ctx); err != nil {
			t.Fatal(err)
		}
	}
	if a := web.Addr(); a != netip.MustParseAddr("10.137.1.7") {
		t.Errorf("the guest with a fixed address has %v", a)
	}
	s.listenTCP(web, ":80")
	if who, err := ask(s.ctx, g, "10.137.1.7:80"); err != nil || who != g.Addr().String() {
		t.Errorf("from guest to guest: %q, %v", who, err)
	}
	if _, err := ask(s.ctx, g, "192.0.2.1:81"); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("rejected: %v", err)
	}
	matched := func(rule string) (n uint64) {
		for _, r := range s.d.core.RuleStats() {
			if r.Name == rule {
				n = r.Matched
			}
		}
		return n
	}
	s.unanswered(g, "192.0.2.1:82", func() bool { return matched("silent") > 1 })
	if who, err := ask(s.ctx, s.world, "192.0.2.2:8080"); err != nil || who != "192.0.2.1" {
		t.Errorf("through the forward: %q, %v", who, err)
	}
	// The guest of the network without rules begins nothing.
	filtered := func() (n uint64) {
		for id := range router.PortID(8) {
			if p, ok := s.d.core.PortStats(id); ok {
				n += p.Dropped[router.ReasonFiltered]
			}
		}
		return n
	}
	before := filtered()
	s.unanswered(web, "192.0.2.1:80", func() bool { return filtered() > before+1 })
	if matched("shut") == 0 {
		t.Error("the rule that rejects has matched nothing")
	}
}

// dropped returns how many packets the router has decided to drop for a reason that a flow could
// notice. That a vif had no room is no decision of its.
func (s *site) dropped() (n uint64) {
	for id := range router.PortID(8) {
		if p, ok := s.d.core.PortStats(id); ok {
			n += p.Drops() - p.Dropped[router.ReasonNotForUs] - p.Dropped[router.ReasonFiltered]
		}
	}
	return n
}

func TestReloadLosesNothing(t *testing.T) {
	s := newSite(t, standard)
	g, _ := s.guest(firstDom)
	s.settled(g)
	c, err := g.DialContext(s.ctx, "tcp", "192.0.2.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var hello [64]byte
	if _, err := c.Read(hello[:]); err != nil {
		t.Fatal(err)
	}
	before := s.dropped()
	stop, ended := make(chan struct{}), make(chan struct{})
	var reloads atomic.Int64
	go func() {
		defer close(ended)
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			text := standard + fmt.Sprintf("reject from office to uplink proto tcp port %d\n", 1000+n%100)
			if err := s.d.reload(parse(t, text)); err != nil {
				t.Error(err)
			}
			reloads.Add(1)
			time.Sleep(time.Millisecond)
		}
	}()
	h, piece := sha256.New(), make([]byte, 64<<10)
	for i := 0; i < 400 || reloads.Load() < 5 && s.ctx.Err() == nil; i++ {
		for j := range piece {
			piece[j] = byte(i*7 + j*13)
		}
		h.Write(piece)
		if _, err := c.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	<-ended
	if n := reloads.Load(); n < 5 {
		t.Errorf("only %d reloads", n)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	sum, err := io.ReadAll(c)
	if want := fmt.Sprintf("%x\n", h.Sum(nil)); err != nil || string(sum) != want {
		t.Errorf("%q, %v; want %q", sum, err, want)
	}
	if n := s.dropped() - before; n != 0 {
		t.Errorf("%d packets were lost", n)
	}
}

func TestReloadEndsWhatIsAllowedNoMore(t *testing.T) {
	s := newSite(t, standard)
	g, _ := s.guest(firstDom)
	s.settled(g)
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil {
		t.Fatal(err)
	}
	if err := s.d.reload(parse(t, strings.Replace(standard, "allow from office", "reject from office", 1))); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err == nil {
		t.Error("what is rejected now still connects")
	}
	// A reload that changes what it cannot is refused, and the old configuration stays.
	err := s.d.reload(parse(t, standard+"flows 1000\n"))
	if err == nil || !strings.Contains(err.Error(), `"flows"`) {
		t.Error(err)
	}
	if err := s.d.reload(parse(t, standard)); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil {
		t.Error(err)
	}
}

func TestGuestIsHeldToItsAddress(t *testing.T) {
	s := newSite(t, standard)
	g, _ := s.guest(firstDom)
	s.settled(g)
	domain := s.lab.Domain(firstDom + 1)
	vif := s.lab.Add(toolstack.Vif{Front: firstDom + 1, Back: routerDom})
	dev, err := pvnet.Connect(s.ctx, domain, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Disconnect()
	to := netip.AddrPortFrom(worldAddr, 53)
	send := func(mac [6]byte, src string) {
		f := udpFrame(mac, guestMAC, netip.MustParseAddrPort(src), to, []byte("spoofed"))
		if _, err := dev.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	id := router.PortID(2)
	count := func(r router.Reason) uint64 {
		p, _ := s.d.core.PortStats(id)
		return p.Dropped[r]
	}
	send(vif.MAC, "10.137.0.100:1000") // the other guest's
	s.comes("a spoofed address is dropped", func() bool { return count(router.ReasonSpoofed) == 1 })
	send(vif.MAC, "192.0.2.9:1000") // one of the world
	s.comes("an address of the uplink is dropped", func() bool { return count(router.ReasonSpoofed) == 2 })
	send([6]byte{0, 0x16, 0x3e, 0, byte(firstDom), 0}, "10.137.0.101:1000") // the other guest's MAC
	s.comes("another MAC is dropped", func() bool { return count(router.ReasonSourceMAC) == 1 })
	send(vif.MAC, "10.137.0.101:1000") // its own address, which it has without DHCP too
	s.comes("what is its own passes", func() bool {
		p, _ := s.d.core.PortStats(id)
		return p.Forwarded+p.Waiting > 0
	})
	// Neither has taken anything from the other guest.
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil {
		t.Error(err)
	}
}

func TestGuestsAndUplinkComeAndGo(t *testing.T) {
	s := newSite(t, standard)
	g, domain := s.guest(firstDom)
	s.settled(g)
	first := g.Addr()
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil {
		t.Fatal(err)
	}
	// The guest's vif is taken away and comes back, with its address.
	g.Close()
	vif := toolstack.Vif{Front: firstDom, Back: routerDom}
	if err := toolstack.Remove(s.ctx, s.lab.Tools, vif); err != nil {
		t.Fatal(err)
	}
	s.comes("the router lets go of the vif", func() bool { return strings.Contains(s.said.String(), "vif 3.0: gone") })
	s.lab.Add(vif)
	g = s.connectGuest(domain)
	s.settled(g)
	if g.Addr() != first {
		t.Errorf("the guest had %v and has %v", first, g.Addr())
	}
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil {
		t.Fatal(err)
	}
	// The uplink is taken away and comes back.
	up := toolstack.Vif{Front: routerDom, Back: worldDom}
	s.world.Close()
	if err := toolstack.Remove(s.ctx, s.lab.Tools, up); err != nil {
		t.Fatal(err)
	}
	s.comes("the uplink is down", func() bool { return strings.Contains(s.said.String(), "uplink vif 0: down") })
	s.lab.Add(up)
	s.connectWorld()
	s.comes("the guest reaches the world again", func() bool {
		soon, cancel := context.WithTimeout(s.ctx, 5*time.Second)
		defer cancel()
		_, err := ask(soon, g, "192.0.2.1:80")
		return err == nil
	})
}

// refusedGuest adds a vif that the configuration does not name, and waits until it is refused.
func (s *site) refusedGuest(dom hypercall.DomID) *emu.Domain {
	s.Helper()
	domain := s.lab.Domain(dom)
	vif := s.lab.Add(toolstack.Vif{Front: dom, Back: routerDom})
	s.comes("the router says why", func() bool {
		why, err := s.lab.Tools.Read(s.ctx, vif.BackDir()+"/hotplug-error")
		return err == nil && strings.Contains(why, "no guest line")
	})
	return domain
}

func TestVifThatNobodyNamesIsRefusedUntilAReloadAdmitsIt(t *testing.T) {
	s := newSite(t, strings.Replace(standard, "guest * in office", "guest other in office domain 77", 1))
	domain := s.refusedGuest(firstDom)
	if err := s.d.reload(parse(t, standard)); err != nil {
		t.Fatal(err)
	}
	s.settled(s.connectGuest(domain))
}

func TestMetricsAreOneReadablePage(t *testing.T) {
	s := newSite(t, standard)
	g, _ := s.guest(firstDom)
	s.settled(g)
	if _, err := ask(s.ctx, g, "web.test:80"); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := s.d.writeMetrics(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	if strings.Count(text, "# EOF") != 1 || !strings.HasSuffix(text, "\n# EOF\n") {
		t.Error("the page does not end with one EOF")
	}
	types := map[string]bool{}
	for line := range strings.Lines(text) {
		if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, _, _ = strings.Cut(name, " ")
			if types[name] {
				t.Errorf("%s comes twice", name)
			}
			types[name] = true
		}
	}
	for _, want := range []string{
		`vifrouter_forwarded_packets_total{port="3.0"} `, `vifrouter_dhcp_leases 1`, `vifrouter_guests{admitted="yes"} 1`,
		`vifrouter_rule_packets_total{rule="out"} `, `vifrouter_dns_upstream_queries_total `, `{vif="vif3.0",queue="0"}`, `{vif="uplink",queue="0"}`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("nothing says %q", want)
		}
	}
	if strings.Contains(text, `vifrouter_forwarded_packets_total{port="3.0"} 0`+"\n") {
		t.Error("nothing was counted as forwarded")
	}
}

// A file without an error is one that the core takes, with the uplink and guests there, up to as many
// statements as there may be.
func TestTheLargestFileIsTaken(t *testing.T) {
	s := newSite(t, standard)
	g, _ := s.guest(firstDom)
	var b strings.Builder
	b.WriteString(standard)
	for i := range config.MaxRoutes {
		fmt.Fprintf(&b, "route 198.18.%d.%d/32 via 192.0.2.%d\n", i>>8, i&0xff, 3+i%200)
	}
	for i := range config.MaxRules - 1 {
		fmt.Fprintf(&b, "drop from office to uplink proto udp port %d name r%d\n", 1+i, i)
	}
	for i := range config.MaxForwards {
		fmt.Fprintf(&b, "forward tcp %d to 10.137.0.%d\n", 1000+i, 100+i%100)
	}
	if err := s.d.reload(parse(t, b.String())); err != nil {
		t.Fatal(err)
	}
	if who, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil || who != "192.0.2.2" {
		t.Errorf("%q, %v", who, err)
	}
}

// A router whose uplink is a guest of another router: it leases its address there, asks the name
// server of the lease, and gives both back with its own guests behind it.
func TestUplinkLeasesItsAddress(t *testing.T) {
	s := newSite(t, standard)
	const inner = firstDom + 4
	own := s.lab.Domain(inner)
	s.lab.Add(toolstack.Vif{Front: inner, Back: routerDom})
	log := s.said.Logger()
	say := func(format string, args ...any) { fmt.Fprintf(&s.said, "inner: "+format+"\n", args...) }
	text := `uplink vif 0
uplink ipv4 dhcp
network lab ipv4 10.200.0.0/24 router 10.200.0.1 pool 10.200.0.5-10.200.0.9
guest * in lab
dns uplink
allow from lab to uplink
`
	d, err := newDaemon(own, parse(t, text), pvnet.Config{Offload: true}, say, log)
	if err != nil {
		t.Fatal(err)
	}
	running, end := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- d.run(running) }()
	defer func() {
		end()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	}()
	s.comes("the uplink has a lease", func() bool {
		return strings.Contains(s.said.String(), "inner: uplink: address 10.137.0.100/32 by DHCP")
	})
	domain := s.lab.Domain(inner + 1)
	s.lab.Add(toolstack.Vif{Front: inner + 1, Back: inner})
	g, err := netstack.Connect(s.ctx, domain, "0", netstack.Config{DHCP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if _, err := g.Ready(s.ctx); err != nil {
		t.Fatal(err)
	}
	if who, err := ask(s.ctx, g, "web.test:80"); err != nil || who != "192.0.2.2" {
		t.Errorf("through two routers: %q, %v", who, err)
	}
	// A reload to a static address ends the client, and one back starts it again.
	static := strings.Replace(text, "ipv4 dhcp", "ipv4 10.137.0.100/24 via 10.137.0.1", 1)
	if err := d.reload(parse(t, strings.Replace(static, "dns uplink", "dns to 10.137.0.1", 1))); err != nil {
		t.Fatal(err)
	}
	if who, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil || who != "192.0.2.2" {
		t.Errorf("with a static address: %q, %v", who, err)
	}
	if err := d.reload(parse(t, text)); err != nil {
		t.Fatal(err)
	}
	s.comes("the uplink has a lease again", func() bool {
		return strings.Count(s.said.String(), "inner: uplink: address 10.137.0.100/32 by DHCP") == 2
	})
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil {
		t.Error(err)
	}
	// Of two routes of a server for one network the first counts, and none leads away from the own link.
	two := func(to, via string) dhcp.Route {
		return dhcp.Route{To: netip.MustParsePrefix(to), Via: netip.MustParseAddr(via)}
	}
	if err := d.leased(s.ctx, &dhcp.Lease{Addr: netip.MustParsePrefix("10.137.0.100/24"), Routes: []dhcp.Route{
		two("10.137.0.0/24", "10.137.0.9"), two("0.0.0.0/0", "10.137.0.1"), two("0.0.0.0/0", "10.137.0.9"),
	}}); err != nil {
		t.Error(err)
	}
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil {
		t.Error(err)
	}
	// A lease in a network of guests is refused.
	if err := d.leased(s.ctx, &dhcp.Lease{Addr: netip.MustParsePrefix("10.200.0.7/24")}); err == nil || !strings.Contains(err.Error(), "overlaps the network lab") {
		t.Error(err)
	}
}

// A vif that cannot be received from is closed, and the log says why once. One that goes in an orderly way is
// no error.
// A peer's fault is said once, by the device, which has ended.
func TestAPeersFaultIsNotSaidTwice(t *testing.T) {
	for err, want := range map[error]bool{nil: false, &pvnet.PeerError{}: false, pvnet.ErrDisconnected: false, pvnet.ErrOwned: true} {
		if receivesNothing(err) != want {
			t.Errorf("%v: %v", err, !want)
		}
	}
}

func TestAVifThatCannotBeReceivedFromIsClosed(t *testing.T) {
	h := pvnettest.NewHub(t, 2, toolstack.Vif{}, func(int) pvnet.Config { return pvnet.Config{} }, pvnet.ServeConfig{})
	var said logtest.Log
	d, err := newDaemon(h.Driver, parse(t, standard), pvnet.Config{}, func(format string, args ...any) { fmt.Fprintf(&said, format+"\n", args...) }, said.Logger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.close)
	const complaint = "a vif can no longer be received from and is closed"
	serve := func(dev *pvnet.Device) (served chan struct{}) {
		served = make(chan struct{})
		go func() { d.serve(context.Background(), dev); close(served) }()
		return served
	}
	ends := func(served <-chan struct{}) {
		t.Helper()
		select {
		case <-served:
		case <-time.After(limit):
			t.Fatal("the vif is still served")
		}
	}
	deaf := h.Backs[0]
	if _, err := deaf.OwnRX(0); err != nil {
		t.Fatal(err)
	}
	ends(serve(deaf))
	ends(deaf.Done())
	if lines := said.Lines(complaint); len(lines) != 1 || !strings.Contains(lines[0], "vif=2.0") || !strings.Contains(lines[0], pvnet.ErrOwned.Error()) {
		t.Errorf("%q", lines)
	}

	uplink := h.Fronts[0] // of a backend that is gone: it would wait for another
	if _, err := uplink.OwnRX(0); err != nil {
		t.Fatal(err)
	}
	if err := d.useUplink(context.Background(), uplink); err != nil {
		t.Error(err)
	}
	ends(uplink.Done())
	if lines := said.Lines(complaint); len(lines) != 2 || !strings.Contains(lines[1], "vif=0") {
		t.Errorf("%q", lines)
	}

	served := serve(h.Backs[1])
	for begun := time.Now(); len(said.Lines("vif 3.0: connected")) == 0; time.Sleep(time.Millisecond) {
		if time.Since(begun) > limit {
			t.Fatal("the vif does not connect")
		}
	}
	h.Unplug(1)
	ends(served)
	if lines := said.Lines(complaint); len(lines) != 2 {
		t.Errorf("%q", lines)
	}
}
