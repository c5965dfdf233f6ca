package counters

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/bpf"
	"barevif/xenbus"
	"barevif/xenbus/store"
	"barevif/xenbus/toolstack"
)

const (
	envNamespace = "BAREVIF_TEST_MOUNTNS"
	envOwner     = "BAREVIF_TEST_OWNER"
	limit        = 20 * time.Second
)

// noBPF says why this machine cannot have a BPF file system of its own; "" if it
// can.
var noBPF string

// TestMain runs the tests in a mount namespace of their own, on a BPF file system
// of their own.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv(envOwner) != "":
		os.Exit(owner(os.Getenv(envOwner)))
	case os.Geteuid() != 0:
		noBPF = "not root"
	case os.Getenv(envNamespace) == "":
		code, err := again()
		if err == nil {
			os.Exit(code)
		}
		noBPF = "mount namespace: " + err.Error()
	default:
		noBPF = mountBPF()
	}
	code := m.Run()
	os.RemoveAll(publicDir())
	os.Exit(code)
}

// again runs this program in a new mount namespace.
func again() (code int, err error) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if err = cmd.Run(); cmd.ProcessState != nil {
		return cmd.ProcessState.ExitCode(), nil
	}
	return 1, err
}

func mountBPF() string {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "private mounts: " + err.Error()
	}
	if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0755"); err != nil {
		return "mount a BPF file system: " + err.Error()
	}
	return ""
}

func needBPF(t testing.TB) {
	t.Helper()
	if noBPF != "" {
		t.Skip("no BPF file system of our own: " + noBPF)
	}
}

func needTool(t testing.TB, name string) string {
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

// Numbers no other test has, so that what is unpinned elsewhere on the machine is not
// taken for ours.
const (
	frontDom  = 31001
	backDom   = 31002
	frontName = "front-31001-31002-0"
	backName  = "back-31002-31001-0"
)

// A wire is a vif of an emulated machine, both ends in this process.
type wire struct{ front, back *pvnet.Device }

func newWire(t testing.TB, front, back pvnet.Config) *wire {
	t.Helper()
	before := runtime.NumGoroutine()
	st := store.New(store.Config{})
	m, err := emu.New(emu.Config{Store: func(dom hypercall.DomID, c io.ReadWriteCloser) { st.ServeConn(c, dom) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Close()
		st.Close()
		for end := time.Now().Add(limit); runtime.NumGoroutine() > before; runtime.Gosched() {
			if time.Now().After(end) {
				buf := make([]byte, 1<<16)
				t.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			}
		}
	})
	m.OnDeath(st.DomainDied)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	var doms []*emu.Domain
	var tools *xenbus.Client
	for i, id := range []hypercall.DomID{0, frontDom, backDom} {
		d, err := m.NewDomain(id)
		if err != nil {
			t.Fatal(err)
		}
		st.Introduce(id)
		doms = append(doms, d)
		if i == 0 {
			if tools, err = xenbus.Dial(ctx, d.Store, xenbus.Config{}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { tools.Close() })
		} else if err := toolstack.Home(ctx, tools, id); err != nil {
			t.Fatal(err)
		}
	}
	if err := toolstack.Add(ctx, tools, toolstack.Vif{Front: frontDom, Back: backDom, MAC: [6]byte{0, 0x16, 0x3e, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(context.Background())
	backs, served := make(chan *pvnet.Device, 1), make(chan error, 1)
	go func() {
		served <- pvnet.Serve(serving, doms[2], pvnet.ServeConfig{Config: back, Hotplug: true}, func(d *pvnet.Device) { backs <- d })
	}()
	t.Cleanup(func() {
		stop()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	w := &wire{}
	if w.front, err = pvnet.Connect(ctx, doms[1], "0", front); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.front.Disconnect)
	w.back = <-backs
	return w
}

// A path is one direction of a queue of a wire, in the hands of this goroutine.
type path struct {
	tx     *pvnet.TX
	rx     *pvnet.RX
	frames []pvnet.Frame
}

func newPath(t testing.TB, from, to *pvnet.Device, queue, batch int) *path {
	t.Helper()
	tx, err := from.OwnTX(queue)
	if err != nil {
		t.Fatal(err)
	}
	rx, err := to.OwnRX(queue)
	if err != nil {
		t.Fatal(err)
	}
	rx.SetDeadline(time.Now().Add(10 * time.Minute))
	return &path{tx, rx, make([]pvnet.Frame, batch)}
}

// move sends a batch of frames of size bytes and receives them.
func (p *path) move(t testing.TB, size int) {
	n := p.tx.AllocSize(p.frames, size)
	if k, err := p.tx.Send(p.frames[:n]); k != len(p.frames) || err != nil {
		t.Fatalf("sent %d of %d: %v", k, len(p.frames), err)
	}
	for n > 0 {
		k, err := p.rx.Receive(p.frames[:n])
		if err != nil {
			t.Fatal(err)
		}
		if err := p.rx.Release(p.frames[:k]); err != nil {
			t.Fatal(err)
		}
		n -= k
	}
}

// owner is a process that counts n packets in a memfd or whatever it is allowed,
// says where, and ends with its standard input.
func owner(name string) int {
	var info telemetry.Info
	if err := json.Unmarshal([]byte(name), &info); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	set := telemetry.NewSet(1)
	set.Open(&bpf.Store{}, info)
	set.RX(0).Add(telemetry.Packets, 1<<53+1) // more than a float64 holds
	set.RX(0).Flush()
	kind, reason := set.Backend()
	fmt.Printf("%s: %s\n", kind, reason)
	io.Copy(io.Discard, os.Stdin)
	if err := set.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// publicDir holds programs that other users may run.
func publicDir() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("barevif-counters-test-%d", os.Getpid()))
}

// command builds the command of this project where everybody may run it.
func command(t testing.TB) string {
	t.Helper()
	path := filepath.Join(publicDir(), "barevif")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if err := errors.Join(os.MkdirAll(publicDir(), 0o755), os.Chmod(publicDir(), 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", path, "barevif/tools/barevif")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	if err := os.Chmod(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
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

// eventually waits for what another goroutine does in its own time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(limit)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("%s: not within %v", what, limit)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
