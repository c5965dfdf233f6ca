package pvnet_test

import (
	"context"
	"errors"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

// reads waits until the nodes of a directory are as wanted. "" wants a node that is empty
// or missing.
func (l *lab) reads(dir string, want map[string]string) {
	l.t.Helper()
	err := labtest.Comes(func() error {
		for key, value := range want {
			got, err := l.store.Read(dir + "/" + key)
			if err != nil {
				got = ""
			}
			if got != value {
				return errors.New(key + " is " + got + ", want " + value)
			}
		}
		return nil
	})
	if err != nil {
		l.t.Error(err)
	}
}

// A vif is shown to nobody before its network is there; and when that is missing, the
// toolstack and the frontend can read why.
func TestAVifIsHeldUntilItsNetworkIsThere(t *testing.T) {
	synctest.Test(t, testAVifIsHeldUntilItsNetworkIsThere)
}

func testAVifIsHeldUntilItsNetworkIsThere(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2, Bridge: "xenbr7"})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hold: true})
	back := wait(t, backs)
	l.reads(v.BackDir(), map[string]string{"state": "1", "hotplug-status": "", "feature-sg": ""})
	if ts, err := back.Toolstack(ctx(t)); err != nil || ts.Bridge != "xenbr7" || ts.Done || ts.MAC != pvnet.MAC(v.MAC) || ts.Type != "vif" {
		t.Errorf("the toolstack's keys: %+v, %v", ts, err)
	}

	why := errors.New("bridge xenbr7: no such interface " + strings.Repeat("é", 1000))
	said := why.Error()[:511] // the 512th byte begins a character
	back.Refuse(why)
	l.reads(v.BackDir(), map[string]string{
		"state": "2", "hotplug-status": "error", "hotplug-error": said, "error": said, "feature-sg": "1",
	})
	short, cancel := context.WithTimeout(ctx(t), 100*time.Millisecond)
	defer cancel()
	if _, err := pvnet.Connect(short, fdom, "0", pvnet.Config{}); err == nil || !strings.Contains(err.Error(), "xenbr7") {
		t.Errorf("the frontend learns %v", err)
	}
	// While a frontend waits, a script says that all is well: the vif stays refused.
	waiting, enough := context.WithCancel(ctx(t))
	defer enough()
	gaveUp := make(chan error, 1)
	go func() {
		_, err := pvnet.Connect(waiting, fdom, "0", pvnet.Config{})
		gaveUp <- err
	}()
	l.reads(v.FrontDir(), map[string]string{"state": "4"})
	if err := l.tools.Write(ctx(t), v.BackDir()+"/hotplug-status", "connected"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-gaveUp:
		t.Errorf("a script's word connects a vif that was refused: %v", err)
	case <-time.After(100 * time.Millisecond):
		enough()
		<-gaveUp
	}
	back.Refuse(errors.New("another reason"))
	l.reads(v.BackDir(), map[string]string{"state": "6", "hotplug-error": "another reason", "error": "another reason"})

	back.Offer(true)
	connected := map[string]string{"hotplug-status": "connected", "hotplug-error": "", "error": ""}
	l.reads(v.BackDir(), connected)
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	await(t, back, true)
	if ts, err := back.Toolstack(ctx(t)); err != nil || !ts.Done {
		t.Errorf("once set up: %+v, %v", ts, err)
	}

	// A reason that comes later ends no connection.
	back.Refuse(errors.New("the bridge was removed"))
	l.reads(v.BackDir(), map[string]string{"state": "4", "hotplug-status": "error"})
	if _, err := front.Write(frame(100, 1)); err != nil {
		t.Errorf("after a late refusal: %v", err)
	}
	back.Offer(true)
	l.reads(v.BackDir(), connected)

	if _, err := front.Toolstack(ctx(t)); !errors.Is(err, pvnet.ErrNotBackend) {
		t.Errorf("the toolstack's keys of a frontend: %v", err)
	}
	front.Refuse(why)
	front.Offer(true)
}

// A vif whose interface a script sets up waits for the script, also after a refusal, and
// what the script writes stays.
func TestAHeldVifMayBeLeftToTheScript(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hold: true, Hotplug: true})
	back := wait(t, backs)
	back.Refuse(errors.New("no interface"))
	l.reads(v.BackDir(), map[string]string{"state": "2", "hotplug-status": "error"})
	back.Offer(false)
	l.reads(v.BackDir(), map[string]string{"hotplug-status": "", "hotplug-error": "", "error": ""})
	for key, value := range map[string]string{"hotplug-error": "of the script", "hotplug-status": "connected"} {
		if err := l.tools.Write(ctx(t), v.BackDir()+"/"+key, value); err != nil {
			t.Fatal(err)
		}
	}
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	back.Offer(false)
	await(t, back, true)
	l.reads(v.BackDir(), map[string]string{"hotplug-status": "connected", "hotplug-error": "of the script"})
}

// Two processes of a domain share its vifs: neither touches what the other is to serve, also when it
// comes later.
func TestAVifThatIsNotSelectedIsLeftAlone(t *testing.T) {
	l := newLab(t)
	bdom := l.domain(2)
	l.domain(1)
	l.domain(3)
	ours, theirs := l.add(toolstack.Vif{Front: 1, Back: 2, ID: 1}), l.add(toolstack.Vif{Front: 3, Back: 2, ID: 1})
	only := func(front hypercall.DomID) func(hypercall.DomID, string) bool {
		return func(dom hypercall.DomID, id string) bool { return dom == front && id == "1" }
	}
	before := l.keys(theirs.BackDir())
	backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Select: only(1)})
	if d := wait(t, backs); d.Peer() != 1 {
		t.Errorf("the vif of domain %d is served", d.Peer())
	}
	l.reads(ours.BackDir(), map[string]string{"state": "2"})
	late := l.add(toolstack.Vif{Front: 3, Back: 2, ID: 2})
	again := l.add(toolstack.Vif{Front: 1, Back: 2, ID: 7})
	if after := l.keys(theirs.BackDir()); !maps.Equal(before, after) {
		t.Errorf("the other's vif was %v and is %v", before, after)
	}
	others, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Select: only(3)})
	if d := wait(t, others); d.Peer() != 3 || d.ID() != "1" {
		t.Errorf("vif %s of domain %d is served", d.ID(), d.Peer())
	}
	l.reads(theirs.BackDir(), map[string]string{"state": "2"})
	l.reads(late.BackDir(), map[string]string{"state": "1"})
	l.reads(again.BackDir(), map[string]string{"state": "1"})
	stop()
	select {
	case d := <-backs:
		t.Errorf("vif %s of domain %d is served", d.ID(), d.Peer())
	case d := <-others:
		t.Errorf("vif %s of domain %d is served", d.ID(), d.Peer())
	default:
	}
}

// A vif that is held goes away with its directory, and with its backend.
func TestAHeldVifIsRemoved(t *testing.T) { synctest.Test(t, testAHeldVifIsRemoved) }

func testAHeldVifIsRemoved(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	backs, stop := l.serve(bdom, pvnet.ServeConfig{Hold: true})
	back := wait(t, backs)
	short, cancel := context.WithTimeout(ctx(t), 100*time.Millisecond)
	defer cancel()
	if _, err := pvnet.Connect(short, fdom, "0", pvnet.Config{}); err == nil {
		t.Fatal("the frontend connected to a vif that is held")
	}
	l.reads(v.BackDir(), map[string]string{"state": "6", "feature-sg": ""})
	if err := toolstack.Remove(ctx(t), l.tools, v); err != nil {
		t.Fatal(err)
	}
	wait(t, back.Done())
	back.Offer(true) // too late: there is nothing to write to

	v = l.add(v)
	again := wait(t, backs)
	l.reads(v.BackDir(), map[string]string{"state": "1"})
	stop()
	wait(t, again.Done())
	l.reads(v.BackDir(), map[string]string{"state": "6"})
}
