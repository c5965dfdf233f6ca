package main

import (
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"barevif/pvnet"
	"barevif/tools/cli"
	"barevif/tools/internal/deploytest"
	"barevif/tools/vifrouter/config"

	"github.com/spf13/cobra"
)

// deployed returns the text of a file of deploy.
func deployed(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

const (
	unitFile  = "etc/systemd/system/vifrouter.service"
	confFile  = "etc/vifrouter/router.conf"
	installed = "/usr/local/bin/vifrouter"
)

// parsed returns the command that a unit's line runs, with its flags parsed and its arguments.
func parsed(t *testing.T, line string) (*cobra.Command, []string) {
	t.Helper()
	words := strings.Fields(strings.ReplaceAll(line, "$OPTIONS", "--log json"))
	root := (&cli.Program{Stdout: io.Discard, Stderr: io.Discard}).Command(rootCommand)
	cmd, args, err := root.Find(words[1:])
	if err != nil || cmd == root || words[0] != installed {
		t.Fatalf("%q: %v", line, err)
	}
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	if err := cmd.ValidateArgs(cmd.Flags().Args()); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return cmd, cmd.Flags().Args()
}

// The unit runs a command that takes its flags, on the file that is installed with it; a reload
// checks that file and is the signal that reads it; and "vifrouter status" looks where it is.
func TestTheUnitRunsTheRouter(t *testing.T) {
	unit := deployed(t, unitFile)
	is := func(name string, want ...string) {
		t.Helper()
		if got := deploytest.Settings(unit, name); !slices.Equal(got, want) {
			t.Errorf("%s=%q, want %q", name, got, want)
		}
	}
	is("ExecStart", installed+" run --xen --inspect /run/vifrouter $OPTIONS /etc/vifrouter/router.conf")
	is("ExecReload", installed+" check /etc/vifrouter/router.conf", "/bin/kill -HUP $MAINPID")
	is("Type", "notify")
	is("RuntimeDirectory", strings.TrimPrefix(serviceDir, "/run/"))
	is("RuntimeDirectoryMode", "0700")
	is("User", "barevif")
	is("Restart", "always")
	is("StartLimitIntervalSec", "0")
	is("CapabilityBoundingSet", "")
	cmd, args := parsed(t, deploytest.Settings(unit, "ExecStart")[0])
	if cmd.Name() != "run" || cmd.Flags().Lookup("inspect").Value.String() != serviceDir || len(args) != 1 || filepath.Join("deploy", confFile) != "deploy"+args[0] {
		t.Errorf("%s %q", cmd.Name(), args)
	}
	if cmd, args := parsed(t, deploytest.Settings(unit, "ExecReload")[0]); cmd.Name() != "check" || len(args) != 1 {
		t.Errorf("%s %q", cmd.Name(), args)
	}
}

func TestSystemdTakesTheUnit(t *testing.T) {
	deploytest.Verify(t, installed, map[string]string{unitFile: deployed(t, unitFile)})
}

// The rules and modules of barevif's files, which the router's page says to install too, are
// those that the unit needs: it is both ends.
func TestTheRulesOpenTheNodesOfTheUnit(t *testing.T) {
	const barevif = "../../barevif/deploy/etc/"
	rules, modules, sysusers := deployed(t, barevif+"udev/rules.d/70-barevif.rules"), deployed(t, barevif+"modules-load.d/barevif.conf"), deployed(t, barevif+"sysusers.d/barevif.conf")
	nodes := deploytest.Settings(deployed(t, unitFile), "DeviceAllow")
	if len(nodes) != 4 {
		t.Errorf("DeviceAllow=%q", nodes)
	}
	for _, one := range nodes {
		node, mode, _ := strings.Cut(strings.TrimPrefix(one, "/dev/"), " ")
		if mode != "rw" || !strings.Contains(rules, `KERNEL=="`+node+`", GROUP="barevif", MODE="0660"`) {
			t.Errorf("no rule opens %q", one)
		}
		if name := strings.TrimPrefix(node, "xen/"); name != "xenbus" && !strings.Contains(modules, "xen-"+name+"\n") {
			t.Errorf("nothing loads the module of %q", one)
		}
	}
	if !strings.Contains(sysusers, "u barevif ") {
		t.Error("nothing makes the user")
	}
}

// The configurations of the domains fit each other, and the router's file: the guest names the
// router as its backend, and has the MAC and the address of its line.
func TestTheDomainsFitTheRoutersFile(t *testing.T) {
	cfg, err := config.Load(filepath.Join("deploy", confFile))
	if err != nil {
		t.Fatal(err)
	}
	router, uplinks := deploytest.Domain(t, deployed(t, "router.cfg"))
	guest, vifs := deploytest.Domain(t, deployed(t, "client.cfg"))
	for _, want := range []string{"name", "type", "kernel", "memory", "vcpus", "disk", "cmdline", "on_crash"} {
		if router[want] == "" || guest[want] == "" {
			t.Errorf("no %s", want)
		}
	}
	if router["driver_domain"] != "1" || len(uplinks) != 1 || len(vifs) != 1 {
		t.Fatalf("driver_domain=%s, vifs %q, %q", router["driver_domain"], uplinks, vifs)
	}
	for _, want := range []string{"modprobe.blacklist=xen-netfront,xen-netback", "xen_gntalloc.limit="} {
		if !strings.Contains(router["cmdline"], want) {
			t.Errorf("the router's cmdline %s has no %s", router["cmdline"], want)
		}
	}
	keys := map[string]string{}
	for field := range strings.SplitSeq(vifs[0], ",") {
		key, value, _ := strings.Cut(field, "=")
		keys[key] = value
	}
	var mac pvnet.MAC
	for _, g := range cfg.Guests {
		if g.Name == "client" {
			mac = g.MAC
			if keys["ip"] != g.Addr.String() {
				t.Errorf("ip=%s, and the file has %v", keys["ip"], g.Addr)
			}
		}
	}
	if `"`+keys["backend"]+`"` != router["name"] || keys["mac"] != mac.String() {
		t.Errorf("vif %q of %s, %v", vifs[0], router["name"], mac)
	}
}

// DEPLOYING.md names each file that there is to install, and the files of barevif's that go along.
func TestDeployingNamesWhatIsInstalled(t *testing.T) {
	page, err := os.ReadFile("DEPLOYING.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	err = filepath.WalkDir("deploy", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
			if name := strings.TrimPrefix(path, "deploy"); !strings.Contains(string(page), "`deploy"+name+"`") && !strings.Contains(string(page), "`"+name+"`") {
				t.Errorf("DEPLOYING.md does not name deploy%s", name)
			}
		}
		return err
	})
	if err != nil || n != 5 {
		t.Errorf("%d files, %v", n, err)
	}
}

// What the pages put behind "--" of an image is a command line of the router, which looks where
// vifrouter-reload writes.
func TestTheImageOfThePagesRunsTheRouter(t *testing.T) {
	const image = "./tools/vifrouter -- "
	for _, page := range []string{"DEPLOYING.md", "../../README.md"} {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for line := range strings.Lines(string(text)) {
			_, words, ok := strings.Cut(line, image)
			if !ok {
				continue
			}
			found++
			cmd, args := parsed(t, installed+" "+words)
			store := cmd.Flags().Lookup("store").Value.String()
			if cmd.Name() != "run" || cmd.Flags().Lookup("xen").Value.String() != "true" || checkStore(store) != nil || len(args) != 1 || filepath.Join("deploy", confFile) != "deploy"+args[0] {
				t.Errorf("%s: %s %q", page, cmd.Name(), words)
			}
			if script := deployed(t, "vifrouter-reload"); !strings.Contains(script, "/local/domain/$id/"+store+"\n") {
				t.Errorf("vifrouter-reload does not write to %s", store)
			}
		}
		if found != 1 {
			t.Errorf("%s: %d images", page, found)
		}
	}
}
