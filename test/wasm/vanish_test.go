package wasm_test

import (
	"os/exec"
	"strings"
	"testing"
)

// Where an access to memory that is gone does not become a panic, the program ends: pvnet's
// trap is no help, and a domain must not take memory away that it has mapped. Here nothing can
// take it away, since the memory of such a machine only grows.
func TestMemoryThatIsGoneEndsTheProgram(t *testing.T) {
	out, err := build(t, ".", "./vanish", "build").run(t)
	if err == nil || !strings.Contains(err.Error(), "out of bounds memory access") {
		t.Errorf("the program ended with %v", err)
	}
	if out != "" { // recover saw nothing, and no deferred call ran
		t.Errorf("it printed %q", out)
	}
	// The same program where Go's runtime makes a panic of it.
	cmd := exec.CommandContext(t.Context(), "go", "run", "./vanish")
	text, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(text), "a panic with the address 0xfffff000") {
		t.Errorf("here it ended with %v and printed %q", err, text)
	}
}
