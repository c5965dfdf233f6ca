//go:build linux

package embeddedstore_test

import (
	"bufio"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"barevif/hypercall/emu/emutest"
	"barevif/test/xenstored"
	"barevif/xenbus/xenstore/server"
)

// TestDebiansClientsWork runs every client of the package xenstore-utils.
func TestDebiansClientsWork(t *testing.T) {
	s := server.New(server.Config{})
	defer s.Close()
	s.Introduce(5)
	socket := filepath.Join(emutest.SocketDir(t), "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()

	run := func(client string, args ...string) (out string, code int) {
		t.Helper()
		cmd := xenstored.Tool(t, socket, "xenstore-"+client, args...)
		b, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil || !cmd.ProcessState.Exited() {
			t.Fatalf("xenstore-%s: %v", client, err)
		}
		return string(b), cmd.ProcessState.ExitCode()
	}
	for _, step := range []struct {
		args string
		out  string
		code int
	}{
		{"write /local/domain/5/name guest /local/domain/5/device/vif/0/mac 00:16:3e:00:00:01", "", 0},
		{"read /local/domain/5/name", "guest\n", 0},
		{"read -p /local/domain/5/name", "/local/domain/5/name: guest\n", 0},
		{"read /none", "xenstore-read: couldn't read path /none\n", 1},
		{"list /local/domain/5", "name\ndevice\n", 0},
		{"list -p /local/domain/5", "/local/domain/5/name\n/local/domain/5/device\n", 0},
		{"exists /local/domain/5", "", 0},
		{"exists /local/domain/6", "", 1},
		{"chmod -r /local/domain/5 n5 r0", "", 0},
		{"chmod /local/domain/5/name n0 r77", "", 0},
		{"chmod /local/domain/5 n77", "xenstore-chmod: error setting permissions for '/local/domain/5': No such file or directory\n", 1},
		{"ls -f -p /local", `/local/domain = ""   (n0)
/local/domain/5 = ""   (n5,r0)
/local/domain/5/name = "guest"   (n0,r77)
/local/domain/5/device = ""   (n5,r0)
/local/domain/5/device/vif = ""   (n5,r0)
/local/domain/5/device/vif/0 = ""   (n5,r0)
/local/domain/5/device/vif/0/mac = "00:16:3e:00:00:01"   (n5,r0)
`, 0},
		{"rm /local/domain/5/device", "", 0},
		{"rm -t /local/domain/5/name", "", 0}, // and every parent that is empty now
		{"ls /", "tool = \"\"\n xenstored = \"\"\n", 0},
		{"rm /none/none", "xenstore-rm: could not remove path /none/none\n", 1},
	} {
		args := strings.Fields(step.args)
		out, code := run(args[0], args[1:]...)
		if args[0] == "chmod" && step.code != 0 {
			out = step.out // the wording of errors is not ours
		}
		if out != step.out || code != step.code {
			t.Errorf("xenstore-%s: exit %d, want %d, output:\n%swant:\n%s", step.args, code, step.code, out, step.out)
		}
	}

	// A list that takes DIRECTORY_PART, from libxenstore's own joining of parts.
	var names []string
	for i := range 1000 {
		names = append(names, "n"+strings.Repeat("x", i%7)+"-"+string(rune('a'+i%26))+strings.Repeat("y", i/26))
		if err := s.Mkdir("/big/" + names[i]); err != nil {
			t.Fatal(err)
		}
	}
	if out, code := run("list", "/big"); code != 0 || out != strings.Join(names, "\n")+"\n" {
		t.Errorf("xenstore-list /big: exit %d, %d bytes", code, len(out))
	}

	watch := xenstored.Tool(t, socket, "xenstore-watch", "-n", "3", "/w")
	pipe, err := watch.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(pipe)
	for _, want := range []string{"/w", "/w/a", "/w"} {
		if !lines.Scan() || lines.Text() != want {
			t.Errorf("xenstore-watch says %q, want %q", lines.Text(), want)
		}
		switch want { // the first line says that the watch is set
		case "/w":
			run("write", "/w/a", "1")
		case "/w/a":
			run("rm", "/w")
		}
	}
	if err := watch.Wait(); err != nil {
		t.Errorf("xenstore-watch: %v", err)
	}

	s.Close()
	if err := <-served; err != nil {
		t.Errorf("Serve after Close: %v", err)
	}
}
