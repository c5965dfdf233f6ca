package hostile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/test/hostile/raw"
	"barevif/xenbus/xenstore"
)

// Values that no correct peer writes for a number.
var garbage = []string{
	"", "-1", "+1", " 1", "1 ", "01", "0x10", "1e3", "1.0", "one", "18446744073709551616",
	"18446744073709551615", "4294967296", "99999999999999999999999999", "\x00", "1\x00", "1\n",
	strings.Repeat("1", 3900), strings.Repeat("\xff", 3900), "%d%s%n", "٣",
}

const missing = "\x00missing"

// retryAfterRefusal closes as a frontend that was refused does, and then connects correctly.
func (g *guest) retryAfterRefusal() {
	g.l.t.Helper()
	g.awaitBackend("5", "6")
	g.setState("6")
	g.awaitBackend("6")
	g.reopen()
	g.connect()
	g.requireTraffic()
	g.disconnect()
}

// reopen returns to Initialising with new rings, and removes the keys of the old ones.
func (g *guest) reopen() {
	g.l.t.Helper()
	g.setState("1")
	g.awaitBackend("2")
	if err := g.Close(); err != nil {
		g.l.t.Errorf("a connection that was refused keeps something: %v", err)
	}
	var err error
	if g.Front, err = raw.NewFront(g.l.guest, backID, 32, true); err != nil {
		g.l.t.Fatal(err)
	}
	for _, k := range append(frontKeys, "multi-queue-num-queues", "queue-0", "queue-1") {
		if err := g.l.tools.Remove(ctx(g.l.t), g.v.FrontDir()+"/"+k); err != nil && !errors.Is(err, xenstore.ErrNotFound) {
			g.l.t.Fatal(err)
		}
	}
}

// requireRefused publishes keys, some of them wrong, and requires that the backend then holds
// nothing and serves the next frontend.
func (g *guest) requireRefused(keys xenstore.Values) {
	g.l.t.Helper()
	before := g.l.Ledger()
	lines := g.l.log.count(slog.LevelWarn)
	for k, v := range keys {
		if v == missing {
			delete(keys, k)
			g.l.tools.Remove(ctx(g.l.t), g.v.FrontDir()+"/"+k)
		}
	}
	g.l.write(g.l.tools, g.v.FrontDir(), keys, "4")
	g.awaitBackend("5")
	if now := g.l.Ledger(); now != before {
		g.l.t.Errorf("refused, and yet it holds %+v, before: %+v", now, before)
	}
	if n := g.l.log.count(slog.LevelWarn) - lines; n != 1 {
		g.l.t.Errorf("%d lines of warnings, want 1\n%s", n, g.l.log)
	}
	why, err := g.l.store.Read(fmt.Sprintf("/local/domain/%d/error/backend/vif/%d/%d/error", backID, frontID, g.v.ID))
	if err != nil || why == "" || len(why) > 512 {
		g.l.t.Errorf("the reason left for the administrator is %q, %v", why, err)
	}
}

func TestT21FrontendKeys(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Queues: 2}})
	n := 0
	for _, key := range []string{"tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx", "multi-queue-num-queues", "request-rx-copy"} {
		values := append([]string{missing, "0", "4294967295", "1000000"}, garbage...)
		for _, v := range values {
			if key == "multi-queue-num-queues" && v == missing || key == "event-channel-tx" && v == missing {
				continue // legal: one queue; and see below
			}
			if n++; testing.Short() && n%5 != 0 {
				continue
			}
			g := l.newGuest()
			keys := g.Keys()
			keys[key] = v
			g.requireRefused(keys)
			if n%7 == 0 {
				g.retryAfterRefusal()
			} else {
				g.setState("6")
				g.awaitBackend("6")
				g.removeVif()
			}
			if t.Failed() {
				t.Fatalf("%s = %.40q", key, v)
			}
		}
	}
}

func TestT21GrantsAndPortsThatAreNot(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Queues: 2}})
	third := l.domain(3)
	str := func(n any) string { return fmt.Sprint(n) }
	foreign, err := l.guest.Share(3, 1, hypercall.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.End()
	readOnly, _ := l.guest.Share(backID, 1, hypercall.ReadOnly)
	defer readOnly.End()
	ended, _ := l.guest.Share(backID, 1, hypercall.ReadWrite)
	gone := ended.Refs[0]
	ended.End()
	theirs, _ := third.Share(backID, 1, hypercall.ReadWrite) // granted by another domain
	defer theirs.End()
	w, _ := l.guest.Waiter()
	defer w.Close()
	other, err := w.Unbound(3)
	if err != nil {
		t.Fatal(err)
	}
	dead, _ := w.Unbound(backID)
	dead.Close()
	taken, _ := w.Unbound(backID)
	dw, _ := l.drv.Waiter()
	defer dw.Close()
	if _, err := dw.Bind(frontID, taken.ID()); err != nil {
		t.Fatal(err)
	}
	two := func(g *guest, q1 xenstore.Values) xenstore.Values {
		k := xenstore.Values{"request-rx-copy": "1", "multi-queue-num-queues": "2"}
		for _, key := range []string{"tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx"} {
			k["queue-0/"+key] = g.Keys()[key]
		}
		for key, v := range q1 {
			k["queue-1/"+key] = v
		}
		return k
	}
	for name, keys := range map[string]func(g *guest) xenstore.Values{
		"granted to another":      func(g *guest) xenstore.Values { return xenstore.Values{"tx-ring-ref": str(foreign.Refs[0])} },
		"granted read-only":       func(g *guest) xenstore.Values { return xenstore.Values{"rx-ring-ref": str(readOnly.Refs[0])} },
		"not granted any more":    func(g *guest) xenstore.Values { return xenstore.Values{"rx-ring-ref": str(gone)} },
		"beyond the table":        func(g *guest) xenstore.Values { return xenstore.Values{"tx-ring-ref": "4000000"} },
		"one page for both rings": func(g *guest) xenstore.Values { return xenstore.Values{"rx-ring-ref": str(g.Rings.Refs[0])} },
		"a port for another":      func(g *guest) xenstore.Values { return xenstore.Values{"event-channel-tx": str(other.ID())} },
		"a closed port":           func(g *guest) xenstore.Values { return xenstore.Values{"event-channel-rx": str(dead.ID())} },
		"a port that is joined":   func(g *guest) xenstore.Values { return xenstore.Values{"event-channel-rx": str(taken.ID())} },
		"no port":                 func(g *guest) xenstore.Values { return xenstore.Values{"event-channel-tx": "3999"} },
		"half a pair":             func(g *guest) xenstore.Values { return xenstore.Values{"event-channel-tx": missing} },
		"a queue that is missing": func(g *guest) xenstore.Values { return two(g, nil) },
		"rings of another queue":  func(g *guest) xenstore.Values { return two(g, g.Keys()) },
		"a port of another queue": func(g *guest) xenstore.Values {
			k := g.Keys()
			k["tx-ring-ref"], k["rx-ring-ref"] = str(g.Posted.Refs[0]), str(g.Posted.Refs[1])
			return two(g, k)
		},
		"indices that are impossible": func(g *guest) xenstore.Values {
			g.Tx.Store(raw.ReqProd, 257)
			return nil
		},
		"indices that are impossible on rx": func(g *guest) xenstore.Values {
			g.Rx.Store(raw.RspProd, 5)
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			l.t = t
			g := l.newGuest()
			k := g.Keys()
			for key, v := range keys(g) {
				k[key] = v
			}
			g.requireRefused(k)
			g.retryAfterRefusal()
		})
	}
	l.t = t
}

// Keys whose value may be anything without harm: the feature is then not offered.
func TestT21KeysThatMayBeAnything(t *testing.T) {
	l := newServingLab(t)
	for _, v := range []string{"", "-1", "yes", strings.Repeat("1", 3000)} {
		g := l.newGuest()
		keys := g.Keys()
		keys["feature-sg"], keys["feature-rx-notify"], keys["feature-gso-tcpv4"], keys["ctrl-ring-ref"] = v, v, v, v
		g.l.write(g.l.tools, g.v.FrontDir(), keys, "4")
		g.awaitBackend("4")
		waitLinkUp(t, g.dev)
		g.sink = listen(g.dev)
		g.requireTraffic()
		if _, err := g.dev.Write(pattern(5000, 0)); !errors.Is(err, pvnet.ErrFrameSize) {
			t.Errorf("a chain to a frontend that takes none: %v", err)
		}
		g.disconnect()
	}
}

func TestT21BackendKeys(t *testing.T) {
	l := newLab(t, emu.Config{})
	connect := func(drv *driver) error {
		drv.errorLines = l.log.count(slog.LevelError)
		done := make(chan error, 1)
		go func() {
			c, cancel := context.WithTimeout(context.Background(), 8*time.Second)
			defer cancel()
			var err error
			drv.dev, err = pvnet.Connect(c, l.guest, fmt.Sprint(drv.v.ID), pvnet.Config{Queues: 2, Logger: slog.New(l.log)})
			done <- err
		}()
		return wait(t, done)
	}
	for _, v := range append([]string{missing, "0", "2"}, garbage...) {
		base := l.Ledger()
		drv := &driver{l: l, v: l.addVif()}
		keys := raw.BackKeys()
		delete(keys, "feature-rx-copy")
		if v != missing {
			keys["feature-rx-copy"] = v
		}
		l.write(l.tools, drv.v.BackDir(), keys, "2")
		if err := connect(drv); err == nil || !strings.Contains(err.Error(), "rx-copy") {
			t.Fatalf("feature-rx-copy = %.40q: %v", v, err)
		}
		if now := l.Ledger(); now != base {
			t.Fatalf("refused, and yet it holds %+v, before: %+v", now, base)
		}
		l.write(l.tools, drv.v.BackDir(), nil, "6")
		l.removeVif(drv.v)
	}
	// A feature with a bad value is not offered; a bad MAC is replaced by a random one.
	for i, v := range append([]string{missing, "0"}, garbage...) {
		if testing.Short() && i%5 != 0 {
			continue
		}
		drv := &driver{l: l, v: l.addVif(), before: l.Ledger()}
		for _, k := range []string{"mac", "mtu", "trusted"} {
			if v == missing {
				l.tools.Remove(ctx(t), drv.v.FrontDir()+"/"+k)
				l.tools.Remove(ctx(t), drv.v.BackDir()+"/"+k)
			} else {
				l.write(l.tools, drv.v.FrontDir(), xenstore.Values{k: v}, "")
				l.write(l.tools, drv.v.BackDir(), xenstore.Values{k: v}, "")
			}
		}
		done := make(chan error, 1)
		go func() { done <- connect(drv) }()
		keys := raw.BackKeys()
		for _, k := range []string{"feature-sg", "feature-split-event-channels", "multi-queue-max-queues"} {
			delete(keys, k)
			if v != missing {
				keys[k] = v
			}
		}
		l.write(l.tools, drv.v.BackDir(), keys, "")
		drv.offerWith(nil)
		if err := wait(t, done); err != nil {
			t.Fatalf("%.40q: %v", v, err)
		}
		if mac := drv.dev.MAC(); drv.dev.MTU() != 1500 || drv.dev.Active() != 1 || mac[0]&1 != 0 || mac == (pvnet.MAC{}) {
			t.Errorf("%.40q: MTU %d, %d queues, MAC %v", v, drv.dev.MTU(), drv.dev.Active(), mac)
		}
		drv.sink = listen(drv.dev)
		drv.requireTraffic()
		drv.disconnect()
	}
}

// A directory that names another's backend is no device.
func TestT21PathsThatAreNotOurs(t *testing.T) {
	l := newLab(t, emu.Config{})
	for _, dir := range []string{
		"", "/", "/local/domain/2", "/local/domain/2/backend/vif/1", "/local/domain/2/backend/vif/2/0",
		"/local/domain/3/backend/vif/1/0", "/local/domain/2/backend/vif/1/0/..", "/local/domain/2/device/vif/0",
		"../../2/backend/vif/1/0", strings.Repeat("/a", 1500), "/local/domain/2/backend/vif/1/0\x00", "@releaseDomain",
	} {
		v := l.addVif()
		l.write(l.tools, v.FrontDir(), xenstore.Values{"backend": dir}, "")
		base := l.Ledger()
		c, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		d, err := pvnet.Connect(c, l.guest, fmt.Sprint(v.ID), pvnet.Config{})
		cancel()
		if err == nil {
			d.Disconnect()
			t.Errorf("%.60q was taken for a backend", dir)
		}
		if now := l.Ledger(); now != base {
			t.Errorf("%.60q: it holds %+v, before: %+v", dir, now, base)
		}
		l.write(l.tools, v.BackDir(), nil, "6")
		l.removeVif(v)
	}
}

// A Windows frontend closes before its first connection, and spins until the backend
// answers.
func TestT25WindowsClosesFirst(t *testing.T) {
	l := newServingLab(t)
	for range 3 {
		g := l.newGuest()
		g.setState("5")
		g.awaitBackend("5")
		g.setState("6")
		g.awaitBackend("6")
		g.setState("1")
		g.awaitBackend("2")
		g.connect()
		g.requireTraffic()
		g.disconnect()
	}
}

// A frontend closes, makes new rings and connects again between two reads of the backend.
// The backend sees Connected both times, and must leave the old rings for the new ones.
func TestT25RingsReplacedBetweenTwoLooks(t *testing.T) {
	l := newServingLab(t)
	g := l.attackBackend()
	g.requireTraffic()
	for range 5 {
		old := g.Front
		next, err := raw.NewFront(l.guest, backID, 32, true)
		if err != nil {
			t.Fatal(err)
		}
		maps := l.drv.Calls().Map
		l.write(l.guestStore, g.v.FrontDir(), next.Keys(), "4")
		eventually(t, "the new rings mapped", func() bool { return l.drv.Calls().Map >= maps+2 })
		g.awaitBackend("4")
		g.Front = next
		waitLinkUp(t, g.dev)
		g.requireTraffic()
		if err := old.Close(); err != nil {
			t.Errorf("the backend kept something of the old rings: %v", err)
		}

		// The same keys again mean the same rings.
		maps = l.drv.Calls().Map
		asked := l.store.Stats().Requests
		l.write(l.guestStore, g.v.FrontDir(), next.Keys(), "4")
		// The guest itself sends three requests more than it has keys; the backend reads
		// each key.
		eventually(t, "the keys read again", func() bool {
			return l.store.Stats().Requests > asked+uint64(2*len(next.Keys())+3)
		})
		g.requireTraffic()
		if n := l.drv.Calls().Map; n != maps {
			t.Errorf("%d pages mapped for a state written again", n-maps)
		}
	}
	g.disconnect()
}

var states = []string{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "-1", "", "4294967300", "x"}

func stateJumps(t *testing.T) int {
	if testing.Short() {
		return 300
	}
	return 10000
}

func TestT25StateJumpsOfTheFrontend(t *testing.T) { inVirtualTime(t, testT25StateJumpsOfTheFrontend) }

func testT25StateJumpsOfTheFrontend(t *testing.T) {
	l := newServingLab(t)
	honest := l.attackBackend()
	g := l.attackBackend()
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range stateJumps(t) {
		s := states[rng.IntN(len(states))]
		if i%5 == 0 {
			s = []string{"4", "6"}[rng.IntN(2)]
		}
		l.write(l.guestStore, g.v.FrontDir(), nil, s)
		if i%11 == 0 {
			g.awaitBackend("2", "4", "5", "6")
		}
		if i%500 == 0 {
			honest.requireTraffic()
		}
	}
	// From any state: the close cycle, and then a connection.
	g.closeHandshake()
	eventually(t, "rings let go", func() bool { return l.Ledger().Mappings == 2 }) // the neighbour's mappings remain
	g.reopen()
	g.attach()
	g.requireTraffic()
	g.disconnect()
	honest.requireTraffic()
	honest.disconnect()
}

func TestT25StateJumpsOfTheBackend(t *testing.T) { inVirtualTime(t, testT25StateJumpsOfTheBackend) }

func testT25StateJumpsOfTheBackend(t *testing.T) {
	l := newLab(t, emu.Config{})
	honest := l.attackFrontend(pvnet.Config{})
	drv := l.attackFrontend(pvnet.Config{})
	if err := drv.Close(); err != nil { // the backend has nothing mapped
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for i := range stateJumps(t) {
		s := states[rng.IntN(len(states))]
		if i%5 == 0 {
			s = []string{"4", "6", "2"}[rng.IntN(3)]
		}
		l.write(l.drvStore, drv.v.BackDir(), nil, s)
		if i%11 == 0 {
			drv.awaitFrontend("1", "4", "5", "6")
		}
		if i%500 == 0 {
			honest.requireTraffic()
		}
	}
	drv.setState("5")
	drv.awaitFrontend("6", "1")
	drv.setState("6")
	drv.awaitFrontend("1")
	drv.reconnect()
	drv.requireTraffic()
	drv.disconnect()
	honest.requireTraffic()
	honest.disconnect()
}
