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
	"barevif/xenbus/xenstore/server/labtest"
)

// framesPerLine is how many frames come back between two lines of the frontend.
const framesPerLine = 20

// numberedFrame returns a frame that holds its number and its sender.
func numberedFrame(n uint64) []byte {
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
	listened := make(chan error, 1)
	go func() {
		err := dev.Listen(context.Background(), func(f pvnet.Frame) {
			b := make([]byte, f.Len())
			f.CopyTo(b)
			if len(b) < 26 || binary.BigEndian.Uint32(b[14:]) != uint32(os.Getpid()) {
				return // of an earlier process
			}
			n := binary.BigEndian.Uint64(b[18:])
			if !bytes.Equal(b, numberedFrame(n)) {
				fmt.Printf("frame %d came back as something else\n", n)
			}
			select {
			case back <- n:
			default:
			}
		})
		listened <- err
	}()
	for n, came := uint64(0), 0; ; n++ {
		if _, err := dev.Write(numberedFrame(n)); err != nil {
			if errors.Is(err, pvnet.ErrDisconnected) {
				return <-listened
			}
			return err
		}
		lost := time.NewTimer(20 * time.Millisecond)
		select {
		case at := <-back:
			if at > n {
				fmt.Printf("frame %d came back after %d were sent\n", at, n)
			}
			if came++; came%framesPerLine == 0 {
				fmt.Println("moved")
			}
		case <-lost.C:
		}
		lost.Stop()
	}
}

// runBackend is a backend that echoes frames until its standard input ends.
func runBackend(ctx context.Context) error {
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

// A child is a process with one end of the vif.
type child struct {
	t      testing.TB
	name   string
	cmd    *exec.Cmd
	in     io.WriteCloser
	lines  chan string // its output; closed at its end
	exited chan error
}

// startChild starts a child with additional environment variables.
func (m *machine) startChild(mode string, env ...string) *child {
	m.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	c := &child{t: m.t, name: mode, cmd: exec.Command(exe), lines: make(chan string, 1<<16), exited: make(chan error, 1)}
	c.cmd.Env = append(append(os.Environ(), childVar+"="+mode, "BAREVIF_TEST_SOCKET="+m.socket), env...)
	c.cmd.Stderr = os.Stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		m.t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			c.lines <- s.Text()
		}
		close(c.lines)
		c.exited <- c.cmd.Wait()
	}()
	return c
}

// kill sends SIGKILL and waits.
func (c *child) kill() {
	c.t.Helper()
	c.cmd.Process.Kill()
	if err := c.wait(); c.cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		c.t.Errorf("%s: had ended before it was killed: %v", c.name, err)
	}
}

// stop asks it to end, and waits.
func (c *child) stop() {
	c.t.Helper()
	c.in.Close()
	if err := c.wait(); err != nil {
		c.t.Errorf("%s: %v", c.name, err)
	}
}

// wait waits until it has ended.
func (c *child) wait() error {
	c.t.Helper()
	select {
	case err := <-c.exited:
		return err
	case <-time.After(2 * time.Minute):
		c.dump()
		return nil
	}
}

// dump ends it with a dump of its goroutines' stacks.
func (c *child) dump() {
	c.t.Helper()
	c.cmd.Process.Signal(syscall.SIGQUIT)
	select {
	case err := <-c.exited:
		c.t.Fatalf("%s: %v", c.name, err)
	case <-time.After(labtest.Limit):
		c.t.Fatalf("%s: it does not end", c.name)
	}
}

// waitTraffic waits until frames pass both ways. It ignores earlier output.
func (c *child) waitTraffic(other *child) {
	c.t.Helper()
	for len(c.lines) > 0 {
		c.checkLine(<-c.lines)
	}
	limit := time.After(2 * time.Minute)
	for range 2 {
		select {
		case line := <-c.lines:
			c.checkLine(line)
		case <-limit:
			defer c.dump()
			other.dump()
		}
	}
}

func (c *child) checkLine(line string) {
	c.t.Helper()
	if line != "moved" && line != "ready" {
		c.t.Errorf("%s says %q", c.name, line)
	}
}

// T29: either process, or both, end at any moment. The survivor goes on, a new process
// connects and moves frames, and nothing of the dead is left.
func TestT29ProcessesAreKilledAtAnyMoment(t *testing.T) {
	m := newMachine(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 29))
	front, back := m.startChild("ping"), m.startChild("serve")
	kills, worst := 0, time.Duration(0)
	long := 10 * time.Second
	if testing.Short() {
		long = 3 * time.Second
	}
	begun := time.Now()
	for round := 1; time.Since(begun) < long || kills < 10; round++ { // however slow the machine is
		if round%4 == 0 { // a new vif, without an old state
			m.replug()
		}
		if rng.IntN(3) > 0 { // else in the middle of the handshake
			start := time.Now()
			front.waitTraffic(back)
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
			m.requireNothingLeft()
		}
		if which != 1 {
			front = m.startChild("ping")
		}
		if which != 0 {
			back = m.startChild("serve")
		}
	}
	front.waitTraffic(back)
	t.Logf("%d kills; frames moved again after %v at most", kills, worst)
	front.stop()
	back.stop()
	m.requireNothingLeft()
}

// requireNothingLeft waits until only the toolstack's domain holds anything.
func (m *machine) requireNothingLeft() {
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
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	if err := toolstack.Remove(ctx, m.tools, testVif); err != nil {
		m.t.Fatal(err)
	}
	if err := toolstack.Add(ctx, m.tools, testVif); err != nil {
		m.t.Fatal(err)
	}
}

// watchLink reports the changes of a device's link.
func watchLink(t *testing.T, d *pvnet.Device) (next func(up bool) (string, time.Duration)) {
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
		for limit := time.After(labtest.Limit); ; {
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

// requireLinkFollows kills the peer of a device and starts another, and requires that the
// link goes down and up with it. next is of watchLink. It returns the last peer.
func (m *machine) requireLinkFollows(peer *child, next func(up bool) (string, time.Duration)) *child {
	m.t.Helper()
	for range 3 {
		peer.kill()
		reason, down := next(false)
		if !strings.Contains(reason, "program has ended") {
			m.t.Errorf("the link is down: %s", reason)
		}
		peer = m.startChild(peer.name)
		_, up := next(true)
		m.t.Logf("down after %v, up %v after the next process was started", down, up)
	}
	return peer
}

// A backend's process is killed while no frames move: the frontend's link goes down, and
// comes up with the next backend.
func TestTheLinkGoesDownWithTheBackendsProcess(t *testing.T) {
	m := newMachine(t)
	back := m.startChild("serve")
	dom, err := m.host.NewDomain(1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	front, err := pvnet.Connect(ctx, dom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	go front.Listen(context.Background(), func(pvnet.Frame) {})
	next := watchLink(t, front)
	next(true)
	m.requireLinkFollows(back, next).stop()
}

// The same for a frontend.
func TestTheLinkGoesDownWithTheFrontendsProcess(t *testing.T) {
	m := newServingMachine(t)
	front := m.startChild("ping")
	dev := m.awaitDevice()
	next := watchLink(t, dev)
	next(true)
	go dev.Listen(context.Background(), func(pvnet.Frame) {})
	m.requireLinkFollows(front, next).stop()
}
