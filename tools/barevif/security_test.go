package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/telemetry"
	"barevif/tools/cli"
	"barevif/xenbus/toolstack"

	"github.com/spf13/cobra"
)

// SECURITY.md has the memory of a vif as its ends print it, and names flags, files and
// counters that there are.
func TestWhatSecurityNamesIsThere(t *testing.T) {
	text := deployed(t, "../../SECURITY.md")
	w := pvnettest.New(t, toolstack.Vif{}, pvnet.Config{}, pvnet.Config{})
	for ev := range w.Back.Links(t.Context()) {
		if ev.Up {
			break
		}
	}
	front, back := w.Front.Budget(), w.Back.Budget()
	memory := fmt.Sprintf("%d granted and %d private pages of a frontend, %d private ones of a backend", front.SharedPages, front.PrivatePages, back.PrivatePages)
	if !strings.Contains(text, memory) {
		t.Errorf("no %q", memory)
	}
	commands := (&cli.Program{Stdout: io.Discard, Stderr: io.Discard}).Command(rootCommand)
	flags := regexp.MustCompile("`(?:([a-z]+) )?--([a-z-]+)").FindAllStringSubmatch(text, -1)
	for _, m := range flags {
		if !hasFlag(commands, m[1], m[2]) {
			t.Errorf("no command %s has --%s", m[1], m[2])
		}
	}
	files := regexp.MustCompile("`((?:arena|test|tools|pvnet)/[^` ]+|[A-Z]+\\.md)`").FindAllStringSubmatch(text, -1)
	for _, m := range files {
		if _, err := os.Stat(filepath.Join("../..", m[1])); err != nil {
			t.Error(err)
		}
	}
	if len(flags) < 3 || len(files) < 5 {
		t.Errorf("%d flags, %d files", len(flags), len(files))
	}
	counter := "pages_quarantined"
	known := false
	for _, f := range telemetry.Fields() {
		known = known || f.Name == counter
	}
	if !known || !strings.Contains(text, "`"+counter+"`") {
		t.Errorf("the counter %s", counter)
	}
}

// hasFlag reports whether a command, of that name unless it is "", has the flag.
func hasFlag(parent *cobra.Command, name, flag string) bool {
	for _, c := range parent.Commands() {
		if (name == "" || name == c.Name()) && c.Flags().Lookup(flag) != nil {
			return true
		}
	}
	return false
}
