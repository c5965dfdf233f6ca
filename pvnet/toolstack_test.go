package pvnet

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"barevif/xenbus/xenstore"
)

func TestTheToolstacksKeysAreChecked(t *testing.T) {
	ips := func(all ...string) (p []netip.Prefix) {
		for _, s := range all {
			p = append(p, netip.MustParsePrefix(s))
		}
		return p
	}
	long := strings.Repeat("a", 16)
	for _, c := range []struct {
		in   xenstore.Values
		want Toolstack // without Bad
		bad  string    // the keys in Bad
	}{
		{},
		{in: xenstore.Values{"bridge": "", "vifname": "", "script": "", "ip": "", "mac": "", "type": "", "gatewaydev": "", "hotplug-status": ""}},
		{in: xenstore.Values{ // what libxl 4.17 writes
			"script": "/etc/xen/scripts/vif-bridge", "vifname": "web0", "mac": "00:16:3e:01:02:03",
			"ip": "10.0.0.7 10.1.0.0/24  fd00::7", "gatewaydev": "eth0", "bridge": "xenbr0", "type": "vif", "hotplug-status": "",
		}, want: Toolstack{
			Script: "/etc/xen/scripts/vif-bridge", Name: "web0", MAC: MAC{0, 0x16, 0x3e, 1, 2, 3},
			IPs: ips("10.0.0.7/32", "10.1.0.0/24", "fd00::7/128"), Gateway: "eth0", Bridge: "xenbr0", Type: "vif",
		}},
		{in: xenstore.Values{"type": "vif_ioemu", "hotplug-status": "connected"}, want: Toolstack{Type: "vif_ioemu", Done: true}},
		{in: xenstore.Values{"hotplug-status": "error"}},
		{in: xenstore.Values{"vlan": "7", "forwarddev": "eth1"}, want: Toolstack{Others: []string{"forwarddev", "vlan"}}},
		{in: xenstore.Values{"vifname": long[1:]}, want: Toolstack{Name: long[1:]}},
		{in: xenstore.Values{"bridge": long, "vifname": "a/b", "gatewaydev": ".."}, bad: "bridge vifname gatewaydev"},
		{in: xenstore.Values{"bridge": "a b", "vifname": "vif%d", "gatewaydev": "eth0:1"}, bad: "bridge vifname gatewaydev"},
		{in: xenstore.Values{"bridge": "br\x00", "vifname": "\xff\xfe", "gatewaydev": "\n"}, bad: "bridge vifname gatewaydev"},
		{in: xenstore.Values{"script": "/a b"}, bad: "script"},
		{in: xenstore.Values{"script": "/" + strings.Repeat("s", 255)}, bad: "script"},
		{in: xenstore.Values{"ip": "10.0.0.7 255.255.255.0 10.0.0.1"}, want: Toolstack{IPs: ips("10.0.0.7/32")}}, // as Mini-OS reads it
		{in: xenstore.Values{"ip": "10.0.0.7 255.255.255.0 10.0.9.1"}, bad: "ip"},
		{in: xenstore.Values{"ip": " "}, bad: "ip"},
		{in: xenstore.Values{"ip": "10.0.0.1,10.0.0.2"}, bad: "ip"},
		{in: xenstore.Values{"ip": "10.0.0.1 fe80::1%eth0"}, bad: "ip"},
		{in: xenstore.Values{"ip": "::ffff:10.0.0.1"}, bad: "ip"},
		{in: xenstore.Values{"ip": "0.0.0.0/0"}, bad: "ip"},
		{in: xenstore.Values{"ip": "224.0.0.1"}, bad: "ip"},
		{in: xenstore.Values{"ip": strings.Repeat("10.0.0.1 ", 65)}, bad: "ip"},
		{in: xenstore.Values{"mac": "01:00:00:00:00:00", "type": "ioemu"}, bad: "type mac"},
		{in: xenstore.Values{"mac": "00:00:00:00:00:00"}, bad: "mac"},
		{in: xenstore.Values{"mac": "moon"}, bad: "mac"},
	} {
		got := parseToolstack(c.in)
		var bad []string
		for _, err := range got.Bad {
			v, ok := errors.AsType[*xenstore.ValueError](err)
			if !ok || v.Want == "" {
				t.Fatalf("%q: %v", c.in, err)
			}
			bad = append(bad, v.Path)
		}
		got.Bad = nil
		if !reflect.DeepEqual(got, c.want) || !slices.Equal(bad, strings.Fields(c.bad)) {
			t.Errorf("%q:\ngot  %+v, bad %q\nwant %+v, bad %q", c.in, got, bad, c.want, c.bad)
		}
	}
	if n := len(parseToolstack(xenstore.Values{"ip": strings.Repeat("10.0.0.1 ", 64)}).IPs); n != 64 {
		t.Errorf("%d of 64 addresses", n)
	}
}

// FuzzToolstack: whatever the bytes are, a value is either refused or safe to name an
// interface with, and to print.
func FuzzToolstack(f *testing.F) {
	f.Add("xenbr0", "web0", "10.0.0.7 fd00::/64", "/etc/xen/scripts/vif-route")
	f.Add("..", "vif%d", "\x00", "\x1b[2J")
	f.Fuzz(func(t *testing.T, bridge, name, ip, script string) {
		ts := parseToolstack(xenstore.Values{"bridge": bridge, "vifname": name, "ip": ip, "script": script})
		for _, s := range []string{ts.Bridge, ts.Name} {
			if len(s) > 15 || strings.ContainsAny(s, "/%: \n\x00\x1b") || s == ".." {
				t.Errorf("took %q", s)
			}
		}
		if strings.ContainsAny(ts.Script, "\n\x00\x1b ") || len(ts.IPs) > 64 {
			t.Errorf("took %q, %v", ts.Script, ts.IPs)
		}
		for key, took := range map[string]bool{bridge: ts.Bridge != "", name: ts.Name != ""} {
			if key != "" && !took && len(ts.Bad) == 0 {
				t.Errorf("dropped %q in silence", key)
			}
		}
	})
}
