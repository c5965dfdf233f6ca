package hostile

import (
	"context"
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/xenstore"
)

// maxConnections returns how many connections d allows a peer that never rests: five at
// once, five after shorter delays, then one per second. One more may be under way.
func maxConnections(d time.Duration) uint64 { return uint64(12 + d/time.Second) }

func heapBytes() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// set writes a state as fast as possible.
func (l *lab) setStateNow(c *xenstore.Client, dir, state string) {
	if err := c.Write(context.Background(), dir+"/state", state); err != nil {
		l.t.Fatal(err)
	}
}

// T25, T37: we set the pace of connections, pages, grants and log lines, not a frontend
// that does nothing but connect and close.
func TestT25FrontendThatTogglesForEver(t *testing.T) {
	inVirtualTime(t, testT25FrontendThatTogglesForEver)
}

func testT25FrontendThatTogglesForEver(t *testing.T) {
	l := newServingLab(t)
	honest, g := l.attackBackend(), l.attackBackend()
	before, bytes := heapBytes(), l.log.bytes()
	calls, stats := l.drv.Calls(), l.store.Stats()
	start := time.Now()
	toggles := 10000
	if testing.Short() {
		toggles = 1000
	}
	for n := range toggles {
		for _, s := range []string{"5", "6", "1", "4"} {
			l.setStateNow(l.guestStore, g.v.FrontDir(), s)
		}
		if n%500 == 0 {
			honest.requireTraffic()
		}
	}
	if n, most := l.drv.Calls().Map-calls.Map, 2*maxConnections(time.Since(start)); n > most {
		t.Errorf("%d pages mapped, want at most %d", n, most)
	}
	// Changes during a read, or during a delay, cause one further read.
	if n := int(l.store.Stats().Requests-stats.Requests) - 4*toggles; n > 2*4*toggles {
		t.Errorf("%d requests of ours for %d of the guest's writes", n, 4*toggles)
	}

	// Each step follows as soon as our state allows it: the fastest possible peer.
	calls, start = l.drv.Calls(), time.Now()
	used, known := cpuTime(t)
	for time.Since(start) < 3*time.Second {
		g.setState("6")
		g.awaitBackend("6")
		g.setState("1")
		g.awaitBackend("2")
		g.setState("4")
		g.awaitBackend("4", "5")
	}
	spent := time.Since(start)
	if n, most := l.drv.Calls().Memory-calls.Memory, 2*maxConnections(spent); n > most {
		t.Errorf("pages made %d times in %v, want at most %d", n, spent, most)
	}
	if now, _ := cpuTime(t); known && now-used > spent/4 {
		t.Errorf("%v of %v used", now-used, spent)
	}
	if n := l.log.bytes() - bytes; n > 4000 {
		t.Errorf("%d bytes of log\n%s", n, l.log)
	}
	honest.requireTraffic()
	if now := heapBytes(); now > before+16<<20 {
		t.Errorf("%d bytes on the heap, %d before", now, before)
	}

	// The next frontend is served.
	g.closeHandshake()
	eventually(t, "rings let go", func() bool { return l.Ledger().Mappings == 2 }) // the neighbour's mappings remain
	g.reopen()
	start = time.Now()
	g.attach()
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("it took %v to connect", d)
	}
	for len(g.sink.frames) > 0 {
		<-g.sink.frames
	}
	g.requireTraffic()
	if st := honest.dev.Stats(); st.RX.Get(telemetry.RescuedWakeups)+st.TX.Get(telemetry.RescuedWakeups) != 0 {
		t.Error("a neighbour missed an event")
	}
	l.closeAll([]*guest{g, honest})
}

func TestT25BackendThatTogglesForEver(t *testing.T) {
	inVirtualTime(t, testT25BackendThatTogglesForEver)
}

func testT25BackendThatTogglesForEver(t *testing.T) {
	l := newLab(t, emu.Config{})
	drv := l.attackFrontend(pvnet.Config{})
	drv.requireTraffic()
	if err := drv.Close(); err != nil { // the backend has nothing mapped
		t.Fatal(err)
	}
	before, bytes := heapBytes(), l.log.bytes()
	calls, start := l.guest.Calls(), time.Now()
	toggles := 10000
	if testing.Short() {
		toggles = 1000
	}
	for n := range toggles {
		states := []string{"5", "6", "2", "4"}
		if n%2 == 0 { // the link goes up and down without a write of ours
			states = []string{"3", "4", "3", "4"}
		}
		for _, s := range states {
			l.setStateNow(l.drvStore, drv.v.BackDir(), s)
		}
	}
	// Each of our connections has three shares.
	if n, most := l.guest.Calls().Share-calls.Share, 3*maxConnections(time.Since(start)); n > most {
		t.Errorf("pages granted %d times, want at most %d", n, most)
	}
	calls, start = l.guest.Calls(), time.Now()
	used, known := cpuTime(t)
	for time.Since(start) < 3*time.Second {
		drv.setState("5")
		drv.awaitFrontend("6", "1")
		drv.setState("6")
		drv.awaitFrontend("1")
		drv.setState("2")
		drv.awaitFrontend("4")
		drv.setState("4")
	}
	spent := time.Since(start)
	if n, most := l.guest.Calls().Share-calls.Share, 3*maxConnections(spent); n > most {
		t.Errorf("pages granted %d times in %v, want at most %d", n, spent, most)
	}
	if now, _ := cpuTime(t); known && now-used > spent/4 {
		t.Errorf("%v of %v used", now-used, spent)
	}
	if n := l.log.bytes() - bytes; n > 4000 {
		t.Errorf("%d bytes of log\n%s", n, l.log)
	}
	if now := heapBytes(); now > before+16<<20 {
		t.Errorf("%d bytes on the heap, %d before", now, before)
	}
	drv.setState("5")
	drv.awaitFrontend("6", "1")
	drv.setState("6")
	drv.awaitFrontend("1")
	drv.reconnect()
	drv.requireTraffic()
	drv.disconnect()
}

// A correct peer that reconnects a few times is connected again at once.
func TestT25OrderlyReconnectsAreNotSlowedDown(t *testing.T) {
	inVirtualTime(t, testT25OrderlyReconnectsAreNotSlowedDown)
}

func testT25OrderlyReconnectsAreNotSlowedDown(t *testing.T) {
	l := newServingLab(t)
	g := l.newGuest()
	start := time.Now()
	for n := range 5 {
		if n > 0 {
			g.closeHandshake()
			g.reopen()
		}
		g.attach()
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("5 connections took %v", d)
	}
	g.sink = listen(g.dev)
	g.requireTraffic()
	g.disconnect()
}

func (j *journal) bytes() (n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, line := range j.lines {
		n += len(line) + 1
	}
	return n
}

// makeReadOnly lets dom only read path, until allow is called.
func (l *lab) makeReadOnly(path string, dom hypercall.DomID) (allow func()) {
	l.t.Helper()
	if _, err := l.store.Read(path); err != nil {
		if err := l.tools.Write(ctx(l.t), path, ""); err != nil {
			l.t.Fatal(err)
		}
	}
	perms, err := l.tools.Perms(ctx(l.t), path)
	if err == nil {
		err = l.tools.SetPerms(ctx(l.t), path, xenstore.Perm{Access: xenstore.None}, xenstore.Perm{Dom: dom, Access: xenstore.ReadOnly})
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return func() {
		if err := l.tools.SetPerms(ctx(l.t), path, perms...); err != nil {
			l.t.Fatal(err)
		}
	}
}

// refused counts the attempts at a step that keeps failing: it is tried at once, after
// one second, and after two more.
func (l *lab) requireBackoff(line string) {
	l.t.Helper()
	eventually(l.t, "a refusal", func() bool { return strings.Contains(l.log.String(), line) })
	lines, requests := l.log.count(slog.LevelWarn), l.store.Stats().Requests
	time.Sleep(2500 * time.Millisecond)
	if n := l.log.count(slog.LevelWarn) - lines; n > 1 {
		l.t.Errorf("%d warnings more\n%s", n, l.log)
	}
	if n := l.store.Stats().Requests - requests; n > 45 {
		l.t.Errorf("%d requests", n)
	}
}

// T24: a write that xenstore refuses is repeated, at growing intervals.
func TestT24StatesThatXenstoreRefuses(t *testing.T) {
	inVirtualTime(t, testT24StatesThatXenstoreRefuses)
}

func testT24StatesThatXenstoreRefuses(t *testing.T) {
	l := newLab(t, emu.Config{})
	drv := l.attackFrontend(pvnet.Config{})
	drv.requireTraffic()
	allow := l.makeReadOnly(drv.v.FrontDir()+"/state", frontID)
	drv.setState("5")
	l.requireBackoff("cannot write the state")
	allow()
	drv.awaitFrontend("6")
	if err := drv.Close(); err != nil {
		t.Error(err)
	}
	drv.setState("6")
	drv.awaitFrontend("1")
	drv.reconnect()
	drv.requireTraffic()
	drv.disconnect()
}

func TestT24FeaturesThatXenstoreRefuses(t *testing.T) {
	inVirtualTime(t, testT24FeaturesThatXenstoreRefuses)
}

func testT24FeaturesThatXenstoreRefuses(t *testing.T) {
	l := newLab(t, emu.Config{})
	v := l.addVif()
	allow := l.makeReadOnly(v.BackDir()+"/feature-sg", backID)
	l.serve(pvnet.ServeConfig{})
	dev := wait(t, l.devs)
	l.requireBackoff("cannot publish features")
	warnings := l.log.count(slog.LevelWarn)
	for range 10 { // nor if the frontend writes the state that it is in
		l.setStateNow(l.guestStore, v.FrontDir(), "1")
		time.Sleep(10 * time.Millisecond)
	}
	if n := l.log.count(slog.LevelWarn) - warnings; n > 1 {
		t.Errorf("%d warnings for a state written again\n%s", n, l.log)
	}
	for range 1000 { // the frontend cannot speed it up
		for _, s := range []string{"4", "1"} {
			l.setStateNow(l.guestStore, v.FrontDir(), s)
		}
	}
	if n := l.log.count(slog.LevelWarn); n > 25 {
		t.Errorf("%d warnings\n%s", n, l.log)
	}
	allow()
	l.setStateNow(l.guestStore, v.FrontDir(), "6") // a new state
	l.await(v.BackDir()+"/state", "6")
	l.setStateNow(l.guestStore, v.FrontDir(), "1")
	l.await(v.BackDir()+"/state", "2")
	l.removeVif(v)
	wait(t, dev.Done())
}
