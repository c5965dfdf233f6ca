//go:build linux

package command_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	small = "--size=24MiB"

	// The SHA-256 of as many bytes of AES-128 in counter mode under a key of zeros:
	// head -c 25165824 /dev/zero | openssl enc -aes-128-ctr -K 0 -iv 0 | sha256sum
	smallSum = "190f79471dfa4ac8c1224beff4633e6b3a6dae24fce75c5c2b5ec26de21ea781"
)

// shown are the texts that every demonstration prints.
var shown = []string{
	"state=1 (Initialising)", "state=2 (InitWait)", "state=4 (Connected)", "tx-ring-ref=", "feature-rx-copy=1",
	"516 pages shared", "200 OK", "SHA-256 " + smallSum + ", as it should be", "Gbit/s", "100 %",
	"sent = received + dropped", "state=5 (Closing)", "state=6 (Closed)", "nothing is left",
}

func TestDemo(t *testing.T) {
	out := start(t, nil, barevif(t), "demo", small).exit(0)
	wants(t, out, shown...)
	if strings.Contains(out, "WARN") {
		t.Error("the two ends complain of each other")
	}
}

func TestDemoOnEachNetwork(t *testing.T) {
	for network, parts := range map[string][]string{
		"tap":       {"TAP eth0", "3 of 3 answered"},
		"veth":      {"veth pair eth0", "3 of 3 answered"},
		"userspace": {"gVisor's TCP/IP on the backend", "not tried"},
	} {
		t.Run(network, func(t *testing.T) {
			p := start(t, nil, barevif(t), "demo", small, "--network", network)
			<-p.done
			if p.cmd.ProcessState.ExitCode() == 3 {
				t.Skip("this machine refuses it: ", p.text())
			}
			wants(t, p.exit(0), append(parts, shown...)...)
		})
	}
}

// nobody returns the attributes of an unprivileged user, or nil if the test runs as one.
func nobody(t *testing.T) *syscall.SysProcAttr {
	if os.Geteuid() != 0 {
		return nil // we are unprivileged already
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}

func TestDemoAsNobody(t *testing.T) {
	out := start(t, nobody(t), barevif(t), "demo", small).exit(0)
	wants(t, out, shown...)
}

// refusing runs the command as root of a user namespace, after script has taken something
// away there. Outside the namespace that root is an unprivileged user.
func refusing(t *testing.T, script string, args ...string) *process {
	t.Helper()
	bin := barevif(t)
	words := append([]string{"-ec", script + `; exec "$0" "$@"`, bin}, args...)
	return start(t, ownNamespaces(unix.CLONE_NEWNS), "/bin/sh", words...)
}

// Scripts that take something away from the machine.
const (
	noTAPs       = "mount -t tmpfs none /dev/net"
	noNamespaces = "echo 0 >/proc/sys/user/max_user_namespaces; echo 0 >/proc/sys/user/max_net_namespaces"
)

func TestDemoWithoutTAPs(t *testing.T) {
	out := refusing(t, noTAPs, "demo", small).exit(0)
	wants(t, out, append([]string{"veth pair eth0", "no TAP: ", "3 of 3 answered"}, shown...)...)

	out = refusing(t, noTAPs, "demo", small, "--network=tap").exit(3)
	wants(t, out, "no TAP: ", "next: ")
}

func TestDemoWithoutNamespaces(t *testing.T) {
	out := refusing(t, noNamespaces, "demo", small).exit(0)
	wants(t, out, append([]string{"gVisor's TCP/IP on the backend", "user.max_user_namespaces = 0"}, shown...)...)

	for _, network := range []string{"tap", "veth"} {
		out = refusing(t, noNamespaces, "demo", small, "--network", network).exit(3)
		wants(t, out, "user.max_user_namespaces = 0", "next: ")
	}
}

func TestDemoInterrupted(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		p := start(t, nil, barevif(t), "demo", "--size=1TiB")
		p.await("bytes/1099511627776", 1)
		p.signal(sig)
		out := p.exit(130)
		wants(t, out, "interrupted", "state=6 (Closed)")
		if strings.Contains(out, "panic") {
			t.Error("it panicked")
		}
	}
}

func TestDemoRunsFromTheSource(t *testing.T) {
	barevif(t) // notes the sources and warms the build cache
	goTool := lookGo(t)
	p := startIn(t, root, nil, goTool, "run", raceFlag, "./tools/barevif", "demo", small)
	wants(t, p.exit(0), shown...)
}

func TestNothingIsLeftInTheTemporaryDirectory(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	start(t, nil, barevif(t), "demo", small).exit(0)
	left, err := filepath.Glob(filepath.Join(tmp, "*"))
	if uid := os.Getuid(); uid != 0 {
		if _, statErr := os.Stat(fmt.Sprintf("/run/user/%d", uid)); statErr != nil {
			// The processes of this user share a directory for their sockets here, which stays, but empty.
			sockets := filepath.Join(tmp, fmt.Sprintf("barevif-%d", uid))
			left = slices.DeleteFunc(left, func(name string) bool { return name == sockets && os.Remove(name) == nil })
		}
	}
	if err != nil || len(left) != 0 {
		t.Error(left, err)
	}
}
