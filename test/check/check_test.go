package main

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
)

func TestSizesAreReadStrictly(t *testing.T) {
	for s, want := range map[string][]int{
		"1":                         {1},
		"1-3":                       {1, 2, 3},
		"1-9:4,65507":               {1, 5, 9, 65507},
		"7-7,7":                     {7, 7},
		"100-200:70,1472-2000:5000": {100, 170, 1472},
	} {
		if got, err := parseSizes(s); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "0", "1,", "-1", "1-", "2-1", "65508", "1-5:0", "1:2", "1-2-3", "a", "1e3", "1-5:x"} {
		_, err := parseSizes(s)
		var a *cli.Advice
		if !errors.As(err, &a) || !a.Usage {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestMistakesNameWhatWouldDo(t *testing.T) {
	clitest.Build(command).EveryFlag(t, 1)
	for args, says := range map[string][]string{
		"--answer --lost 3":     {`--answer "true" and --lost "3"`},
		"--silence 0 127.0.0.1": {`--silence "0s": not a time to wait`},
		"no-such-host.invalid":  {`no host "no-such-host.invalid" is known`, "10.9.0.2"},
	} {
		clitest.Build(command).Fails(t, cli.ExitUsage, strings.Fields(args), says...)
	}
	udp, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	_, port, _ := net.SplitHostPort(udp.LocalAddr().String())
	clitest.Build(command).Fails(t, cli.ExitFailed, []string{"--answer", "--port", port, "0.0.0.0"}, "another program listens at ", "--port")
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
	code, _, stderr := clitest.Build(command).Run(t, "--port", port, "--silence", "1100ms", "127.0.0.1")
	if code != cli.ExitFailed || time.Since(began) > 25*time.Second {
		t.Errorf("exit %d after %v", code, time.Since(began))
	}
	for _, want := range []string{"no answer yet: ", "giving up after 1.1s\n", "nothing was answered within 1.1s: ", "\n  next: is that its address"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in %q", want, stderr)
		}
	}
	silent.Close()
	code, _, stderr = clitest.Build(command).Run(t, "--port", port, "127.0.0.1")
	if want := "nothing answers at port " + port + " of 127.0.0.1\n  next: "; code != cli.ExitFailed || !strings.Contains(stderr, want) {
		t.Errorf("exit %d, %q", code, stderr)
	}
}
