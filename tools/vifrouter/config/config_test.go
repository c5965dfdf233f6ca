package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/pvnet"
)

// base is a configuration without an error, of few lines.
const base = `uplink vif 0
uplink ipv4 192.0.2.2/24 via 192.0.2.1
uplink ipv6 2001:db8::2/64
network office ipv4 10.137.0.0/24 router 10.137.0.1 pool 10.137.0.100-10.137.0.199
network office ipv6 fd00:137::/56
guest web in office mac 00:16:3e:00:00:07 ipv4 10.137.0.7
guest * in office
dns to 192.0.2.53
`

func TestExampleHasNoError(t *testing.T) {
	c, err := Parse("example", []byte(Example))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Networks) != 2 || len(c.Guests) != 3 || len(c.Rules) != 9 || len(c.Forwards) != 2 || len(c.Routes) != 1 {
		t.Errorf("%+v", c)
	}
	for _, s := range statements {
		if !strings.Contains("\n"+Example, "\n"+s+" ") {
			t.Errorf("the example has no statement %q", s)
		}
	}
}

func TestValuesAreThoseOfTheFile(t *testing.T) {
	c, err := Parse("f", []byte(base+`allow from web to uplink proto tcp,17 port 80,8000-8010 sport 1024-65535 source 10.137.0.7 dest 198.51.100.0/24 family ipv4 name out
reject from any to router proto icmp type 8,13 state invalid,related
default reject
forward udp 53-54 to 10.137.0.7:1053 at 192.0.2.2
dhcp lease 30m
metrics machine 127.0.0.1:9100
flows 1000 per-guest 100
uplink nat ipv6 ipv4
`))
	if err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr
	if u := c.Uplink; u.Vif != "0" || u.IPv4 != netip.MustParsePrefix("192.0.2.2/24") || u.Via4 != a("192.0.2.1") || !u.NAT4 || !u.NAT6 || u.DHCP {
		t.Errorf("%+v", u)
	}
	if n := c.NetworkOf("office"); n == nil || n.Router != a("10.137.0.1") || n.First != a("10.137.0.100") || n.Last != a("10.137.0.199") || n.IPv6.Bits() != 56 {
		t.Errorf("%+v", n)
	}
	r := c.Rules[0]
	if r.Action != Allow || r.From != (Place{AtGuest, "web"}) || r.To != (Place{Kind: AtUplink}) || !slices.Equal(r.Proto, []uint8{6, 17}) ||
		!slices.Equal(r.DstPorts, []Ports{{80, 80}, {8000, 8010}}) || !slices.Equal(r.SrcPorts, []Ports{{1024, 65535}}) || r.Family != 4 || r.Name != "out" ||
		r.Source[0] != netip.MustParsePrefix("10.137.0.7/32") || r.Dest[0] != netip.MustParsePrefix("198.51.100.0/24") {
		t.Errorf("%+v", r)
	}
	if r := c.Rules[1]; r.Action != Reject || r.To.Kind != AtRouter || !r.Related || !r.Invalid || !slices.Equal(r.Types, []uint8{8, 13}) {
		t.Errorf("%+v", r)
	}
	if f := c.Forwards[0]; f.First != 53 || f.Last != 54 || f.ToPort != 1053 || f.To != a("10.137.0.7") || f.At != a("192.0.2.2") || f.Proto != 17 {
		t.Errorf("%+v", f)
	}
	if c.Default != Reject || c.Lease != 30*time.Minute || !c.Metrics.Machine || c.Limits != (Limits{1000, 100}) || c.DNS.Upstream[0].Port() != 53 {
		t.Errorf("%+v", c)
	}
}

func TestGuestIsTheFirstThatMatches(t *testing.T) {
	c, err := Parse("f", []byte(base+"guest both in office domain 5 vif 1\nguest five in office domain 5\n"))
	if err != nil {
		t.Fatal(err)
	}
	web := pvnet.MAC{0, 0x16, 0x3e, 0, 0, 7}
	for _, one := range []struct {
		domain uint16
		vif    string
		mac    pvnet.MAC
		want   string
	}{
		{5, "1", web, "web"}, {5, "1", pvnet.MAC{2}, "both"}, {5, "0", pvnet.MAC{2}, "five"}, {6, "1", pvnet.MAC{}, "*"},
	} {
		if g := c.GuestOf(one.domain, one.vif, one.mac); g == nil || g.Name != one.want {
			t.Errorf("%+v: %+v", one, g)
		}
	}
	c, err = Parse("f", []byte(strings.Replace(base, "guest * in office\n", "", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if g := c.GuestOf(6, "1", pvnet.MAC{}); g != nil {
		t.Errorf("a vif that no line names is %+v", g)
	}
}

// wrong are lines, each with a part of its error. A line that begins with "-" replaces the lines of
// base that begin with the words behind it up to ":".
var wrong = []struct{ line, want string }{
	{"frobnicate", `"frobnicate" is no statement: begin with one of: uplink, route`},
	{"uplink", `"" is nothing of an uplink`},
	{"uplink speed 10", `"speed" is nothing of an uplink`},
	{"uplink vif 1", `"uplink vif" is there already, in line 1`},
	{"-uplink vif:uplink vif x", `"x" is no number of a vif`},
	{"-uplink vif:uplink vif 007", `"007" is no number of a vif`},
	{"-uplink vif:uplink vif", `"vif" has no value: write the number of a vif`},
	{"-uplink vif:uplink vif 0 1", `"1" is too much`},
	{"-uplink vif:", `the file names no uplink: write "uplink vif 0"`},
	{"-uplink ipv6:uplink ipv6 dhcp", `DHCP for IPv6 is not supported at the uplink: write "uplink ipv6 auto"`},
	{"-uplink ipv6:uplink ipv6 auto now", `"now" is too much: write "uplink ipv6 auto" alone`},
	{"-uplink ipv4:uplink ipv4 auto", `no router announces addresses of IPv4: write "uplink ipv4 dhcp"`},
	{"-uplink ipv6:uplink ipv6 auto;route 2001:db8:5::/48 via 2001:db8::9", "not known yet, and a route needs one: name the router by its link-local address"},
	{"-uplink ipv6:uplink ipv6 192.0.2.2/24", `"192.0.2.2/24" is no ipv6 address`},
	{"-uplink ipv4:uplink ipv4 192.0.2.2", `"192.0.2.2" is no ipv4 address with a length`},
	{"-uplink ipv4:uplink ipv4 192.0.2.0/24", "192.0.2.0/24 is no address that a host can have"},
	{"-uplink ipv4:uplink ipv4 192.0.2.255/24", "no address that a host can have"},
	{"-uplink ipv4:uplink ipv4 224.0.0.1/24", "no address that a host can have"},
	{"-uplink ipv4:uplink ipv4 192.0.2.2/24 over 192.0.2.1", `"over" makes no sense here`},
	{"-uplink ipv4:uplink ipv4 192.0.2.2/24 via", `"via" has no value`},
	{"-uplink ipv4:uplink ipv4 192.0.2.2/24 via 192.0.3.1", "the router 192.0.3.1 is not another address of 192.0.2.0/24"},
	{"-uplink ipv4:uplink ipv4 192.0.2.2/24 via 192.0.2.2", "not another address"},
	{"-uplink ipv4:uplink ipv4 dhcp now", `"now" is too much`},
	{"-uplink ipv4,uplink ipv6:", "the uplink has no address"},
	{"-uplink ipv6:uplink nat ipv6", "no IPv6 address at the uplink to translate to"},
	{"-uplink ipv4:uplink nat ipv4", "no IPv4 address at the uplink to translate to"},
	{"uplink nat", `"nat" has no value`},
	{"uplink nat none ipv4", `"none" makes no sense here`},
	{"uplink nat ipv5", `"ipv5" makes no sense here`},
	{"route 198.51.100.0/24", `"via" is missing`},
	{"route 198.51.100.1/24 via 192.0.2.9", `"198.51.100.1/24" is no prefix`},
	{"route x via 192.0.2.9", `"x" is no prefix`},
	{"route 198.51.100.0/24 via 10.0.0.1", "10.0.0.1 is not another address of 192.0.2.0/24"},
	{"route 198.51.100.0/24 via 2001:db8::9", `"2001:db8::9" is no such address`},
	{"route 10.137.0.128/25 via 192.0.2.9", "10.137.0.128/25 is in the network office"},
	{"-uplink ipv4:uplink ipv4 dhcp;route 198.51.100.0/24 via 192.0.2.9", "the uplink's address is not known yet"},
	{"route 224.0.0.0/4 via 192.0.2.9", "224.0.0.0/4 is no prefix of addresses that hosts beyond a router can have"},
	{"route 127.0.0.0/8 via 192.0.2.9", "127.0.0.0/8 is no prefix of addresses"},
	{"route 0.0.0.0/8 via 192.0.2.9", "0.0.0.0/8 is no prefix of addresses"},
	{"route fe80::/10 via 2001:db8::9", "fe80::/10 is no prefix of addresses"},
	{"route 198.51.100.0/24 via 192.0.2.9;route 198.51.100.0/24 via 192.0.2.10", "r.conf:10: line 9 has a route to 198.51.100.0/24 already: leave one of the lines"},
	{"route 0.0.0.0/0 via 192.0.2.9", "the uplink's line names a router to all other networks already, 192.0.2.1: leave the route out"},
	{"route 192.0.2.0/24 via 192.0.2.9", "192.0.2.0/24 is the uplink's own link, which needs no router: leave the route out"},
	{manyRoutes() + "route 203.0.113.0/24 via 192.0.2.9", "there are too many routes: have at most 1024"},
	{"network", `"network" has no value`},
	{"network a.b ipv4 10.0.0.0/24 router 10.0.0.1", `"a.b" is no name`},
	{"network any ipv4 10.0.0.0/24 router 10.0.0.1", `the name "any" has a meaning already`},
	{"network x appletalk", `"appletalk" is nothing of a network`},
	{"network office ipv4 10.0.0.0/24 router 10.0.0.1", `"network office ipv4" is there already, in line 4`},
	{"network x ipv4 10.0.0.1/24 router 10.0.0.1", "10.0.0.1/24 has bits behind its length: write 10.0.0.0/24"},
	{"network x ipv4 10.0.0.0/31 router 10.0.0.1", "10.0.0.0/31 is no prefix for guests"},
	{"network x ipv4 fd00::/64 router 10.0.0.1", `"fd00::/64" is no ipv4 prefix`},
	{"network x ipv4 10.0.0.0/24", `"router" is missing`},
	{"network x ipv4 10.0.0.0/24 router 10.0.1.1", "the router 10.0.1.1 is no host of 10.0.0.0/24"},
	{"network x ipv4 10.0.0.0/24 router 10.0.0.255", "is no host of"},
	{"route 198.51.100.0/24 via 192.0.2.255", "192.0.2.255 is not another address of 192.0.2.0/24"},
	{"network x ipv4 10.0.0.0/24 router 10.0.0.1 swamp 1", `"swamp" makes no sense here`},
	{"network x ipv4 10.0.0.0/24 router 10.0.0.1 pool 10.0.0.9", `"10.0.0.9" is no range of addresses`},
	{"network x ipv4 10.0.0.0/24 router 10.0.0.1 pool 10.0.0.9-10.0.0.5", "is no range of hosts"},
	{"network x ipv4 10.0.0.0/24 router 10.0.0.1 pool 10.0.0.9-10.0.1.5", "is no range of hosts"},
	{"network x ipv4 10.0.0.0/8 router 10.0.0.1 pool 10.0.0.9-10.9.1.5", "the pool is too large"},
	{"network x ipv4 10.0.0.0/24 router 10.0.0.1 pool 10.0.0.1-10.0.0.5", "the router's address 10.0.0.1 is in the pool"},
	{"network x ipv4 10.137.0.128/25 router 10.137.0.129", "overlaps 10.137.0.0/24 of network office"},
	{"network x ipv4 192.0.2.0/28 router 192.0.2.3", "overlaps 192.0.2.0/24 of the uplink"},
	{"network x ipv6 fd00::/65", "fd00::/65 cannot be shared out"},
	{"network x ipv6 fe80::/64", "fe80::/64 is no prefix for hosts"},
	{"-network,guest:", "the file has no network for guests"},
	{"-guest:", "the file names no guests"},
	{"guest", `"guest" has no value`},
	{"guest a", `"in" is missing`},
	{"guest a in", `"in" has no value`},
	{"guest a in nowhere mac 00:16:3e:00:00:09", `there is no network "nowhere"`},
	{"guest a in office", `nothing says which vif the guest "a" is`},
	{"guest web in office vif 3", `"guest web" is there already`},
	{"guest a in office mac 01:16:3e:00:00:09", `"01:16:3e:00:00:09" is no MAC of a card`},
	{"guest a in office domain 0", `"0" is no number of a guest's domain`},
	{"guest a in office domain 40000", "is no number of a guest's domain"},
	{"guest a in office vif -1", `"-1" is no number of a vif`},
	{"guest a in office vif 1 vif 2", `"vif" comes twice`},
	{"guest a in office colour red", `"colour" is nothing of a guest`},
	{"guest a in office vif 1 ipv4 10.0.0.1", "10.0.0.1 is no host of the network office"},
	{"guest a in office vif 1 ipv4 10.137.0.1", "10.137.0.1 is the router's own address"},
	{"guest a in office vif 1 ipv4 10.137.0.7", `the guest "web" has the address 10.137.0.7 too`},
	{"guest office in office vif 1", `a network is called "office" too`},
	{"guest a in office mac 00:16:3e:00:00:07", `the guest "a" is the same vif as "web"`},
	{"guest a in office domain 3;guest b in office domain 3 vif 0", `r.conf:10: no vif becomes the guest "b", since "a" in line 9 takes all of them: put this line before that one`},
	{"guest a in office vif 0;guest b in office mac 00:16:3e:00:00:09 vif 0", `no vif becomes the guest "b"`},
	{"guest b in office mac 00:16:3e:00:00:07 domain 3", `no vif becomes the guest "b", since "web" in line 6 takes all of them`},
	{"-guest *:guest * in office vif 3", `"guest *" are all that no other line names`},
	{"allow", `"from" is missing`},
	{"allow from office", `"to" is missing`},
	{"allow from office to nobody", `no network and no guest is called "nobody"`},
	{"allow from router to router", "no packet goes from the router to itself"},
	{"allow from any to any port 80", "ports are of tcp and udp alone"},
	{"allow from any to any proto tcp,icmp port 80", "ports are of tcp and udp alone"},
	{"allow from any to any type 8", "types are of icmp or icmpv6 alone"},
	{"allow from any to any proto icmp,icmpv6 type 8", "types are of icmp or icmpv6 alone"},
	{"allow from any to any proto icmp type 256", `"256" is no type of ICMP`},
	{"allow from any to any proto ipx", `"ipx" is no protocol`},
	{"allow from any to any proto tcp port 0", `"0" is no port`},
	{"allow from any to any proto tcp port 9-5", `"9-5" is no port`},
	{"allow from any to any proto tcp port 80 port 81", `"port" comes twice`},
	{"allow from any to any family ipx", `"ipx" is no family`},
	{"allow from any to any family ipv6 proto icmp", "the protocol is of the other family"},
	{"allow from any to any family ipv4 source fd00::/8", "fd00::/8 is of the other family"},
	{"allow from any to any source 10.0.0.1/8", `"10.0.0.1/8" has bits behind its length, and is 10.0.0.0/8`},
	{"allow from any to any dest x", `"x" is no address and no prefix`},
	{"allow from any to any source 10.0.0.1 dest fd00::1", "no packet has all of it: its addresses, or its protocol, are of different families: name what is of one family"},
	{"allow from any to any proto icmp source fd00::1", "no packet has all of it"},
	{"allow from any to any proto icmpv6 dest 10.0.0.1,10.0.0.2", "no packet has all of it"},
	{strings.Repeat("allow from any to any;", MaxRules) + "drop from any to any", "there are too many rules: have at most 2048"},
	{"drop from any to any state established", "packets of a flow pass because it was allowed"},
	{"drop from any to any state wild", `"wild" is no state`},
	{"drop from any to any name a/b", `"a/b" is no name`},
	{"drop from any to any loudly yes", `"loudly" is nothing of a rule`},
	{"drop from any to any proto", `"proto" has no value`},
	{"default maybe", `"maybe" is no default`},
	{"default drop;default drop", `"default" is there already`},
	{"forward icmp 1 to 10.137.0.7", `"icmp" is not forwarded`},
	{"forward tcp x to 10.137.0.7", `"x" is no port`},
	{"forward tcp 80 10.137.0.7", `"to" is missing`},
	{"forward tcp 80 to web", `"web" is no address`},
	{"forward tcp 80-90 to 10.137.0.7:65530", "the ports end behind 65535"},
	{"forward tcp 80 to 10.137.0.1", "10.137.0.1 is the router itself"},
	{"forward tcp 80 to 10.9.9.9", "10.9.9.9 is in no network"},
	{"forward tcp 80 to 10.137.0.7 at 192.0.2.3", "192.0.2.3 is no address of the uplink"},
	{"forward tcp 80 to 10.137.0.7 for 192.0.2.3", `"for" makes no sense here`},
	{"forward tcp 80-90 to 10.137.0.7;forward tcp 85 to 10.137.0.8", "are those of line 9 too"},
	{"forward tcp 80 to 10.137.0.255", "10.137.0.255 is no host of the network office: forward to the address of a guest"},
	{"forward tcp 80 to 10.137.0.0", "10.137.0.0 is no host of the network office"},
	{"forward tcp 80 to fd00:137:0:7::1", "fd00:137:0:7::1 is the router itself: the first address of each /64 is: forward to the address of a guest"},
	{"forward tcp 80 to fd00:137:0:7::", "fd00:137:0:7:: is the router itself"},
	{"-uplink ipv6:forward tcp 80 to fd00:137::7", "the uplink has no address of the family of fd00:137::7 to forward from"},
	{"-uplink ipv4:forward tcp 80 to 10.137.0.7", "the uplink has no address of the family of 10.137.0.7 to forward from"},
	{"-uplink ipv4:uplink ipv4 dhcp;forward udp 60-70 to 10.137.0.7", "port 68 is that of the uplink's DHCP client: leave it out"},
	{"dhcp lease 1m", `"1m" is no time of a lease`},
	{"dhcp lease", `"lease" has no value`},
	{"dhcp on", `"on" is nothing of dhcp`},
	{"-dns:dns uplink", "nothing says where names are looked up"},
	{"-dns:", "nothing says where names are looked up"},
	{"-dns:dns to", `"to" has no value`},
	{"-dns:dns to ns.example", `"ns.example" is no name server`},
	{"-dns:dns to 192.0.2.53 192.0.2.53", "comes twice"},
	{"-dns:dns to 192.0.2.1 192.0.2.3 192.0.2.4 192.0.2.5 192.0.2.6", "there are too many name servers"},
	{"-dns:dns to 192.0.2.2", "192.0.2.2 is the router itself, which would ask itself without end: name another server"},
	{"-dns:dns to 2001:db8::2", "2001:db8::2 is the router itself"},
	{"-dns:dns to 10.137.0.1:5353", "10.137.0.1 is the router itself"},
	{"-dns:dns to fd00:137:0:9::1", "fd00:137:0:9::1 is the router itself"},
	{"-dns:dns at 192.0.2.1", `"at" is nothing of dns`},
	{"metrics 127.0.0.1:9100", `"127.0.0.1:9100" says not who serves the counters`},
	{"metrics machine 127.0.0.1", `"127.0.0.1" is no address with a port`},
	{"metrics router 127.0.0.1:9100", "127.0.0.1 is no address of the router"},
	{"metrics router 10.137.0.1:53", "port 53 is that of the name server"},
	{"metrics router 192.0.2.2:9100;forward tcp 9000-9200 to 10.137.0.7", "r.conf:9: line 10 forwards the port 9100 to a guest: choose another"},
	{"flows 3", `"3" is no size of the table of flows`},
	{"flows 1000 each 5", `"each" makes no sense here`},
	{"flows 1000 per-guest 2000", "one guest cannot have more flows than there are"},
	{"allow from any to any\x00", "the line has bytes that are no text"},
	{"allow from any to any \xff", "the line has bytes that are no text"},
	{"# " + strings.Repeat("x", MaxLine), "the line is longer than"},
}

// manyRoutes are lines of as many routes as there may be.
func manyRoutes() string {
	var b strings.Builder
	for i := range MaxRoutes {
		fmt.Fprintf(&b, "route 198.18.%d.%d/32 via 192.0.2.9;", i>>8, i&0xff)
	}
	return b.String()
}

// right are changes of base, beside those of wrong, that have no error.
var right = []string{
	"-uplink ipv4:uplink ipv4 192.0.2.2/24;route 0.0.0.0/0 via 192.0.2.9",
	"route 0.0.0.0/1 via 192.0.2.9;route 128.0.0.0/1 via 192.0.2.9;route 192.0.2.128/25 via 192.0.2.9",
	"-uplink ipv6:uplink ipv6 auto;route ::/0 via fe80::9",
	"guest b in office domain 3 vif 0;guest a in office domain 3",
	"guest a in office domain 3;guest b in office vif 0;guest c in office mac 00:16:3e:00:00:09",
	"allow from any to any source 10.0.0.1,fd00::1 dest fd00::2;allow from any to any proto icmp,icmpv6 dest 10.0.0.1",
	"allow from any to any proto icmpv6,tcp source 10.0.0.1",
	"forward tcp 80 to fd00:137:0:7::2;forward udp 68 to 10.137.0.7;forward tcp 443 to 10.137.0.254",
	"-dns:dns to 10.137.0.7",
	manyRoutes(),
	strings.Repeat("allow from any to any;", MaxRules),
	"metrics router 192.0.2.2:9100;forward udp 9100 to 10.137.0.7;forward tcp 9100 to fd00:137::7",
	"metrics router 10.137.0.1:9100;forward tcp 9100 to 10.137.0.7",
}

func TestWhatIsOddAndRight(t *testing.T) {
	for _, change := range right {
		if _, err := Parse("r.conf", []byte(with(change))); err != nil {
			t.Errorf("%q: %v", change, err)
		}
	}
}

// A file that is no configuration at all has an error in each line, of which there may be many more
// than anybody reads, or than a small guest has memory for.
func TestErrorsAreBounded(t *testing.T) {
	for _, line := range []string{"x\n", "\xff\n", "guest a in b mac c\n", "network x\n"} {
		_, err := Parse("r.conf", []byte(strings.Repeat(line, MaxFile/len(line))))
		list, _ := err.(Errors)
		if len(list) != MaxErrors+1 {
			t.Fatalf("%q: %d errors", line, len(list))
		}
		if last := list[MaxErrors]; last.Line != MaxErrors+1 || !strings.Contains(last.What, "nothing from here on was read") {
			t.Errorf("%q: %v", line, last)
		}
	}
}

// with applies a change of wrong to base.
func with(change string) string {
	text := base
	if rest, ok := strings.CutPrefix(change, "-"); ok {
		gone, line, _ := strings.Cut(rest, ":")
		text = ""
		for one := range strings.Lines(base) {
			if !slices.ContainsFunc(strings.Split(gone, ","), func(s string) bool { return strings.HasPrefix(one, s) }) {
				text += one
			}
		}
		change = line
	}
	return text + strings.ReplaceAll(change, ";", "\n") + "\n"
}

func TestEveryWrongLineSaysWhatAndWhatInstead(t *testing.T) {
	if _, err := Parse("f", []byte(base)); err != nil {
		t.Fatal(err)
	}
	for _, one := range wrong {
		_, err := Parse("r.conf", []byte(with(one.line)))
		list, ok := err.(Errors)
		if !ok || len(list) == 0 {
			t.Errorf("%q: %v", one.line, err)
			continue
		}
		if !strings.Contains(err.Error(), one.want) {
			t.Errorf("%q: %v; want %q", one.line, err, one.want)
		}
		if len(list) > 1 {
			t.Errorf("%q is more than one error:\n%v", one.line, err)
		}
		e := list[0]
		if e.What == "" || e.Instead == "" || e.Line > 0 && !strings.HasPrefix(err.Error(), fmt.Sprintf("r.conf:%d: ", e.Line)) {
			t.Errorf("%q: %+v", one.line, e)
		}
	}
}

func TestAllWrongLinesAtOnceInTheirOrder(t *testing.T) {
	_, err := Parse("r.conf", []byte(base+"allow from office to nobody\nfrobnicate\ndhcp on\nguest b in nowhere vif 9\n"))
	list, _ := err.(Errors)
	var lines []int
	for _, e := range list {
		lines = append(lines, e.Line)
	}
	if !slices.Equal(lines, []int{9, 10, 11, 12}) {
		t.Errorf("%v\n%v", lines, err)
	}
}

func TestLoadRefusesALongFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "long.conf")
	if err := os.WriteFile(name, []byte(base+strings.Repeat("# comment\n", MaxFile/10)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(name); err == nil || !strings.Contains(err.Error(), "is longer than") {
		t.Error(err)
	}
	if _, err := Load(name + "-not-there"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if _, err := Load(t.TempDir()); err == nil {
		t.Error("a directory was read")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Example)
	f.Add(base)
	for _, change := range right {
		f.Add(with(change))
	}
	for _, one := range wrong {
		f.Add(with(one.line))
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse("f", []byte(text))
		if (c == nil) == (err == nil) {
			t.Fatalf("%v, %v", c, err)
		}
		if err != nil {
			for _, e := range err.(Errors) {
				if e.What == "" || e.Instead == "" || e.Line < 0 {
					t.Fatalf("%+v", e)
				}
			}
			return
		}
		for _, r := range c.Rules {
			for _, p := range [...]Place{r.From, r.To} {
				if p.Kind == InNetwork && c.NetworkOf(p.Name) == nil {
					t.Fatalf("%+v", r)
				}
			}
		}
		for _, g := range c.Guests {
			if c.NetworkOf(g.Network) == nil {
				t.Fatalf("%+v", g)
			}
		}
	})
}

// What routers announce is enough for an uplink: an address to translate to, name servers, and a
// way to a router that is named by its address on the link.
func TestUplinkMayLiveOnAnnouncements(t *testing.T) {
	c, err := Parse("f", []byte(`uplink vif 0
uplink ipv6 auto
uplink nat ipv6
route 2001:db8:5::/48 via fe80::9
network office ipv6 fd00:137::/56
guest * in office
dns uplink
forward tcp 80 to fd00:137::7 at 2001:db8::7
`))
	if err != nil {
		t.Fatal(err)
	}
	if u := c.Uplink; !u.Auto6 || !u.NAT6 || u.NAT4 || u.DHCP || u.IPv6.IsValid() || len(c.Routes) != 1 || len(c.DNS.Upstream) != 0 {
		t.Errorf("%+v", c)
	}
}
