package hostile

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
	"barevif/xenbus/xenstore"
)

// A ctrlGuest is a guest with two queues and a control ring.
type ctrlGuest struct {
	*guest
	*raw.Ctrl
	second *raw.Front // the second queue
}

// inQueue returns the ring and channel keys of a frontend of several queues.
func inQueue(i int, keys xenstore.Values) xenstore.Values {
	v := make(xenstore.Values)
	for k, s := range keys {
		if strings.Contains(k, "ring-ref") || strings.Contains(k, "event-channel") {
			k = fmt.Sprintf("queue-%d/%s", i, k)
		}
		v[k] = s
	}
	return v
}

// newCtrlGuest adds a vif, and makes what a guest with a control ring shares. The backend
// offers two queues.
func (l *lab) newCtrlGuest() *ctrlGuest {
	l.t.Helper()
	g := &ctrlGuest{guest: l.newGuest()}
	g.share()
	return g
}

func (g *ctrlGuest) share() {
	g.l.t.Helper()
	var err error
	if g.second, err = raw.NewFront(g.l.guest, backID, 32, true); err != nil {
		g.l.t.Fatal(err)
	}
	if g.Ctrl, err = raw.NewCtrlFront(g.l.guest, backID); err != nil {
		g.l.t.Fatal(err)
	}
	g.more = []func() error{g.second.Close, g.Ctrl.Close}
}

func (g *ctrlGuest) keys() xenstore.Values {
	keys := g.Ctrl.Keys()
	keys["multi-queue-num-queues"] = "2"
	for i, f := range []*raw.Front{g.Front, g.second} {
		for k, v := range inQueue(i, f.Keys()) {
			keys[k] = v
		}
	}
	return keys
}

func (g *ctrlGuest) connect() {
	g.l.t.Helper()
	g.l.write(g.l.guestStore, g.v.FrontDir(), g.keys(), "4")
	g.awaitBackend("4")
	waitLinkUp(g.l.t, g.dev)
	g.sink = listen(g.dev)
}

// attackCtrl returns a connected guest with a control ring.
func (l *lab) attackCtrl() *ctrlGuest {
	l.t.Helper()
	g := l.newCtrlGuest()
	g.connect()
	return g
}

// ask makes a request and returns the response to it.
func (g *ctrlGuest) ask(typ uint16, data ...uint32) raw.CtrlRsp {
	g.l.t.Helper()
	r := raw.CtrlReq{ID: uint16(g.Ctrl.Prod), Type: typ}
	copy(r.Data[:], data)
	g.Ctrl.Put(r)
	g.Ctrl.Push()
	rsp, err := g.Ctrl.Answers(1, deadline())
	if err != nil {
		g.l.t.Fatalf("request %d of type %d: %v\n%s", r.ID, typ, err, stacks())
	}
	if rsp[0].ID != r.ID || rsp[0].Type != typ {
		g.l.t.Fatalf("the response to %+v is %+v", r, rsp[0])
	}
	return rsp[0]
}

// requireCtrlAnswer requires an answer to a request of a type that nobody serves.
func (g *ctrlGuest) requireCtrlAnswer() {
	g.l.t.Helper()
	if r := g.ask(99, 1, 2, 3); r.Status != 1 || r.Data != 0 {
		g.l.t.Errorf("a request of type 99 was answered %+v", r)
	}
}

// features returns the features that the device shows beside its counters.
func features(d *pvnet.Device) telemetry.Feature { return d.Counters().Status().Features }

func newCtrlLab(t testing.TB) *lab {
	t.Helper()
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Queues: 2}})
	return l
}

// The ring is offered where there is something to serve, since each key is a node of
// xenstore.
func TestTheControlRingIsOffered(t *testing.T) {
	for queues, want := range map[int]string{1: "", 2: "1"} {
		l := newLab(t, emu.Config{})
		l.serve(pvnet.ServeConfig{Config: pvnet.Config{Queues: queues}})
		g := l.newGuest()
		if got, _ := l.store.Read(g.v.BackDir() + "/feature-ctrl-ring"); got != want {
			t.Errorf("%d queues: feature-ctrl-ring is %q, want %q", queues, got, want)
		}
		g.connect()
		g.requireTraffic()
		g.disconnect()
		l.stopServing()
	}
}

func TestControlRing(t *testing.T) {
	l := newCtrlLab(t)
	g := l.attackCtrl()
	if f := features(g.dev); f&telemetry.FeatureControlRing == 0 {
		t.Errorf("the features do not say it: %b", f)
	}
	for range 3 * raw.CtrlSize {
		g.requireCtrlAnswer()
	}
	// A whole ring of requests at once is answered in order.
	for i := range uint32(raw.CtrlSize) {
		g.Ctrl.Put(raw.CtrlReq{ID: uint16(i * 3), Type: uint16(100 + i)})
	}
	g.Ctrl.Push()
	rsp, err := g.Ctrl.Answers(raw.CtrlSize, deadline())
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range rsp {
		if (r != raw.CtrlRsp{ID: uint16(i * 3), Type: uint16(100 + i), Status: 1}) {
			t.Fatalf("response %d is %+v", i, r)
		}
	}
	g.disconnect()
}

// A guest that connects again has a new ring; the backend has let go of the old one.
func TestControlRingAnew(t *testing.T) {
	l := newCtrlLab(t)
	g := l.newCtrlGuest()
	for range 3 {
		g.connect()
		g.requireCtrlAnswer()
		g.closeHandshake()
		g.dev.Done()
		for _, end := range g.more {
			if err := end(); err != nil {
				t.Fatalf("the backend kept the control ring: %v", err)
			}
		}
		g.reopen()
		g.share()
	}
	g.connect()
	g.requireCtrlAnswer()
	g.disconnect()
}

// T11: indices that no correct frontend writes.
func TestT11ControlRingIndices(t *testing.T) {
	for name, attack := range map[string]func(*ctrlGuest){
		"more than the ring":  func(g *ctrlGuest) { g.Ctrl.Prod += raw.CtrlSize + 1 },
		"half of all numbers": func(g *ctrlGuest) { g.Ctrl.Prod += 1 << 31 },
		"backwards":           func(g *ctrlGuest) { g.Ctrl.Prod-- },
	} {
		t.Run(name, func(t *testing.T) {
			l := newCtrlLab(t)
			other := l.attackBackend()
			g := l.attackCtrl()
			g.requireCtrlAnswer()
			attack(g)
			g.Ctrl.Push()
			g.requirePeerError("ctrl", "impossible")
			other.requireTraffic()
			other.disconnect()
		})
	}
}

// T11: a ring whose indices are impossible from the beginning is not attached.
func TestT11ControlRingKeys(t *testing.T) {
	l := newCtrlLab(t)
	defer func() { l.t = t }()
	for name, attack := range map[string]func(g *ctrlGuest, keys xenstore.Values){
		"a wild index":          func(g *ctrlGuest, _ xenstore.Values) { g.Ctrl.Ring.Store(raw.ReqProd, 1<<20) },
		"no channel":            func(_ *ctrlGuest, keys xenstore.Values) { keys["event-channel-ctrl"] = missing },
		"channel 0":             func(_ *ctrlGuest, keys xenstore.Values) { keys["event-channel-ctrl"] = "0" },
		"a channel that is not": func(_ *ctrlGuest, keys xenstore.Values) { keys["event-channel-ctrl"] = "60000" },
		"a queue's channel": func(_ *ctrlGuest, keys xenstore.Values) {
			keys["event-channel-ctrl"] = keys["queue-1/event-channel-rx"]
		},
		"a grant that is not": func(_ *ctrlGuest, keys xenstore.Values) { keys["ctrl-ring-ref"] = "99999" },
		"grant 0":             func(_ *ctrlGuest, keys xenstore.Values) { keys["ctrl-ring-ref"] = "0" },
		"a queue's ring":      func(_ *ctrlGuest, keys xenstore.Values) { keys["ctrl-ring-ref"] = keys["queue-1/tx-ring-ref"] },
		"the other ring":      func(_ *ctrlGuest, keys xenstore.Values) { keys["ctrl-ring-ref"] = keys["queue-0/rx-ring-ref"] },
		"no number":           func(_ *ctrlGuest, keys xenstore.Values) { keys["ctrl-ring-ref"] = "one" },
	} {
		t.Run(name, func(t *testing.T) {
			l.t = t
			g := l.newCtrlGuest()
			keys := g.keys()
			attack(g, keys)
			g.requireRefused(keys)
			g.setState("6")
			g.awaitBackend("6")
			g.removeVif()
		})
	}
}

// A channel without a ring is no control ring, as for Linux's netback.
func TestAControlChannelAlone(t *testing.T) {
	l := newCtrlLab(t)
	g := l.newCtrlGuest()
	keys := g.keys()
	delete(keys, "ctrl-ring-ref")
	l.write(l.guestStore, g.v.FrontDir(), keys, "4")
	g.awaitBackend("4")
	waitLinkUp(t, g.dev)
	if f := features(g.dev); f&telemetry.FeatureControlRing != 0 {
		t.Errorf("a control ring without a ring: %b", f)
	}
	g.disconnect()
}

// A guest that never stops asking gets a few answers in each second, and delays neither
// its own frames nor its own end.
func TestEndlessControlRequests(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		l := newCtrlLab(t)
		g := l.attackCtrl()
		begin, answers := time.Now(), 0
		for time.Since(begin) < 10*time.Second {
			for g.Ctrl.Prod-g.Ctrl.Cons < raw.CtrlSize {
				g.Ctrl.Put(raw.CtrlReq{Type: 99})
			}
			g.Ctrl.Push()
			rsp, err := g.Ctrl.Answers(1, deadline())
			if err != nil {
				t.Fatal(err)
			}
			answers += len(rsp)
		}
		if answers < 2000 || answers > 3000 {
			t.Errorf("%d answers in 10 s, want some 2756: 256 at once and then one every 4 ms", answers)
		}
		at := time.Now()
		g.requireTraffic()
		if d := time.Since(at); d > 0 {
			t.Errorf("a frame took %v", d)
		}
		g.disconnect()
		if d := time.Since(at); d > time.Second {
			t.Errorf("the end took %v", d)
		}
	})
}

// Events without a request cost the guest that sends them: they count later and later.
func TestControlEventStorm(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		l := newCtrlLab(t)
		g := l.attackCtrl()
		for range 12 {
			g.Ctrl.Port.Notify()
			time.Sleep(10 * time.Millisecond)
		}
		at := time.Now()
		g.requireCtrlAnswer()
		if d := time.Since(at); d < time.Millisecond || d > 2*time.Second {
			t.Errorf("the first request after a storm took %v", d)
		}
		g.requireTraffic()
		g.disconnect()
	})
}

// A ctrlDriver is a raw backend with two queues and a control ring.
type ctrlDriver struct {
	*driver
	*raw.Ctrl
	second *raw.Back
}

// offerCtrl performs the handshake of a correct backend with two queues and a control
// ring.
func (drv *ctrlDriver) offerCtrl() {
	t, l, v := drv.l.t, drv.l, drv.v
	t.Helper()
	offer := raw.BackKeys()
	offer["multi-queue-max-queues"], offer["feature-ctrl-ring"] = "2", "1"
	l.write(l.drvStore, v.BackDir(), offer, "2")
	drv.awaitFrontend("4")
	keys := make(xenstore.Values)
	var queue [2]xenstore.Values
	for i := range queue {
		queue[i] = make(xenstore.Values)
		for _, k := range frontKeys {
			if s, err := l.store.Read(fmt.Sprintf("%s/queue-%d/%s", v.FrontDir(), i, k)); err == nil {
				queue[i][k] = s
			}
		}
	}
	for _, k := range []string{"ctrl-ring-ref", "event-channel-ctrl"} {
		s, err := l.store.Read(v.FrontDir() + "/" + k)
		if err != nil {
			t.Fatalf("%s: %v", k, err)
		}
		keys[k] = s
	}
	var err error
	if drv.Back, err = raw.NewBack(l.drv, frontID, queue[0]); err != nil {
		t.Fatal(err)
	}
	if drv.second, err = raw.NewBack(l.drv, frontID, queue[1]); err != nil {
		t.Fatal(err)
	}
	if drv.Ctrl, err = raw.NewCtrlBack(l.drv, frontID, keys); err != nil {
		t.Fatal(err)
	}
	drv.more = []func() error{drv.second.Close, drv.Ctrl.Close}
	drv.posted = nil
	drv.setState("4")
}

// attackCtrlClient connects our frontend, with cfg and two queues, to a raw backend with a
// control ring.
func (l *lab) attackCtrlClient(cfg pvnet.Config) *ctrlDriver {
	l.t.Helper()
	drv := new(ctrlDriver)
	cfg.Queues = 2
	l.connectFrontendBy(cfg, func(d *driver) {
		drv.driver = d
		drv.offerCtrl()
	})
	drv.sink = listen(drv.dev)
	return drv
}

// request takes the next request of our frontend.
func (drv *ctrlDriver) request() raw.CtrlReq {
	drv.l.t.Helper()
	r, err := drv.Ctrl.Requests(1, deadline())
	if err != nil {
		drv.l.t.Fatalf("%v\n%s", err, stacks())
	}
	return r[0]
}

// answer answers the next request of our frontend with a status.
func (drv *ctrlDriver) answer(status uint32) raw.CtrlReq {
	drv.l.t.Helper()
	r := drv.request()
	drv.Ctrl.Answer(raw.CtrlRsp{ID: r.ID, Type: r.Type, Status: status})
	return r
}

// Our frontend tells what it wants in the order that Linux's netback needs, with a key and a
// table that the backend can read, and again when it changes: then only what has changed.
func TestHashIsAskedForInOrder(t *testing.T) {
	l := newLab(t, emu.Config{})
	cfg := &pvnet.HashConfig{Types: []pvnet.HashType{pvnet.HashIPv4}, Key: []byte{1, 2, 3}, Table: []int{1, 0, 3}}
	drv := l.attackCtrlClient(pvnet.Config{Hash: cfg})
	page := func(ref uint32, n int) []byte {
		t.Helper()
		b := make([]byte, n)
		if err := drv.Read(hypercall.GrantRef(ref), 0, b); err != nil {
			t.Fatal(err)
		}
		return b
	}
	require := func(typ uint16, read func(r raw.CtrlReq) []byte, want []byte, data ...uint32) {
		t.Helper()
		r := drv.request()
		for i, w := range data {
			if w != any32 && r.Data[i] != w {
				t.Errorf("type %d has %v, want %v", typ, r.Data, data)
			}
		}
		if r.Type != typ {
			t.Fatalf("type %d, want %d", r.Type, typ)
		}
		if read != nil && !bytes.Equal(read(r), want) {
			t.Errorf("type %d: %v, want %v", typ, read(r), want)
		}
		drv.Ctrl.Answer(raw.CtrlRsp{ID: r.ID, Type: r.Type})
	}
	table := func(r raw.CtrlReq) []byte { return page(r.Data[0], 12) }
	require(setAlgorithm, nil, nil, 1, 0, 0)
	require(setKey, func(r raw.CtrlReq) []byte { return page(r.Data[0], 3) }, []byte{1, 2, 3}, any32, 3, 0)
	require(setFlags, nil, nil, 1, 0, 0)
	require(setSize, nil, nil, 3, 0, 0)
	require(setTable, table, []byte{1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, any32, 3, 0) // 3 of two queues is 1
	eventually(t, "the feature", func() bool { return features(drv.dev)&telemetry.FeatureHash != 0 })
	ended := make(chan error, 1)
	set := func(c *pvnet.HashConfig) { ended <- drv.dev.SetHash(ctx(t), c) }
	cfg.Table = []int{0, 0, 0}
	go set(cfg)
	require(setTable, table, make([]byte, 12), any32, 3, 0)
	if err := wait(t, ended); err != nil {
		t.Error(err)
	}
	go set(nil)
	require(setAlgorithm, nil, nil, 0, 0, 0)
	if err := wait(t, ended); err != nil || features(drv.dev)&telemetry.FeatureHash != 0 {
		t.Error(err)
	}
	// What the backend refuses is an error of SetHash, and the device works on.
	for _, status := range []uint32{1, 2, 3, 99} {
		go set(cfg)
		drv.answer(0)
		drv.answer(status)
		if err := wait(t, ended); err == nil || errors.Is(err, pvnet.ErrNoHash) != (status == 1) || features(drv.dev)&telemetry.FeatureHash != 0 {
			t.Errorf("status %d: %v", status, err)
		}
	}
	drv.requireTraffic()
	drv.disconnect()
}

const any32 = 1<<32 - 1

// A backend that never answers, or that supports nothing, costs its frontend a line in the
// log. It neither delays frames nor the end.
func TestHashThatIsNotAnswered(t *testing.T) {
	for _, answer := range []bool{false, true} {
		inVirtualTime(t, func(t *testing.T) {
			l := newLab(t, emu.Config{})
			drv := l.attackCtrlClient(pvnet.Config{Hash: new(pvnet.HashConfig)})
			lines := l.log.count(slog.LevelWarn)
			if answer {
				drv.answer(1)
			}
			begin := time.Now()
			drv.requireTraffic()
			if d := time.Since(begin); d > 0 {
				t.Errorf("a frame took %v", d)
			}
			time.Sleep(time.Minute)
			if n := l.log.count(slog.LevelWarn) - lines; n != 1 {
				t.Errorf("%d lines\n%s", n, l.log)
			}
			if !answer { // and the next request waits for the first one's answer
				if err := drv.dev.SetHash(ctx(t), new(pvnet.HashConfig)); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("SetHash: %v", err)
				}
			}
			begin = time.Now()
			drv.disconnect()
			if d := time.Since(begin); d > time.Second {
				t.Errorf("the end took %v", d)
			}
		})
	}
}

// T11: what no correct backend writes to the control ring ends the device.
func TestT11ControlResponses(t *testing.T) {
	l := newLab(t, emu.Config{})
	defer func() { l.t = t }()
	for name, attack := range map[string]struct {
		do   func(drv *ctrlDriver)
		want string
	}{
		"nobody asked": {func(drv *ctrlDriver) {
			drv.answer(0)
			drv.Ctrl.Answer(raw.CtrlRsp{ID: 2, Type: setAlgorithm})
		}, "impossible"},
		"twice": {func(drv *ctrlDriver) {
			r := drv.answer(0)
			drv.Ctrl.Answer(raw.CtrlRsp{ID: r.ID, Type: r.Type})
		}, "impossible"},
		"another id": {func(drv *ctrlDriver) {
			r := drv.request()
			drv.Ctrl.Answer(raw.CtrlRsp{ID: r.ID + 1, Type: r.Type})
		}, "a request that was not made"},
		"another type": {func(drv *ctrlDriver) {
			r := drv.request()
			drv.Ctrl.Answer(raw.CtrlRsp{ID: r.ID, Type: getFlags})
		}, "a request that was not made"},
		"far ahead": {func(drv *ctrlDriver) {
			drv.Ctrl.Prod += raw.CtrlSize
			drv.Ctrl.Answer()
		}, "impossible"},
		"backwards": {func(drv *ctrlDriver) {
			drv.Ctrl.Prod--
			drv.Ctrl.Answer()
		}, "impossible"},
	} {
		t.Run(name, func(t *testing.T) {
			l.t = t
			drv := l.attackCtrlClient(pvnet.Config{})
			attack.do(drv)
			drv.requirePeerError("ctrl", attack.want)
		})
	}
}

// Without an offer, or with one queue, a frontend makes no control ring.
func TestNoControlRing(t *testing.T) {
	l := newLab(t, emu.Config{})
	for _, offer := range []xenstore.Values{{}, {"feature-ctrl-ring": "0"}, {"feature-ctrl-ring": "yes"}, {"feature-ctrl-ring": "1"}} {
		drv := l.connectFrontendBy(pvnet.Config{Queues: 2}, func(drv *driver) {
			keys := raw.BackKeys() // one queue
			for k, v := range offer {
				keys[k] = v
			}
			drv.offerWith(keys)
		})
		if _, err := l.store.Read(drv.v.FrontDir() + "/ctrl-ring-ref"); err == nil {
			t.Errorf("%v: there is a control ring", offer)
		}
		drv.sink = listen(drv.dev)
		drv.requireTraffic()
		drv.disconnect()
	}
}

// A page of the guest's that a request names, granted read-only as the protocol allows.
func (g *ctrlGuest) grant(words ...uint32) uint32 {
	g.l.t.Helper()
	s, err := g.l.guest.Share(backID, 1, hypercall.ReadOnly)
	if err != nil {
		g.l.t.Fatal(err)
	}
	g.more = append(g.more, s.End)
	for i, w := range words {
		binary.LittleEndian.PutUint32(s.Page(0)[4*i:], w)
	}
	return uint32(s.Refs[0])
}

// Types of requests.
const (
	getFlags = iota + 1
	setFlags
	setKey
	getSize
	setSize
	setTable
	setAlgorithm
)

// What Linux's netback answers to each message (run on it), in an order that shows what each
// answer depends on.
func TestHashMessages(t *testing.T) {
	l := newCtrlLab(t)
	g := l.attackCtrl()
	key, table := g.grant(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), g.grant(0, 1, 1, 0, 2, 1)
	bad := uint32(99999)
	for i, c := range []struct {
		typ    uint16
		data   [3]uint32
		status uint32
		answer uint32
	}{
		{getFlags, [3]uint32{}, 1, 0}, // no algorithm yet
		{setFlags, [3]uint32{15}, 2, 0},
		{getSize, [3]uint32{}, 0, 128},
		{setAlgorithm, [3]uint32{2}, 2, 0},
		{setAlgorithm, [3]uint32{257}, 2, 0}, // its low byte is 1
		{setAlgorithm, [3]uint32{1 << 31}, 2, 0},
		{getFlags, [3]uint32{}, 1, 0},
		{setKey, [3]uint32{key, 40}, 0, 0}, // needs no algorithm
		{setAlgorithm, [3]uint32{1}, 0, 0},
		{getFlags, [3]uint32{}, 0, 15},
		{setFlags, [3]uint32{16}, 2, 0},
		{setFlags, [3]uint32{1<<31 | 15}, 2, 0},
		{setFlags, [3]uint32{15}, 0, 0},
		{setKey, [3]uint32{key, 41}, 2, 0},
		{setKey, [3]uint32{key, 1<<32 - 1}, 2, 0},
		{setKey, [3]uint32{bad, 40}, 2, 0},
		{setKey, [3]uint32{0, 1}, 2, 0},
		{setKey, [3]uint32{bad, 0}, 0, 0}, // clears the key, and no page is read
		{setKey, [3]uint32{key, 7}, 0, 0},
		{setTable, [3]uint32{table, 1, 0}, 2, 0}, // no size yet
		{setTable, [3]uint32{bad, 0, 0}, 0, 0},
		{setSize, [3]uint32{129}, 2, 0},
		{setSize, [3]uint32{1<<32 - 1}, 2, 0},
		{setSize, [3]uint32{128}, 0, 0},
		{setTable, [3]uint32{table, 4, 0}, 0, 0},
		{setTable, [3]uint32{table, 4, 124}, 0, 0},
		{setTable, [3]uint32{table, 4, 125}, 2, 0},
		{setTable, [3]uint32{table, 0, 128}, 0, 0},
		{setTable, [3]uint32{table, 0, 129}, 2, 0},
		{setTable, [3]uint32{table, 1<<32 - 1, 1}, 2, 0}, // XSA-270: the sum is 0
		{setTable, [3]uint32{table, 1, 1<<32 - 1}, 2, 0},
		{setTable, [3]uint32{table, 1 << 30, 0}, 2, 0}, // 2^32 bytes
		{setTable, [3]uint32{table, 5, 0}, 2, 0},       // an entry of 2, of two queues
		{setTable, [3]uint32{bad, 4, 0}, 2, 0},
		{setSize, [3]uint32{0}, 0, 0},
		{setAlgorithm, [3]uint32{0}, 0, 0},
		{getFlags, [3]uint32{}, 1, 0},
		{0, [3]uint32{}, 1, 0},
		{8, [3]uint32{}, 1, 0},
		{9, [3]uint32{0, table, 1}, 1, 0},
		{10, [3]uint32{0, table, 1}, 1, 0},
		{99, [3]uint32{}, 1, 0},
	} {
		if r := g.ask(c.typ, c.data[:]...); r.Status != c.status || r.Data != c.answer {
			t.Errorf("message %d, type %d with %v: status %d, data %d; want %d, %d", i, c.typ, c.data, r.Status, r.Data, c.status, c.answer)
		}
	}
	g.disconnect()
}

// ip returns a frame with an IPv4 packet to port.
func ip(port uint16) []byte {
	f := make([]byte, 60)
	copy(f, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 2, byte(port >> 8), byte(port)})
	f[46] = 0x50
	return f
}

// comesOn posts pages on both queues and returns the queue on which a frame comes, and the
// slots of it.
func (g *ctrlGuest) comesOn(frame []byte) (queue int, slots [][3]uint32) {
	g.l.t.Helper()
	fronts := []*raw.Front{g.Front, g.second}
	for _, f := range fronts {
		if f.RxProd-f.RxCons < 4 {
			f.Post(8)
		}
	}
	if _, err := g.dev.Write(frame); err != nil {
		g.l.t.Fatal(err)
	}
	eventually(g.l.t, "the frame", func() bool {
		for i, f := range fronts {
			if n := f.Rx.Load(raw.RspProd) - f.RxCons; n > 0 {
				queue = i
				for range n {
					slots = append(slots, f.Rx.Get(f.RxCons))
					f.RxCons++
				}
				return true
			}
		}
		return false
	})
	return queue, slots
}

// The sequence of the Windows driver, one request in flight; afterwards frames come on the
// queues that the table says, each with its hash. A table that is refused changes nothing,
// and a new size clears it.
func TestHashSteers(t *testing.T) {
	l := newCtrlLab(t)
	g := l.attackCtrl()
	key := g.grant(0xda565a6d, 0xc20e5b25, 0x3d256741, 0xb08fa343, 0xcb2bcad0, 0xb4307bae, 0xa32dcb77, 0x0cf23080, 0x3bb7426a, 0xfa01acbe)
	require := func(want uint32, typ uint16, data ...uint32) {
		t.Helper()
		if r := g.ask(typ, data...); r.Status != want {
			t.Fatalf("type %d with %v: %+v", typ, data, r)
		}
	}
	require(0, setAlgorithm, 1)
	require(0, setKey, key, 40)
	require(0, setFlags, 15)
	require(0, setSize, 2)
	require(0, setTable, g.grant(1, 1), 2, 0)
	suite := append(ip(1766)[:26:26], 66, 9, 149, 187, 161, 142, 100, 80, 0x0a, 0xea) // of the published vectors
	suite = append(suite, ip(1766)[36:]...)
	q, slots := g.comesOn(suite)
	if want := [3]uint32{4 | 1<<16 | 1<<24, 0x51ccc178}; q != 1 || len(slots) != 2 || slots[0][1]&raw.RxExtra == 0 || slots[1] != want {
		t.Errorf("it came on queue %d as %x", q, slots)
	}
	require(2, setTable, g.grant(0, 2), 2, 0) // its second entry is no queue
	if q, _ := g.comesOn(suite); q != 1 {
		t.Error("a table that was refused steers frames")
	}
	require(0, setTable, g.grant(0), 1, 0) // half of the table
	if q, _ := g.comesOn(suite); q != 0 {
		t.Error("the hash is even, and its entry names queue 0")
	}
	require(0, setTable, g.grant(1), 1, 0)
	require(0, setSize, 4)
	if q, _ := g.comesOn(suite); q != 0 {
		t.Error("a new size did not clear the table")
	}
	require(0, setSize, 4)
	require(0, setTable, g.grant(1, 1, 1, 1), 4, 0)
	require(0, setFlags, 0) // no frame has a hash: 0 counts
	if q, slots := g.comesOn(suite); q != 1 || len(slots) != 1 {
		t.Errorf("without a type it came on queue %d as %x", q, slots)
	}
	require(0, setFlags, 15)
	require(0, setKey, 0, 0)
	if _, slots := g.comesOn(suite); len(slots) != 2 || slots[1][1] != 0 {
		t.Errorf("without a key it came as %x", slots)
	}
	require(0, setAlgorithm, 0)
	if _, slots := g.comesOn(suite); len(slots) != 1 {
		t.Errorf("without an algorithm it came as %x", slots)
	}
	g.disconnect()
}

// The settings outlive the connection, as those of Linux's netback.
func TestHashOutlivesTheConnection(t *testing.T) {
	l := newCtrlLab(t)
	g := l.newCtrlGuest()
	g.connect()
	g.ask(setAlgorithm, 1)
	g.ask(setFlags, 15)
	g.ask(setSize, 1)
	g.ask(setTable, g.grant(1), 1, 0)
	g.closeHandshake()
	for _, end := range g.more {
		if err := end(); err != nil {
			t.Fatal(err)
		}
	}
	g.reopen()
	g.share()
	g.connect()
	if r := g.ask(getFlags); r.Status != 0 {
		t.Errorf("the algorithm is gone: %+v", r)
	}
	if q, slots := g.comesOn(ip(1)); q != 1 || len(slots) != 2 {
		t.Errorf("it came on queue %d as %x", q, slots)
	}
	g.disconnect()
}

// T11: a table that the guest changes while the backend reads it is copied once: each entry
// is checked where it is used. The memory is mapped, because the race detector must not report
// this.
func TestT11TableChangedUnderUs(t *testing.T) {
	l := newLab(t, emu.Config{Mapped: true})
	l.serve(pvnet.ServeConfig{Config: pvnet.Config{Queues: 2}})
	g := l.attackCtrl()
	s, err := l.guest.Share(backID, 1, hypercall.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	g.more = append(g.more, s.End)
	g.ask(setAlgorithm, 1)
	g.ask(setSize, 128)
	stop := make(chan struct{})
	var writing sync.WaitGroup
	stopWriting := sync.OnceFunc(func() {
		close(stop)
		writing.Wait()
	})
	t.Cleanup(stopWriting) // before the memory goes
	writing.Go(func() {
		ring := raw.CtrlRing(s.Page(0))
		for v := uint32(0); ; v += 1 << 20 {
			select {
			case <-stop:
				return
			default:
			}
			for i := range 128 {
				ring.Store(4*i, v)
			}
		}
	})
	taken := 0
	for range 200 {
		if r := g.ask(setTable, uint32(s.Refs[0]), 128, 0); r.Status == 0 {
			taken++
		}
		if q, _ := g.comesOn(ip(uint16(taken))); q > 1 {
			t.Fatal(q)
		}
	}
	stopWriting()
	g.disconnect()
}
