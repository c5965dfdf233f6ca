package main

import (
	"net"
	"path/filepath"
	"testing"

	"barevif/tools/cli"
	"barevif/tools/cli/clitest"
)

// systemd must not take a service for ready of which no vif has begun: "systemctl start" succeeded then, and
// the services that come after it were started.
func TestAServeThatHasFailedIsNotReady(t *testing.T) {
	socket := emulated(t, "--vif", "front=1,id=0")
	at := filepath.Join(clitest.TempDir(t), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", at)
	for range 5 { // fewer than the socket holds messages of
		code, _, stderr := clitest.Build(rootCommand).Run(t, "serve", "--emu", socket, "--vif", "7", "--addr", "10.9.7.2/24", "--inspect", "off", "--handover", "none")
		if code == cli.ExitOK {
			t.Fatalf("there is no vif 7: exit %d, %s", code, stderr)
		}
	}
	// The commands have ended, so what they have said lies in the socket, before this.
	const last = "that was all"
	end, err := net.Dial("unixgram", at)
	if err != nil {
		t.Fatal(err)
	}
	defer end.Close()
	if _, err := end.Write([]byte(last)); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, 256)
	if n, err := manager.Read(said); err != nil || string(said[:n]) != last {
		t.Errorf("systemd was told %q, %v", said[:n], err)
	}
}
