// Package deploytest reads files that operators install: systemd units, and xl's configurations
// of domains. It is for tests.
package deploytest

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// Settings returns the values of a setting of a systemd unit.
func Settings(unit, name string) (values []string) {
	for line := range strings.Lines(unit) {
		if v, ok := strings.CutPrefix(line, name+"="); ok {
			values = append(values, strings.TrimSpace(v))
		}
	}
	return values
}

// Verify has systemd look for mistakes in units, which are texts by the paths of their files.
// program is what they run; it need not be installed. Without systemd the test is skipped.
func Verify(t *testing.T, program string, units map[string]string) {
	t.Helper()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed: ", err)
	}
	dir := t.TempDir()
	stand := filepath.Join(dir, "program")
	if err := os.WriteFile(stand, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	stand = strconv.Quote(strings.ReplaceAll(stand, "%", "%%")) // the path may have a space
	for file, unit := range units {
		path := filepath.Join(dir, strings.Replace(filepath.Base(file), "@.", "@0.", 1))
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(unit, program, stand)), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(analyze, "verify", path).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
}

var (
	comment    = regexp.MustCompile(`(?m)^\s*#.*$`)
	brackets   = regexp.MustCompile(`\[[^\]]*\]`)
	assignment = regexp.MustCompile(`^(\w+)\s*= ("[^"]*"|\d+|\[ '[^']*'(?:, '[^']*')*,? \])$`)
	quoted     = regexp.MustCompile(`'([^']*)'`)
)

// Domain returns the values of a domain's configuration for xl by their keys, as they are
// written there, and the entries of its vif list. A line that is no assignment is an error.
func Domain(t *testing.T, text string) (values map[string]string, vifs []string) {
	t.Helper()
	text = comment.ReplaceAllString(text, "")
	text = brackets.ReplaceAllStringFunc(text, func(list string) string { return strings.Join(strings.Fields(list), " ") })
	values = make(map[string]string)
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		m := assignment.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("no assignment: %q", line)
			continue
		}
		values[m[1]] = m[2]
	}
	for _, m := range quoted.FindAllStringSubmatch(values["vif"], -1) {
		vifs = append(vifs, m[1])
	}
	return values, vifs
}
