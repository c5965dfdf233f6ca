// Package scale tests how many vifs one backend domain serves within the quotas of
// xenstored.
package scale

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry/logtest"
	"barevif/test/xenstored"
	"barevif/xenbus"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/server/labtest"
)

const (
	limit    = time.Minute
	backend  = hypercall.DomID(7)
	guests   = 50 // frontend domains: the stand-in for Xen supports no more
	vifCount = 250
)

// A host has a xenstore with Xen's default quotas, and a toolstack. There are no frontends:
// the toolstack writes their states.
type host struct {
	t     *testing.T
	ctx   context.Context
	dial  func(context.Context, hypercall.DomID) (io.ReadWriteCloser, error)
	tools *xenstore.Client
	emu   *emu.Machine
	back  *domain
	log   logtest.Log
}

// A domain is an emulated domain that uses the xenstore of dial.
type domain struct {
	*emu.Domain
	dial func(context.Context, hypercall.DomID) (io.ReadWriteCloser, error)
}

func (d *domain) Store(ctx context.Context) (io.ReadWriteCloser, error) { return d.dial(ctx, d.ID()) }

// onEachStore runs a test with the embedded xenstore and with Debian's.
func onEachStore(t *testing.T, test func(*testing.T, *host)) {
	for _, name := range []string{"embedded", "Debian"} {
		t.Run(name, func(t *testing.T) {
			m, err := emu.New(emu.Config{})
			if err != nil {
				t.Fatal(err)
			}
			h := &host{t: t, emu: m}
			if name == "Debian" {
				h.dial = xenstored.Start(t).Dial
			} else {
				h.dial = embeddedStore(t)
			}
			var cancel context.CancelFunc
			h.ctx, cancel = context.WithTimeout(context.Background(), limit)
			t.Cleanup(cancel)
			d, err := m.NewDomain(backend)
			if err != nil {
				t.Fatal(err)
			}
			h.back = &domain{d, h.dial}
			t.Cleanup(func() {
				if err := labtest.Comes(m.CheckClean); err != nil {
					t.Error(err)
				}
				m.Close()
			})
			h.tools = h.client(0)
			for id := hypercall.DomID(0); id <= backend+guests; id++ {
				if id != 0 {
					h.client(id).Close() // the connection makes the domain known to xenstore
				}
				h.must(toolstack.Home(h.ctx, h.tools, id))
			}
			test(t, h)
		})
	}
}

func embeddedStore(t *testing.T) func(context.Context, hypercall.DomID) (io.ReadWriteCloser, error) {
	s := server.New(server.Config{})
	t.Cleanup(func() { s.Close() })
	return func(_ context.Context, dom hypercall.DomID) (io.ReadWriteCloser, error) {
		s.Introduce(dom)
		ours, theirs := net.Pipe()
		go s.ServeConn(theirs, dom)
		return ours, nil
	}
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) client(dom hypercall.DomID) *xenstore.Client {
	h.t.Helper()
	c, err := xenstore.Dial(h.ctx, func(ctx context.Context) (io.ReadWriteCloser, error) { return h.dial(ctx, dom) }, xenstore.Config{})
	h.must(err)
	h.t.Cleanup(func() { c.Close() })
	return c
}

// nthVif returns the i-th vif. The vifs are dealt out to the guests in turn.
func nthVif(i int) toolstack.Vif {
	return toolstack.Vif{Front: backend + 1 + hypercall.DomID(i%guests), ID: uint32(i / guests), Back: backend, MAC: [6]byte{0, 0x16, 0x3e, 0, byte(i >> 8), byte(i)}}
}

// serve runs the backend until the test ends.
func (h *host) serve() {
	ctx, cancel := context.WithCancel(h.ctx)
	done := make(chan error, 1)
	go func() {
		done <- pvnet.Serve(ctx, h.back, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{
			Logger: h.log.Logger(), Queues: 2, StaticGrants: true, // so that every key is written
		}}, func(*pvnet.Device) {})
	}()
	h.t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) && h.ctx.Err() == nil {
			h.t.Errorf("Serve: %v", err)
		}
	})
}

// await waits until the backend has reached the state for each of the vifs.
func (h *host) await(state xenbus.State, vifs ...toolstack.Vif) {
	h.t.Helper()
	for _, v := range vifs {
		if got := h.awaitState(v, state); got != state {
			h.t.Fatalf("%s is %v, want %v\n%s", v.BackDir(), got, state, tail(h.log.String()))
		}
	}
}

func (h *host) awaitState(v toolstack.Vif, states ...xenbus.State) xenbus.State {
	h.t.Helper()
	w, err := h.tools.Watch(h.ctx, v.BackDir()+"/state")
	h.must(err)
	defer w.Close()
	for {
		text, err := h.tools.Read(h.ctx, v.BackDir()+"/state")
		h.must(err)
		n, _ := strconv.Atoi(text)
		for _, s := range states {
			if s == xenbus.State(n) {
				return s
			}
		}
		select {
		case <-w.C():
		case <-h.ctx.Done():
			return xenbus.State(n)
		}
	}
}

func tail(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}

func (h *host) setFrontend(v toolstack.Vif, s xenbus.State) {
	h.t.Helper()
	h.must(h.tools.Write(h.ctx, v.FrontDir()+"/state", fmt.Sprint(uint8(s))))
}

// A backend serves 250 vifs in a domain with xenstored's default quotas, if the toolstack
// makes room for the nodes that it writes itself. The backend notices each frontend.
func TestOneDomainServesManyVifs(t *testing.T) {
	onEachStore(t, func(t *testing.T, h *host) {
		vifs := make([]toolstack.Vif, vifCount)
		for i := range vifs {
			vifs[i] = nthVif(i)
			vifs[i].Room = true
			h.must(toolstack.Add(h.ctx, h.tools, vifs[i]))
		}
		h.serve()
		h.await(xenbus.InitWait, vifs...)
		for _, step := range []struct{ front, back xenbus.State }{
			{xenbus.Closing, xenbus.Closing}, {xenbus.Closed, xenbus.Closed}, {xenbus.Initialising, xenbus.InitWait},
		} {
			for _, v := range vifs {
				h.setFrontend(v, step.front)
			}
			h.await(step.back, vifs...)
		}
		// A vif that is removed and added again is served anew; the others stay.
		h.must(toolstack.Remove(h.ctx, h.tools, vifs[17]))
		h.must(toolstack.Add(h.ctx, h.tools, vifs[17]))
		h.await(xenbus.InitWait, vifs[17])
		if log := h.log.String(); strings.Contains(log, "WARN") {
			t.Error(tail(log))
		}
	})
}

// Without that room the quota of nodes is the limit; the toolstack has made most of them. The
// backend's log names the quota.
func TestTheQuotaOfNodesIsNamed(t *testing.T) {
	onEachStore(t, func(t *testing.T, h *host) {
		h.serve()
		served := 0
		var last toolstack.Vif
		for i := range vifCount {
			last = nthVif(i)
			h.must(toolstack.Add(h.ctx, h.tools, last))
			if h.awaitState(last, xenbus.InitWait, xenbus.Closed) != xenbus.InitWait {
				break
			}
			served++
		}
		t.Logf("%d vifs", served)
		if served < 50 || served == vifCount {
			t.Errorf("%d vifs are served", served)
		}
		for end := time.Now().Add(limit); !strings.Contains(h.log.String(), "--entry-nb"); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the log does not name the quota: %s", tail(h.log.String()))
			}
		}
	})
}

// The error of Connect names the quota that the backend has met.
func TestConnectNamesTheQuotaTheBackendMet(t *testing.T) {
	for room, want := range map[int]string{ // nodes that the backend may still make: one is its claim, and a transaction may not use the last one
		0: "quota of xenstore", 3: "--entry-nb",
	} {
		onEachStore(t, func(t *testing.T, h *host) {
			c := h.client(backend)
			h.must(toolstack.Add(h.ctx, h.tools, nthVif(0)))
			name := func(i int) string { return fmt.Sprintf("data/%d/%d", i/100, i%100) }
			i := 0
			for ; ; i++ {
				if err := c.Write(h.ctx, name(i), ""); errors.Is(err, xenstore.ErrQuota) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
			}
			for k := range room {
				h.must(c.Remove(h.ctx, name(i-1-k)))
			}
			c.Close()
			h.serve()
			h.await(xenbus.Closed, nthVif(0))
			d, err := h.emu.NewDomain(nthVif(0).Front)
			h.must(err)
			ctx, cancel := context.WithTimeout(h.ctx, time.Second)
			defer cancel()
			_, err = pvnet.Connect(ctx, &domain{d, h.dial}, "0", pvnet.Config{})
			if err == nil || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), want) {
				t.Errorf("Connect: %v", err)
			}
		})
	}
}

// When xenstored's quota of watches is full, a client merges its watches on other domains'
// nodes into one. Each of them still gets its events.
func TestWatchesBecomeOneAtTheQuota(t *testing.T) {
	onEachStore(t, func(t *testing.T, h *host) {
		var paths []string
		for i := range 200 {
			v := nthVif(i)
			h.must(toolstack.Add(h.ctx, h.tools, v))
			paths = append(paths, v.FrontDir()+"/state")
		}
		c := h.client(backend)
		var watches []*xenstore.Watch
		for _, path := range paths {
			w, err := c.Watch(h.ctx, path)
			h.must(err)
			watches = append(watches, w)
		}
		for i, w := range watches {
			for hears := false; !hears; { // skip earlier events
				h.must(h.tools.Write(h.ctx, paths[i], fmt.Sprint(i%7)))
				select {
				case <-w.C():
					hears = true
				case <-h.ctx.Done():
					t.Fatalf("watch %d hears nothing", i)
				}
			}
			dirty, all := w.Paths()
			if !all && (len(dirty) != 1 || dirty[0] != paths[i]) {
				t.Errorf("watch %d hears of %q", i, dirty)
			}
		}
		for _, w := range watches[1:] {
			h.must(w.Close())
		}
		h.must(h.tools.Write(h.ctx, paths[0], "0"))
		<-watches[0].C()

		// That frees room for many other watches. In the end the error names the quota.
		n := 0
		for {
			_, err := c.Watch(h.ctx, fmt.Sprint("data/", n))
			if err == nil {
				n++
				continue
			}
			if !errors.Is(err, xenstore.ErrQuota) || !strings.Contains(err.Error(), "--watch-nb") {
				t.Errorf("watch %d: %v", n, err)
			}
			break
		}
		if n < 100 {
			t.Errorf("only %d watches beside the one", n)
		}
	})
}
