package router

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestWrongConfigurationsSayWhatIsWrong(t *testing.T) {
	for want, edit := range map[string]func(*Config){
		"port 1024 (up): has an ID that is not below 1024":                     func(c *Config) { c.Ports[2].ID = 1024 },
		`port 1 (b): has the ID of another port, "a"`:                          func(c *Config) { c.Ports[1].ID = 1 },
		"port 1 (a): has the MAC 000000000000":                                 func(c *Config) { c.Ports[0].MAC = [6]byte{} },
		"port 1 (a): has the MAC 010000000000":                                 func(c *Config) { c.Ports[0].MAC = [6]byte{1} },
		"port 1 (a): guards the source MAC 010000000000":                       func(c *Config) { c.Ports[0].SourceMAC = [6]byte{1} },
		"port 1 (a): has an MTU of 1279 bytes: use 1280 to 65521":              func(c *Config) { c.Ports[0].MTU = 1279 },
		"port 1 (a): has an MTU of 575 bytes: use 576":                         func(c *Config) { c.Ports[0].MTU = 575; c.Ports[0].Addrs = pfx("10.1.0.1/24") },
		"port 1 (a): has an MTU of 65522 bytes":                                func(c *Config) { c.Ports[0].MTU = 65522 },
		"port 1 (a): has the address invalid Prefix":                           func(c *Config) { c.Ports[0].Addrs[0] = netip.Prefix{} },
		"port 1 (a): has the address 127.0.0.1/8: write a unicast address":     func(c *Config) { c.Ports[0].Addrs = pfx("127.0.0.1/8") },
		"port 1 (a): has the address ff02::1/64: write a unicast address":      func(c *Config) { c.Ports[0].Addrs = pfx("ff02::1/64") },
		"port 1 (a): has the address 10.1.0.0/24, which is the network's own":  func(c *Config) { c.Ports[0].Addrs = pfx("10.1.0.0/24") },
		"port 1 (a): has the address 10.1.0.255/24, which is the network":      func(c *Config) { c.Ports[0].Addrs = pfx("10.1.0.255/24") },
		"port 1 (a): has the address 10.1.0.1 twice":                           func(c *Config) { c.Ports[0].Addrs = pfx("10.1.0.1/24", "10.1.0.1/25") },
		"port 1 (a): has the source invalid Prefix":                            func(c *Config) { c.Ports[0].Sources[0] = netip.Prefix{} },
		"port 2 (b): goes to port 2 what another route for the same prefix":    func(c *Config) { c.Ports[1].Addrs = pfx("10.1.0.2/24") },
		"route 0: has the prefix invalid Prefix":                               func(c *Config) { c.Routes[0].Prefix = netip.Prefix{} },
		"route 0: goes out of port 5, which is not there":                      func(c *Config) { c.Routes[0].Out = 5 },
		"route 0: sends 0.0.0.0/0 to 2001:db8::1, of the other family":         func(c *Config) { c.Routes[0].Via = ip("2001:db8::1") },
		"route 0: goes via 224.0.0.1, which is no host":                        func(c *Config) { c.Routes[0].Via = ip("224.0.0.1") },
		"route 0: goes via 198.51.100.1, which is in no prefix of port 9 (up)": func(c *Config) { c.Routes[0].Via = ip("198.51.100.1") },
		"route 0: goes via 192.0.2.2, which is the router itself":              func(c *Config) { c.Routes[0].Via = ip("192.0.2.2") },
		"route 2: goes to port 1 what another route for the same prefix":       func(c *Config) { c.Routes = append(c.Routes, Route{Prefix: c.Routes[0].Prefix, Out: 1}) },
		"the routes: are 16385: at most 16384":                                 func(c *Config) { c.Routes = make([]Route, 16385) },
		"the rules: are 4097: at most 4096":                                    func(c *Config) { c.Rules = make([]Rule, 4097) },
		"the forwards: are 1025: at most 1024":                                 func(c *Config) { c.Forwards = make([]Forward, 1025) },
		"port 9 (up): has the tentative address 192.0.2.7":                     func(c *Config) { c.Ports[2].Tentative = []netip.Addr{ip("192.0.2.7")} },
		"port 9 (up): has the tentative address ff02::1":                       func(c *Config) { c.Ports[2].Tentative = []netip.Addr{ip("ff02::1")} },
		"port 9 (up): has the tentative address invalid IP":                    func(c *Config) { c.Ports[2].Tentative = make([]netip.Addr, 1) },
		"forward 0: has the ports 8009 to 8000":                                func(c *Config) { c.Forwards[0].Ports = PortRange{8009, 8000} },
		"forward 0: has the ports 0 to 10":                                     func(c *Config) { c.Forwards[0].Ports = PortRange{0, 10} },
		"forward 0: is for protocol 1":                                         func(c *Config) { c.Forwards[0].Proto = 1 },
		"forward 0: has no host to forward to":                                 func(c *Config) { c.Forwards[0].To = netip.Addr{} },
		"forward 0: ends beyond port 65535: choose":                            func(c *Config) { c.Forwards[0].ToPort = 65530 },
		"forward 0: goes to 127.0.0.1: write the unicast":                      func(c *Config) { c.Forwards[0].To = ip("127.0.0.1") },
		"forward 0: goes to 10.1.0.1, which is the router itself":              func(c *Config) { c.Forwards[0].To = ip("10.1.0.1") },
		"forward 0: goes from 2001:db8::2 to 10.1.0.5, of the other family":    func(c *Config) { c.Forwards[0].Addr = ip("2001:db8::2") },
		"forward 0: is for packets of the router itself":                       func(c *Config) { c.Forwards[0].In.Ports = []PortID{LocalPort} },
		"rule 0 (out): names port 1024: ports are below 1024":                  func(c *Config) { c.Rules[0].In.Ports = []PortID{1024} },
		"rule 0 (out): names a group without a name":                           func(c *Config) { c.Rules[0].In.Groups = []string{""} },
		"rule 0 (out): has no action":                                          func(c *Config) { c.Rules[0].Action = 3 },
		"rule 0 (out): is for IP version 5":                                    func(c *Config) { c.Rules[0].Family = 5 },
		"rule 0 (out): has the source invalid Prefix":                          func(c *Config) { c.Rules[0].Src = make([]netip.Prefix, 1) },
		"rule 0 (out): has the destination ::/0 but is for IP version 4":       func(c *Config) { c.Rules[0].Family = 4; c.Rules[0].Dst = pfx("::/0") },
		"rule 0 (out): has the destination 0.0.0.0/0 but is for IP version 6":  func(c *Config) { c.Rules[0].Family = 6; c.Rules[0].Dst = pfx("0.0.0.0/0") },
		"rule 0 (out): has port numbers: name the protocols":                   func(c *Config) { c.Rules[0].DstPorts = []PortRange{{1, 2}} },
		"rule 0 (out): has the ports 2 to 1":                                   func(c *Config) { c.Rules[0].Protocols = []uint8{6}; c.Rules[0].SrcPorts = []PortRange{{2, 1}} },
		"rule 0 (out): has ICMP types: name the protocols":                     func(c *Config) { c.Rules[0].Protocols = []uint8{1, 6}; c.Rules[0].ICMPTypes = []uint8{8} },
		"rule 0 (out): has the states 0x80, some of which do not exist":        func(c *Config) { c.Rules[0].States = 0x80 },
		"rule 0 (out): drops packets of established flows":                     func(c *Config) { c.Rules[0].States = StateEstablished; c.Rules[0].Action = Drop },
		"the default: is no action":                                            func(c *Config) { c.Default = 9 },
		"timeout UDP: is 10ms: use between 1 s and 30 days, or 0 for 5m0s":     func(c *Config) { c.Timeouts.UDP = 10 * time.Millisecond },
	} {
		c := baseConfig()
		forwardsTo(&c)
		if err := c.Check(); err != nil {
			t.Fatal(err)
		}
		edit(&c)
		err := c.Check()
		var ce *ConfigError
		if err == nil || !strings.Contains(err.Error(), "router: "+want) || !errors.As(err, &ce) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	for want, l := range map[string]Limits{
		"limit Flows: is 1": {Flows: 1}, "limit FlowsPerPort: is 65537": {FlowsPerPort: 65537}, "limit NATPerPort": {NATPerPort: -1},
		"limit Fragments": {Fragments: 1}, "limit Neighbours": {Neighbours: -1}, "limit Replies": {Replies: -1},
	} {
		if _, err := New(l); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestAWrongConfigurationChangesNothing(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	port := w.open(4000)
	bad := w.cfg
	bad.Rules = nil
	bad.Default = 9
	if w.Configure(bad) == nil {
		t.Fatal("accepted")
	}
	w.forwarded(tcp(uplink, server, 80, "192.0.2.2", port, ack), clientA)
	w.open(4001)
}

func TestRulesMatchAllTheyName(t *testing.T) {
	base := udp(clientA, "10.1.0.5", 4000, "10.2.0.5", 53)
	six := udp(clientA, "fd01::5", 4000, "fd02::5", 53)
	ping := echo(clientA, "10.1.0.5", "10.2.0.5", 1, false)
	for name, c := range map[string]struct {
		r       Rule
		yes, no []spec
	}{
		"everything":  {Rule{}, []spec{base, six, ping}, nil},
		"family 4":    {Rule{Family: 4}, []spec{base}, []spec{six}},
		"family 6":    {Rule{Family: 6}, []spec{six}, []spec{base}},
		"in":          {Rule{In: Match{Ports: []PortID{clientA}}}, []spec{base}, []spec{udp(clientB, "10.2.0.5", 1, "10.1.0.5", 2)}},
		"out":         {Rule{Out: Match{Ports: []PortID{clientB}}}, []spec{base}, []spec{udp(clientA, "10.1.0.5", 1, server, 2)}},
		"group":       {Rule{Out: Match{Groups: []string{"clients", "none"}}}, []spec{base}, []spec{udp(clientA, "10.1.0.5", 1, server, 2)}},
		"no group":    {Rule{Out: Match{Groups: []string{"none"}}}, nil, []spec{base}},
		"source":      {Rule{Src: pfx("10.9.0.0/16", "10.1.0.5/32")}, []spec{base}, []spec{six, udp(clientA, "10.1.0.6", 1, "10.2.0.5", 2)}},
		"destination": {Rule{Dst: pfx("fd02::/64")}, []spec{six}, []spec{base}},
		"all of 6":    {Rule{Dst: pfx("::/0")}, []spec{six}, []spec{base}},
		"all of 4":    {Rule{Dst: pfx("0.0.0.0/0")}, []spec{base}, []spec{six}},
		"protocol":    {Rule{Protocols: []uint8{17}}, []spec{base, six}, []spec{ping, tcp(clientA, "10.1.0.5", 1, "10.2.0.5", 2, syn)}},
		"dport":       {Rule{Protocols: []uint8{17}, DstPorts: []PortRange{{1, 2}, {53, 60}}}, []spec{base}, []spec{udp(clientA, "10.1.0.5", 4000, "10.2.0.5", 61), udp(clientA, "10.1.0.5", 4000, "10.2.0.5", 52)}},
		"sport":       {Rule{Protocols: []uint8{17}, SrcPorts: []PortRange{{4000, 4000}}}, []spec{base}, []spec{udp(clientA, "10.1.0.5", 3999, "10.2.0.5", 53)}},
		"type":        {Rule{Protocols: []uint8{1, 58}, ICMPTypes: []uint8{8}}, []spec{ping}, []spec{echo(clientA, "fd01::5", "fd02::5", 1, false)}},
		"established": {Rule{States: StateEstablished | StateRelated}, nil, []spec{base}},
	} {
		w := newWorld(t, Limits{}, func(x *Config) {
			c.r.Action, c.r.Name = Accept, "it"
			x.Rules = []Rule{c.r}
		})
		for _, s := range c.yes {
			if p := w.send(s); p.Verdict != VerdictForward {
				t.Errorf("%s: %+v: %v because of %v", name, s, p.Verdict, p.Reason)
			}
			w.send(s) // belongs to the flow, and is not compared again
		}
		for _, s := range c.no {
			if p := w.send(s); p.Reason != ReasonFiltered {
				t.Errorf("%s: %+v: %v because of %v", name, s, p.Verdict, p.Reason)
			}
		}
		if got := w.RuleStats(); len(got) != 1 || got[0] != (RuleStat{"it", uint64(len(c.yes))}) {
			t.Errorf("%s: counted %v", name, got)
		}
		w.configure()
		if got := w.RuleStats(); got[0].Matched != uint64(len(c.yes)) {
			t.Errorf("%s: after Configure %v", name, got)
		}
	}
}

func TestTheFirstRuleDecides(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) {
		c.Rules = []Rule{{Dst: pfx("10.2.0.5/32"), Action: Reject}, {Dst: pfx("10.2.0.0/24"), Action: Accept}, {Action: Drop}}
		c.Default = Accept
	})
	w.refused(udp(clientA, "10.1.0.5", 1, "10.2.0.5", 2), ReasonFiltered)
	w.dropped(udp(clientA, "10.1.0.5", 1, server, 2), ReasonFiltered)
	if p := w.send(udp(clientA, "10.1.0.5", 1, "10.2.0.7", 2)); p.Verdict != VerdictNeighbour {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
}

func TestAReloadEndsWhatIsNoLongerAllowed(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { forwardsTo(c) })
	a, b := w.open(4000), w.open(4001)
	web := tcp(uplink, server, 5000, "192.0.2.2", 8000, syn)
	w.forwarded(web, clientA)
	w.forwarded(tcp(clientA, "10.1.0.5", 80, server, 5000, synAck), uplink)
	web.flags = ack
	w.forwarded(web, clientA)
	w.forwarded(udp(clientB, "10.2.0.5", 9, server, 53), uplink)
	serials := func() (s []uint32) {
		for i := range w.table.flows {
			if w.table.flows[i].used {
				s = append(s, w.table.flows[i].serial)
			}
		}
		return s
	}
	before := serials()
	// What is still allowed goes on, in both directions, by whichever comes first.
	for range 3 {
		w.configure()
		w.forwarded(tcp(uplink, server, 80, "192.0.2.2", a, ack), clientA)
		w.forwarded(tcp(clientA, "10.1.0.5", 4001, server, 80, ack), uplink)
		w.forwarded(tcp(uplink, server, 80, "192.0.2.2", b, ack), clientA)
		w.forwarded(tcp(clientA, "10.1.0.5", 80, server, 5000, ack), uplink)
		w.forwarded(web, clientA)
	}
	if got := serials(); len(got) != len(before) || len(got) != 4 {
		t.Fatalf("flows %v, before %v", got, before)
	}
	w.cfg.Rules[0].Dst = pfx("198.51.100.0/24") // clients may go elsewhere
	w.configure()
	w.dropped(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), ReasonInvalid)
	w.dropped(tcp(uplink, server, 80, "192.0.2.2", b, ack), ReasonInvalid)
	w.forwarded(web, clientA)
	w.cfg.Forwards[0].ToPort = 90 // another service
	w.configure()
	w.dropped(web, ReasonInvalid)
	w.idle()
}

func TestAReloadWithAnotherAddressEndsTranslatedFlows(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	port := w.open(4000)
	w.forwarded(udp(clientA, "fd01::5", 9, "2001:db8:1::9", 53), uplink)
	w.cfg.Ports[2].Addrs = pfx("192.0.2.3/24", "2001:db8::2/64")
	w.configure()
	w.dropped(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), ReasonInvalid)
	if p := w.send(tcp(uplink, server, 80, "192.0.2.2", port, ack)); p.Verdict == VerdictForward {
		t.Fatal("answers to the old address go on")
	}
	n := w.Stats().Flows
	w.forwarded(udp(clientA, "fd01::5", 9, "2001:db8:1::9", 53), uplink) // not translated
	if w.Stats().Flows != n {
		t.Fatal("a flow that may go on was made anew")
	}
	if got := w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, syn), uplink); got.src != "192.0.2.3" {
		t.Fatalf("%+v", got)
	}
	// Without masquerading.
	w.cfg.Ports[2].Masquerade = false
	w.configure()
	w.dropped(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), ReasonInvalid)
}

func TestAnotherPortUnderTheSameID(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	port := w.open(4000)
	w.cfg.Ports[0].Name = "c"
	w.configure()
	if s := w.Stats(); s.Flows != 0 {
		t.Fatal("its flows go on")
	}
	if s, _ := w.PortStats(clientA); s.Forwarded != 0 || s.Neighbours != 0 {
		t.Fatalf("it has the counters of the one before: %+v", s)
	}
	w.dropped(tcp(uplink, server, 80, "192.0.2.2", port, ack), ReasonInvalid)
	// Gone, and back.
	ports := w.cfg.Ports
	w.neighbours()
	w.open(4000)
	w.cfg.Ports = ports[1:]
	w.configure()
	if _, ok := w.PortStats(clientA); ok || w.Stats().Flows != 0 {
		t.Fatal("a port that is gone has flows")
	}
	w.forwarded(udp(clientB, "10.2.0.5", 1, "10.1.0.5", 2), uplink) // by the default route now
	w.cfg.Ports = ports
	w.configure()
	w.neighbours()
	w.open(4000)
	w.Flush(clientA)
	w.Flush(clientB)
	w.Flush(1023)
	w.Flush(5000)
	if s := w.Stats(); s.Flows != 0 {
		t.Fatal("flushed flows go on")
	}
	w.idle()
}

// TestOneAddressOnSeveralPorts is how Qubes joins its guests: each on a /32 of its own, the
// router with one address for all.
func TestOneAddressOnSeveralPorts(t *testing.T) {
	w := &world{t: t, at: time.Hour, cfg: baseConfig()}
	w.Router, _ = New(Limits{})
	edit := func(c *Config) {
		c.Ports[0].Addrs, c.Ports[0].Sources = pfx("10.137.0.1/32"), pfx("10.1.0.5/32")
		c.Ports[1].Addrs, c.Ports[1].Sources = pfx("10.137.0.1/32"), pfx("10.2.0.5/32")
		c.Routes = append(c.Routes, Route{Prefix: netip.MustParsePrefix("10.1.0.5/32"), Out: clientA}, Route{Prefix: netip.MustParsePrefix("10.2.0.5/32"), Out: clientB})
		c.LocalDefault = Accept
		c.Ports[2].Addrs = pfx("192.0.2.2/32") // and its own network does the same
		c.Routes = append(c.Routes[2:], c.Routes[0], Route{Prefix: netip.MustParsePrefix("192.0.2.1/32"), Out: uplink})
	}
	edit(&w.cfg)
	w.configure()
	for _, n := range []struct {
		id  PortID
		a   string
		mac [6]byte
	}{{clientA, "10.1.0.5", hostA}, {clientB, "10.2.0.5", hostB}, {uplink, "192.0.2.1", gatewayMAC}} {
		if err := w.Learn(w.at, n.id, ip(n.a), n.mac); err != nil {
			t.Fatal(err)
		}
	}
	w.open(4000)
	w.dropped(udp(clientA, "10.1.0.6", 1, server, 53), ReasonSpoofed)
	w.dropped(udp(clientA, "10.137.0.1", 1, server, 53), ReasonSpoofed)
	for _, s := range []spec{udp(clientA, "10.1.0.5", 9, "10.137.0.1", 53), udp(clientB, "10.2.0.5", 9, "10.137.0.1", 53)} {
		if p := w.send(s); p.Verdict != VerdictLocal {
			t.Fatalf("%v because of %v", p.Verdict, p.Reason)
		}
		w.forwarded(udp(LocalPort, "10.137.0.1", 53, s.src, 9), s.in)
		if ask := w.AppendSolicit(nil, s.in, ip(s.src)); !bytes.Contains(ask, []byte{10, 137, 0, 1}) {
			t.Fatalf("%x", ask)
		}
	}
	w.idle()
}

func TestDescriptionsAreComplete(t *testing.T) {
	for r := range reasons {
		if r.String() == "" {
			t.Errorf("reason %d has no name", r)
		}
	}
	if reasons.String() != "unknown" || Verdict(99).String() != "verdict unknown" || VerdictFragment.String() != "fragment" || ReasonTranslation.String() != "translation" {
		t.Error("names are shifted")
	}
	if bytes.Contains([]byte((&ConfigError{"a", "b"}).Error()), []byte("%")) {
		t.Error("no text")
	}
}
