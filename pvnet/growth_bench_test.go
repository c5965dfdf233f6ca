package pvnet_test

import (
	"context"
	"errors"
	"io"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
)

const backDomain = hypercall.DomID(1)

// A fleet is a machine with mmapped memory, as between processes, and many vifs: their
// backends are in one domain, their frontends in a domain each.
type fleet struct {
	machine *emu.Machine
	store   *server.Store
	fronts  []hypercall.Domain
	backs   chan *pvnet.Device
	front   []*pvnet.Device
	back    []*pvnet.Device
	serving chan error
	stop    context.CancelFunc
}

func newFleet(b testing.TB, n int) *fleet {
	b.Helper()
	f := &fleet{store: server.New(server.Config{Privileged: []hypercall.DomID{backDomain}})}
	var err error
	f.machine, err = emu.New(emu.Config{
		Mapped: true,
		Store:  func(dom hypercall.DomID, c io.ReadWriteCloser) { f.store.ServeConn(c, dom) },
	})
	if errors.Is(err, errors.ErrUnsupported) {
		b.Skip(err)
	}
	if err != nil {
		b.Fatal(err)
	}
	domain := func(id hypercall.DomID) *emu.Domain {
		d, err := f.machine.NewDomain(id)
		if err != nil {
			b.Fatal(err)
		}
		f.store.Introduce(id)
		return d
	}
	tools, err := xenstore.Dial(b.Context(), domain(0).Store, xenstore.Config{Pipeline: 8})
	if err != nil {
		b.Fatal(err)
	}
	defer tools.Close()
	back := domain(backDomain)
	if err := toolstack.Home(b.Context(), tools, backDomain); err != nil {
		b.Fatal(err)
	}
	for i := range n {
		id := backDomain + 1 + hypercall.DomID(i)
		f.fronts = append(f.fronts, domain(id))
		if err := toolstack.Home(b.Context(), tools, id); err != nil {
			b.Fatal(err)
		}
		if err := toolstack.Add(b.Context(), tools, toolstack.Vif{
			Front: id, Back: backDomain, MAC: [6]byte{2, 0, 0, 0, byte(id), 1},
		}); err != nil {
			b.Fatal(err)
		}
	}
	var serving context.Context
	serving, f.stop = context.WithCancel(context.Background())
	f.backs, f.serving = make(chan *pvnet.Device, n), make(chan error, 1)
	go func() {
		f.serving <- pvnet.Serve(serving, back, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) { f.backs <- d })
	}()
	return f
}

// connect brings every link up, one after another or all at once.
func (f *fleet) connect(b testing.TB, atOnce bool) {
	b.Helper()
	f.front = make([]*pvnet.Device, len(f.fronts))
	errs := make(chan error, len(f.fronts))
	for i, dom := range f.fronts {
		one := func() {
			var err error
			f.front[i], err = pvnet.Connect(b.Context(), dom, "0", pvnet.Config{})
			errs <- err
		}
		if atOnce {
			go one()
		} else {
			one()
		}
	}
	for range f.fronts {
		if err := <-errs; err != nil {
			b.Fatal(err)
		}
	}
	for range f.fronts {
		d := <-f.backs
		await(b, d, true)
		f.back = append(f.back, d)
	}
}

func (f *fleet) close(b testing.TB) {
	b.Helper()
	for _, d := range f.front {
		if d != nil {
			go d.Disconnect()
		}
	}
	for _, d := range f.front {
		if d != nil {
			<-d.Done()
		}
	}
	f.stop()
	<-f.serving
	f.machine.Close()
	f.store.Close()
}

// BenchmarkConnect64 connects 64 vifs whose directories exist: one after another, as a
// program that starts guests in turn does, and all at once, as on a booting host.
func BenchmarkConnect64(b *testing.B) {
	for name, atOnce := range map[string]bool{"in-turn": false, "at-once": true} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				f := newFleet(b, 64)
				before := f.store.Stats()
				b.StartTimer()
				f.connect(b, atOnce)
				b.StopTimer()
				after := f.store.Stats()
				b.ReportMetric(float64(after.Requests-before.Requests)/64, "requests/vif")
				b.ReportMetric(float64(after.Conflicts-before.Conflicts), "conflicts")
				b.ReportMetric(float64(after.RateLimited+after.Throttled), "held-up")
				f.close(b)
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/64vifs")
		})
	}
}
