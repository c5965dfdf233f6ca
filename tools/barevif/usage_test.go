package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"barevif/telemetry"
	"barevif/telemetry/bpf"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// rawTexts are parts of error texts of package net and of the libraries that parse the
// command line. The command must not print them.
var rawTexts = []string{
	"strconv.", "if any flags", "accepts at most", "accepts 1 arg", "unknown shorthand", "unknown flag", "flag needs an argument",
	"invalid argument", "bad flag syntax", "time: invalid", "time: unknown", "time: missing", "parsing ", "dial udp", "listen tcp", "listen udp", "bind: ", "lookup ", "unknown command",
}

// allCommands returns every subcommand that runs, by its words.
func allCommands(t *testing.T) map[string]*cobra.Command {
	t.Helper()
	all := map[string]*cobra.Command{}
	p := &program{stdout: io.Discard, stderr: io.Discard}
	root := p.root()
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.RunE != nil {
			all[strings.TrimPrefix(c.CommandPath(), "barevif ")] = c
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	if len(all) < 20 {
		t.Fatalf("%d commands", len(all))
	}
	return all
}

func wrong(t *testing.T, args []string, says ...string) {
	t.Helper()
	code, stdout, stderr := stats(t, args...)
	if code != exitUsage || stdout != "" {
		t.Errorf("%q: exit %d, %q", args, code, stdout)
	}
	for _, want := range append(says, "\n  next: ") {
		if !strings.Contains(stderr, want) {
			t.Errorf("%q: no %q in %q", args, want, stderr)
		}
	}
	for _, raw := range rawTexts {
		if strings.Contains(stderr, raw) {
			t.Errorf("%q: %q in %q", args, raw, stderr)
		}
	}
}

// Every flag that does not take any text refuses an invalid value. The error names the flag,
// the value and the valid values.
func TestEveryFlagSaysWhatItTakes(t *testing.T) {
	for path, c := range allCommands(t) {
		words := strings.Fields(path)
		wrong(t, append(words, "--no-such-flag"), `"--no-such-flag"`, path, "--")
		wrong(t, append(words, "-Z"), `"-Z"`, path, "--")
		wrong(t, append(words, "---"), `"---"`, path, "--")
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if f.NoOptDefVal == "" {
				wrong(t, append(words, "--"+f.Name), "--"+f.Name+" needs a value", f.Usage[strings.LastIndexByte(f.Usage, '`')+1:])
			}
			if kind := f.Value.Type(); kind == "string" || kind == "stringArray" {
				return
			}
			for _, value := range []string{"moon", "99999999999999999999", "1,5"} {
				if f.Value.Type() == "float64" && value != "moon" && value != "1,5" {
					continue // which is a number
				}
				want := "not "
				if f.Value.Type() == "bool" {
					want = "not true or false"
				}
				wrong(t, append(words, "--"+f.Name+"="+value), fmt.Sprintf("--%s %q", f.Name, value), want)
			}
		})
		if c.Args != nil {
			wrong(t, append(words, "extra", "more"), `"`, path[strings.LastIndexByte(path, ' ')+1:])
		}
	}
}

func TestMistakesNameWhatWouldDo(t *testing.T) {
	for _, c := range []struct {
		args string
		says []string
	}{
		{"stta", []string{`"stta" is no command of "barevif"`, `did you mean "stat"?`}},
		{"-v nonsense", []string{`"nonsense" is no command`, `"demo"`, `"back"`, "barevif --help"}},
		{"help nonsense", []string{`"nonsense" is no command`}},
		{"bench nonsense", []string{`"nonsense" is no command of "barevif bench"`, `"pktgen"`}},
		{"xen take", []string{"the ID of a vif is missing", "barevif xen"}},
		{"xen take 0 1", []string{`"1"`, "one argument at most"}},
		{"serve --emu x --xen", []string{`--emu "x" and --xen "true": only one of them can be given`, "leave out"}},
		{"stat --json --plot --http 1", []string{`--json "true" and --plot "true" and --http "1"`}},
		{"stat --prune --watch", []string{`--prune "true" and --watch "true"`}},
		{"stat --prune front-*", []string{`"front-*": --prune takes no names`}},
		{"check --answer --lost 3", []string{`--answer "true" and --lost "3"`}},
		{"check --silence 0 127.0.0.1", []string{`--silence "0s": not a time to wait`}},
		{"check no-such-host.invalid", []string{`no host "no-such-host.invalid" is known`, "10.9.0.2"}},
		{"serve --dom 0", []string{`--dom "0": not the number of a domain from 1 to 32751`}},
		{"serve --dom 32752", []string{`--dom "32752": not the number of a domain from 1 to 32751`}},
		{"serve --dom x", []string{`--dom "x": not the number of a domain from 1 to 32751`}},
		{"serve --port 65536", []string{`--port "65536": not a port from 1 to 65535`}},
		{"demo --size 5 apples", []string{`"apples"`, "takes flags alone"}},
		{"demo --size apples", []string{`--size "apples": not a number of bytes up to 1 TiB, like 64MiB`}},
	} {
		wrong(t, strings.Split(c.args, " "), c.says...)
	}
}

// The errors for a port in use and for an address of another machine are in plain words.
func TestAddressesThatCannotBeListenedAt(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	any4, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer any4.Close()
	port := func(a net.Addr) string { _, p, _ := net.SplitHostPort(a.String()); return p }
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free := port(closed.Addr())
	closed.Close()
	for _, c := range []struct {
		args string
		says []string
	}{
		{"stat --http " + tcp.Addr().String(), []string{"another program listens at " + tcp.Addr().String() + " already", "--http"}},
		{"stat --http 192.0.2.77:0", []string{"192.0.2.77:0 is no address of this machine", "ip -brief address"}},
		{"check --answer --port " + port(udp.LocalAddr()) + " 0.0.0.0", []string{"another program listens at ", "--port"}},
		{"bench udp-recv --secs 1 --port " + port(udp.LocalAddr()), []string{"another program listens at UDP port ", "--port"}},
		{"bench tcp-send --secs 1 --to 127.0.0.1 --port " + free, []string{"connect to 127.0.0.1:" + free + ": connection refused", "barevif bench tcp-recv"}},
		{"bench table /no/such/file", []string{"/no/such/file", "pipe the lines in"}},
		{"bench tcp-recv --secs 1 --port " + port(any4.Addr()), []string{"another program listens at TCP port ", "--port"}},
	} {
		code, _, stderr := stats(t, strings.Fields(c.args)...)
		if code != exitFailed {
			t.Errorf("%s: exit %d", c.args, code)
		}
		for _, want := range append(c.says, "\n  next: ") {
			if !strings.Contains(stderr, want) {
				t.Errorf("%s: no %q in %q", c.args, want, stderr)
			}
		}
	}
}

// A reader that ends early, such as head, is not a failure.
func TestAReaderThatHasEnoughIsNoFailure(t *testing.T) {
	_, args := counting(t, 61031)
	for _, more := range [][]string{nil, {"--json"}, {"--watch", "--interval", "100ms"}, {"--watch", "--json", "--interval", "100ms"}, {"--plot", "--count", "2", "--interval", "100ms"}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		var stderr bytes.Buffer
		if code := run(t.Context(), append(args, more...), w, &stderr); code != exitOK || stderr.Len() != 0 {
			t.Errorf("%q: exit %d, %q", more, code, &stderr)
		}
		w.Close()
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	lines := filepath.Join(t.TempDir(), "lines")
	if err := os.WriteFile(lines, []byte(`{"what":"send","way":"ours","seconds":1,"frames":5}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"version"}, {"bench", "table", lines}, {"xen", "--help"}, {"--help"}} {
		var stderr bytes.Buffer
		if code := run(t.Context(), args, w, &stderr); code != exitOK || stderr.Len() != 0 {
			t.Errorf("%q: exit %d, %q", args, code, &stderr)
		}
	}
	// Any other loss of output is a failure.
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("no /dev/full: ", err)
	}
	defer full.Close()
	if code := run(t.Context(), args, full, io.Discard); code != exitFailed {
		t.Errorf("a full device: exit %d", code)
	}
}

// The check reports an address that does not answer, and gives up soon.
func TestCheckOfAnAddressThatIsSilent(t *testing.T) {
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	_, port, _ := net.SplitHostPort(silent.LocalAddr().String())
	began := time.Now()
	code, _, stderr := stats(t, "check", "--port", port, "--silence", "1100ms", "127.0.0.1")
	if code != exitFailed || time.Since(began) > 25*time.Second {
		t.Errorf("exit %d after %v", code, time.Since(began))
	}
	for _, want := range []string{"no answer yet: ", "giving up after 1.1s\n", "nothing was answered within 1.1s: ", "\n  next: is that its address"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in %q", want, stderr)
		}
	}
	silent.Close()
	code, _, stderr = stats(t, "check", "--port", port, "127.0.0.1")
	if want := "nothing answers at port " + port + " of 127.0.0.1\n  next: "; code != exitFailed || !strings.Contains(stderr, want) {
		t.Errorf("exit %d, %q", code, stderr)
	}
}

func TestStatKnowsTheNamesPeopleType(t *testing.T) {
	root := filepath.Join(t.TempDir(), "none")
	for _, info := range []telemetry.Info{
		{Role: telemetry.Backend, Own: 61042, Peer: 61041, Handle: 3},
		{Role: telemetry.Frontend, Own: 61041, Peer: 61042, Handle: 3},
	} {
		set := telemetry.NewSet(1)
		set.Open(&bpf.Store{Root: root}, info)
		t.Cleanup(func() { set.Close() })
		set.SetStatus(telemetry.Status{State: 4, Up: true})
	}
	for name, want := range map[string]string{
		"vif61041.3": "back-61042-61041-3", "61041.3": "front-61041-61042-3 back-61042-61041-3", "xvif3": "front-61041-61042-3",
		"61042.3": "", "vif61042.3": "", "vif61041.30": "", "vif61041": "",
	} {
		code, text, _ := stats(t, "stat", "--root", root, "--json", name)
		var j struct{ Devices []struct{ Vif string } }
		var got []string
		if json.Unmarshal([]byte(text), &j) == nil {
			for _, d := range j.Devices {
				got = append(got, d.Vif)
			}
		}
		if strings.Join(got, " ") != want || (code == exitOK) != (want != "") {
			t.Errorf("%s: exit %d, %q, want %q", name, code, got, want)
		}
	}
	code, _, stderr := stats(t, "stat", "--root", root, "0")
	if code != exitFailed || !strings.Contains(stderr, `no counters of "0"`) || !strings.Contains(stderr, `"back-61042-61041-3"`) {
		t.Errorf("exit %d, %q", code, stderr)
	}
}

func TestVersionSaysWhatItIsBuiltOf(t *testing.T) {
	for _, c := range []struct {
		info *debug.BuildInfo
		want []string
	}{
		{nil, []string{"barevif    " + release + "\nGo  "}},
		{&debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, []string{"barevif    " + release + "\nGo  "}},
		{&debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}, Settings: []debug.BuildSetting{{Key: "vcs.revision", Value: "abc"}, {Key: "vcs.modified", Value: "true"}}},
			[]string{"barevif    v1.2.3\ncommit     abc, and changes that were not committed\n", fmt.Sprintf("layout %d, ", telemetry.LayoutVersion)}},
	} {
		var b bytes.Buffer
		if err := printVersion(&b, c.info); err != nil {
			t.Fatal(err)
		}
		for _, want := range c.want {
			if !strings.Contains(b.String(), want) {
				t.Errorf("no %q in %q", want, &b)
			}
		}
	}
	if code, text, _ := stats(t, "version"); code != exitOK || !strings.HasPrefix(text, "barevif ") {
		t.Errorf("exit %d, %q", code, text)
	}
}
