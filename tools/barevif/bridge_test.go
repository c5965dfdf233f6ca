package main

import (
	"net/netip"
	"strings"
	"testing"

	"barevif/pvnet"
	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
	"barevif/xenbus/xenstore"
)

func TestWhatAVifBecomesOnABridge(t *testing.T) {
	mac, ips := pvnet.MAC{2, 0, 0, 0, 0, 1}, []netip.Prefix{netip.MustParsePrefix("10.0.0.2/32")}
	bad := func(key string) []error {
		return []error{&xenstore.ValueError{Path: key, Value: "moon", Want: "what it should be"}}
	}
	for name, c := range map[string]struct {
		b     *bridged
		ts    pvnet.Toolstack
		want  string // of the port
		notes string // keys
		err   string
	}{
		"nothing is said":           {ts: pvnet.Toolstack{MAC: mac}, want: ", from 02:00:00:00:00:01 alone"},
		"what libxl says":           {ts: pvnet.Toolstack{MAC: mac, Bridge: "xenbr0", Script: "/etc/xen/scripts/vif-bridge", Type: "vif"}, want: ", from 02:00:00:00:00:01 alone"},
		"in domain 0":               {b: &bridged{backend: backend{dom0: true}}, ts: pvnet.Toolstack{MAC: mac, Script: "/etc/xen/scripts/vif-bridge"}, err: "script=/etc/xen/scripts/vif-bridge: the toolstack runs it"},
		"in domain 0, our script":   {b: &bridged{backend: backend{dom0: true}}, ts: pvnet.Toolstack{MAC: mac, Script: "/etc/xen/scripts/vif-barevif"}, want: ", from 02:00:00:00:00:01 alone"},
		"in domain 0, started anew": {b: &bridged{backend: backend{dom0: true}}, ts: pvnet.Toolstack{MAC: mac, Script: "/etc/xen/scripts/vif-bridge", Done: true}, want: ", from 02:00:00:00:00:01 alone"},
		"another bridge":            {ts: pvnet.Toolstack{MAC: mac, Bridge: "dmz"}, err: "bridge=dmz: this is the bridge xenbr0; "},
		"another script":            {ts: pvnet.Toolstack{MAC: mac, Script: "vif-nat"}, err: "script=vif-nat: bridge runs no scripts"},
		"another script, done":      {ts: pvnet.Toolstack{MAC: mac, Script: "vif-nat", Done: true}, err: "script=vif-nat: "},
		"routed":                    {ts: pvnet.Toolstack{MAC: mac, Script: "vif-barevif-route"}, err: "script=vif-barevif-route: "},
		"a VLAN":                    {ts: pvnet.Toolstack{MAC: mac, Others: []string{"vlan"}}, err: "vlan: bridge sets up no VLANs"},
		"no address":                {err: "mac: there is no usable one"},
		"a group's address":         {ts: pvnet.Toolstack{MAC: pvnet.MAC{3}}, err: "mac: there is no usable one"},
		"a bad address":             {ts: pvnet.Toolstack{Bad: bad("mac")}, err: "--no-guard=1.0"},
		"a bad bridge":              {ts: pvnet.Toolstack{MAC: mac, Bad: bad("bridge")}, err: `bridge="moon": not what it should be`},
		"a bad address, no guard":   {b: &bridged{unguarded: []string{allVifs}}, ts: pvnet.Toolstack{Bad: bad("mac")}, notes: "mac"},
		"no guard":                  {b: &bridged{unguarded: []string{"1.0"}}, ts: pvnet.Toolstack{MAC: mac}},
		"another's has no guard":    {b: &bridged{unguarded: []string{"1.1", "3.*"}}, ts: pvnet.Toolstack{MAC: mac}, want: ", from 02:00:00:00:00:01 alone"},
		"isolated":                  {b: &bridged{isolated: []string{"1.*"}}, ts: pvnet.Toolstack{MAC: mac}, want: ", from 02:00:00:00:00:01 alone, isolated"},
		"all isolated":              {b: &bridged{isolated: []string{allVifs}, unguarded: []string{allVifs}}, want: ", isolated"},
		"what has no effect":        {ts: pvnet.Toolstack{MAC: mac, Name: "web0", IPs: ips, Gateway: "eth0", Others: []string{"forwarddev"}, Type: "vif_ioemu"}, want: ", from 02:00:00:00:00:01 alone", notes: "forwarddev type vifname ip gatewaydev"},
	} {
		if c.b == nil {
			c.b = new(bridged)
		}
		c.b.bridge = defaultBridge
		info, notes, err := c.b.plan("1.0", c.ts)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v, want %q", name, err, c.err)
			}
			continue
		}
		var keys []string
		for _, n := range notes {
			keys = append(keys, n.key)
		}
		if err != nil || info.String() != c.want || info.name != "1.0" || strings.Join(keys, " ") != c.notes {
			t.Errorf("%s: %q, %q, %v; want %q, %q", name, info, keys, err, c.want, c.notes)
		}
	}
}

func TestMistakesOfABridgesCommandLine(t *testing.T) {
	for _, c := range []struct {
		args string
		says []string
	}{
		{"--uplink eth0", []string{`--uplink "eth0": not tap:NAME`, "vif:ID"}},
		{"--uplink tap:", []string{`--uplink "tap:"`}},
		{"--uplink tap:a/b", []string{`--uplink "tap:a/b"`}},
		{"--uplink vif:x", []string{`--uplink "vif:x"`}},
		{"--uplink tap:lan0 --uplink tap:lan0", []string{`--uplink "tap:lan0": not given once only`}},
		{"--addr 10.9.0.1/24", []string{"no uplink is a TAP", "--uplink tap:lan0"}},
		{"--uplink vif:0 --addr 10.9.0.1/24", []string{"no uplink is a TAP"}},
		{"--uplink tap:lan0 --addr moon", []string{`--addr "moon": not an address with a prefix`}},
		{"--uplink tap:a --uplink tap:b --addr 10.9.0.1/24", []string{"one for 2 TAPs", "--addr a=10.9.0.1/24"}},
		{"--uplink tap:a --addr b=10.9.0.1/24", []string{`there is no TAP "b" here, only "a"`, "--uplink tap:b"}},
		{"--name a/b", []string{`--name "a/b": not a name`}},
		{"--vif 1", []string{`--vif "1": not a vif DOM.ID`, "3.*"}},
		{"--vif [.0", []string{`--vif "[.0"`}},
		{"--isolated=moon", []string{`--isolated "moon": not all`}},
		{"--no-guard=x.0", []string{`--no-guard "x.0": not all`}},
		{"--isolated 1.0", []string{`"1.0"`, "--isolated=1.0"}},
		{"stauts", []string{`"stauts" is no command of "barevif bridge"`, `did you mean "status"?`}},
		{"--stations 0", []string{`--stations "0": not a number from 1 to 1048576`}},
		{"--ports 1025", []string{`--ports "1025": not a number from 2 to 1024`}},
		{"--stations-per-vif -1", []string{`--stations-per-vif "-1"`}},
		{"--age 999ms", []string{`--age "999ms": not a time from 1s to 24h`}},
		{"--take", []string{"--take is for a real Xen"}},
		{"--drain 0s", []string{`--drain "0s": not a time from 1ms to 24h, or negative`}},
		{"--queues 65", []string{`--queues "65"`}},
		{"status [x", []string{"syntax error in pattern"}},
	} {
		clitest.Build(rootCommand).Fails(t, cli.ExitUsage, append([]string{"bridge"}, strings.Fields(c.args)...), c.says...)
	}
}

func TestPatternsOfVifs(t *testing.T) {
	for pattern, ok := range map[string]bool{
		"1.0": true, "3.*": true, "*.0": true, "1?.[0-3]": true, "": false, ".": false, "1": false, "1.": false, ".0": false, "all": false, "1.x": false, "[.0": false, "vif1.0": false,
	} {
		if isVifPattern(pattern) != ok {
			t.Errorf("%q: %t", pattern, !ok)
		}
	}
	if !isAmong([]string{"5.1", "3.*"}, "3.12") || isAmong([]string{"5.1", "3.*"}, "31.2") || isAmong(nil, "1.0") {
		t.Error("a vif that matches, or one that does not")
	}
}

// Another process says what a status shows: it cannot write to the terminal what it likes.
func TestTheStatusOfABridgeAsText(t *testing.T) {
	page := &bridgePage{
		Bridge: "lan\x1b[2J", Domain: 2, PID: 77, UpSeconds: 3725, MaxStations: 4096, MaxPorts: 256, Known: 3,
		Ports: []portPage{
			{Port: "1.0", Up: true, Guard: []string{"02:00:00:00:00:01"}, Isolated: true, Received: 12345, Dropped: portDrops{Spoofed: 3, Alone: 1}, Sent: 7, Lost: portLost{Full: 2, Down: 3}, Waiting: 1},
			{Port: "tap:lan0\xff"},
		},
		Stations: []stationPage{{MAC: "02:00:00:00:00:01", Port: "1.0", Guarded: true}, {MAC: "02:00:00:00:00:09", Port: "tap:lan0", IdleSeconds: 75}},
	}
	var b strings.Builder
	writeBridge(&b, page)
	for _, want := range []string{
		" in domain 2, process 77, up for 1h2m5s: 2 ports of 256, 3 stations of 4096\n",
		"port", "1.0", "up", "yes", "12 345", " 4 ", " 5 ", "down", "guarded\n", "1m15s\n", "and 1 more\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, &b)
		}
	}
	if strings.Contains(b.String(), "\x1b") || strings.Contains(b.String(), "\xff") {
		t.Errorf("raw bytes reach the terminal: %q", &b)
	}
}

func TestPortsAreInTheOrderOfTheirNumbers(t *testing.T) {
	sorted := []string{"1.2", "1.10", "9.0", "10.0", "tap:lan0", "vif:0"}
	for i, x := range sorted {
		for j, y := range sorted {
			got := comparePorts(x, y)
			if got < 0 != (i < j) || got > 0 != (i > j) {
				t.Errorf("%s and %s: %d", x, y, got)
			}
		}
	}
}

func TestAShellOffersUplinks(t *testing.T) {
	socket := emulated(t, "--vif", "front=2,id=10,back=3", "--vif", "front=1")
	code, out, _ := clitest.Build(rootCommand).Run(t, "__complete", "bridge", "--emu", socket, "--uplink", "")
	if code != cli.ExitOK || strings.Join(strings.Fields(out), " ") != "tap: vif:10 :6" {
		t.Errorf("exit %d, %q", code, out)
	}
}
