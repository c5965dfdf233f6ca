package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
	"barevif/tools/internal/stat"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"
)

// counting mirrors the counters of a device below a root of its own, and returns the flags
// with which stat finds them.
func counting(t *testing.T, own uint16) (set *telemetry.Set, args []string) {
	t.Helper()
	root := filepath.Join(t.TempDir(), "none")
	info := telemetry.Info{Role: telemetry.Frontend, Own: own, Peer: 61021, Handle: 9}
	set = telemetry.NewSet(2)
	set.Open(&bpf.Store{Root: root}, info)
	t.Cleanup(func() { set.Close() })
	if kind, reason := set.Backend(); kind == "heap" {
		t.Fatalf("counters cannot be seen from outside: %s", reason)
	}
	set.SetStatus(telemetry.Status{State: 4, Up: true, MTU: 1500, Queues: 2, Epoch: 1})
	set.TX(0).Add(telemetry.Packets, 1234)
	set.TX(0).Flush()
	return set, []string{"stat", "--root", root, info.Name()}
}

func stats(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	return clitest.Build(rootCommand).Run(t, args...)
}

func TestStatShowsADeviceAsTextAndJSON(t *testing.T) {
	_, args := counting(t, 61022)
	code, text, stderr := stats(t, args...)
	if code != cli.ExitOK || stderr != "" || !strings.Contains(text, "front-61022-61021-9  frontend in domain 61022") ||
		!strings.Contains(text, "1 234") || strings.Contains(text, "\x1b") {
		t.Errorf("exit %d, %q\n%s", code, stderr, text)
	}
	code, text, _ = stats(t, append(args, "--json")...)
	var j stat.JSON
	if err := json.Unmarshal([]byte(text), &j); err != nil || code != cli.ExitOK || len(j.Devices) != 1 || j.Devices[0].Totals.Counters["tx_packets"] != 1234 {
		t.Errorf("exit %d, %v\n%s", code, err, text)
	}
	code, text, _ = stats(t, append(args, "--json", "--watch", "--count", "3", "--interval", "100ms")...)
	if lines := strings.Split(strings.TrimSpace(text), "\n"); code != cli.ExitOK || len(lines) != 3 || json.Unmarshal([]byte(lines[2]), &j) != nil || j.Devices[0].Rates == nil {
		t.Errorf("exit %d\n%s", code, text)
	}
	code, text, _ = stats(t, append(args, "--count", "2", "--interval", "100ms")...)
	looks := strings.Split(strings.TrimSpace(text), "\n\n")
	if code != cli.ExitOK || len(looks) != 2 || strings.Contains(looks[0], "frames/s") || !strings.Contains(looks[1], "frames/s") {
		t.Fatalf("exit %d\n%s", code, text)
	}
	for _, look := range looks {
		at, table, _ := strings.Cut(look, "\n")
		if _, err := time.Parse(time.RFC3339, at); err != nil || !strings.HasPrefix(table, "front-61022-61021-9  frontend") || !strings.Contains(table, "1 234") {
			t.Errorf("%v\n%s", err, look)
		}
	}
}

// Every field of the table is a line, for the sums and for each queue, in an order that
// stays.
func TestStatPrintsEveryCounterByName(t *testing.T) {
	set, args := counting(t, 61023)
	set.RX(1).Observe(telemetry.FrameSize, 100)
	set.RX(1).Flush()
	code, text, stderr := stats(t, append(args, "-S")...)
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	want := []string{"NIC statistics of front-61023-61021-9:"}
	for _, prefix := range []string{"", "queue_0_", "queue_1_"} {
		for _, dir := range []telemetry.Dir{telemetry.RX, telemetry.TX} {
			for _, f := range telemetry.Fields() {
				for i := range f.Words() {
					name, value := prefix+f.FullName(dir), "0"
					if f.Kind == telemetry.KindHistogram {
						name += "_" + f.Bucket(i)
					}
					switch strings.TrimPrefix(strings.TrimPrefix(name, "queue_0_"), "queue_1_") {
					case "tx_packets":
						if prefix != "queue_1_" {
							value = "1234"
						}
					case "rx_frame_size_le_128":
						if prefix != "queue_0_" {
							value = "1"
						}
					case "rx_frame_size_sum":
						if prefix != "queue_0_" {
							value = "100"
						}
					}
					want = append(want, "     "+name+": "+value)
				}
			}
		}
	}
	if code != cli.ExitOK || stderr != "" || len(lines) != len(want) {
		t.Fatalf("exit %d, %q, %d lines, want %d\n%s", code, stderr, len(lines), len(want), text)
	}
	for i := range want {
		if lines[i] != want[i] {
			t.Fatalf("line %d is %q, want %q", i, lines[i], want[i])
		}
	}
	code, text, _ = stats(t, append(args, "-S", "--count", "2", "--interval", "100ms")...)
	if code != cli.ExitOK || strings.Count(text, "     tx_packets: 1234\n") != 2 {
		t.Errorf("exit %d\n%s", code, text)
	}
}

func TestStatSaysWhatIsWrongWithItsArguments(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"no-such-vif"}, cli.ExitFailed, "no counters of \"no-such-vif\"\n  next: "},
		{[]string{"[x"}, cli.ExitUsage, "syntax error in pattern"},
		{[]string{"--interval", "1ms"}, cli.ExitUsage, "not 100ms or more"},
		{[]string{"--count", "0"}, cli.ExitUsage, "a number from 1"},
		{[]string{"--root", "stat_test.go"}, cli.ExitUsage, "not a directory"},
		{[]string{"--http", "nowhere"}, cli.ExitUsage, "an address such as"},
		{[]string{"--json", "--http", "0"}, cli.ExitUsage, "next: "},
		{[]string{"--json", "-S"}, cli.ExitUsage, "next: "},
		{[]string{"--user", "no such user"}, cli.ExitUsage, "a user of this machine"},
		{[]string{"--token-file", "x"}, cli.ExitUsage, "--http"},
		{[]string{"--prune", "--root", t.TempDir()}, cli.ExitFailed, "not in a BPF file system\n  next: name the directory"},
		{[]string{"--no-token"}, cli.ExitUsage, "--http"},
		{[]string{"--http", "0", "--no-token", "--token-file", "x"}, cli.ExitUsage, "next: "},
		{[]string{"--http", "0", "--token-file", "/proc/none/x"}, cli.ExitFailed, "name another with --token-file"},
	} {
		code, _, stderr := stats(t, append([]string{"stat"}, c.args...)...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit %d, %q", c.args, code, stderr)
		}
	}
}

// stat mentions the device of another user, and shows it on request.
func TestStatShowsStrangersOnRequest(t *testing.T) {
	t.Setenv("SUDO_UID", "")
	root := filepath.Join(t.TempDir(), "none")
	info := telemetry.Info{Role: telemetry.Frontend, Own: 61025, Peer: 61021, Handle: 9}
	clitest.AsStranger(t, func() error {
		set := telemetry.NewSet(1)
		set.Open(&bpf.Store{Root: root}, info)
		t.Cleanup(func() { set.Close() })
		return nil
	})
	args := []string{"stat", "--root", root, info.Name()}
	code, text, stderr := stats(t, args...)
	if code != cli.ExitFailed || text != "" || !strings.Contains(stderr, "1 device of another user is not shown: --all-users") {
		t.Errorf("exit %d, %q, %q", code, text, stderr)
	}
	for _, more := range [][]string{{"--all-users"}, {"--user", "nobody"}, {"--user", "7", "--user", "65534"}} {
		code, text, stderr := stats(t, append(args, more...)...)
		if code != cli.ExitOK || stderr != "" || !strings.Contains(text, info.Name()+"  of user nobody (65534)  frontend in domain 61025") {
			t.Errorf("%v: exit %d, %q, %q", more, code, text, stderr)
		}
	}
	_, args = counting(t, 61025) // the same name, ours
	args[2] = root
	code, text, stderr = stats(t, args...)
	if code != cli.ExitOK || !strings.Contains(stderr, "1 device of another user is not shown: see --user and --all-users") || strings.Contains(text, "nobody") || !strings.Contains(text, "1 234") {
		t.Errorf("exit %d, %q, %q", code, text, stderr)
	}
}

func TestLiveTableObeysItsKeysAndItsWindow(t *testing.T) {
	set, args := counting(t, 61023)
	w, err := stat.NewWatcher(args[2], args[3])
	if err != nil {
		t.Fatal(err)
	}
	s := &statistics{Program: &cli.Program{}, interval: 1}
	m := newLive(s, w, w.Look())
	m.coloured, m.paint = true, colours()
	press := func(key rune) tea.Cmd {
		_, cmd := m.Update(tea.KeyPressMsg{Code: key, Text: string(key)})
		return cmd
	}
	turn := func() {
		t.Helper()
		msg, ok := m.again()().(lookMsg)
		if !ok {
			t.Fatal("no look")
		}
		m.Update(msg)
	}
	m.Update(tea.WindowSizeMsg{Width: 50, Height: 20})
	turn()
	for _, l := range strings.Split(m.text(), "\n") {
		if lipgloss.Width(l) > 50 {
			t.Errorf("a line of %d columns: %q", lipgloss.Width(l), l)
		}
	}
	if n := strings.Count(m.text(), "\n") + 1; n > 20 {
		t.Errorf("%d lines", n)
	}
	m.Update(tea.WindowSizeMsg{Width: 200, Height: 60})
	if !strings.Contains(m.text(), "1 234") || !strings.Contains(m.text(), "tx 1") {
		t.Errorf("not there:\n%s", m.text())
	}
	press('r')
	turn()
	set.TX(0).Add(telemetry.Packets, 7)
	set.TX(0).Flush()
	turn()
	if strings.Contains(m.text(), "1 234") || m.look.Devices[0].Count(stat.All, telemetry.TX, stat.Packets) != 7 {
		t.Errorf("not counted from now:\n%s", m.text())
	}
	press('x')
	if strings.Contains(m.text(), "tx 1") || !strings.Contains(m.text(), "tx all") {
		t.Errorf("queues are not folded:\n%s", m.text())
	}
	press('s')
	press('p')
	if !strings.Contains(m.text(), "by rate") || !strings.Contains(m.text(), "frames/s, last") {
		t.Errorf("not sorted by rate, or no plot:\n%s", m.text())
	}
	before := m.look
	m.Update(tea.KeyPressMsg{Code: tea.KeySpace, Text: " "})
	turn()
	if m.look != before || !strings.Contains(m.text(), "paused") {
		t.Error("it goes on while it is paused")
	}
	for _, key := range []rune{'j', 'k', 'z'} {
		if cmd := press(key); cmd != nil {
			t.Errorf("%c does something", key)
		}
	}
	if cmd := press('q'); cmd == nil || cmd() != tea.Quit() {
		t.Error("q does not quit")
	}
}
