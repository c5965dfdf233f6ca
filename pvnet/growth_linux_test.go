// The race detector takes memory of its own for what it sees.
//go:build !race

package pvnet_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
	"barevif/pvnet"
	"barevif/xenbus"
	"barevif/xenbus/store"
	"barevif/xenbus/toolstack"
)

// backendOf has the test's program be a backend and nothing else, at the emulated host
// whose socket it names.
const backendOf = "BAREVIF_PVNET_BACKEND_OF"

func TestMain(m *testing.M) {
	if path := os.Getenv(backendOf); path != "" {
		if err := serveIn(path, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serveIn serves until in ends. To each line it answers with what it holds.
func serveIn(path string, in io.Reader, out io.Writer) error {
	dom, err := emu.Join(context.Background(), path, backDomain)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	served := make(chan error, 1)
	go func() {
		served <- pvnet.Serve(ctx, dom, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) {
			go d.Listen(ctx, func(pvnet.Frame) {})
		})
	}()
	fmt.Fprintln(out, "serving")
	for lines := bufio.NewScanner(in); lines.Scan(); {
		debug.FreeOSMemory()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		anon, shared := 0, 0
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(status)) {
			name, value, _ := strings.Cut(line, ":")
			kib, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			switch name {
			case "RssAnon":
				anon = kib
			case "RssShmem":
				shared = kib
			}
		}
		fmt.Fprintln(out, anon, shared, m.HeapInuse>>10, m.StackInuse>>10, runtime.NumGoroutine())
	}
	cancel()
	<-served
	return nil
}

// A held is what a process that serves holds, in KiB but for the goroutines.
type held struct{ anon, shared, heap, stacks, goroutines int }

// less is what each of n vifs holds of it, where before there was none.
func (h held) less(before held, n int) held {
	return held{(h.anon - before.anon) / n, (h.shared - before.shared) / n, (h.heap - before.heap) / n,
		(h.stacks - before.stacks) / n, (h.goroutines - before.goroutines) / n}
}

// A pond is an emulated host whose backends are in a process of their own.
type pond struct {
	host  *emu.Host
	store *store.Store
	tools *xenbus.Client
	ask   func() held
	front []*pvnet.Device
}

func newPond(t testing.TB) *pond {
	t.Helper()
	p := &pond{store: store.New(store.Config{Privileged: []hypercall.DomID{backDomain}})}
	path := filepath.Join(emutest.SocketDir(t), "xen")
	var err error
	p.host, err = emu.Listen(path, emu.Config{
		Store: func(dom hypercall.DomID, c io.ReadWriteCloser) { p.store.ServeConn(c, dom) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.host.Close()
		p.store.Close()
	})
	if p.tools, err = xenbus.Dial(t.Context(), p.domain(t, 0).Store, xenbus.Config{Pipeline: 8}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.tools.Close() })
	p.store.Introduce(backDomain)
	if err := toolstack.Home(t.Context(), p.tools, backDomain); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env, cmd.Stderr = append(os.Environ(), backendOf+"="+path), os.Stderr
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
	lines := bufio.NewScanner(out)
	t.Cleanup(func() {
		for _, d := range p.front {
			d.Disconnect()
		}
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	line := func() string {
		if !lines.Scan() {
			t.Fatal("the backend's process has ended")
		}
		return lines.Text()
	}
	line()
	p.ask = func() (h held) {
		fmt.Fprintln(in)
		if _, err := fmt.Sscan(line(), &h.anon, &h.shared, &h.heap, &h.stacks, &h.goroutines); err != nil {
			t.Fatal(err)
		}
		return h
	}
	return p
}

func (p *pond) domain(t testing.TB, id hypercall.DomID) *emu.Domain {
	t.Helper()
	d, err := p.host.NewDomain(id)
	if err != nil {
		t.Fatal(err)
	}
	p.store.Introduce(id)
	return d
}

// connect makes n vifs and brings them up.
func (p *pond) connect(t testing.TB, n int) {
	t.Helper()
	for i := range n {
		id := backDomain + 1 + hypercall.DomID(len(p.front))
		dom := p.domain(t, id)
		if err := toolstack.Home(t.Context(), p.tools, id); err != nil {
			t.Fatal(err)
		}
		if err := toolstack.Add(t.Context(), p.tools, toolstack.Vif{
			Front: id, Back: backDomain, MAC: [6]byte{2, 0, 0, 0, byte(i), 1},
		}); err != nil {
			t.Fatal(err)
		}
		d, err := pvnet.Connect(t.Context(), dom, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		p.front = append(p.front, d)
	}
}

// An idle backend holds little: what its traffic needs at once is touched then.
func TestAnIdleBackendHoldsLessThanAMiB(t *testing.T) {
	p := newPond(t)
	p.connect(t, 1) // and what the first one takes of the process
	before := p.ask()
	const n = 8
	p.connect(t, n)
	each := p.ask().less(before, n)
	t.Logf("each vif: %+v", each)
	if all := each.anon + each.shared; all > 1024 {
		t.Errorf("an idle backend holds %d KiB", all)
	}
}

// BenchmarkIdleVif is what a process that serves many idle vifs holds for each.
func BenchmarkIdleVif(b *testing.B) {
	p := newPond(b)
	before := p.ask()
	const n = 64
	var each held
	for b.Loop() {
		if p.front == nil {
			p.connect(b, n)
			time.Sleep(100 * time.Millisecond) // the last one's end
		}
		each = p.ask().less(before, n)
	}
	b.ReportMetric(float64(each.anon+each.shared), "KiB/vif")
	b.ReportMetric(float64(each.heap), "heap-KiB/vif")
	b.ReportMetric(float64(each.stacks), "stack-KiB/vif")
	b.ReportMetric(float64(each.shared), "shared-KiB/vif")
	b.ReportMetric(float64(each.goroutines), "goroutines/vif")
	b.ReportMetric(0, "ns/op")
}
