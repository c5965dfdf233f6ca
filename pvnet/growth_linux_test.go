// The race detector needs memory of its own, which would be measured too.
//go:build !race

package pvnet_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/emu/emutest"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
)

// backendOf is an environment variable that makes the test's program only a backend, at
// the emulated host whose socket it names.
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

// serveIn serves until in ends. It answers each line with a held of this process.
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

// A held is what a serving process holds: KiB, and the number of goroutines.
type held struct{ anon, shared, heap, stacks, goroutines int }

// less returns how much each of n vifs added to before.
func (h held) less(before held, n int) held {
	return held{(h.anon - before.anon) / n, (h.shared - before.shared) / n, (h.heap - before.heap) / n,
		(h.stacks - before.stacks) / n, (h.goroutines - before.goroutines) / n}
}

// A hostedBackend is an emulated host whose backends run in another process.
type hostedBackend struct {
	host  *emu.Host
	store *server.Store
	tools *xenstore.Client
	ask   func() held
	vifs  int // how many were added
	front []*pvnet.Device
}

func newHostedBackend(t testing.TB) *hostedBackend {
	t.Helper()
	p := &hostedBackend{store: server.New(server.Config{Privileged: []hypercall.DomID{backDomain}})}
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
	if p.tools, err = xenstore.Dial(t.Context(), p.domain(t, 0).Store, xenstore.Config{Pipeline: 8}); err != nil {
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

func (p *hostedBackend) domain(t testing.TB, id hypercall.DomID) *emu.Domain {
	t.Helper()
	d, err := p.host.NewDomain(id)
	if err != nil {
		t.Fatal(err)
	}
	p.store.Introduce(id)
	return d
}

// add makes n vifs and waits until the backend waits for their frontends.
func (p *hostedBackend) add(t testing.TB, n int) (guests []*emu.Domain) {
	t.Helper()
	for range n {
		p.vifs++
		id := backDomain + hypercall.DomID(p.vifs)
		guests = append(guests, p.domain(t, id))
		if err := toolstack.Home(t.Context(), p.tools, id); err != nil {
			t.Fatal(err)
		}
		v := toolstack.Vif{Front: id, Back: backDomain, MAC: [6]byte{2, 0, 0, 0, byte(p.vifs), 1}}
		if err := toolstack.Add(t.Context(), p.tools, v); err != nil {
			t.Fatal(err)
		}
		soon(t, "shown to its frontend", func() bool {
			state, _ := p.store.Read(v.BackDir() + "/state")
			return state == "2"
		})
	}
	return guests
}

// connect connects the vifs of guests, all at once.
func (p *hostedBackend) connect(t testing.TB, guests []*emu.Domain) {
	t.Helper()
	front, errs := make([]*pvnet.Device, len(guests)), make([]error, len(guests))
	var wg sync.WaitGroup
	for i, dom := range guests {
		wg.Go(func() { front[i], errs[i] = pvnet.Connect(t.Context(), dom, "0", pvnet.Config{}) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	p.front = append(p.front, front...)
}

// An idle backend holds little memory: it touches pages only when traffic needs them.
func TestAnIdleBackendHoldsLessThanAMiB(t *testing.T) {
	p := newHostedBackend(t)
	p.connect(t, p.add(t, 1)) // once, so that its one-time costs do not count
	before := p.ask()
	const n = 8
	p.connect(t, p.add(t, n))
	each := p.ask().less(before, n)
	t.Logf("each vif: %+v", each)
	if all := each.anon + each.shared; all > 1024 {
		t.Errorf("an idle backend holds %d KiB", all)
	}
}

// BenchmarkIdleVif measures how much a process that serves many idle vifs holds for each
// of them.
func BenchmarkIdleVif(b *testing.B) {
	p := newHostedBackend(b)
	before := p.ask()
	const n = 64
	var each held
	for b.Loop() {
		if p.front == nil {
			p.connect(b, p.add(b, n))
			time.Sleep(100 * time.Millisecond) // until the last one has ended
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

// BenchmarkConnect64Processes connects 64 vifs at once, whose backends run in another
// process and wait for their frontends.
func BenchmarkConnect64Processes(b *testing.B) {
	p := newHostedBackend(b)
	p.connect(b, p.add(b, 1))
	for b.Loop() {
		b.StopTimer()
		guests := p.add(b, 64)
		before := p.store.Stats()
		b.StartTimer()
		p.connect(b, guests)
		b.StopTimer()
		after := p.store.Stats()
		b.ReportMetric(float64(after.Requests-before.Requests)/64, "requests/vif")
		b.ReportMetric(float64(after.Conflicts-before.Conflicts), "conflicts")
		var wg sync.WaitGroup
		for _, d := range p.front[1:] {
			wg.Go(d.Disconnect)
		}
		wg.Wait()
		p.front = p.front[:1]
		for _, dom := range guests {
			v := toolstack.Vif{Front: dom.ID(), Back: backDomain}
			if err := toolstack.Remove(b.Context(), p.tools, v); err != nil {
				b.Fatal(err)
			}
			dom.Destroy()
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/64vifs")
}
