package pvnet_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

func groupMAC(i byte) pvnet.MAC { return pvnet.MAC{1, 0, 0x5e, 0, 0, i} }

// passesTo reports whether the backend sends a frame with the destination mac.
func passesTo(t *testing.T, back *pvnet.Device, mac pvnet.MAC) bool {
	t.Helper()
	before := back.Stats().TX
	b := frame(100, 1)
	copy(b, mac[:])
	if _, err := back.Write(b); err != nil {
		t.Fatal(err)
	}
	after := back.Stats().TX
	return after.Get(telemetry.Filtered) == before.Get(telemetry.Filtered)
}

func soon(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(labtest.Limit); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never " + what)
		}
	}
}

// A frontend gets the groups that it lists, in this connection and in later ones, while its
// own frames go out on the same ring. Without a list it gets all.
func TestAFrontendListsItsGroups(t *testing.T) {
	l, log := newLab(t), new(logtest.Log)
	defer func() {
		if t.Failed() {
			t.Log(log)
		}
	}()
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Logger: log.Logger()}})
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{Logger: log.Logger()})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	back := wait(t, backs)
	await(t, back, true)
	listening, end := context.WithCancel(context.Background())
	defer end()
	go front.Listen(listening, func(pvnet.Frame) {})
	go back.Listen(context.Background(), func(pvnet.Frame) {})
	var busy atomic.Bool
	busy.Store(true)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for busy.Load() {
			front.Write(frame(500, 1))
		}
	}()
	if !passesTo(t, back, groupMAC(1)) {
		t.Error("without a list, a group is filtered")
	}
	check := func(when string, wanted ...byte) {
		t.Helper()
		for i := range byte(70) {
			if got := passesTo(t, back, groupMAC(i)); got != strings.Contains(string(wanted), string([]byte{i})) {
				t.Errorf("%s: group %d passes: %v", when, i, got)
			}
		}
		if !passesTo(t, back, pvnet.MAC{2, 0, 0, 0, 0, 1}) || !passesTo(t, back, pvnet.MAC{255, 255, 255, 255, 255, 255}) {
			t.Errorf("%s: unicast or broadcast is filtered", when)
		}
	}
	set := func(list ...byte) (wanted []byte) {
		t.Helper()
		macs := []pvnet.MAC{}
		for _, i := range list {
			macs = append(macs, groupMAC(i))
		}
		if err := front.SetMulticast(ctx(t), macs); err != nil {
			t.Fatal(err)
		}
		soon(t, "filtered", func() bool { return !passesTo(t, back, groupMAC(200)) })
		return list
	}
	check("one", set(1)...)
	check("three", set(1, 2, 60)...)
	check("another", set(5)...)
	var many []byte
	for i := range byte(64) {
		many = append(many, i)
	}
	check("the most", set(many...)...)
	check("none", set()...)
	check("two", set(7, 8)...)

	// Another connection, with the list in the ring from the start.
	stop()
	backs, _ = l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: pvnet.Config{Logger: log.Logger()}})
	back = wait(t, backs)
	await(t, back, true)
	go back.Listen(context.Background(), func(pvnet.Frame) {})
	soon(t, "listed again", func() bool { return passesTo(t, back, groupMAC(7)) })
	soon(t, "listed again", func() bool { return passesTo(t, back, groupMAC(8)) })
	check("after a reconnect", 7, 8)

	if err := front.SetMulticast(ctx(t), nil); err != nil {
		t.Fatal(err)
	}
	soon(t, "without a filter", func() bool { return passesTo(t, back, groupMAC(200)) })
	if s := l.read(v.FrontDir() + "/request-multicast-control"); s != "0" {
		t.Errorf("request-multicast-control is %s", s)
	}
	busy.Store(false)
	<-sent
	if n := front.Stats().TX.Lost(telemetry.DropBackendError); n != 0 {
		t.Errorf("%d frames are counted as refused", n)
	}
	for what, list := range map[string][]pvnet.MAC{
		"no multicast group": {{2, 0, 0, 0, 0, 1}}, "is no multicast group": {{255, 255, 255, 255, 255, 255}}, "65": make([]pvnet.MAC, 65),
	} {
		if err := front.SetMulticast(ctx(t), list); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := back.SetMulticast(ctx(t), nil); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a backend: %v", err)
	}
	// A backend that refuses: its list is full of what the frontend did not ask for.
	for i := range byte(64) {
		back.Join(pvnet.MAC{1, 1, 1, 1, 1, i})
	}
	if err := front.SetMulticast(ctx(t), []pvnet.MAC{groupMAC(9)}); err == nil || !strings.Contains(err.Error(), "01:00:5e:00:00:09") {
		t.Errorf("a group that the backend did not take: %v", err)
	}
	soon(t, "all multicast", func() bool { return passesTo(t, back, groupMAC(200)) })
}
