package main

import (
	"net/netip"
	"strings"
	"testing"

	"barevif/pvnet"
	"barevif/xenbus/xenstore"
)

func TestPlans(t *testing.T) {
	const scripts = "/etc/xen/scripts/"
	ips := []netip.Prefix{netip.MustParsePrefix("10.0.0.2/32"), netip.MustParsePrefix("10.1.0.0/16")}
	prefix := netip.MustParsePrefix("10.9.0.1/24")
	bad := func(key string) []error {
		return []error{&xenstore.ValueError{Path: key, Value: "\x00", Want: "good"}}
	}
	for name, c := range map[string]struct {
		b     *back
		ts    pvnet.Toolstack
		want  plan   // without notes
		notes string // the keys that are noted
		err   string // the beginning of the error
	}{
		"nothing said": {},
		"libxl's default": {
			ts:   pvnet.Toolstack{Bridge: "xenbr0", Script: scripts + "vif-bridge", Type: "vif"},
			want: plan{bridge: "xenbr0", keyed: true},
		},
		"libxl's default, and a flag": {
			b:    &back{bridge: "br0"},
			ts:   pvnet.Toolstack{Bridge: "xenbr0", Script: scripts + "vif-bridge"},
			want: plan{bridge: "br0"},
		},
		"libxl's default, and an address": {
			b:  &back{addrs: []string{""}, prefix: map[string]netip.Prefix{"": prefix}},
			ts: pvnet.Toolstack{Bridge: "xenbr0"},
		},
		"a key wins": {
			b:    &back{bridge: "br0", addrs: []string{""}, prefix: map[string]netip.Prefix{"": prefix}},
			ts:   pvnet.Toolstack{Bridge: "br1", Name: "web0", IPs: ips, Gateway: "eth0"},
			want: plan{tap: "web0", named: true, bridge: "br1", keyed: true}, notes: "ip gatewaydev",
		},
		"an address of the vif's own wins": {
			b:  &back{addrs: []string{""}, prefix: map[string]netip.Prefix{"1.0": prefix}},
			ts: pvnet.Toolstack{Bridge: "br1"}, notes: "bridge",
		},
		"held to its address": {
			b: &back{lockMAC: true}, ts: pvnet.Toolstack{Bridge: "br1", MAC: pvnet.MAC{2}},
			want: plan{bridge: "br1", keyed: true, mac: pvnet.MAC{2}},
		},
		"held to no address":      {b: &back{lockMAC: true, bridge: "br0"}, err: "mac: "},
		"held to a bad address":   {b: &back{lockMAC: true, bridge: "br0"}, ts: pvnet.Toolstack{Bad: bad("mac")}, err: "mac: "},
		"held, but on no bridge":  {b: &back{lockMAC: true}, ts: pvnet.Toolstack{MAC: pvnet.MAC{2}}, notes: "--lock-mac"},
		"not held to its address": {b: &back{bridge: "br0"}, ts: pvnet.Toolstack{MAC: pvnet.MAC{2}}, want: plan{bridge: "br0"}},
		"held by flags alone": {
			b: &back{lockMAC: true, hotplug: hotplugFlags, bridge: "br0"}, ts: pvnet.Toolstack{MAC: pvnet.MAC{2}},
			want: plan{bridge: "br0", mac: pvnet.MAC{2}},
		},
		"held by a script": {
			b: &back{lockMAC: true, backend: backend{dom0: true}}, ts: pvnet.Toolstack{Script: scripts + "vif-bridge"},
			want: plan{script: true}, notes: "--lock-mac",
		},
		"flags alone": {
			b:    &back{hotplug: hotplugFlags, bridge: "br0"},
			ts:   pvnet.Toolstack{Bridge: "br1", Name: "web0", Script: "vif-nat", Bad: bad("ip")},
			want: plan{bridge: "br0"},
		},
		"routed": {
			b:    &back{bridge: "br0"},
			ts:   pvnet.Toolstack{Bridge: "br1", Script: scripts + "vif-route", IPs: ips, Gateway: "eth0"},
			want: plan{routed: true, routes: ips, via: "eth0"},
		},
		"the script in domain 0": {
			b: &back{backend: backend{dom0: true}}, ts: pvnet.Toolstack{Bridge: "br1", Name: "web0", Script: scripts + "vif-nat", Bad: bad("ip")},
			want: plan{script: true},
		},
		"our script in domain 0": {
			b: &back{backend: backend{dom0: true}}, ts: pvnet.Toolstack{Bridge: "br1", Script: scripts + "vif-barevif"},
			want: plan{bridge: "br1", keyed: true},
		},
		"our other script, though scripts are wanted": {
			b: &back{hotplug: hotplugScript}, ts: pvnet.Toolstack{Script: scripts + "vif-barevif-route"},
			want: plan{routed: true},
		},
		"no script in domain 0": {
			b: &back{backend: backend{dom0: true}}, ts: pvnet.Toolstack{Bridge: "br1"}, want: plan{bridge: "br1", keyed: true},
		},
		"keys in domain 0": {
			b: &back{backend: backend{dom0: true}, hotplug: hotplugKeys}, ts: pvnet.Toolstack{Bridge: "br1", Script: scripts + "vif-bridge"},
			want: plan{bridge: "br1", keyed: true},
		},
		"the script in domain 0, again": {
			b: &back{backend: backend{dom0: true}}, ts: pvnet.Toolstack{Bridge: "br1", Name: "web0", Script: scripts + "vif-bridge", Done: true},
			want: plan{tap: "web0", named: true, bridge: "br1", keyed: true},
		},
		"another script in domain 0, again": {
			b: &back{backend: backend{dom0: true}}, ts: pvnet.Toolstack{Bridge: "br1", Script: scripts + "vif-nat", Done: true},
			notes: "script",
		},
		"another script":             {ts: pvnet.Toolstack{Script: scripts + "vif-nat"}, err: "script=/etc/xen/scripts/vif-nat: "},
		"another script, and a flag": {b: &back{bridge: "br0"}, ts: pvnet.Toolstack{Script: "vif-nat"}, want: plan{bridge: "br0"}, notes: "script"},
		"a bad bridge":               {ts: pvnet.Toolstack{Bad: bad("bridge")}, err: `bridge="\x00": not good; `},
		"a bad name":                 {ts: pvnet.Toolstack{Bad: bad("vifname")}, err: "vifname="},
		"a bad script":               {ts: pvnet.Toolstack{Bad: bad("script")}, err: "script="},
		"bad addresses":              {ts: pvnet.Toolstack{Bad: bad("ip")}, err: "ip="},
		"a bad address":              {ts: pvnet.Toolstack{Bad: bad("mac")}, notes: "mac"},
		"a bad type":                 {ts: pvnet.Toolstack{Bad: bad("type")}, notes: "type"},
		"an emulated card":           {ts: pvnet.Toolstack{Type: "vif_ioemu"}, notes: "type"},
		"others":                     {ts: pvnet.Toolstack{Others: []string{"forwarddev"}}, notes: "forwarddev"},
		"a vlan":                     {ts: pvnet.Toolstack{Others: []string{"vlan"}}, err: "vlan: "},
		"an interface": {
			b:     &back{packet: "eth0"},
			ts:    pvnet.Toolstack{Bridge: "br1", Name: "web0", Script: "vif-nat", IPs: ips, Gateway: "eth1"},
			notes: "bridge vifname script ip gatewaydev",
		},
		"an interface, and libxl's default": {
			b: &back{packet: "eth0"}, ts: pvnet.Toolstack{Bridge: "xenbr0", Script: scripts + "vif-bridge"},
		},
	} {
		if c.b == nil {
			c.b = new(back)
		}
		if c.b.hotplug == "" {
			c.b.hotplug = hotplugAuto
		}
		if c.want.tap == "" {
			c.want.tap = "vif1.0"
		}
		got, err := c.b.plan("1.0", "vif1.0", c.ts)
		if c.err != "" {
			if err == nil || !strings.HasPrefix(err.Error(), c.err) {
				t.Errorf("%s: %v, want %q", name, err, c.err)
			}
			continue
		}
		var noted []string
		for _, n := range got.notes {
			noted = append(noted, n.key)
			if n.what == "" || n.Error() == "" {
				t.Errorf("%s: %s is noted without a word", name, n.key)
			}
		}
		if err != nil || strings.Join(noted, " ") != c.notes {
			t.Errorf("%s: %v, notes %q, want %q", name, err, noted, c.notes)
		}
		if got.notes = nil; got.String() != c.want.String() || got.tap != c.want.tap || got.named != c.want.named ||
			got.keyed != c.want.keyed || got.script != c.want.script || got.via != c.want.via || got.bridge != c.want.bridge || got.mac != c.want.mac {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}
