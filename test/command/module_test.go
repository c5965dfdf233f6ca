//go:build linux

package command_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// readmeCommands returns the blocks of commands in README.md whose first line is first.
func readmeCommands(t *testing.T, first string) (blocks [][]string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range regexp.MustCompile(`(?m)(?:^    .*\n)+`).FindAllString(string(text), -1) {
		lines := strings.Split(strings.TrimSuffix(block, "\n"), "\n")
		for i := range lines {
			lines[i] = strings.TrimSpace(lines[i])
		}
		if lines[0] == first {
			blocks = append(blocks, lines)
		}
	}
	if blocks == nil {
		t.Fatalf("README.md shows no commands that begin with %q", first)
	}
	return blocks
}

// inModule runs commands in dir as a user's shell does, with what the module cache has.
func inModule(t *testing.T, dir string, commands ...string) string {
	t.Helper()
	out, err := tryInModule(t, dir, commands...)
	if err != nil {
		if strings.Contains(out, "disabled by GOPROXY=off") {
			t.Skipf("the module cache does not have all that is needed: %s", out)
		}
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

func tryInModule(t *testing.T, dir string, commands ...string) (string, error) {
	t.Helper()
	lookGo(t)
	clone, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-e", "-c", strings.Join(commands, "\n"))
	cmd.Dir = dir
	// Nothing is fetched, and nobody is asked for checksums of what is there.
	cmd.Env = append(os.Environ(), "BAREVIF="+clone, "PWD="+dir, "GOPROXY=off", "GONOSUMDB=*", "GOWORK=")
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return string(out) + string(exit.Stderr), err
	}
	return string(out), err
}

// ownModule makes a folder with nothing in it but the program that README.md shows. It is there until
// the test ends.
func ownModule(t *testing.T, name string) (dir string) {
	t.Helper()
	dir = filepath.Join(programs, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	readmeProgram(t)
	source, err := os.ReadFile(filepath.Join(programs, "readme.go"))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "main.go"), source, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// The commands that README.md shows lead from an empty folder to a page that the program
// serves, which is in a module of its own or in a workspace.
func TestAModuleOfOnesOwnServes(t *testing.T) {
	outside := os.Getenv(inside) == ""
	names := []string{"own-replace", "own-workspace"}
	if outside {
		blocks := readmeCommands(t, "go mod init example.com/hello")
		if len(blocks) != len(names) {
			t.Fatalf("%d ways to build it", len(blocks))
		}
		for i, commands := range blocks {
			inModule(t, ownModule(t, names[i]), commands...)
		}
	}
	if !namespace(t) {
		return
	}
	needTAP(t)
	for _, name := range names {
		servesFrom(t, filepath.Join(programs, name))
	}
}

// servesFrom runs what README.md shows, each command in a terminal of its own.
func servesFrom(t *testing.T, dir string) {
	t.Helper()
	commands := readmeCommands(t, "./barevif host --socket host.sock")[0]
	if len(commands) != 4 {
		t.Fatalf("%q", commands)
	}
	var running []*process
	for i, ready := range []string{"look inside:", "serves vifs", "http://10.9.0.2/"} {
		command := strings.TrimPrefix(commands[i], "sudo ") // root of the namespace
		p := startIn(t, dir, nil, "/bin/sh", "-c", "exec "+command)
		p.await(ready, 1)
		running = append(running, p)
	}
	url, ok := strings.CutPrefix(commands[3], "curl ")
	if body := string(fetch(t, url)); !ok || !strings.Contains(body, "main.go") {
		t.Errorf("%s: %s", commands[3], body)
	}
	slices.Reverse(running)
	for _, p := range running {
		p.signal(syscall.SIGINT)
		p.exit(0)
	}
}

// What a user of the library links is the library, and with pvnet/netstack gVisor and a DHCP client. The command
// and its terminal, browsers, Prometheus and tests are no part of it.
func TestWhatAModuleThatUsesTheLibraryLinks(t *testing.T) {
	const sys = "golang.org/x/sys"
	gvisor := []string{
		"github.com/google/btree", "github.com/insomniacslk/dhcp", "github.com/josharian/native", "github.com/pierrec/lz4/v4", "github.com/u-root/uio",
		"golang.org/x/exp", sys, "golang.org/x/time", "gvisor.dev/gvisor",
	}
	for _, c := range []struct {
		imports string
		modules []string // beside barevif itself
	}{
		{`import _ "barevif/pvnet"`, nil},
		{`import (_ "barevif/pvnet"; _ "barevif/hypercall/xendev")`, []string{sys}},
		{`import (_ "barevif/pvnet"; _ "barevif/pvnet/netstack")`, gvisor},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "lib.go"), []byte("package lib\n"+c.imports+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		setUp := readmeCommands(t, "go mod init example.com/hello")[0][:3]
		inModule(t, dir, setUp...)
		linked := strings.Fields(inModule(t, dir, `go list -deps -f '{{with .Module}}{{.Path}}{{end}}' .`))
		slices.Sort(linked)
		linked = slices.DeleteFunc(slices.Compact(linked), func(m string) bool { return m == "barevif" || m == "example.com/hello" })
		if !slices.Equal(linked, c.modules) {
			t.Errorf("%s: linked are packages of %q, not of %q", c.imports, linked, c.modules)
		}
		for pkg := range strings.FieldsSeq(inModule(t, dir, "go list -deps .")) {
			if strings.HasPrefix(pkg, "barevif/tools/") || strings.HasPrefix(pkg, "barevif/test/") {
				t.Errorf("%s: %s is linked", c.imports, pkg)
			}
		}
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^(?:require |\t)(\S+) v`).FindAllStringSubmatch(string(text), -1) {
			if m[1] != "barevif" && !slices.Contains(c.modules, m[1]) {
				t.Errorf("%s: go.mod requires %s", c.imports, m[1])
			}
		}
		noForeignModules(t, dir)
	}
}

// noForeignModules checks that the module graph has no browser and no Prometheus. It names the
// modules of the command, of which no user of the library fetches more than the go.mod.
func noForeignModules(t *testing.T, dir string) {
	t.Helper()
	graph, err := tryInModule(t, dir, "go list -m all")
	if err != nil { // it wants every go.mod, also of what is not linked
		if !strings.Contains(graph, "disabled by GOPROXY=off") {
			t.Fatalf("%v\n%s", err, graph)
		}
		graph, _ = tryInModule(t, root, "cat go.mod") // what barevif adds to it
	}
	if !strings.Contains(graph, "github.com/cilium/ebpf") {
		t.Fatalf("no module graph: %s", graph)
	}
	for _, m := range []string{"chromedp", "prometheus", "barevif/test/"} {
		if strings.Contains(graph, m) {
			t.Errorf("%s is in the module graph:\n%s", m, graph)
		}
	}
}
