package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fakes are the toolstack's programs: domain 7 is "router", and each node of xenstore is a file, the
// directory's name with ".value". The answer is there as soon as something was written.
var fakes = map[string]string{
	"xl":            `[ "$1 $2" = "domid router" ] && echo 7`,
	"xenstore-read": `cat "$S$1.value"`,
	"xenstore-rm":   `[ -e "$S$1.value" ] && rm -r "$S$1.value" "$S$1"`,
	"xenstore-write": `[ "$1" = -- ] && shift
		echo written >>"$S/writes"
		while [ $# -gt 0 ]; do
			mkdir -p "$S$1"
			printf %s "$2" | sed 's/\\\\/\\/g' >"$S$1.value"
			shift 2
		done
		[ -z "$ANSWER" ] || echo "$ANSWER" >"$S/local/domain/7/data/vifrouter/result.value"`,
	"sleep": `exit 0`,
}

// The script hands a file over as it is, in pieces that any xenstore takes, and ends as the router
// has answered.
func TestTheScriptHandsAFileToTheRouter(t *testing.T) {
	script, err := filepath.Abs(filepath.Join("deploy", "vifrouter-reload"))
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("# a remark of thirty-one bytes\n", 200) + `allow from "\x41\n" to \` + "\n\n  indented\t\nno line end"
	for _, c := range []struct {
		name, domain, text, answer string
		code                       int
		says                       string
	}{
		{"short", "router", "uplink vif 0\n", "taken: 1 networks", 0, "taken: 1 networks\n"},
		{"long", "router", long, "taken: 1 networks", 0, "taken: 1 networks\n"},
		{"empty", "router", "", "refused: it is empty", 1, "refused: it is empty\n"},
		{"refused", "router", "x\n", "refused: line 1", 1, "refused: line 1\n"},
		{"silent", "router", "x\n", "", 1, "no answer from router: does its router run with --store data/vifrouter?\n"},
		{"no domain", "other", "x\n", "", 1, "no domain other runs here: xl list\n"},
		{"no file", "router", "-", "", 1, "none.conf cannot be read\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bin, store := t.TempDir(), t.TempDir()
			for name, text := range fakes {
				if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			const home = "/local/domain/7/data/vifrouter"
			old := filepath.Join(store, home, "config/99.value") // a piece of an older file
			if err := os.MkdirAll(filepath.Dir(old), 0o755); err != nil {
				t.Fatal(err)
			}
			for _, file := range []string{old, filepath.Join(store, home, "config.value")} {
				if err := os.WriteFile(file, []byte("old"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			file := filepath.Join(t.TempDir(), "none.conf")
			if c.text != "-" {
				if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command(script, c.domain, file)
			cmd.Env = []string{"PATH=" + bin + ":/usr/bin:/bin", "S=" + store, "ANSWER=" + c.answer}
			out, _ := cmd.CombinedOutput() // the status says the same
			if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.HasSuffix(string(out), c.says) {
				t.Fatalf("exit %d, %s", code, out)
			}
			if c.domain != "router" || c.text == "-" {
				if _, err := os.Stat(filepath.Join(store, "writes")); err == nil {
					t.Error("it has written something")
				}
				return
			}
			if writes, err := os.ReadFile(filepath.Join(store, "writes")); err != nil || string(writes) != "written\n" {
				t.Errorf("not in one transaction: %q, %v", writes, err)
			}
			want := c.text
			if want != "" && !strings.HasSuffix(want, "\n") {
				want += "\n"
			}
			if got := pieces(t, filepath.Join(store, home, "config")); got != want {
				t.Errorf("it has handed over %q", got)
			}
		})
	}
	cmd := exec.Command(script, "router")
	if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 2 || string(out) != "usage: vifrouter-reload DOMAIN FILE\n" {
		t.Errorf("exit %d, %s", cmd.ProcessState.ExitCode(), out)
	}
}

// pieces returns what is below the key, in the order of the numbers, each short enough.
func pieces(t *testing.T, key string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(key, "*.value"))
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(files, func(a, b string) int { return len(a) - len(b) }) // Glob has sorted those of a length
	first, err := os.ReadFile(key + ".value")
	if err != nil {
		t.Fatal(err)
	}
	text := string(first)
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil || len(b) > 2048 {
			t.Errorf("%s has %d bytes, %v", file, len(b), err)
		}
		text += string(b)
	}
	return text
}
