//go:build linux

package command_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// benchLine is a result line of test/bench.
type benchLine struct {
	What, Way     string
	Seconds       float64
	Frames, Bytes uint64
	Median        float64 `json:"median_us"`
}

// benchSays returns the one result line in the output of a bench command.
func benchSays(t *testing.T, out string) (line benchLine) {
	t.Helper()
	_, text, ok := strings.Cut("\n"+out, "\n{")
	if !ok {
		t.Fatalf("no line of JSON in %q", out)
	}
	if err := json.NewDecoder(strings.NewReader("{" + text)).Decode(&line); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	if line.Seconds <= 0 {
		t.Errorf("%+v has no duration", line)
	}
	return line
}

// TestBenchBothEnds measures between two processes, in both directions.
func TestBenchBothEnds(t *testing.T) {
	s, bin := newSite(t), benchProgram(t)
	back := func(args ...string) *process {
		return start(t, nil, bin, append([]string{args[0], "--emu", s.socket, "--back", "--dom", "2"}, args[1:]...)...)
	}
	front := func(args ...string) *process {
		return start(t, nil, bin, append([]string{args[0], "--emu", s.socket}, args[1:]...)...)
	}
	for _, c := range []struct {
		name       string
		recv, send func(...string) *process
	}{{"to the backend", back, front}, {"to the frontend", front, back}} {
		r := c.recv("recv", "--secs", "0.1")
		sender := c.send("send", "--secs", "0.5", "--batch", "7", "--size", "200")
		received, sent := benchSays(t, r.exit(0)), benchSays(t, sender.exit(0))
		if received.Frames == 0 || received.Bytes != 200*received.Frames || received.What != "receive" {
			t.Errorf("%s: received %+v", c.name, received)
		}
		if sent.Frames < received.Frames || sent.Bytes != 200*sent.Frames || sent.What != "send" {
			t.Errorf("%s: sent %+v", c.name, sent)
		}
	}
}

// TestBenchKernel runs the bench commands that need no card, on the loopback interface.
func TestBenchKernel(t *testing.T) {
	if !namespace(t) {
		return
	}
	l, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		t.Fatal(err)
	}
	bin := benchProgram(t)
	run := func(args ...string) *process { return start(t, nil, bin, args...) }
	for _, c := range []struct {
		name       string
		recv, send []string
	}{
		{"udp", []string{"udp-recv"}, []string{"udp-send", "--to", "127.0.0.1"}},
		{"packet", []string{"packet-recv", "--if", "lo"}, []string{"packet-send", "--if", "lo"}},
		{"tcp", []string{"tcp-recv"}, []string{"tcp-send", "--to", "127.0.0.1"}},
	} {
		recv := run(append(c.recv, "--secs", "0.1")...)
		recv.await("bench: receiving", 1)
		send := run(append(c.send, "--secs", "0.5")...)
		got, sent := benchSays(t, recv.exit(0)), benchSays(t, send.exit(0))
		if got.Bytes == 0 || sent.Bytes < got.Bytes {
			t.Errorf("%s: %d bytes received of %d", c.name, got.Bytes, sent.Bytes)
		}
	}
	trip := benchSays(t, run("ping-socket", "--to", "127.0.0.1", "--count", "5").exit(0))
	if trip.Frames != 5 || trip.Median <= 0 {
		t.Errorf("round trips: %+v", trip)
	}
	counted := benchSays(t, run("count", "--if", "lo", "--secs", "0.1").exit(0))
	if counted.Frames != 0 {
		t.Errorf("an idle loopback: %+v", counted)
	}
}

func TestBenchTable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lines")
	lines := `{"what":"send","way":"kernel pktgen","seconds":2,"frames":20000}
{"what":"send","way":"Go UDP socket","seconds":1,"frames":1000}
{"what":"send","way":"ours","seconds":1,"frames":19000}
{"what":"round trip","way":"ours","seconds":1,"frames":5,"median_us":250}
{"what":"send","way":"ours","seconds":1,"frames":30000}
{"what":"send","way":"ours","seconds":1,"frames":21000}
`
	if err := os.WriteFile(file, []byte(lines), 0o644); err != nil {
		t.Fatal(err)
	}
	bin := benchProgram(t)
	out := start(t, nil, bin, "table", file).exit(0)
	for _, row := range []string{
		"send kernel pktgen 10000 frames/s 10000 10000 1 1.00 10.00",
		"send ours 21000 frames/s 19000 30000 3 2.10 21.00",
		"round trip ours 250 us 250 250 1 1.00",
	} {
		if text := strings.Join(strings.Fields(out), " "); !strings.Contains(text, row) {
			t.Errorf("no row %q in\n%s", row, out)
		}
	}
	for _, wrong := range []string{"", "x\n", `{"what":"a","way":"b","seconds":1,"frames":1}` + "\n" + `{"what":"a","way":"c","seconds":1,"bytes":1}`} {
		if err := os.WriteFile(file, []byte(wrong), 0o644); err != nil {
			t.Fatal(err)
		}
		start(t, nil, bin, "table", file).exit(1)
	}
}

func TestBenchRefuses(t *testing.T) {
	bin := benchProgram(t)
	for _, args := range [][]string{
		{"send", "--size", "3"}, {"send", "--batch", "0"}, {"send", "--secs", "0"}, {"send", "--secs", "NaN"},
		{"send", "--doorbell", "bell"}, {"send", "--take"}, {"send", "--wait-mode", "nap"}, {"send", "--dst-mac", "1"},
		{"ping", "--to", "::1"}, {"ping", "--count", "0"}, {"count", "--dir", "up"}, {"udp-send", "--to", "example"},
	} {
		start(t, nil, bin, args...).exit(2)
	}
	wants(t, start(t, nil, bin).exit(0), "one boot of one machine")
}
