package hygiene_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// runGate runs steps of .ci/run with a go command that fails the first time and passes
// from then on. It gives what the gate printed, what it asked of go, and its verdict.
func runGate(t *testing.T, steps ...string) (out string, asked []string, err error) {
	t.Helper()
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("bash is not installed: ", err)
	}
	bin := t.TempDir()
	log := filepath.Join(bin, "log")
	script := fmt.Sprintf("#!/bin/sh\necho \"go $*\" >>%[1]s\n[ $(wc -l <%[1]s) -gt 1 ]\n", log)
	if err := os.WriteFile(filepath.Join(bin, "go"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("bash", append([]string{".ci/run"}, steps...)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "CI=", "BAREVIF_XENLAB=")
	b, err := cmd.CombinedOutput()
	text, _ := os.ReadFile(log)
	return string(b), strings.Split(strings.TrimSpace(string(text)), "\n"), err
}

// A fault that shows every second time is a fault.
func TestGateDoesNotRepeatFailedTests(t *testing.T) {
	for _, command := range []string{"go test ./...", "go test -race ./...", "go test -tags shmdebug ./arena/... ./hypercall/... ./pvnet/... ./test/hostile"} {
		out, asked, err := runGate(t, command)
		if err == nil || !strings.Contains(out, "--- FAILED") || !strings.Contains(out, "=== failed") {
			t.Errorf("%s failed once, the gate says %v:\n%s", command, err, out)
		}
		if len(asked) != 1 || asked[0] != command {
			t.Errorf("%s: it ran %q", command, asked)
		}
	}
}

// The commands that the README names are those of the gate.
func TestGateRunsWhatTheReadmeSays(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile(filepath.Join(root, ".ci/run"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for line := range strings.Lines(string(readme)) {
		command, _, _ := strings.Cut(line, "#")
		command = strings.TrimSpace(command)
		if !strings.HasPrefix(line, "    ") || !strings.Contains(command, "go test ") || strings.Contains(command, "XENLAB") {
			continue
		}
		found++
		if !strings.Contains(string(script), command) {
			t.Errorf("the gate never runs %q", command)
		}
	}
	if found < 3 {
		t.Errorf("the README names %d commands", found)
	}
}
