package main

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
)

func TestEveryFlagSaysWhatItTakes(t *testing.T) {
	clitest.Build(command).EveryFlag(t, 16)
	clitest.Build(command).Fails(t, cli.ExitUsage, []string{"nonsense"}, `"nonsense" is no command of "bench"`, `"pktgen"`)
}

// The errors for a port in use, and for one where nobody listens, are in plain words.
func TestAddressesThatAreOfNoUse(t *testing.T) {
	udp, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcp, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := func(a net.Addr) string { _, p, _ := net.SplitHostPort(a.String()); return p }
	free := port(closed.Addr())
	closed.Close()
	for _, c := range []struct {
		args string
		says []string
	}{
		{"udp-recv --secs 1 --port " + port(udp.LocalAddr()), []string{"another program listens at UDP port ", "--port"}},
		{"tcp-send --secs 1 --to 127.0.0.1 --port " + free, []string{"connect to 127.0.0.1:" + free + ": connection refused", "bench tcp-recv"}},
		{"table /no/such/file", []string{"/no/such/file", "pipe the lines in"}},
		{"tcp-recv --secs 1 --port " + port(tcp.Addr()), []string{"another program listens at TCP port ", "--port"}},
	} {
		clitest.Build(command).Fails(t, cli.ExitFailed, strings.Fields(c.args), c.says...)
	}
}

// A reader that ends early, such as head, is not a failure.
func TestAReaderThatHasEnoughIsNoFailure(t *testing.T) {
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
	if code := cli.Run(t.Context(), command, []string{"table", lines}, w, io.Discard); code != cli.ExitOK {
		t.Errorf("exit %d", code)
	}
}
