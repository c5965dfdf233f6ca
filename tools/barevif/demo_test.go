package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"barevif/telemetry"
	"barevif/tools/cli"
	"barevif/tools/internal/storetrace"
	"barevif/xenbus/toolstack"
)

func TestSizesHaveUnits(t *testing.T) {
	for s, want := range map[string]byteSize{
		"0": 0, "1": 1, "1500": 1500, "64KiB": 64 << 10, "256MiB": 256 << 20, "2GiB": 2 << 30, "1TiB": 1 << 40, "1099511627776": 1 << 40,
	} {
		var got byteSize
		if err := got.Set(s); err != nil || got != want {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "-1", "1.5", "MiB", "1 MiB", "1MB", "2TiB", "1025GiB", "1099511627777", "99999999999999999999", "1MiBKiB"} {
		var got byteSize
		if err := got.Set(s); err == nil {
			t.Errorf("%q: %d", s, got)
		}
	}
	if s := byteSize(256 << 20); s.String() != "256MiB" {
		t.Error(s.String())
	}
}

func TestFlowsBalanceWithWhatWasDropped(t *testing.T) {
	set := telemetry.NewSet(1)
	set.TX(0).Add(telemetry.Packets, 1000)
	set.TX(0).Add(telemetry.Bytes, 60000)
	set.TX(0).Observe(telemetry.BatchSize, 4)
	set.TX(0).Observe(telemetry.BatchSize, 2)
	set.RX(0).Add(telemetry.Packets, 997)
	set.RX(0).Drop(telemetry.DropDisconnected, 1)
	set.RX(0).Drop(telemetry.DropBadChain, 1)
	set.TX(0).Flush()
	set.RX(0).Flush()
	st := set.Snapshot()
	f := flows(st, st)
	if f[0].balanced() {
		t.Error("a frame is missing and nobody says so")
	}
	set.RX(0).Drop(telemetry.DropDisconnected, 1)
	set.RX(0).Flush()
	st = set.Snapshot()
	f = flows(st, st)
	if !f[0].balanced() || !f[1].balanced() {
		t.Error("1000 are not 997 and 3")
	}
	var b bytes.Buffer
	b.WriteString(sprintFlows("  ", f) + "\n")
	for _, want := range []string{"frontend sent   1 000", "60 000", " 3.0 ", "backend received     997", "  3\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, &b)
		}
	}
}

func TestAHandshakeIsTold(t *testing.T) {
	var lines []string
	h := watchHandshake(toolstack.Vif{Front: 1, Back: 2}, func(line string) { lines = append(lines, line) })
	front, back := "/local/domain/1/device/vif/0", "/local/domain/2/backend/vif/1/0"
	h.tell([]storetrace.Change{{By: 0, Path: front}, {By: 0, Path: front + "/state", Value: "1"}, {By: 0, Path: back + "/state", Value: "1"}})
	h.tell([]storetrace.Change{{By: 2, Path: "/local/domain/2/other", Value: "x"}})
	h.tell([]storetrace.Change{{By: 2, Path: back + "/never-there", Removed: true}, {By: 2, Path: back + "/state", Value: "2"}})
	h.tell([]storetrace.Change{{By: 1, Path: front + "/evil", Value: "\x1b[2J\n"}, {By: 1, Path: front + "/state", Value: "99"}})
	h.tell([]storetrace.Change{{By: 1, Path: front + "/evil", Removed: true}})
	h.flush()
	h.tell([]storetrace.Change{{By: 0, Path: back, Removed: true}})
	h.end()
	want := []string{
		"frontend  (by the toolstack) state=1 (Initialising)",
		"backend   (by the toolstack) state=1 (Initialising)",
		"backend   state=2 (InitWait)",
		`frontend  evil="\x1b[2J\n" state=99`,
		"frontend  -evil",
		"backend   (by the toolstack) removed",
	}
	if len(lines) != len(want) {
		t.Fatalf("%d lines: %q", len(lines), lines)
	}
	for i, line := range lines {
		if !strings.HasSuffix(line, " ms  "+want[i]) {
			t.Errorf("line %d is %q, want %q", i, line, want[i])
		}
	}
}

func TestLongKeysAreBroken(t *testing.T) {
	h := &handshake{vif: toolstack.Vif{Front: 1, Back: 2}, have: make(map[string]bool)}
	var changes []storetrace.Change
	for _, c := range "abcdefghijklmnopqrstuvwxyz" {
		changes = append(changes, storetrace.Change{By: 1, Path: h.vif.FrontDir() + "/" + strings.Repeat(string(c), 10), Value: "1"})
	}
	lines := h.lines(moment{time.Millisecond, changes})
	if len(lines) < 3 {
		t.Errorf("%d lines", len(lines))
	}
	for _, line := range lines {
		if len(line) > lineWidth+25 {
			t.Errorf("%d characters: %s", len(line), line)
		}
	}
}

func TestProgressOnNoTerminalIsLines(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&cli.Program{Stdout: &b}, 1000)
	for range 1000 {
		p.Write(make([]byte, 1))
	}
	p.finish()
	if got := strings.Count(b.String(), "\n"); got != 4 || !strings.Contains(b.String(), " 25 %  250 bytes") {
		t.Errorf("%d lines:\n%s", got, &b)
	}
	newProgress(&cli.Program{Stdout: &b}, 0).Write(nil)
}
