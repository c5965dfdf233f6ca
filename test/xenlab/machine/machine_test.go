//go:build linux

package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"barevif/test/xenlab/image"
	"barevif/test/xenlab/proto"
)

// modeEnv makes the test binary run as a fake QEMU. Its value says how the fake dom0 behaves.
const modeEnv = "XENLAB_FAKE_QEMU"

func TestMain(m *testing.M) {
	if mode := os.Getenv(modeEnv); mode != "" {
		fakeQEMU(mode)
		return
	}
	os.Exit(m.Run())
}

func fakeQEMU(mode string) {
	if mode == "refuses" {
		fmt.Fprintln(os.Stderr, "Could not allocate memory")
		os.Exit(1)
	}
	conns := map[string]net.Conn{}
	for _, arg := range os.Args {
		if _, path, ok := strings.Cut(arg, ",path="); ok {
			c, err := net.Dial("unix", path)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			conns[filepath.Base(path)] = c
		}
	}
	console, port := conns["console"], json.NewEncoder(conns["port"])
	fmt.Fprintln(console, "(XEN) Xen version")
	switch mode {
	case "dies":
		return
	case "toolstack":
		port.Encode(proto.Reply{Err: "xenstored: exit status 1"})
	case "panics":
		fmt.Fprintln(console, "[    1.0] Kernel panic - not syncing: Attempted to kill init!")
	default:
		port.Encode(proto.Reply{})
	}
	calls := bufio.NewScanner(conns["port"])
	for calls.Scan() {
		var c proto.Call
		if err := json.Unmarshal(calls.Bytes(), &c); err != nil {
			os.Exit(1)
		}
		switch c.Op {
		case proto.Get:
			port.Encode(proto.Reply{ID: c.ID, Stdout: []byte(c.Path)})
		case proto.Put:
			port.Encode(proto.Reply{ID: c.ID, Err: "read-only"})
		case proto.Shell:
			fmt.Fprintln(console, "(XEN) Xen BUG at grant_table.c:1234")
		case proto.Off:
			return
		} // other calls get no reply
	}
}

// start boots a fake machine.
func start(t *testing.T, mode string) (*Machine, string, error) {
	t.Helper()
	bin, dir := t.TempDir(), t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(bin, "qemu-system-x86_64")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	t.Setenv(modeEnv, mode)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	m, err := Start(ctx, Config{Images: &image.Set{Xen: "xen", Kernel: "vmlinux", Dom0: "dom0.cpio"}, Dir: dir})
	if err == nil {
		t.Cleanup(m.Stop)
	}
	return m, dir, err
}

func running(t *testing.T) *Machine {
	t.Helper()
	m, _, err := start(t, "works")
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestBootThatFailsSaysWhy(t *testing.T) {
	for mode, want := range map[string]string{
		"refuses":   "Could not allocate memory",
		"dies":      "powered off",
		"toolstack": "xenstored: exit status 1",
		"panics":    "Kernel panic",
	} {
		t.Run(mode, func(t *testing.T) {
			_, dir, err := start(t, mode)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
			log, rerr := os.ReadFile(filepath.Join(dir, "console.log"))
			if rerr != nil || mode != "refuses" && !strings.Contains(string(log), "(XEN) Xen version") {
				t.Errorf("console.log %q, %v", log, rerr)
			}
		})
	}
}

func TestCallsAreAnswered(t *testing.T) {
	m := running(t)
	ctx := t.Context()
	r, err := m.Call(ctx, proto.Call{Op: proto.Get, Path: "/a", Timeout: time.Minute})
	if err != nil || string(r.Stdout) != "/a" {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := m.Call(ctx, proto.Call{Op: proto.Put, Timeout: time.Minute}); err == nil || err.Error() != "read-only" {
		t.Errorf("the agent's error: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := m.Call(short, proto.Call{Op: proto.Run, Timeout: time.Minute}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no reply: %v", err)
	}
	if err := m.Err(); err != nil {
		t.Errorf("one call without a reply broke the machine: %v", err)
	}
}

func TestCallEndsWithTheMachine(t *testing.T) {
	for op, want := range map[proto.Op]string{proto.Shell: "Xen BUG", proto.Off: "powered off"} {
		t.Run(string(op), func(t *testing.T) {
			m := running(t)
			_, err := m.Call(t.Context(), proto.Call{Op: op, Timeout: time.Minute})
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
			<-m.Ended()
			if _, again := m.Call(t.Context(), proto.Call{Op: proto.Get, Timeout: time.Minute}); again == nil {
				t.Error("a call to a machine that ended")
			}
		})
	}
}

func TestStopEndsQEMU(t *testing.T) {
	m := running(t)
	pid := m.qemu.Pid
	m.Stop()
	m.Stop()
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
		t.Error("QEMU is still there")
	}
	if !errors.Is(m.Err(), net.ErrClosed) {
		t.Errorf("%v", m.Err())
	}
}

func TestCommaInKernelArgumentsIsRefused(t *testing.T) {
	_, err := Start(t.Context(), Config{Images: &image.Set{}, Dir: t.TempDir(), Linux: []string{"isolcpus=0,1"}})
	if err == nil || !strings.Contains(err.Error(), "isolcpus=0,1") {
		t.Errorf("%v", err)
	}
}

func TestFatalLines(t *testing.T) {
	for line, want := range map[string]bool{
		"[  3.1] Kernel panic - not syncing: VFS":                   true,
		"(XEN) Panic on CPU 0:":                                     true,
		"(XEN) Xen BUG at mm.c:1":                                   true,
		"[ 12.3] BUG: unable to handle page fault for address: 0":   true,
		"[ 12.3] Oops: 0000 [#1] PREEMPT SMP":                       true,
		"[ 12.3] kernel BUG at mm/slub.c:1":                         true,
		"(XEN) CPU0: AMD K8 machine check reporting enabled":        false,
		"[  0.1] Spectre V2 : Mitigation: Retpolines":               false,
		"[  0.1] DEBUG: nothing":                                    false,
		"[  1.0] vif vif-1-0 vif1.0: Guest Rx ready":                false,
		"[  0.0] tsc: Fast TSC calibration failed":                  false,
		"(XEN) d1v0 Triple fault - invoking HVM shutdown action 1.": false,
	} {
		if Fatal(line) != want {
			t.Errorf("%q", line)
		}
	}
}
