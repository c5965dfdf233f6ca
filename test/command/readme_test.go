//go:build linux

package command_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// readmeProgram builds the program in README.md and returns its path.
func readmeProgram(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "```go\npackage main\n")
	source, _, end := strings.Cut(rest, "\n```\n")
	if !ok || !end {
		t.Fatal("README.md shows no program")
	}
	// An overlay puts the program into a folder of the module, so that it may import the
	// module's packages.
	file := filepath.Join(programs, "readme.go")
	if err := os.WriteFile(file, []byte("package main\n"+source+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	within, err := filepath.Abs(filepath.Join(root, "test/command/readme/main.go"))
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {within: file}})
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(programs, "overlay.json")
	if err := os.WriteFile(list, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	return build(t, "readme", "./test/command/readme", "-overlay="+list)
}

func TestReadmeShowsTheHelp(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	help := start(t, nil, barevif(t), "--help").exit(0)
	_, list, _ := strings.Cut(help, "Available Commands:\n")
	list, _, _ = strings.Cut(list, "\n\n")
	for line := range strings.Lines(list) {
		name := strings.Fields(line)[0]
		if name != "help" && name != "completion" && !strings.Contains(string(text), "`barevif "+name+"`") {
			t.Errorf("README.md does not name %q", name)
		}
	}
	if !strings.Contains(list, "demo") {
		t.Errorf("no commands in %q", help)
	}
	for line := range strings.Lines(help) {
		if command, ok := strings.CutPrefix(line, "  barevif "); ok && command != "[command]\n" && !strings.Contains(string(text), "barevif "+strings.TrimSpace(command)) {
			t.Errorf("README.md does not show %q", strings.TrimSpace(line))
		}
	}
}
