//go:build linux

package command_test

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
)

// eachLineIsJSON checks that a process has written nothing but records, one of which has the
// message.
func eachLineIsJSON(t *testing.T, p *process, message string) {
	t.Helper()
	found := false
	for line := range strings.Lines(p.text()) {
		var r struct{ Time, Level, Msg string }
		if err := json.Unmarshal([]byte(line), &r); err != nil || r.Time == "" || r.Level == "" {
			t.Errorf("%s: %q: %v", p.cmd.Args[1], line, err)
		}
		found = found || strings.Contains(r.Msg, message)
	}
	if !found {
		t.Errorf("%s: no record of %q", p.cmd.Args[1], message)
	}
}

// With --log json the commands that run for long write nothing but JSON, whatever becomes of
// them.
func TestCommandsLogJSON(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--log", "json")
	b := s.back("--log", "json", "--addr", "10.9.0.1/24")
	g := s.serve("--log", "json")
	check(t, "10.9.0.2")
	a := start(t, nil, s.bin, "attach", "--log", "json", "--emu", s.socket, "--dom", "7", "--wait", "1s")
	a.exit(1)
	iface(t, "lo", netlink.LinkSetUp)
	stat := start(t, nil, s.bin, "stat", "--http", "127.0.0.1:0", "--log", "json")
	stat.await("a signal ends it", 1)
	stat.signal(syscall.SIGTERM)
	stat.exit(0)
	demo := start(t, nil, s.bin, "demo", "--log", "json", "--network", "userspace", "--size", "1MiB")
	demo.exit(0)
	g.signal(syscall.SIGTERM)
	g.exit(0)
	b.await("vif 1.0: down", 1)
	s.host.signal(syscall.SIGTERM)
	s.host.exit(0)
	b.exit(1)
	eachLineIsJSON(t, s.host, "emulated Xen")
	eachLineIsJSON(t, b, "the emulated host has ended, and this domain with it")
	eachLineIsJSON(t, g, "serving http://10.9.0.2/")
	eachLineIsJSON(t, a, "no device at")
	eachLineIsJSON(t, stat, "metrics")
	eachLineIsJSON(t, demo, "100 %")
}
