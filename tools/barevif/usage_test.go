package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"

	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
	"barevif/tools/internal/release"
)

func TestEveryFlagSaysWhatItTakes(t *testing.T) {
	clitest.Build(rootCommand).EveryFlag(t, 8)
}

func TestMistakesNameWhatWouldDo(t *testing.T) {
	for _, c := range []struct {
		args string
		says []string
	}{
		{"stta", []string{`"stta" is no command of "barevif"`, `did you mean "stat"?`}},
		{"-v nonsense", []string{`"nonsense" is no command`, `"demo"`, `"back"`, "barevif --help"}},
		{"help nonsense", []string{`"nonsense" is no command`}},
		{"xen take", []string{"the ID of a vif is missing", "barevif xen"}},
		{"xen take 0 1", []string{`"1"`, "one argument at most"}},
		{"serve --emu x --xen", []string{`--emu "x" and --xen "true": only one of them can be given`, "leave out"}},
		{"stat --json --http 1", []string{`--json "true" and --http "1"`}},
		{"stat --plot", []string{`"--plot" is no flag of "barevif stat"`, "press p in the live table of --watch", "--http"}},
		{"stat --watch --plot=true", []string{`"--plot" is no flag of "barevif stat"`, "press p in the live table of --watch", "--http"}},
		{"bench send", []string{`"bench" is no command of "barevif"`, "go run ./test/bench"}},
		{"check 10.9.0.2", []string{`"check" is no command of "barevif"`, "go run ./test/check"}},
		{"stat --prune --watch", []string{`--prune "true" and --watch "true"`}},
		{"stat --prune front-*", []string{`"front-*": --prune takes no names`}},
		{"serve --dom 0", []string{`--dom "0": not the number of a domain from 1 to 32751`}},
		{"serve --dom 32752", []string{`--dom "32752": not the number of a domain from 1 to 32751`}},
		{"serve --dom x", []string{`--dom "x": not the number of a domain from 1 to 32751`}},
		{"back --drain 0s", []string{`--drain "0s": not a time from 1ms to 24h, or negative`}},
		{"back --drain 25h", []string{`--drain "25h0m0s": not a time from 1ms to 24h, or negative`}},
		{"back --stall 999ms", []string{`--stall "999ms": not a time from 1s to 24h, or negative`}},
		{"back --stall 25h", []string{`--stall "25h0m0s": not a time from 1s to 24h, or negative`}},
		{"serve --port 65536", []string{`--port "65536": not a port from 1 to 65535`}},
		{"serve --log yaml", []string{`--log "yaml": not text or json`}},
		{"serve --vif 0,1", []string{`--vif "0,1": not the id of one vif`, "--vif 0 --vif 1"}},
		{"attach --vif 3 --vif 3", []string{`--vif "3": not given once only`}},
		{"serve --vif 0 --vif 1 --handover /x/s.sock", []string{`--handover "/x/s.sock": one socket, and each of 2 vifs`, "--handover /x/vif%i.sock"}},
		{"attach --vif 0 --vif 1 --tap card", []string{`--tap "card": one name for 2 TAPs`, "--tap card%i"}},
		{"attach --vif 0 --vif 1 --addr 10.9.0.2/24", []string{`--addr "10.9.0.2/24": one for 2 vifs`, "--addr 0=10.9.0.2/24"}},
		{"serve --vif 0 --vif 1 --addr 10.9.0.2/24", []string{`--addr "10.9.0.2/24": one for 2 vifs`, "--addr 0=10.9.0.2/24"}},
		{"serve --vif 0 --vif 1 --gateway 10.9.0.1", []string{`--gateway "10.9.0.1": one for 2 vifs`, "--gateway 0=10.9.0.1"}},
		{"serve --vif 1 --addr 0=10.9.0.2/24", []string{`--addr "0=10.9.0.2/24": there is no vif "0" here, only "1"`, "--vif 0"}},
		{"serve --addr 0=10.9.0.2/24 --addr 0=10.9.0.3/24", []string{`--addr "0=10.9.0.3/24": not the only one of that vif`}},
		{"serve --addr 10.9.0.2/24 --addr 10.9.0.3/24", []string{`--addr "10.9.0.3/24": not the only one`, "0=10.9.0.3/24"}},
		{"serve --addr 0=moon", []string{`--addr "moon": not an address with a prefix`}},
		{"serve --addr 10.9.0.2/24 --gateway 0=10.9.1.1", []string{`--gateway "10.9.1.1": not another address of the network 10.9.0.0/24`}},
		{"serve --addr 10.9.0.255/24", []string{`--addr "10.9.0.255/24": not an address that a host can have`}},
		{"serve --addr 10.9.0.2/0", []string{`--addr "10.9.0.2/0": not an address that a host can have`}},
		{"attach --addr 240.0.0.1/8", []string{`--addr "240.0.0.1/8": not an address that a host can have`}},
		{"attach --addr ::1/128", []string{`--addr "::1/128": not an address that a host can have`}},
		{"back --addr 1.0=224.0.0.1/24", []string{`--addr "1.0=224.0.0.1/24": not an address that a host can have`}},
		{"back --addr 1.0=moon", []string{`--addr "1.0=moon": not an address with a prefix`}},
		{"bridge --uplink tap:x --addr 10.9.0.0/24", []string{`--addr "10.9.0.0/24": not an address that a host can have`}},
		{"completion tcsh", []string{`"tcsh" is no command of "barevif completion"`, `"bash"`}},
		{"serve --emu=", []string{`--emu "": not the socket of an emulated host`}},
		{"back --tap a/b", []string{`--tap "a/b": not the name of an interface`}},
		{"back --tap %x", []string{`--tap "%x": not the name of an interface`}},
		{"back --tap=", []string{`--tap "": not the name of an interface`}},
		{"back --tap fifteen-bytes--%d", []string{`--tap "fifteen-bytes--%d": not the name of an interface`}},
		{"back --type a/b", []string{`--type "a/b": not a backend type of small letters`}},
		{"bridge --type=", []string{`--type "": not a backend type of small letters`}},
		{"attach --tap a:b", []string{`--tap "a:b": not the name of an interface`}},
		{"attach --vif 10 --tap sixteen-bytes-%i", []string{`--tap "sixteen-bytes-%i": not the name of an interface`}},
		{"stat --count -1", []string{`--count "-1": not a number from 1`}},
		{"demo --size 5 apples", []string{`"apples"`, "takes flags alone"}},
		{"demo --size apples", []string{`--size "apples": not a number of bytes up to 1 TiB, like 64MiB`}},
	} {
		clitest.Build(rootCommand).Fails(t, cli.ExitUsage, strings.Split(c.args, " "), c.says...)
	}
}

// The errors for a port in use and for an address of another machine are in plain words.
func TestAddressesThatCannotBeListenedAt(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	for _, c := range []struct {
		args string
		says []string
	}{
		{"stat --http " + tcp.Addr().String(), []string{"another program listens at " + tcp.Addr().String() + " already", "--http"}},
		{"stat --http 192.0.2.77:0", []string{"192.0.2.77:0 is no address of this machine", "ip -brief address"}},
	} {
		clitest.Build(rootCommand).Fails(t, cli.ExitFailed, strings.Fields(c.args), c.says...)
	}
}

// A reader that ends early, such as head, is not a failure.
func TestAReaderThatHasEnoughIsNoFailure(t *testing.T) {
	_, args := counting(t, 61031)
	for _, more := range [][]string{nil, {"--json"}, {"--watch", "--interval", "100ms"}, {"--watch", "--json", "--interval", "100ms"}, {"--count", "2", "--interval", "100ms"}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		var stderr bytes.Buffer
		if code := cli.Run(t.Context(), rootCommand, append(args, more...), w, &stderr); code != cli.ExitOK || stderr.Len() != 0 {
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
	for _, args := range [][]string{{"version"}, {"xen", "--help"}, {"--help"}} {
		var stderr bytes.Buffer
		if code := cli.Run(t.Context(), rootCommand, args, w, &stderr); code != cli.ExitOK || stderr.Len() != 0 {
			t.Errorf("%q: exit %d, %q", args, code, &stderr)
		}
	}
	// Any other loss of output is a failure.
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("no /dev/full: ", err)
	}
	defer full.Close()
	for _, args := range [][]string{args, {"--help"}, {"help", "xen"}, {"completion", "bash"}} {
		var stderr bytes.Buffer
		code := cli.Run(t.Context(), rootCommand, args, full, &stderr)
		if said := stderr.String(); code != cli.ExitFailed || strings.Count(said, "no space left on device") != 1 {
			t.Errorf("%q into a full device: exit %d, %q", args, code, said)
		}
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
		if strings.Join(got, " ") != want || (code == cli.ExitOK) != (want != "") {
			t.Errorf("%s: exit %d, %q, want %q", name, code, got, want)
		}
	}
	code, _, stderr := stats(t, "stat", "--root", root, "0")
	if code != cli.ExitFailed || !strings.Contains(stderr, `no counters of "0"`) || !strings.Contains(stderr, `"back-61042-61041-3"`) {
		t.Errorf("exit %d, %q", code, stderr)
	}
}

func TestVersionSaysWhatItIsBuiltOf(t *testing.T) {
	for _, c := range []struct {
		info *debug.BuildInfo
		want []string
	}{
		{nil, []string{"barevif    " + release.Version + "\nGo  "}},
		{&debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, []string{"barevif    " + release.Version + "\nGo  "}},
		{&debug.BuildInfo{Main: debug.Module{Version: "v0.0.0-20261128030642-dce073767a30+dirty"}}, []string{"barevif    " + release.Version + "\nGo  "}},
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
	changes, err := os.ReadFile("../../CHANGELOG.md")
	if err != nil {
		t.Fatal(err)
	}
	if _, first, _ := strings.Cut(string(changes), "\n## "); !strings.HasPrefix(first, release.Version+"\n") {
		t.Errorf("the first heading of CHANGELOG.md is not %s", release.Version)
	}
	if code, text, _ := stats(t, "version"); code != cli.ExitOK || !strings.HasPrefix(text, "barevif ") {
		t.Errorf("exit %d, %q", code, text)
	}
}
