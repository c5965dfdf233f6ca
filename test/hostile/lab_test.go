// Package hostile attacks both ends of a vif with peers that write the wire format by
// hand. Each attack must end in one of four verdicts: the frame is dropped and counted,
// its slots are answered with ERROR, the device ends and nothing else does, or the
// connection is refused. Afterwards nothing of the attacker is left.
//
// For a verdict of Linux the test cites the function of drivers/net/xen-netback/netback.c
// or drivers/net/xen-netfront.c.
package hostile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server"
	"barevif/xenbus/xenstore/server/labtest"
)

const (
	frontID hypercall.DomID = 1
	backID  hypercall.DomID = 2
)

// A lab is a machine with a guest, a driver domain and a toolstack.
type lab struct {
	*labtest.Lab
	t                    testing.TB
	store                *server.Store
	guest, drv           *emu.Domain
	tools                *xenstore.Client
	guestStore, drvStore *xenstore.Client // clients of the guest and the driver domain, for raw peers
	log                  *journal
	nextVif              uint32
	devs                 <-chan *pvnet.Device
	stop                 func()
}

func newLab(t testing.TB, cfg emu.Config) *lab {
	t.Helper()
	if cfg.Mapped && runtime.GOOS != "linux" {
		t.Skip("memory that a peer rewrites at any moment needs Linux's memfds")
	}
	m := labtest.New(t, cfg)
	l := &lab{Lab: m, t: t, store: m.Store, tools: m.Tools, log: new(journal)}
	l.guest, l.drv = l.domain(frontID), l.domain(backID)
	l.guestStore, l.drvStore = l.client(l.guest), l.client(l.drv)
	t.Cleanup(func() {
		l.stopServing()
		l.guestStore.Close()
		l.drvStore.Close()
	})
	return l
}

// newServingLab is newLab, with our backend served in the driver domain.
func newServingLab(t testing.TB) *lab {
	t.Helper()
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{})
	return l
}

// inVirtualTime runs a test in a bubble where time passes only while all goroutines wait. It
// measures intended delays, however busy the machine is, so its limits are exact.
func inVirtualTime(t *testing.T, test func(t *testing.T)) { synctest.Test(t, test) }

func stacks() []byte {
	buf := make([]byte, 1<<17)
	return buf[:runtime.Stack(buf, true)]
}

func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), waitLimit)
	t.Cleanup(cancel)
	return c
}

// waitLimit bounds every wait of a test; no test comes near it. The machine may be busy.
const waitLimit = 2 * time.Minute

func deadline() time.Time { return time.Now().Add(waitLimit) }

func (l *lab) domain(id hypercall.DomID) *emu.Domain {
	l.t.Helper()
	return l.Domain(id)
}

func (l *lab) client(d *emu.Domain) *xenstore.Client {
	l.t.Helper()
	c, err := xenstore.Dial(ctx(l.t), d.Store, xenstore.Config{Pipeline: 8})
	if err != nil {
		l.t.Fatal(err)
	}
	return c
}

// addVif adds the next vif.
func (l *lab) addVif() toolstack.Vif {
	l.t.Helper()
	v := toolstack.Vif{Front: frontID, Back: backID, ID: l.nextVif, MAC: [6]byte{0, 0x16, 0x3e, 0, 0, byte(l.nextVif)}}
	l.nextVif++
	if err := toolstack.Add(ctx(l.t), l.tools, v); err != nil {
		l.t.Fatal(err)
	}
	return v
}

func (l *lab) removeVif(v toolstack.Vif) {
	l.t.Helper()
	if err := toolstack.Remove(ctx(l.t), l.tools, v); err != nil {
		l.t.Error(err)
	}
}

// await waits until the node at path has one of values.
func (l *lab) await(path string, values ...string) string {
	l.t.Helper()
	w, err := l.tools.Watch(ctx(l.t), path)
	if err != nil {
		l.t.Fatal(err)
	}
	defer w.Close()
	limit := time.After(waitLimit)
	last := ""
	for {
		select {
		case <-w.C():
			last, _ = l.store.Read(path)
			for _, v := range values {
				if last == v {
					return v
				}
			}
		case <-limit:
			l.t.Fatalf("%s is %q, not one of %q\n%s", path, last, values, stacks())
		}
	}
}

// write sets keys below dir in one transaction of c, the state last.
func (l *lab) write(c *xenstore.Client, dir string, keys xenstore.Values, state string) {
	l.t.Helper()
	err := c.Transact(ctx(l.t), func(tx xenstore.Tx) error {
		for k, v := range keys {
			if err := tx.Write(dir+"/"+k, v); err != nil {
				return fmt.Errorf("%s: %w", k, err)
			}
		}
		if state == "" {
			return nil
		}
		return tx.Write(dir+"/state", state)
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// serve starts to serve the vifs of the driver domain.
func (l *lab) serve(cfg pvnet.ServeConfig) {
	l.t.Helper()
	cfg.Hotplug = true
	cfg.Logger = slog.New(l.log)
	c, cancel := context.WithCancel(context.Background())
	devs := make(chan *pvnet.Device, 256)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := pvnet.Serve(c, l.drv, cfg, func(d *pvnet.Device) { devs <- d }); !errors.Is(err, context.Canceled) {
			l.t.Errorf("Serve: %v", err)
		}
	}()
	l.devs = devs
	l.stop = func() { cancel(); <-done }
}

func (l *lab) stopServing() {
	if l.stop != nil {
		l.stop()
		l.stop = nil
	}
}

// A sink keeps the frames that a device receives.
type sink struct {
	dev    *pvnet.Device
	frames chan []byte
	ended  chan error
	seen   atomic.Uint64 // frames seen so far; counted before the frame is in frames
}

func listen(d *pvnet.Device) *sink {
	s := &sink{dev: d, frames: make(chan []byte, 4096), ended: make(chan error, 1)}
	go func() {
		s.ended <- d.Listen(context.Background(), func(f pvnet.Frame) {
			s.seen.Add(1)
			b := make([]byte, f.Len())
			f.CopyTo(b)
			select {
			case s.frames <- b:
			default:
			}
		})
	}()
	return s
}

// stats returns the counters of the device once they show every frame seen so far. Its
// listener publishes them every 32 frames and when it waits, so a frame may be here before
// its count is.
func (s *sink) stats(t testing.TB) telemetry.Stats {
	t.Helper()
	for end := deadline(); ; runtime.Gosched() {
		st := s.dev.Stats()
		all, seen := st.RX.Get(telemetry.Packets), s.seen.Load()
		if seen == all {
			return st
		}
		if time.Now().After(end) {
			t.Fatalf("%d frames seen, %d counted", seen, all)
		}
	}
}

// requireFrame requires that the next frame is want.
func (s *sink) requireFrame(t testing.TB, want []byte) {
	t.Helper()
	if got := wait(t, s.frames); !bytes.Equal(got, want) {
		t.Fatalf("%d bytes arrived as %d others", len(want), len(got))
	}
}

// drain discards the received frames once all of them have come: in virtual time, when everybody
// waits. An answered frame may not be counted yet.
func (s *sink) drain() {
	synctest.Wait()
	for len(s.frames) > 0 {
		<-s.frames
	}
}

// A guest is a raw frontend, in the guest, of our backend.
type guest struct {
	*raw.Front
	l          *lab
	v          toolstack.Vif
	dev        *pvnet.Device
	sink       *sink
	before     emu.Ledger
	errorLines int
	more       []func() error // closes what else it shares with the backend
}

// newGuest adds a vif and waits until our backend is in InitWait for it.
func (l *lab) newGuest() *guest {
	l.t.Helper()
	g := &guest{l: l, errorLines: l.log.count(slog.LevelError)}
	g.v = l.addVif()
	g.dev = wait(l.t, l.devs)
	g.before = l.Ledger()
	if g.dev.ID() != strconv.Itoa(int(g.v.ID)) {
		l.t.Fatalf("device %s came for vif %d", g.dev.ID(), g.v.ID)
	}
	g.awaitBackend("2")
	var err error
	if g.Front, err = raw.NewFront(l.guest, backID, 32, true); err != nil {
		l.t.Fatal(err)
	}
	return g
}

// attackBackend returns a connected guest with a sink.
func (l *lab) attackBackend() *guest {
	l.t.Helper()
	g := l.newGuest()
	g.connect()
	return g
}

func (g *guest) connect() {
	g.l.t.Helper()
	g.attach()
	g.sink = listen(g.dev)
}

// attach publishes the keys of the rings and waits until our backend has mapped them.
func (g *guest) attach() {
	g.l.t.Helper()
	g.l.write(g.l.guestStore, g.v.FrontDir(), g.Keys(), "4")
	g.awaitBackend("4")
	waitLinkUp(g.l.t, g.dev)
}

func (g *guest) setState(s string) { g.l.write(g.l.guestStore, g.v.FrontDir(), nil, s) }

// awaitBackend waits until the state of our backend is one of states.
func (g *guest) awaitBackend(states ...string) string {
	g.l.t.Helper()
	return g.l.await(g.v.BackDir()+"/state", states...)
}

// closeHandshake closes the connection as a correct frontend does. The backend may have
// closed it already.
func (g *guest) closeHandshake() {
	g.l.t.Helper()
	g.setState("5")
	g.awaitBackend("5", "6")
	g.setState("6")
	g.awaitBackend("6")
}

// disconnect closes the connection as a correct frontend does, and requires everything back.
func (g *guest) disconnect() {
	g.l.t.Helper()
	g.closeHandshake()
	g.removeVif()
}

// removeVif removes the vif of a backend that has closed, and requires everything back.
func (g *guest) removeVif() {
	g.l.t.Helper()
	g.l.removeVif(g.v)
	wait(g.l.t, g.dev.Done())
	if g.sink != nil {
		wait(g.l.t, g.sink.ended)
	}
	if why, err := g.l.store.Read(fmt.Sprintf("/local/domain/%d/error/backend/vif/%d/%d/error", backID, frontID, g.v.ID)); err == nil {
		g.l.t.Errorf("the vif is gone, and the reason why it did not connect is still there: %s", why)
	}
	for _, end := range append(g.more, g.Close) {
		if err := end(); err != nil {
			g.l.t.Errorf("the backend kept something of its frontend's: %v", err)
		}
	}
	if err := labtest.Comes(func() error { // a Write that is about to return still has a buffer
		if now := g.l.Ledger(); now != g.before {
			return fmt.Errorf("left behind: %+v, before: %+v", now, g.before)
		}
		return nil
	}); err != nil {
		g.l.t.Error(err)
	}
}

// requirePeerError requires that the attack ends the device: with a PeerError that says want, one
// line in the log, and nothing left.
func (g *guest) requirePeerError(ring, want string) {
	g.l.t.Helper()
	g.awaitBackend("5", "6")
	g.setState("6")
	wait(g.l.t, g.dev.Done())
	err := wait(g.l.t, g.sink.ended)
	g.sink.ended <- err
	var pe *pvnet.PeerError
	if !errors.As(err, &pe) || pe.Ring != ring || !strings.Contains(pe.Reason, want) || !errors.Is(err, pvnet.ErrDisconnected) {
		g.l.t.Errorf("Listen ended with %v, want a PeerError of the %s ring: %q", err, ring, want)
	}
	if _, err := g.dev.Write(make([]byte, 60)); !errors.As(err, &pe) {
		g.l.t.Errorf("Write after it: %v", err)
	}
	if n := g.l.log.count(slog.LevelError) - g.errorLines; n != 1 {
		g.l.t.Errorf("%d lines of errors, want 1\n%s", n, g.l.log)
	}
	st := g.dev.Stats()
	if n := st.RX.Get(telemetry.Violations) + st.TX.Get(telemetry.Violations); n < 1 || n > 4 {
		g.l.t.Errorf("%d violations counted", n)
	}
	g.removeVif()
}

// awaitAnswers takes n responses of our backend from the tx ring.
func (g *guest) awaitAnswers(n int) []raw.TxRsp {
	g.l.t.Helper()
	rsp, err := g.Answers(n, deadline())
	if err != nil {
		g.l.t.Fatal(err)
	}
	return rsp
}

// awaitReceived takes n responses of our backend from the rx ring.
func (g *guest) awaitReceived(n int) []raw.RxRsp {
	g.l.t.Helper()
	rsp, err := g.Received(n, deadline())
	if err != nil {
		g.l.t.Fatal(err)
	}
	return rsp
}

// requireTraffic requires that a frame of the guest arrives, and a frame to it.
func (g *guest) requireTraffic() {
	g.l.t.Helper()
	for len(g.sink.frames) > 0 {
		<-g.sink.frames
	}
	want := pattern(200, int(g.TxProd))
	copy(g.Pages.Page(31), want)
	g.Put(g.Req(31, 0, 200, 0).Words())
	g.Push()
	rsp, err := g.Answers(1, deadline())
	if err != nil || rsp[0] != (raw.TxRsp{ID: 31, Status: raw.Okay}) {
		g.l.t.Fatalf("a correct frame was answered %v, %v", rsp, err)
	}
	g.sink.requireFrame(g.l.t, want)
	if g.RxProd == g.RxCons {
		g.Post(1)
	}
	if _, err := g.dev.Write(want); err != nil {
		g.l.t.Fatal(err)
	}
	at := int(g.RxCons % raw.Size)
	in, err := g.Received(1, deadline())
	if err != nil || in[0].Status != 200 || !bytes.Equal(g.Posted.Page(at % 32)[:200], want) {
		g.l.t.Fatalf("a frame to the guest came as %v, %v", in, err)
	}
}

// waitLinkUp waits until the link is up.
func waitLinkUp(t testing.TB, d *pvnet.Device) {
	t.Helper()
	for ev := range d.Links(ctx(t)) {
		if ev.Up {
			return
		}
	}
	t.Fatalf("the link did not come up\n%s", stacks())
}

func wait[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(waitLimit):
		t.Fatalf("nothing came\n%s", stacks())
		panic("unreachable")
	}
}

// eventually asks until ok holds, for conditions that no event announces.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(waitLimit); !ok(); time.Sleep(50 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: never", what)
		}
	}
}

// pattern returns a frame of n bytes and of no known protocol; its bytes depend on their
// position and on seed.
func pattern(n, seed int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*5 + i>>8 + seed*17)
	}
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5})
	return b
}

// A journal keeps log lines.
type journal struct {
	mu    sync.Mutex
	lines []string
	by    map[slog.Level]int
}

func (j *journal) Enabled(context.Context, slog.Level) bool { return true }
func (j *journal) WithAttrs([]slog.Attr) slog.Handler       { return j }
func (j *journal) WithGroup(string) slog.Handler            { return j }

func (j *journal) Handle(_ context.Context, r slog.Record) error {
	line := r.Level.String() + " " + r.Message
	r.Attrs(func(a slog.Attr) bool { line += " " + a.String(); return true })
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.by == nil {
		j.by = make(map[slog.Level]int)
	}
	j.by[r.Level]++
	j.lines = append(j.lines, line)
	return nil
}

func (j *journal) count(l slog.Level) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.by[l]
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.lines, "\n")
}

func (j *journal) total() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.lines)
}
