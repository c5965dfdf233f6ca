//go:build linux

package bpf

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"barevif/telemetry"
	"barevif/telemetry/bpf/bpftest"
)

// envOwner holds the plan of a process that is an owner.
const envOwner = "BAREVIF_TEST_OWNER"

func TestMain(m *testing.M) {
	if os.Getenv(envOwner) != "" {
		os.Exit(owner())
	}
	os.Exit(bpftest.Main(m))
}

// A plan says what an owner process of a test does.
type plan struct {
	Store   Store
	Info    telemetry.Info
	Queues  int
	Packets uint64        // counted in rx of queue 0 before the process says that it is ready
	Busy    bool          // go on counting until told to end
	Publish int           // publish this many times, then end
	Deny    []uint32      // system calls that fail
	DenyBPF []uint32      // commands of bpf(2) that fail
	Errno   syscall.Errno // with this error, or EPERM if 0
	Read    bool          // own nothing: find the device and print its packets
	Prune   string        // own nothing: Prune this root and print what was removed
}

// withPins returns the kind of mirror that an owner with every privilege gets on this
// machine.
func withPins() string {
	if bpftest.Iterators() != nil {
		return KindPins
	}
	return KindIterator
}

// ready is the first line that an owner prints.
type ready struct{ Kind, Reason string }

// owner runs a plan: it opens a device, prints ready, and closes the device when its
// standard input ends.
func owner() int {
	var p plan
	if err := json.Unmarshal([]byte(os.Getenv(envOwner)), &p); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	if len(p.Deny)+len(p.DenyBPF) > 0 {
		if err := deny(p.Deny, p.DenyBPF, p.Errno); err != nil {
			fmt.Fprintln(os.Stderr, "seccomp:", err)
			return 2
		}
	}
	if p.Read {
		return read(p.Info.Name())
	}
	if p.Prune != "" {
		removed, err := Prune(p.Prune)
		json.NewEncoder(os.Stdout).Encode(ready{strings.Join(removed, " "), fmt.Sprint(err)})
		return 0
	}
	set := telemetry.NewSet(p.Queues)
	set.Open(&p.Store, p.Info)
	set.SetStatus(telemetry.Status{State: 4, Up: true, MAC: [6]byte{0, 0x16, 0x3e, 1, 2, 3}})
	b := set.RX(0)
	count := func(n uint64) {
		b.Add(telemetry.Packets, n)
		b.Add(telemetry.Bytes, n*100)
		b.Drop(telemetry.DropDisconnected, n)
	}
	count(p.Packets)
	b.Flush()
	for range p.Publish {
		count(1)
		b.Publish()
	}
	var r ready
	r.Kind, r.Reason = set.Backend()
	json.NewEncoder(os.Stdout).Encode(r)
	done := make(chan struct{})
	go func() { io.Copy(io.Discard, os.Stdin); close(done) }()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for p.Busy {
		select {
		case <-done:
			p.Busy = false
		case <-tick.C:
			set.Tick()
		default:
			for range 64 {
				count(1)
			}
			b.Publish()
		}
	}
	<-done
	b.Flush()
	if err := set.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func read(name string) int {
	var r ready
	all, _ := List("")
	for _, s := range all {
		if s.Name != name {
			continue
		}
		rd, err := Open(s)
		if err != nil {
			r.Reason = err.Error()
			continue
		}
		rep, err := rd.Read()
		if err != nil {
			r.Reason = err.Error()
			continue
		}
		r = ready{s.Kind, fmt.Sprint(rep.Stats.RX.Get(telemetry.Packets), " packets")}
	}
	json.NewEncoder(os.Stdout).Encode(r)
	return 0
}

// deny makes system calls and commands of bpf(2) fail in all threads from now on.
func deny(calls, commands []uint32, errno syscall.Errno) error {
	if errno == 0 {
		errno = unix.EPERM
	}
	const number, firstArgument = 0, 16 // in struct seccomp_data, on a little-endian machine
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	filter := []unix.SockFilter{load(number)}
	fail := func(values []uint32) {
		for _, v := range values {
			filter = append(filter,
				unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: v},
				unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)})
		}
	}
	fail(calls)
	if len(commands) > 0 {
		over := uint8(1 + 2*len(commands))
		filter = append(filter, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: over, K: unix.SYS_BPF}, load(firstArgument))
		fail(commands)
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	return seccomp(filter)
}

// A process is a running owner.
type process struct {
	ready
	*bpftest.Process
}

// start runs a plan in a separate process, with a command such as setpriv in front of it,
// and waits until its device is open.
func start(t testing.TB, p plan, front ...string) *process {
	t.Helper()
	pr := launch(t, p, front...)
	line, err := bufio.NewReader(pr.Out).ReadString('\n')
	if err != nil {
		t.Fatalf("the owner said nothing: %v", err)
	}
	if err := json.Unmarshal([]byte(line), &pr.ready); err != nil {
		t.Fatalf("the owner said %q", line)
	}
	return pr
}

func launch(t testing.TB, p plan, front ...string) *process {
	t.Helper()
	p.Queues = max(p.Queues, 1)
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return &process{Process: bpftest.Start(t, envOwner+"="+string(text), front...)}
}

var update = flag.Bool("update", false, "write testdata anew")

func golden(t testing.TB, path, got string) {
	t.Helper()
	if *update {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(got), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("differs from %s; run go test -update if that is meant", path)
	}
}
