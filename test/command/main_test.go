//go:build linux

// Package command_test runs the built barevif command as its users do: as root, as a
// user without rights, on machines that refuse things, in one process and in
// several.
//
// Tests that need a network of their own run again inside a user and network
// namespace. The package has no code but tests.
package command_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	root = "../.."

	// limit bounds every wait for a process. The machine may be busy.
	limit = 60 * time.Second

	// inside is set if a test runs inside a namespace. It holds the directory of the
	// built programs.
	inside = "BAREVIF_COMMAND_TEST_INSIDE"
)

// programs is the directory of the programs that build makes.
var programs string

func TestMain(m *testing.M) {
	if programs = os.Getenv(inside); programs != "" {
		os.Exit(m.Run())
	}
	// Not t.TempDir, which other users may not enter.
	dir, err := os.MkdirTemp("", "barevif-command")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	programs = dir
	// In the machine's temporary directory names may be taken by programs of other users.
	temporary := filepath.Join(dir, "t")
	err = os.Mkdir(temporary, 0o700)
	if err == nil {
		err = os.Chmod(temporary, 0o777|fs.ModeSticky) // some tests start programs as another user
	}
	if err == nil {
		err = os.Setenv("TMPDIR", temporary)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.RemoveAll(dir)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func lookGo(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("go")
	if err != nil {
		t.Skip("the go command is not installed: ", err)
	}
	return path
}

// build returns the path of the program of package pkg. It builds the program once.
func build(t testing.TB, name, pkg string, flags ...string) string {
	t.Helper()
	path := filepath.Join(programs, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	goTool := lookGo(t)
	noteSources(t)
	args := append([]string{"build", "-buildvcs=false", raceFlag, "-o", path}, flags...) // git may not trust the tree's owner
	cmd := exec.Command(goTool, append(args, pkg)...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, out)
	}
	if err := os.Chmod(path, 0o755); err != nil { // other users run it, whatever the umask is
		t.Fatal(err)
	}
	return path
}

// noteSources stats every source file. The go command records that, and runs the tests again
// when a file has changed.
func noteSources(t testing.TB) {
	t.Helper()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), ".") && name != root {
			return fs.SkipDir
		}
		if err == nil && strings.HasSuffix(name, ".go") {
			_, err = os.Stat(name)
			if errors.Is(err, fs.ErrNotExist) {
				err = nil // gone while we walked
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func barevif(t testing.TB) string {
	t.Helper()
	return build(t, "barevif", "./tools/barevif")
}

// benchProgram and checkProgram build the instruments of test/.
func benchProgram(t testing.TB) string { return build(t, "bench", "./test/bench") }
func checkProgram(t testing.TB) string { return build(t, "check", "./test/check") }

func routerProgram(t testing.TB) string { return build(t, "vifrouter", "./tools/vifrouter") }

// namespace runs the calling test again inside a user and network namespace, where namespace
// returns true. Outside it returns false once the inner test has passed.
func namespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inside) != "" {
		return true
	}
	for _, made := range [...]func(testing.TB) string{barevif, benchProgram, checkProgram, routerProgram, readmeProgram} {
		made(t)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), inside+"="+programs)
	cmd.SysProcAttr = ownNamespaces(unix.CLONE_NEWNET)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil && strings.Contains(string(out), "--- SKIP: "+t.Name()):
		t.Skipf("inside the namespace:\n%s", out)
	case err == nil && strings.Contains(string(out), "--- PASS: "+t.Name()):
		t.Logf("%s", out)
	case err != nil && !errors.As(err, &exit):
		t.Skip("this machine refuses a user and network namespace: ", err)
	default:
		t.Fatalf("inside the namespace: %v\n%s", err, out)
	}
	return false
}

// ownNamespaces makes a process start as root of a new user namespace, and in the further new
// namespaces of the flags more.
func ownNamespaces(more uintptr) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | more,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
}

// A process is a program under test.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
	err  error         // result of Wait; valid once done is closed

	mu   sync.Mutex
	cond sync.Cond
	out  bytes.Buffer // guarded by mu: both streams
	over bool         // guarded by mu
}

// Write collects the output of the process.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cond.Broadcast()
	return p.out.Write(b)
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// start starts a program that ends with the test.
func start(t *testing.T, attr *syscall.SysProcAttr, name string, args ...string) *process {
	t.Helper()
	return startIn(t, programs, attr, name, args...)
}

func startIn(t *testing.T, dir string, attr *syscall.SysProcAttr, name string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cond.L = &p.mu
	p.cmd.Stdout, p.cmd.Stderr = p, p
	// Only a child that was left behind still holds the streams then.
	p.cmd.WaitDelay = 10 * time.Second
	p.cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	p.cmd.Dir = dir
	if attr == nil {
		attr = new(syscall.SysProcAttr)
	}
	attr.Pdeathsig = syscall.SIGKILL // a test that is killed runs no cleanup
	p.cmd.SysProcAttr = attr
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // Pdeathsig fires when the thread that forked ends
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = p.cmd.Wait()
		close(p.done)
		p.mu.Lock()
		p.over = true
		p.cond.Broadcast()
		p.mu.Unlock()
	}()
	if err := <-started; err != nil {
		if attr.Cloneflags|attr.Unshareflags != 0 {
			t.Skip("this machine refuses namespaces: ", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("%s said:\n%s", strings.Join(p.cmd.Args, " "), p.text())
		}
	})
	return p
}

// stdout runs a program that ends well, and returns what it writes to stdout. On stderr it may
// say more: of the machine, say.
func stdout(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = programs
	var says bytes.Buffer
	cmd.Stderr = &says
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, out, says.String())
	}
	return string(out)
}

// await waits until the process has printed s n times.
func (p *process) await(s string, n int) {
	p.t.Helper()
	timer := time.AfterFunc(limit, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.over = true
		p.cond.Broadcast()
	})
	defer timer.Stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for strings.Count(p.out.String(), s) < n {
		if p.over {
			p.t.Fatalf("%s did not say %q %d times", strings.Join(p.cmd.Args, " "), s, n)
		}
		p.cond.Wait()
	}
}

// exit waits until the process ends, checks its status, and returns its output.
func (p *process) exit(code int) string {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(limit):
		p.t.Fatalf("%s does not end", strings.Join(p.cmd.Args, " "))
	}
	if errors.Is(p.err, exec.ErrWaitDelay) {
		p.t.Errorf("%s left a child behind", strings.Join(p.cmd.Args, " "))
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("%s: exit status %d, want %d (%v)", strings.Join(p.cmd.Args, " "), got, code, p.err)
	}
	return p.text()
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// wants checks that text contains each of parts.
func wants(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("nothing says %q", part)
		}
	}
}
