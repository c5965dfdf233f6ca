package main

import (
	"bufio"
	"context"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"barevif/pvnet"
	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
)

// completed returns what a shell offers after words, of which the last is begun.
func completed(t *testing.T, words ...string) []string {
	t.Helper()
	code, out, stderr := clitest.Build(rootCommand).Run(t, append([]string{"__complete"}, words...)...)
	list, directive, ok := strings.Cut(out, ":")
	if code != cli.ExitOK || !ok || strings.TrimSpace(directive) != "4" { // no files beside them
		t.Errorf("%q: exit %d, %q, %s", words, code, out, stderr)
	}
	return strings.Fields(list)
}

// emulated runs a host with these vifs until the test ends, and returns its socket.
func emulated(t *testing.T, vifs ...string) string {
	t.Helper()
	socket := filepath.Join(clitest.TempDir(t), "x", "host.sock")
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	ended := make(chan int, 1)
	go func() {
		ended <- cli.Run(ctx, rootCommand, append([]string{"host", "--socket", socket}, vifs...), w, io.Discard)
		w.Close()
	}()
	t.Cleanup(func() {
		cancel()
		if code := <-ended; code != cli.ExitOK {
			t.Errorf("the host: exit %d", code)
		}
	})
	for lines := bufio.NewScanner(r); lines.Scan() && !strings.HasPrefix(lines.Text(), "look inside"); {
	}
	go io.Copy(io.Discard, r)
	return socket
}

func TestAShellOffersTheVifsOfTheDomain(t *testing.T) {
	socket := emulated(t, "--vif", "front=1,id=10", "--vif", "front=1,id=9", "--vif", "front=3,id=4")
	for _, command := range []string{"serve", "attach"} {
		for _, c := range []struct{ args, want string }{
			{"--vif", "9 10"},
			{"--vif 9 --vif", "10"},
			{"--dom 3 --vif", "4"},
			{"--dom 7 --vif", ""},
		} {
			words := slices.Concat([]string{command, "--emu", socket}, strings.Fields(c.args), []string{""})
			if got := strings.Join(completed(t, words...), " "); got != c.want {
				t.Errorf("%q: %q, want %q", words, got, c.want)
			}
		}
	}
	// Where there is no host nothing is offered, and nothing is said between two words.
	if got := completed(t, "serve", "--emu", socket+".none/x", "--vif", ""); len(got) > 0 {
		t.Errorf("%q", got)
	}
}

func TestAShellOffersWhatStatFinds(t *testing.T) {
	_, args := counting(t, 61061)
	args = args[:3] // stat --root DIR
	code, out, stderr := stats(t, args...)
	if code != cli.ExitOK {
		t.Fatal(stderr)
	}
	got := completed(t, append(slices.Clone(args), "")...)
	if len(got) == 0 {
		t.Fatal("nothing")
	}
	for _, name := range got {
		if !strings.Contains(out, name) {
			t.Errorf("stat shows no %q", name)
		}
	}
	if again := completed(t, append(slices.Clone(args), got[0], "")...); slices.Contains(again, got[0]) {
		t.Errorf("%q twice", got[0])
	}
}

func TestAShellOffersTheVifsThatCanBeLookedInto(t *testing.T) {
	_, flags := inspectedVif(t, pvnet.Config{})
	both := []string{backVif, frontVif}
	for _, command := range []string{"ring", "dump"} {
		words := append([]string{command}, flags...)
		got := completed(t, append(words, "")...)
		if slices.Sort(got); !slices.Equal(got, both) {
			t.Errorf("%q: %q", words, got)
		}
	}
	words := append([]string{"ring"}, flags...)
	if got := completed(t, append(words, frontVif, "")...); !slices.Equal(got, both[:1]) {
		t.Errorf("%q", got)
	}
	words[0] = "dump" // has one vif; what follows is an expression
	if got := completed(t, append(words, frontVif, "")...); len(got) > 0 {
		t.Errorf("%q", got)
	}
}

func TestAShellOffersTheValuesOfAFlag(t *testing.T) {
	for words, want := range map[string]string{
		"serve --log": "text json", "back --hotplug": "auto keys script flags", "dump --direction": "in out inout",
		"demo --network": "auto tap veth userspace", "attach --counters": "auto public heap", "serve --addr": "auto dhcp", "back --queues": "auto",
	} {
		if got := strings.Join(completed(t, append(strings.Fields(words), "")...), " "); got != want {
			t.Errorf("%s: %q, want %q", words, got, want)
		}
	}
	if got := completed(t, "back", "--packet", ""); !slices.Contains(got, "lo") {
		t.Errorf("%q", got)
	}
}
