//go:build linux

package command_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"barevif/hypercall/emu/emutest"
)

// Each mistake ends with an exit status, a cause, and advice.
func TestMistakesAreExplained(t *testing.T) {
	bin := barevif(t)
	s := newSite(t)
	dir := emutest.SocketDir(t)
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("no socket"), 0o600); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other.sock")
	l, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	const usage, failed, refused = 2, 1, 3
	for _, row := range []struct {
		args string
		code int
		says []string
	}{
		{"nonsense", usage, []string{`"nonsense" is no command of "barevif"`}},
		{"demo --nonsense", usage, []string{`"--nonsense" is no flag`, "barevif demo --help"}},
		{"demo extra", usage, []string{`"extra"`}},
		{"demo --size many", usage, []string{"--size", "like 64MiB"}},
		{"demo --size -1", usage, []string{"--size"}},
		{"demo --network moon", usage, []string{"auto, tap, veth or userspace"}},

		{"host --vif front=1,back=1", usage, []string{"between two domains"}},
		{"host --socket " + dir + "/a.sock --vif front=1 --vif front=1", usage, []string{"there already", "an id of its own"}},
		{"host --socket " + s.socket, failed, []string{"listens at", "--socket"}},
		{"host --socket " + text, failed, []string{"--socket"}},
		{"host --socket " + other, failed, []string{"another program", "--socket"}},
		{"host --socket " + dir + "/b.sock --xenstore " + text, failed, []string{"--socket"}},
		{"host --socket " + open + "/host.sock", failed, []string{"others may write", "--socket"}},
		{"host --socket /nowhere/at/all/host.sock", failed, []string{"no such file", "next: "}},
		{"host --socket " + dir + "/" + strings.Repeat("x", 120), failed, []string{"too long", "next: "}},

		{"serve --emu " + dir + "/none.sock", failed, []string{"no emulated host listens", `"barevif host"`}},
		{"serve --emu " + text, failed, []string{"no emulated host listens", `"barevif host"`}},
		{"serve --emu " + other, failed, []string{"the socket"}},
		{"serve --emu " + s.socket + " --vif 7", failed, []string{"device/vif/7", `the devices there are: "0"`, "choose one of those"}},
		{"serve --emu " + s.socket + " --vif ../../0", failed, []string{"next: "}},
		{"serve --emu " + s.socket + " --vif ", failed, []string{"next: "}},
		{"serve --emu " + s.socket + " --dom 9", failed, []string{"device/vif/0", "--vif"}},
		{"serve --emu " + s.socket + " --dom 0", usage, []string{"from 1 to 32751", "--dom"}},
		{"serve --emu " + s.socket + " --dom 40000", usage, []string{"from 1 to 32751", "--dom"}},
		{"serve --emu " + s.socket + " --dom 70000", usage, []string{"--dom"}},
		{"serve --emu " + s.socket + " --wait 3s", failed, []string{"waited 3s", "backend"}},
		{"serve --emu " + s.socket + " --wait 1ns", failed, []string{"--wait gives it longer"}},
		{"serve --emu " + s.socket + " --wait -1s", usage, []string{"--wait"}},
		{"serve --emu " + s.socket + " --addr moon", usage, []string{"10.9.0.2/24"}},
		{"serve --emu " + s.socket + " --addr 10.9.0.2", usage, []string{"10.9.0.2/24"}},
		{"serve --emu " + s.socket + " --addr 224.0.0.1/4", usage, []string{"--addr"}},
		{"serve --emu " + s.socket + " --addr 10.9.0.2/24 --gateway 192.0.2.1", usage, []string{"10.9.0.0/24"}},
		{"serve --emu " + s.socket + " --port 0", usage, []string{"--port"}},
		{"serve --emu " + s.socket + " --port 65536", usage, []string{"--port"}},
		{"serve --emu " + s.socket + " --queues 0", usage, []string{"--queues"}},
		{"serve --emu " + s.socket + " --root " + dir + "/none", usage, []string{"--root", "directory"}},
		{"serve --emu " + s.socket + " --root " + text, failed, []string{"--root", "directory"}},
		{"serve --emu " + s.socket + " --xen", usage, []string{"emu", "xen"}},
		{"serve --take", usage, []string{"--xen"}},

		{"attach --emu " + s.socket + " --addr moon", usage, []string{"10.9.0.2/24"}},
		{"attach --emu " + s.socket + " --wait 3s", failed, []string{"waited 3s", "backend"}},
		{"attach --take", usage, []string{"--xen"}},
		{"check", usage, []string{"whom", "--answer"}},
		{"check --answer --lost 3", usage, []string{"answer", "lost"}},
		{"check --port 0 127.0.0.1", usage, []string{"--port"}},
		{"check --sizes 5-1 127.0.0.1", usage, []string{"--sizes"}},
		{"check --lost 101 127.0.0.1", usage, []string{"--lost"}},
		{"check --patience 0 127.0.0.1", usage, []string{"--patience"}},

		{"back --queues 65", usage, []string{"--queues"}},
		{"back --addr moon", usage, []string{"10.9.0.1/24"}},
		{"back --addr x.0=10.9.0.1/24", usage, []string{"DOM.ID"}},
		{"back --addr 10.9.0.1/24 --addr 10.9.1.1/24", usage, []string{"1.0="}},
		{"back --packet lo --addr 10.9.0.1/24", usage, []string{"packet", "addr"}},
		{"back --packet nosuchcard --emu " + s.socket, failed, []string{"nosuchcard"}},
		{"back --bridge nosuchbridge --emu " + s.socket, failed, []string{"nosuchbridge", "type bridge"}},
		{"back --bridge lo --emu " + s.socket, failed, []string{"no bridge"}},
	} {
		t.Run(row.args, func(t *testing.T) {
			bin, args := bin, strings.Split(row.args, " ")
			if args[0] == "check" {
				bin, args = checkProgram(t), args[1:]
			}
			out := start(t, nil, bin, args...).exit(row.code)
			wants(t, out, append(row.says, "next: ")...)
			if strings.Contains(out, "goroutine ") {
				t.Errorf("it panicked: %s", out)
			}
		})
	}
	// None of the mistakes has ended the host.
	wants(t, s.host.text(), "look inside:")
	s.host.signal(syscall.SIGTERM)
	s.host.exit(0)
}

func TestARealXenThatIsNotThere(t *testing.T) {
	if _, err := os.Stat("/dev/xen/xenbus"); err == nil {
		t.Skip("this machine is a Xen domain")
	}
	for _, command := range []string{"back", "serve"} {
		args := []string{command, "--xen"}
		if command == "back" {
			args = append(args, "--packet", "lo")
		}
		p := start(t, ownNamespaces(0), barevif(t), args...)
		<-p.done
		wants(t, p.exit(3), "next: ")
	}
}

// An unprivileged user gets no TAP on the machine, but gets advice. The mode of the node
// decides which of the two missing rights the error names.
func TestBackWithoutRights(t *testing.T) {
	const help = `"barevif demo"`
	packet := start(t, nobody(t), barevif(t), "back", "--packet", "lo").exit(3)
	wants(t, packet, "not permitted", "cap_net_raw", help)

	if os.Geteuid() != 0 {
		// Use the machine's node, since this user cannot make one.
		out := start(t, nil, barevif(t), "back").exit(3)
		wants(t, out, "link: new tap: ", "cap_net_admin", help)
		return
	}
	for _, row := range []struct {
		mode string
		says []string
	}{
		{"0600", []string{"permission denied", "chmod 0666 /dev/net/tun", "cap_net_admin"}},
		{"0666", []string{"not permitted", "cap_net_admin"}},
	} {
		t.Run("node "+row.mode, func(t *testing.T) {
			setpriv, err := exec.LookPath("setpriv")
			if err != nil {
				t.Skip("setpriv (package util-linux) is not installed: ", err)
			}
			const refused = 77
			script := fmt.Sprintf(`{ mount -t tmpfs -o mode=0755,dev none /dev/net && mknod -m %s /dev/net/tun c 10 200; } || exit %d
				exec %s --reuid=65534 --regid=65534 --clear-groups "$0" back`, row.mode, refused, setpriv)
			p := start(t, &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}, "/bin/sh", "-c", script, barevif(t))
			<-p.done
			if p.cmd.ProcessState.ExitCode() == refused {
				t.Skip("this root may mount or make no device nodes: ", p.text())
			}
			wants(t, p.exit(3), append(row.says, help, "next: ")...)
		})
	}
}

// Without TAPs "barevif back" can do nothing, and says so.
func TestBackWithoutTAPs(t *testing.T) {
	out := refusing(t, noTAPs, "back").exit(3)
	wants(t, out, "/dev/net/tun", `"barevif demo"`, "next: ")
}

// An address without a vif goes to the first vif that connects, and stays with it. A vif whose
// TAP cannot be opened does not connect; the others go on.
func TestVifsDoNotDisturbEachOther(t *testing.T) {
	if !namespace(t) {
		return
	}
	needTAP(t)
	s := newSite(t, "--vif", "front=1", "--vif", "front=3", "--vif", "front=5")
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vif5.0", TxQLen: -1}, PeerName: "other"}); err != nil {
		t.Skip("this machine gives no veth pair: ", err)
	}
	b := s.back("--addr", "10.9.0.1/24")
	b.await("joined to vif1.0", 1)
	b.await("joined to vif3.0", 1)
	b.await("a vif has no network and does not connect", 1)
	g := s.serve("--dom", "3")
	check(t, "10.9.0.2")
	other := s.serve("--dom", "1")
	b.await("vif 1.0: connected", 1)
	check(t, "10.9.0.2")
	other.signal(syscall.SIGTERM)
	other.exit(0)
	g.signal(syscall.SIGTERM)
	g.exit(0)
	s.serve("--dom", "3")
	check(t, "10.9.0.2")
	wants(t, b.text(), "vif5.0")
}

// A host whose output is no longer read still ends in order.
func TestAClosedPipeIsNoReasonToDie(t *testing.T) {
	dir := emutest.SocketDir(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(barevif(t), "host", "--socket", dir+"/host.sock")
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	w.Close()
	if _, err := r.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	r.Close()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Error(left, err)
	}
}
