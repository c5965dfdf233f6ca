package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
	"barevif/tools/guestimage/guestinit"

	"github.com/spf13/cobra"
)

func TestImageSaysWhatIsWrongWithItsCommandLine(t *testing.T) {
	for _, c := range []struct {
		args string
		says []string
	}{
		{"image", []string{"the program is missing", "barevif image ./tools/hello"}},
		{"image -- -addr 1", []string{"the program is missing"}},
		{"image ./a ./b", []string{`"./b": an image has one program`, `behind "--"`}},
		{"image --deb a --vmlinuz b ./a", []string{`--deb "[a]" and --vmlinuz "b"`}},
		{"image --vmlinuz b ./a", []string{"--vmlinuz and --modules: one of them is missing", "--deb"}},
		{"image --modules b ./a", []string{"--vmlinuz and --modules: one of them is missing"}},
		{"image --restart sometimes ./a", []string{`--restart "sometimes": not never, on-failure or always`}},
		{"image --stop 11m ./a", []string{`--stop "11m0s": not a time up to 10m0s`}},
		{"image --stop -1s ./a", []string{`--stop "-1s": not a time`}},
		{"image --grants -1 ./a", []string{`--grants "-1": not a number of pages`}},
		{"image --grants 1048577 ./a", []string{`--grants "1048577": not a number of pages`}},
		{"image --memory 31 ./a", []string{`--memory "31": not MiB from 32 on`}},
		{"image --vcpus 0 ./a", []string{`--vcpus "0": not a number from 1 to 512`}},
		{"image --name a/b ./a", []string{`--name "a/b": not a name of letters`}},
		{"image --config a\nb ./a", []string{`not one line`}},
		{"image ./a -- a\nb", []string{"control characters", "--file"}},
		{"image ./a -- " + strings.Repeat("x ", 30) + "x", []string{"31 words, and the kernel takes 30", "--file"}},
	} {
		clitest.Build(rootCommand).Fails(t, cli.ExitUsage, strings.Split(c.args, " "), c.says...)
	}
}

func TestImageSaysWhatItLacks(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module example.org/a\n\ngo 1.26\n", "main.go": "package main\nfunc main() {}\n", "file": "", "x.deb": "!<arch>\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	// Without a home there is no folder for fetched kernels, which matters only to who fetches one.
	for _, name := range []string{"GOCACHE", "GOMODCACHE"} {
		value, err := exec.Command("go", "env", name).Output()
		if err != nil {
			t.Skip("the go command is not installed: ", err)
		}
		t.Setenv(name, strings.TrimSpace(string(value)))
	}
	for _, name := range []string{"HOME", "XDG_CACHE_HOME", "BAREVIF_CACHE"} {
		t.Setenv(name, "") // restores it
		os.Unsetenv(name)
	}
	for _, c := range []struct {
		args string
		says []string
	}{
		{"image .", []string{"no folder for a fetched kernel", "BAREVIF_CACHE", "--deb"}},
		{"image -o file .", []string{"the image cannot be written", "--out"}},
		{"image --deb x.deb .", []string{"x.deb: it is truncated", "fetch the package again"}},
		{"image --deb none.deb .", []string{"none.deb: no such file", "apt-get download linux-image-amd64"}},
		{"image --vmlinuz main.go --modules . .", []string{"main.go: no Linux kernel", "--vmlinuz"}},
	} {
		clitest.Build(rootCommand).Fails(t, cli.ExitFailed, strings.Fields(c.args), c.says...)
	}
	if left, err := filepath.Glob("out/.image-*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// What is given on the command line reaches the image's description.
func TestImageFlagsAreTaken(t *testing.T) {
	m := imageFlags{Program: &cli.Program{}}
	cmd := &cobra.Command{Use: "image", Args: m.arguments, RunE: func(*cobra.Command, []string) error { return m.check() }}
	m.register(cmd)
	cmd.SetArgs([]string{"--name", "web-1", "--vif", "none", "--restart", "never", "--without", "tun", "--without", "xenfs", "./a", "--", "A=1", "--", "B=2", "c"})
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	c := m.cfg
	if c.Program.Package != "./a" || !slices.Equal(c.Env, []string{"A=1"}) || !slices.Equal(c.Args, []string{"B=2", "c"}) {
		t.Errorf("%q, %q, %q", c.Program.Package, c.Env, c.Args)
	}
	if !slices.Equal(c.Without, []string{"tun", "xenfs"}) {
		t.Errorf("without %q", c.Without)
	}
	if c.Params.Hostname != "web-1" || c.Params.Restart != guestinit.Never || c.Domain.VIFs != nil || c.Out != "out" || c.Domain.VCPUs != 1 {
		t.Errorf("%+v", c)
	}
}

// What image says meanwhile is a record, too, with --log json.
func TestImageSaysRecords(t *testing.T) {
	_, _, stderr := clitest.Build(rootCommand).Run(t, "--log", "json", "image", "-o", t.TempDir(), "./no-such-package")
	lines := strings.Split(strings.TrimSpace(stderr), "\n")
	for _, line := range lines {
		if !json.Valid([]byte(line)) {
			t.Errorf("no record: %s", line)
		}
	}
	if len(lines) < 2 || !strings.Contains(lines[0], "building ./no-such-package") {
		t.Errorf("%q", stderr)
	}
}
