//go:build linux

package guestinit

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// This test binary plays process 1, the program, and what the program starts, by the value of
// this variable.
const role = "BAREVIF_GUESTINIT_TEST"

func TestMain(m *testing.M) {
	var err error
	switch name := os.Getenv(role); name {
	case "":
		os.Exit(m.Run())
	case "init":
		p := realProcess(time.Now())
		p.root, p.cmdline = os.Getenv("GUEST_DIR"), os.Getenv("GUEST_CMDLINE")
		p.mountAll()
		end(p.run(signals()))
	case "program":
		err = program(os.Getenv("GUEST_DIR"))
	case "parent": // leaves an orphan behind
		err = parent()
	case "orphan":
	default:
		err = fmt.Errorf("no role %q", name)
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

func again(name string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{role + "=" + name}
	return cmd
}

func parent() error {
	orphan := again("orphan")
	if err := orphan.Start(); err != nil {
		return err
	}
	_, err := fmt.Println(orphan.Process.Pid)
	return err
}

// program looks around, leaves an orphan and waits until process 1 has collected it, and ends
// with status 7 when it is asked to end.
func program(root string) error {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGTERM)
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	fmt.Printf("argv %q, MSG %q, host %s, parent %d\n", os.Args, os.Getenv("MSG"), host, os.Getppid())
	if _, err := os.Stat(root + "/proc/1/status"); err != nil {
		return err
	}
	if err := os.WriteFile(root+"/tmp/from-program", nil, 0o600); err != nil {
		return err
	}
	out, err := again("parent").Output()
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return err
	}
	for !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) { // a zombie can still be signalled
		time.Sleep(time.Millisecond)
	}
	fmt.Println("ready")
	<-asked
	os.Exit(7)
	return nil
}

// startGuest starts this binary as process 1 of namespaces of its own, which any user may have
// where the machine allows that.
func startGuest(t *testing.T, cmdline string) (cmd *exec.Cmd, root string, lines *bufio.Scanner) {
	t.Helper()
	root = t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	image := imageText(t, Image{Program: "/app/web", Kernel: "6.1"})
	for _, dir := range []string{"/app", filepath.Dir(ImageFile)} {
		if err := os.MkdirAll(root+dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.WriteFile(root+ImageFile, []byte(image), 0o600), os.Symlink(self, root+"/app/web")); err != nil {
		t.Fatal(err)
	}
	cmd = exec.CommandContext(t.Context(), self)
	cmd.Env = []string{role + "=init", "GUEST_DIR=" + root, "GUEST_CMDLINE=" + strings.ReplaceAll(cmdline, "$DIR", root)}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Skip("no namespaces of one's own on this machine: ", err)
	}
	return cmd, root, bufio.NewScanner(r)
}

func TestProcessOneOfRealNamespaces(t *testing.T) {
	cmd, root, lines := startGuest(t, `quiet barevif.restart=never barevif.hostname=web-1 -- `+role+`=program "MSG=it's me" "GUEST_DIR=$DIR" one 'two words'`)
	var said []string
	for lines.Scan() {
		said = append(said, lines.Text())
		if lines.Text() == "ready" {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
	}
	err := cmd.Wait()
	text := strings.Join(said, "\n")
	for _, want := range []string{
		`argv ["/app/web" "one" "two words"], MSG "it's me", host web-1, parent 1`,
		"barevif: asked to power off", "barevif: /app/web exited with status 7",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	// A power off of a PID namespace ends its process 1 by SIGINT: reboot(2).
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGINT {
		t.Errorf("process 1 ended with %v", err)
	}
	if _, err := os.Stat(root + "/tmp/from-program"); err == nil {
		t.Error("no tmpfs was mounted on /tmp")
	}
}

func TestTheClockGoesOnFromTheKernelsUptime(t *testing.T) {
	before := readUptime(t)
	up := clock()
	first := up()
	time.Sleep(30 * time.Millisecond)
	later := up()
	if after := readUptime(t); first < before || later-first < 30*time.Millisecond || later > after+time.Second {
		t.Errorf("%v and %v, where the kernel says %v and %v", first, later, before, after)
	}
}

func readUptime(t *testing.T) time.Duration {
	t.Helper()
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		t.Fatal(err)
	}
	var s float64
	if _, err := fmt.Sscan(string(b), &s); err != nil {
		t.Fatal(err)
	}
	return time.Duration(s * float64(time.Second))
}
