//go:build linux

// Package bpftest gives tests a private BPF file system, and programs that other users
// may run. It is for tests only.
package bpftest

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

const (
	envNamespace = "BAREVIF_TEST_MOUNTNS" // set in the private namespace
	envMissing   = "BAREVIF_TEST_NO_BPF"  // why there is no BPF file system
)

// Limit bounds every wait of a test; no test comes near it.
const Limit = 2 * time.Minute

// Main runs the tests in a private mount namespace, with a private BPF file system if
// this machine allows one, and returns the exit status. Call it from TestMain.
func Main(m *testing.M) (code int) {
	var missing string
	switch {
	case os.Geteuid() != 0:
		missing = "not root"
	case os.Getenv(envNamespace) == "":
		code, err := again()
		if err == nil {
			return code
		}
		missing = "mount namespace: " + err.Error()
	default:
		missing = mountBPF()
	}
	os.Setenv(envMissing, missing)
	code = m.Run()
	publicOnce.Do(func() {}) // nothing was made, and nothing is any more
	if public != "" {
		os.RemoveAll(public)
	}
	return code
}

// again runs this program in a new mount namespace.
func again() (code int, err error) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Whoever kills this process means the tests. Pdeathsig fires when the thread ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err = cmd.Run(); cmd.ProcessState != nil {
		return cmd.ProcessState.ExitCode(), nil
	}
	return 1, err
}

func mountBPF() (missing string) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "private mounts: " + err.Error()
	}
	if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0755"); err != nil {
		return "mount a BPF file system: " + err.Error()
	}
	return ""
}

// Need skips the test if Main could not mount a BPF file system.
func Need(t testing.TB) {
	t.Helper()
	if missing := os.Getenv(envMissing); missing != "" {
		t.Skip("no BPF file system of our own: " + missing)
	}
}

// Iterators returns why this kernel refuses BPF iterators over maps, or nil. A kernel may
// know them and refuse them to a process with every capability.
var Iterators = sync.OnceValue(func() error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Tracing, AttachType: ebpf.AttachTraceIter, AttachTo: "bpf_map_elem", License: "GPL",
		Instructions: asm.Instructions{asm.LoadImm(asm.R0, 0, asm.DWord), asm.Return()},
	})
	if err != nil {
		return err
	}
	return prog.Close()
})

// NeedIterator is Need for a test that reads the output of an iterator.
func NeedIterator(t testing.TB) {
	t.Helper()
	Need(t)
	if err := Iterators(); err != nil {
		t.Skip("this kernel loads no BPF iterator over maps: ", err)
	}
}

// Tool returns the path of a program, or skips the test.
func Tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	if err != nil {
		t.Skip(name + " is not installed")
	}
	return path
}

// Run returns the output of a program. It fails the test if the program fails.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, exit.Stderr)
		}
		t.Fatalf("%s: %v", name, err)
	}
	return string(out)
}

// Eventually waits until ok holds, for effects of other processes and of the kernel.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(Limit)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("%s: not within %v", what, Limit)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// public is the directory of programs that other users may run. Its name is new: one that could
// be foreseen may be another user's already.
var (
	publicOnce sync.Once
	public     string // written by publicOnce; "": not made
	publicErr  error  // written by publicOnce
)

func publicDir() (string, error) {
	publicOnce.Do(func() {
		var dir string
		if dir, publicErr = os.MkdirTemp("", "barevif-bpftest-"); publicErr == nil {
			public, publicErr = dir, os.Chmod(dir, 0o755)
		}
	})
	return public, publicErr
}

// Public returns the path of a program that other users may run, in a directory that is
// removed after the tests. make writes the program if it does not exist yet.
func Public(t testing.TB, name string, make func(path string) error) string {
	t.Helper()
	dir, err := publicDir()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	fresh := path + "~"
	if err = make(fresh); err == nil {
		err = errors.Join(os.Chmod(fresh, 0o755), os.Rename(fresh, path))
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Self returns a copy of this test binary that other users may run.
func Self(t testing.TB) string {
	t.Helper()
	return Public(t, "self.test", func(path string) error {
		self, err := os.Open("/proc/self/exe")
		if err != nil {
			return err
		}
		defer self.Close()
		out, err := os.Create(path)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, self)
		return errors.Join(err, out.Close())
	})
}

// A Process is a running copy of this test binary; its environment tells it what to do.
type Process struct {
	Cmd *exec.Cmd
	Out io.Reader
	in  io.Closer
}

// Start runs Self with env added to its environment, and with a command such as setpriv
// in front. It kills the process at the end of the test.
func Start(t testing.TB, env string, front ...string) *Process {
	t.Helper()
	args := append(append([]string{}, front...), Self(t))
	cmd := exec.Command(args[0], args[1:]...)
	// The race detector would delay the end of every process by a second.
	cmd.Env = append(os.Environ(), env, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &Process{Cmd: cmd, Out: out, in: in}
	t.Cleanup(p.Kill)
	return p
}

// Kill kills the process with SIGKILL. It does nothing if the process has ended.
func (p *Process) Kill() {
	if p.Cmd.ProcessState == nil {
		p.Cmd.Process.Kill()
		p.Cmd.Wait()
		p.in.Close()
	}
}

// End closes the standard input of the process and waits for its end.
func (p *Process) End(t testing.TB) {
	t.Helper()
	p.in.Close()
	if err := p.Cmd.Wait(); err != nil {
		t.Fatalf("the process ended with %v", err)
	}
}
