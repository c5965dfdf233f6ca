// Package processes tests and measures a frontend and a backend in two processes, as on a
// real machine.
package processes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/server/labtest"
)

const childVar = "BAREVIF_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childVar) != "" {
		if err := runChild(); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A runChild is one end in a separate process.
func runChild() error {
	// It bounds a whole test, and on a slow machine: a child ends when its standard input does.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	switch os.Getenv(childVar) {
	case "serve":
		return runBackend(ctx)
	case "hand", "successor":
		return runHandover(ctx)
	case "fronthand", "frontsuccessor":
		return runFrontHandover(ctx)
	case "bridge":
		return runBridge(ctx)
	case "guests":
		return runGuests(ctx)
	}
	return runFrontend(ctx)
}

// runFrontend is the frontend. It sends frames of one size without end, or echoes frames,
// or receives them, or wants its own frames back. It ends when its standard input does.
func runFrontend(ctx context.Context) error {
	dom, err := emu.Join(ctx, os.Getenv("BAREVIF_TEST_SOCKET"), 1)
	if err != nil {
		return err
	}
	defer dom.Destroy()
	dev, err := pvnet.Connect(ctx, dom, "0", pvnet.Config{})
	for errors.Is(err, xenstore.ErrNotFound) && ctx.Err() == nil { // between two vifs of the same number
		time.Sleep(time.Millisecond)
		dev, err = pvnet.Connect(ctx, dom, "0", pvnet.Config{})
	}
	if err != nil {
		return err
	}
	defer dev.Disconnect()
	go func() {
		io.Copy(io.Discard, os.Stdin)
		dev.Disconnect()
	}()
	fmt.Println("ready")
	if os.Getenv(childVar) == "ping" {
		return ping(dev)
	}
	size, _ := strconv.Atoi(os.Getenv("BAREVIF_TEST_SIZE"))
	tx, err := dev.OwnTX(0)
	if err != nil {
		return err
	}
	rx, err := dev.OwnRX(0)
	if err != nil {
		return err
	}
	frames := make([]pvnet.Frame, 32)
	for err == nil {
		n := 0
		switch os.Getenv(childVar) {
		case "send":
			if n, err = tx.AllocWait(frames, size); err == nil {
				_, err = tx.SendWait(frames[:n])
			}
		case "sink":
			n, err = rx.Receive(frames)
			rx.Release(frames[:n])
		case "echo":
			if n, err = rx.Receive(frames); err == nil {
				_, err = tx.SendWait(frames[:n])
			}
		}
	}
	if errors.Is(err, pvnet.ErrDisconnected) {
		err = nil
	}
	return err
}

// A machine has a host, a vif and children. The backend may be in this process.
type machine struct {
	t      testing.TB
	host   *emu.Host
	store  *server.Store
	tools  *xenstore.Client
	socket string
	backs  chan *pvnet.Device
}

var testVif = toolstack.Vif{Front: 1, Back: 2, MAC: [6]byte{0, 0x16, 0x3e, 0, 0, 1}}

// newServingMachine makes a machine with a backend.
func newServingMachine(t testing.TB) *machine {
	t.Helper()
	m := newMachine(t)
	bdom, err := m.host.NewDomain(2)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- pvnet.Serve(ctx, bdom, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) { m.backs <- d })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-served; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	return m
}

// newMachine makes a machine without a backend.
func newMachine(t testing.TB) *machine {
	t.Helper()
	m := &machine{t: t, socket: filepath.Join(emutest.SocketDir(t), "host"), backs: make(chan *pvnet.Device, 4)}
	st := server.New(server.Config{})
	h, err := emu.Listen(m.socket, emu.Config{Admit: st.Admit, Store: func(dom hypercall.DomID, conn io.ReadWriteCloser) {
		st.ServeConn(conn, dom)
	}})
	if err != nil {
		t.Fatal(err)
	}
	m.host, m.store = h, st
	// The store does not learn of deaths: on Xen a domain outlives one of its processes.
	dom0, err := h.NewDomain(0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	if m.tools, err = xenstore.Dial(ctx, dom0.Store, xenstore.Config{}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []hypercall.DomID{0, 1, 2} {
		st.Introduce(id)
		if err := toolstack.Home(ctx, m.tools, id); err != nil {
			t.Fatal(err)
		}
	}
	if err := toolstack.Add(ctx, m.tools, testVif); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.tools.Close()
		if err := labtest.Comes(h.CheckClean); err != nil {
			t.Error(err)
		}
		h.Close()
		st.Close()
	})
	return m
}

// startFrontend starts a frontend and waits until it is connected.
func (m *machine) startFrontend(mode string, size int) *child {
	m.t.Helper()
	c := m.startChild(mode, "BAREVIF_TEST_SIZE="+strconv.Itoa(size))
	if line := <-c.lines; line != "ready" {
		m.t.Fatalf("the frontend said %q", line)
	}
	return c
}

// awaitDevice returns the backend's device, with its link up.
func (m *machine) awaitDevice() *pvnet.Device {
	m.t.Helper()
	select {
	case d := <-m.backs:
		for ev := range d.Links(context.Background()) {
			if ev.Up {
				return d
			}
		}
	case <-time.After(2 * time.Minute):
	}
	m.t.Fatal("no backend came up")
	return nil
}

func ownHalves(t testing.TB, d *pvnet.Device) (*pvnet.TX, *pvnet.RX) {
	t.Helper()
	tx, err := d.OwnTX(0)
	if err != nil {
		t.Fatal(err)
	}
	rx, err := d.OwnRX(0)
	if err != nil {
		t.Fatal(err)
	}
	return tx, rx
}

func TestFramesCrossProcesses(t *testing.T) {
	m := newServingMachine(t)
	front := m.startFrontend("echo", 0)
	defer front.stop()
	tx, rx := ownHalves(t, m.awaitDevice())
	limit := time.Now().Add(labtest.Limit)
	tx.SetDeadline(limit)
	rx.SetDeadline(limit)
	var f [1]pvnet.Frame
	for i := range 300 {
		want := make([]byte, 14+i*i%65000)
		for k := range want {
			want[k] = byte(k*3 + i)
		}
		if _, err := tx.AllocWait(f[:], len(want)); err != nil {
			t.Fatal(err)
		}
		f[0].CopyFrom(want)
		if _, err := tx.SendWait(f[:]); err != nil {
			t.Fatal(err)
		}
		if _, err := rx.Receive(f[:]); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, f[0].Len())
		f[0].CopyTo(got)
		if string(got) != string(want) {
			t.Fatalf("frame %d: %d bytes came back as %d others", i, len(want), len(got))
		}
		rx.Release(f[:])
	}
}

// A killed frontend leaves its state in xenstore. The next one connects nevertheless.
func TestAKilledFrontendComesBack(t *testing.T) {
	m := newServingMachine(t)
	var dev *pvnet.Device
	for round := range 5 {
		front := m.startFrontend("send", 500)
		if dev == nil {
			dev = m.awaitDevice()
			rx, err := dev.OwnRX(0)
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				frames := make([]pvnet.Frame, 32)
				for {
					n, err := rx.Receive(frames)
					if err != nil {
						return
					}
					rx.Release(frames[:n])
				}
			}()
		}
		before := dev.Stats().RX
		for end := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Millisecond) {
			now := dev.Stats().RX
			if now.Get(telemetry.Packets) > before.Get(telemetry.Packets)+1000 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("round %d: no frames", round)
			}
		}
		if round == 4 {
			front.stop()
			break
		}
		front.kill()
	}
}

func BenchmarkProcesses(b *testing.B) {
	for _, size := range []int{64, 1500, 65535} {
		for _, mode := range []string{"send", "sink"} {
			name := map[string]string{"send": "front-to-back", "sink": "back-to-front"}[mode]
			b.Run(fmt.Sprintf("%s/size=%d/batch=32", name, size), func(b *testing.B) {
				m := newServingMachine(b)
				front := m.startFrontend(mode, size)
				defer front.stop()
				tx, rx := ownHalves(b, m.awaitDevice())
				frames := make([]pvnet.Frame, 32)
				moved := 0
				for b.Loop() {
					var n int
					var err error
					if mode == "send" {
						n, err = rx.Receive(frames)
						rx.Release(frames[:n])
					} else if n, err = tx.AllocWait(frames, size); err == nil {
						_, err = tx.SendWait(frames[:n])
					}
					if err != nil {
						b.Fatal(err)
					}
					moved += n
				}
				ns := float64(b.Elapsed().Nanoseconds()) / float64(moved)
				b.ReportMetric(ns, "ns/frame")
				b.ReportMetric(1e9/ns, "frames/s")
				b.ReportMetric(float64(size)*8/ns, "Gbit/s")
			})
		}
	}
}

// A connection to xenstore over the quota is refused with the name of the quota.
func TestTheQuotaOfConnectionsIsNamed(t *testing.T) {
	m := newMachine(t)
	dom, err := emu.Join(t.Context(), m.socket, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer dom.Destroy()
	n := 0
	for ; ; n++ {
		c, err := xenstore.Dial(t.Context(), dom.Store, xenstore.Config{})
		if err != nil {
			if !strings.Contains(err.Error(), "too many connections") || !strings.Contains(err.Error(), "Quota.Connections") {
				t.Error(err)
			}
			break
		}
		defer c.Close()
		if _, err := c.Directory(t.Context(), "device"); err != nil {
			t.Fatalf("connection %d: %v", n, err)
		}
	}
	if n != 16 {
		t.Errorf("%d connections", n)
	}
}
