package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"barevif/hypercall/emu/emutest"
	"barevif/pvnet/inspect"
	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
)

var command = clitest.Build(rootCommand)

// showing lets others look into this process, in a directory of its own.
func showing(t *testing.T) (s *inspect.Server, dir string) {
	t.Helper()
	dir = filepath.Join(emutest.SocketDir(t), "look")
	s, err := inspect.Listen(inspect.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, dir
}

// asked asks the router of a site, as another process would.
func (s *site) asked(dir string) shown {
	s.Helper()
	code, out, errs := command.Run(s.T, "status", "--json", "--inspect", dir)
	var all []shown
	if err := json.Unmarshal([]byte(out), &all); code != 0 || err != nil || len(all) != 1 {
		s.Fatalf("exit %d, %v\n%s%s", code, err, out, errs)
	}
	return all[0]
}

func TestStatusSaysWhatTheRouterHas(t *testing.T) {
	s := newSite(t, strings.Replace(standard, "guest * in office", "guest web in office domain 3 ipv4 10.137.0.7", 1)+"drop from web to uplink proto udp\n")
	look, dir := showing(t)
	s.d.file = "router.conf"
	defer look.Show(stateName, s.d.state)()
	s.comes("the uplink is up", func() bool { return s.asked(dir).Uplink.Link == "up" })
	before := s.asked(dir)
	if len(before.Guests) != 0 || len(before.Networks) != 1 || before.Networks[0].Guests != 0 || before.Config.Error != "" || !before.Config.Tried.IsZero() {
		t.Errorf("%+v", before)
	}
	g, _ := s.guest(firstDom)
	s.settled(g)
	if _, err := ask(s.ctx, g, "192.0.2.1:80"); err != nil {
		t.Fatal(err)
	}
	s.refusedGuest(firstDom + 1)
	s.d.triedReload("router.conf", nil)
	s.d.triedReload("router.conf", errors.New("router.conf:3: \"a\" is wrong: write b\nrouter.conf:4: so is this"))
	now := s.asked(dir)
	switch {
	case now.PID != os.Getpid() || now.UID != os.Geteuid() || now.Format != stateFormat || now.Domain != uint16(routerDom) || now.Version == "":
		t.Errorf("%+v", now)
	case now.Config.File != "router.conf" || now.Config.Taken != 1 || now.Config.Refused != 1 || !strings.Contains(now.Config.Error, "so is this"):
		t.Errorf("%+v", now.Config)
	case now.Flows.Used == 0 || now.Flows.Limit != 65536 || now.Uplink.FlowsLimit != 16384:
		t.Errorf("%+v", now.Flows)
	case len(now.Guests) != 2 || now.Networks[0].Guests != 1:
		t.Fatalf("%+v", now)
	}
	u := now.Uplink
	if u.Vif != "0" || u.Link != "up" || u.Backend == nil || *u.Backend != uint16(worldDom) || len(u.Addresses) != 2 || u.Addresses[0].From != "file" ||
		len(u.Gateways) != 2 || len(u.DNS) != 1 || u.DNS[0] != "192.0.2.1:53" || u.Received.Packets == 0 || u.Sent.Bytes == 0 || u.MTU != 1500 {
		t.Errorf("%+v", u)
	}
	web, refused := now.Guests[0], now.Guests[1]
	if web.Vif != "3.0" || web.Name != "web" || web.Network != "office" || web.Addr.String() != "10.137.0.7" || web.Leased.IsZero() ||
		web.Link != "up" || web.Received.Packets == 0 || web.Sent.Packets == 0 || web.Flows == 0 || web.FlowsLimit != 16384 || !web.Prefix.IsValid() {
		t.Errorf("%+v", web)
	}
	if refused.Link != "refused" || !strings.Contains(refused.Why, "no guest line") || refused.Name != "" || refused.Vif != "4.0" {
		t.Errorf("%+v", refused)
	}
	code, out, errs := command.Run(t, "status", "--inspect", dir)
	for _, want := range []string{
		"config    router.conf, read ", "was refused, and the old one is in use; 1 taken, 1 refused\n", "  router.conf:4: so is this\n",
		"uplink    vif 0, up, backend in domain 2\n", "address 192.0.2.2/24, of the file\n", "gateway 192.0.2.1, 2001:db8::1\n", "names asked of 192.0.2.1:53\n",
		" of 65 536; a guest may have 16 384; ", "10.137.0.7, leased", "4.0: no guest line of the configuration matches it",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q", want)
		}
	}
	if code != 0 || errs != "" || t.Failed() {
		t.Errorf("exit %d, %s\n%s", code, errs, out)
	}
}

func TestStatusWithoutARouter(t *testing.T) {
	look, dir := showing(t)
	command.Fails(t, cli.ExitFailed, []string{"status", "--inspect", dir}, "no router of this user or root runs here", `"vifrouter run FILE" starts one`)
	command.Fails(t, cli.ExitUsage, []string{"status", "--inspect", dir + "-none"}, "--inspect: ", "name the directory that the process was given")
	command.Fails(t, cli.ExitUsage, []string{"status", "--pid", "-1"}, `--pid`)
	hide := look.Show(stateName, func() any { return state{Format: stateFormat} })
	command.Fails(t, cli.ExitFailed, []string{"status", "--inspect", dir, "--pid", "1"}, "no router of this user or root runs here")
	if code, _, errs := command.Run(t, "status", "--inspect", dir); code != 0 {
		t.Errorf("exit %d: %s", code, errs)
	}
	hide()
	command.Fails(t, cli.ExitFailed, []string{"status", "--inspect", dir}, "no router of this user or root runs here")
}

// What another process says is no reason to fall over, and reaches the terminal as text.
func TestStatusOfAProcessThatLies(t *testing.T) {
	look, dir := showing(t)
	for _, lie := range []struct {
		says string
		of   any
	}{
		{"does not say what a router says", "nothing"},
		{"does not say what a router says", []int{1, 2, 3}},
		{"whose state this program cannot read", state{Format: stateFormat + 1, Version: "9.9"}},
		{"cannot be shown: json: unsupported type", map[string]any{"version": func() {}}},
		{"cannot be shown: it is 17000002 bytes, and", strings.Repeat("x", 17000000)},
	} {
		hide := look.Show(stateName, func() any { return lie.of })
		command.Fails(t, cli.ExitFailed, []string{"status", "--inspect", dir}, "no router answers: ", lie.says)
		hide()
	}
	evil := state{Format: stateFormat, Version: "\x1b[2J", Guests: []guestState{{Vif: "3.0\n", Name: "\x1b]0;x\a", portState: portState{Link: "\u202eup", Drops: map[string]uint64{"\x00": 1}}}}}
	evil.Config.Error = strings.Repeat("long ", 10000)
	evil.Flows.Used = -5
	hide := look.Show(stateName, func() any { return evil })
	defer hide()
	code, out, errs := command.Run(t, "status", "--inspect", dir)
	if code != 0 || strings.ContainsAny(out, "\x1b\a\x00\u202e\r") || len(out) > 10000 {
		t.Errorf("exit %d, %d bytes, %s\n%q", code, len(out), errs, out)
	}
}

// Root finds the service in its directory, which nobody but root can have made.
func TestStatusFindsTheService(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root makes the directory of a service")
	}
	parent := filepath.Join(emutest.SocketDir(t), "run")
	if err := os.Mkdir(parent, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(parent, "vifrouter")
	look, err := inspect.Listen(inspect.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer look.Close()
	defer look.Show(stateName, func() any { return state{Format: stateFormat, Version: "of the service"} })()
	found := func() bool {
		s := statusRequest{Program: &cli.Program{}, service: dir}
		all, err := s.find(context.Background(), nil)
		if err != nil {
			t.Error(err)
		}
		for _, one := range all {
			if one.Version == "of the service" {
				return true
			}
		}
		return false
	}
	if !found() {
		t.Error("the service is not found")
	}
	if err := os.Chmod(parent, 0o777); err != nil {
		t.Fatal(err)
	}
	if found() {
		t.Error("a directory that any user can have made is the service's")
	}
}

// A file that is there and cannot be read is an error that says what to do.
func TestAFileThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{{"check", dir}, {"run", dir}} {
		command.Fails(t, cli.ExitFailed, args, dir+": is a directory", "next: name a file that this user can read")
	}
}
