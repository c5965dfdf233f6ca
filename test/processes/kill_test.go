package processes

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
)

// echoed is how many frames come back between two lines of the frontend.
const echoed = 20

// numbered returns a frame that holds its number and its sender.
func numbered(n uint64) []byte {
	b := make([]byte, 60+n%1400)
	for i := range b {
		b[i] = byte(uint64(i)*7 + n)
	}
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5})
	binary.BigEndian.PutUint32(b[14:], uint32(os.Getpid()))
	binary.BigEndian.PutUint64(b[18:], n)
	return b
}

// ping sends frames one at a time: each comes back, or is lost, before the next. It
// prints a line for every few. It ends when its standard input does.
func ping(dev *pvnet.Device) error {
	back := make(chan uint64, 256)
	heard := make(chan error, 1)
	go func() {
		err := dev.Listen(context.Background(), func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			if len(b) < 26 || binary.BigEndian.Uint32(b[14:]) != uint32(os.Getpid()) {
				return // of an earlier process
			}
			n := binary.BigEndian.Uint64(b[18:])
			if !bytes.Equal(b, numbered(n)) {
				fmt.Printf("frame %d came back as something else\n", n)
			}
			select {
			case back <- n:
			default:
			}
		})
		heard <- err
	}()
	for n, came := uint64(0), 0; ; n++ {
		if _, err := dev.Write(numbered(n)); err != nil {
			if errors.Is(err, pvnet.ErrDisconnected) {
				return <-heard
			}
			return err
		}
		lost := time.NewTimer(20 * time.Millisecond)
		select {
		case at := <-back:
			if at > n {
				fmt.Printf("frame %d came back after %d were sent\n", at, n)
			}
			if came++; came%echoed == 0 {
				fmt.Println("moved")
			}
		case <-lost.C:
		}
		lost.Stop()
	}
}

// childServe is a backend that echoes frames until its standard input ends.
func childServe(ctx context.Context) error {
	dom, err := emu.Join(ctx, os.Getenv("BAREVIF_TEST_SOCKET"), 2)
	if err != nil {
		return err
	}
	defer dom.Destroy()
	ctx, cancel := context.WithCancelCause(ctx)
	over := errors.New("told to")
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel(over)
	}()
	err = pvnet.Serve(ctx, dom, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) {
		d.Listen(context.Background(), func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			d.Write(b)
		})
	})
	if errors.Is(err, over) {
		return nil
	}
	return err
}

// A kid is a child that may be killed.
type kid struct {
	t     testing.TB
	name  string
	cmd   *exec.Cmd
	in    io.Closer
	lines chan string // its output; closed at its end
	gone  chan error
}

func (m *machine) kid(mode string) *kid {
	m.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	k := &kid{t: m.t, name: mode, cmd: exec.Command(exe), lines: make(chan string, 1<<16), gone: make(chan error, 1)}
	k.cmd.Env = append(os.Environ(), childVar+"="+mode, "BAREVIF_TEST_SOCKET="+m.socket)
	k.cmd.Stderr = os.Stderr
	if k.in, err = k.cmd.StdinPipe(); err != nil {
		m.t.Fatal(err)
	}
	out, err := k.cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	if err := k.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			k.lines <- s.Text()
		}
		close(k.lines)
		k.gone <- k.cmd.Wait()
	}()
	return k
}

// kill sends SIGKILL and waits.
func (k *kid) kill() {
	k.t.Helper()
	k.cmd.Process.Kill()
	if err := <-k.gone; k.cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		k.t.Errorf("%s: had ended before it was killed: %v", k.name, err)
	}
}

// stop asks it to end, and waits.
func (k *kid) stop() {
	k.t.Helper()
	k.in.Close()
	select {
	case err := <-k.gone:
		if err != nil {
			k.t.Errorf("%s: %v", k.name, err)
		}
	case <-time.After(2 * time.Minute):
		k.dump()
	}
}

// dump ends it with a dump of its goroutines' stacks.
func (k *kid) dump() {
	k.cmd.Process.Signal(syscall.SIGQUIT)
	k.t.Fatalf("%s: %v", k.name, <-k.gone)
}

// moves waits until frames pass both ways. It ignores earlier output.
func (k *kid) moves(other *kid) {
	k.t.Helper()
	for len(k.lines) > 0 {
		k.said(<-k.lines)
	}
	limit := time.After(2 * time.Minute)
	for range 2 {
		select {
		case line := <-k.lines:
			k.said(line)
		case <-limit:
			other.cmd.Process.Signal(syscall.SIGQUIT)
			<-other.gone
			k.dump()
		}
	}
}

func (k *kid) said(line string) {
	k.t.Helper()
	if line != "moved" && line != "ready" {
		k.t.Errorf("%s says %q", k.name, line)
	}
}

// T29: either process, or both, end at any moment. The survivor goes on, a new process
// connects and moves frames, and nothing of the dead is left.
func TestT29ProcessesAreKilledAtAnyMoment(t *testing.T) {
	m := empty(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 29))
	front, back := m.kid("ping"), m.kid("serve")
	kills, worst := 0, time.Duration(0)
	long := 10 * time.Second
	if testing.Short() {
		long = 3 * time.Second
	}
	begun := time.Now()
	for round := 1; time.Since(begun) < long; round++ {
		if round%4 == 0 { // a new vif, without an old state
			m.replug()
		}
		if rng.IntN(3) > 0 { // else in the middle of the handshake
			start := time.Now()
			front.moves(back)
			worst = max(worst, time.Since(start))
		}
		time.Sleep(time.Duration(rng.IntN(20000)) * time.Microsecond)
		which := rng.IntN(3)
		kills++
		if which != 1 {
			front.kill()
		}
		if which != 0 {
			back.kill()
		}
		if which == 2 { // no process is left to hold anything
			kills++
			m.nothing()
		}
		if which != 1 {
			front = m.kid("ping")
		}
		if which != 0 {
			back = m.kid("serve")
		}
	}
	front.moves(back)
	t.Logf("%d kills; frames moved again after %v at most", kills, worst)
	if kills < 10 {
		t.Errorf("only %d kills", kills)
	}
	front.stop()
	back.stop()
	m.nothing()
}

// nothing waits until only the toolstack's domain holds anything.
func (m *machine) nothing() {
	m.t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Millisecond) {
		l := m.host.Ledger()
		l.Domains, l.Connections = l.Domains-1, 0 // the toolstack's
		if l == (emu.Ledger{}) {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("left behind: %+v", l)
		}
	}
}

func (m *machine) replug() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := toolstack.Remove(ctx, m.tools, theVif); err != nil {
		m.t.Fatal(err)
	}
	if err := toolstack.Add(ctx, m.tools, theVif); err != nil {
		m.t.Fatal(err)
	}
}

// links reports the changes of a device's link.
func links(t *testing.T, d *pvnet.Device) (next func(up bool) (string, time.Duration)) {
	events := make(chan pvnet.LinkEvent, 64)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go func() {
		for ev := range d.Links(ctx) {
			events <- ev
		}
	}()
	return func(up bool) (string, time.Duration) {
		t.Helper()
		begun := time.Now()
		for limit := time.After(15 * time.Second); ; {
			select {
			case ev := <-events:
				if ev.Up == up {
					return ev.Reason, time.Since(begun)
				}
			case <-limit:
				t.Fatalf("the link did not change to up=%v", up)
			}
		}
	}
}

// A backend's process is killed while no frames move: the frontend's link goes down, and
// comes up with the next backend.
func TestTheLinkGoesDownWithTheBackendsProcess(t *testing.T) {
	m := empty(t)
	back := m.kid("serve")
	dom, err := m.host.NewDomain(1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	front, err := pvnet.Connect(ctx, dom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	go front.Listen(context.Background(), func(pvnet.Frame) {})
	next := links(t, front)
	next(true)
	for range 3 {
		back.kill()
		reason, down := next(false)
		if !strings.Contains(reason, "program has ended") {
			t.Errorf("the link is down: %s", reason)
		}
		back = m.kid("serve")
		_, up := next(true)
		t.Logf("down after %v, up %v after the next backend was started", down, up)
	}
	back.stop()
}

// The same for a frontend.
func TestTheLinkGoesDownWithTheFrontendsProcess(t *testing.T) {
	m := start(t)
	front := m.kid("ping")
	dev := m.device()
	next := links(t, dev)
	next(true)
	go dev.Listen(context.Background(), func(pvnet.Frame) {})
	for range 3 {
		front.kill()
		reason, down := next(false)
		if !strings.Contains(reason, "program has ended") {
			t.Errorf("the link is down: %s", reason)
		}
		front = m.kid("ping")
		_, up := next(true)
		t.Logf("down after %v, up %v after the next frontend was started", down, up)
	}
	front.stop()
}
