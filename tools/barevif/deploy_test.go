package main

import (
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"barevif/tools/cli"
	"barevif/tools/internal/deploytest"
)

const (
	etc       = "deploy/etc/"
	installed = "/usr/local/bin/barevif"
)

// deployed returns the text of a file of deploy.
func deployed(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// units returns the systemd units by path.
func units(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob(etc + "systemd/system/*.service")
	if err != nil || len(files) < 4 {
		t.Fatal(files, err)
	}
	out := make(map[string]string)
	for _, f := range files {
		out[f] = deployed(t, f)
	}
	return out
}

// commandLine returns what a unit runs, for vif 0, with what its first comment suggests as its
// OPTIONS.
func commandLine(t *testing.T, unit string) []string {
	t.Helper()
	run := deploytest.Settings(unit, "ExecStart")
	if len(run) != 1 {
		t.Fatalf("ExecStart=%q", run)
	}
	options := ""
	if m := regexp.MustCompile(`(?m)^#.*  OPTIONS=(.*)$`).FindStringSubmatch(unit); m != nil {
		options = m[1]
	}
	line := strings.NewReplacer("%i", "0", "$OPTIONS", options, "${LISTEN}", "127.0.0.1:9464").Replace(run[0])
	return strings.Fields(line)
}

// A unit runs a command that takes its flags, together with each other.
func TestUnitsRunCommandsThatThereAre(t *testing.T) {
	for file, unit := range units(t) {
		words := commandLine(t, unit)
		root := (&cli.Program{Stdout: io.Discard, Stderr: io.Discard}).Command(rootCommand)
		cmd, args, err := root.Find(words[1:])
		if err != nil || cmd == root || words[0] != installed {
			t.Errorf("%s runs %q: %v", file, words, err)
			continue
		}
		if err := cmd.ParseFlags(args); err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		if err := cmd.ValidateArgs(cmd.Flags().Args()); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		if cmd.PreRunE != nil {
			if err := cmd.PreRunE(cmd, nil); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
		// The directory that --inspect names, and where the hand-over's socket is, is the unit's.
		if f := cmd.Flags().Lookup("inspect"); f != nil {
			dir := strings.ReplaceAll("/run/"+strings.Join(deploytest.Settings(unit, "RuntimeDirectory"), " "), "%i", "0")
			if f.Value.String() != dir || !slices.Contains(deploytest.Settings(unit, "RuntimeDirectoryMode"), "0700") {
				t.Errorf("%s: --inspect %s, and its directory is %s", file, f.Value, dir)
			}
			const reload = "/bin/kill -USR2 $MAINPID" // a hand-over
			if got := deploytest.Settings(unit, "ExecReload"); len(got) != 1 || got[0] != reload || !slices.Contains(deploytest.Settings(unit, "Type"), "notify") || !slices.Contains(deploytest.Settings(unit, "Restart"), "always") {
				t.Errorf("%s is not reloaded by %s: %q", file, reload, got)
			}
		}
	}
}

// systemd starts a service again however often it has failed. By default it gives up after five
// starts within ten seconds, as many as there are where a vif is not there yet.
func TestUnitsAreStartedAgainWithoutEnd(t *testing.T) {
	for file, unit := range units(t) {
		head, _, _ := strings.Cut(unit, "[Service]")
		if limit := deploytest.Settings(head, "StartLimitIntervalSec"); len(limit) != 1 || limit[0] != "0" {
			t.Errorf("%s: StartLimitIntervalSec=%q", file, limit)
		}
		if again := deploytest.Settings(unit, "Restart"); len(again) != 1 || again[0] != "always" {
			t.Errorf("%s: Restart=%q", file, again)
		}
	}
}

// systemd finds nothing wrong with the units.
func TestSystemdTakesTheUnits(t *testing.T) { deploytest.Verify(t, installed, units(t)) }

// The group of the rules may open the device nodes that the units let through, and those are
// the rules that a refused program names.
func TestTheRulesOpenTheNodesOfTheUnits(t *testing.T) {
	rule := regexp.MustCompile(`^SUBSYSTEM=="misc", KERNEL=="(xen/[a-z]+)", GROUP="barevif", MODE="0660"$`)
	opened := make(map[string]bool)
	for line := range strings.Lines(deployed(t, etc+"udev/rules.d/70-barevif.rules")) {
		line = strings.TrimSuffix(line, "\n")
		if m := rule.FindStringSubmatch(line); m != nil {
			opened["/dev/"+m[1]+" rw"] = true
		} else if !strings.HasPrefix(line, "#") {
			t.Errorf("no rule: %q", line)
		}
	}
	used := map[string]bool{"/dev/net/tun rw": true} // systemd's own rules open it
	for file, unit := range units(t) {
		for _, node := range deploytest.Settings(unit, "DeviceAllow") {
			used[node] = true
			if !opened[node] && node != "/dev/net/tun rw" {
				t.Errorf("%s has %s, which no rule opens", file, node)
			}
		}
	}
	for node := range opened {
		if !used[node] {
			t.Errorf("no unit has %s", node)
		}
	}
	modules := strings.Fields(regexp.MustCompile(`(?m)^#.*$`).ReplaceAllString(deployed(t, etc+"modules-load.d/barevif.conf"), ""))
	for _, m := range modules {
		if m == "tun" { // udev's own rules let everybody open its node
			continue
		}
		if node := "/dev/xen/" + strings.TrimPrefix(m, "xen-") + " rw"; !opened[node] {
			t.Errorf("module %s, and no rule for %s", m, node)
		}
	}
	if len(modules) != 4 {
		t.Errorf("modules %q", modules)
	}
}

// The domain's configuration is one, and says of vifs what DEPLOYING.md explains.
func TestTheGuestsConfiguration(t *testing.T) {
	values, vifs := deploytest.Domain(t, deployed(t, "deploy/guest.cfg"))
	for _, want := range []string{"name", "type", "kernel", "memory", "vcpus", "disk", "vif"} {
		if values[want] == "" {
			t.Errorf("no %s", want)
		}
	}
	page := deployed(t, "DEPLOYING.md")
	if len(vifs) != 2 {
		t.Errorf("vif = %s", values["vif"])
	}
	for _, vif := range vifs {
		for field := range strings.SplitSeq(vif, ",") {
			key, _, ok := strings.Cut(field, "=")
			if !ok || !strings.Contains(page, "`"+key) {
				t.Errorf("%q of %q: DEPLOYING.md explains no key %q", field, vif, key)
			}
		}
	}
}

// DEPLOYING.md names each file that there is to install.
func TestDeployingNamesWhatIsInstalled(t *testing.T) {
	page := deployed(t, "DEPLOYING.md")
	err := filepath.WalkDir("deploy", func(path string, d os.DirEntry, err error) error {
		name := strings.TrimPrefix(path, "deploy")
		if err == nil && !d.IsDir() && !strings.HasSuffix(name, ".go") && !strings.HasSuffix(name, "_test.yml") &&
			!strings.Contains(page, "`deploy"+name+"`") && !strings.Contains(page, "`"+name+"`") {
			t.Errorf("DEPLOYING.md does not name deploy%s", name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
