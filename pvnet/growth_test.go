package pvnet_test

import (
	"testing"

	"barevif/pvnet"
	"barevif/xenbus/toolstack"
)

// A connection spends most of its set-up time on requests to xenstore. Both ends together
// make about 75, counted from when the backend waits for the frontend.
func TestAConnectionTakesFewRequests(t *testing.T) {
	const most = 120 // about 80, and more if a look at xenstore comes between two writes of the other end
	l := newLab(t)
	bdom, fdom := l.domain(2), l.domain(1)
	backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
	v := l.add(toolstack.Vif{Front: 1, Back: 2})
	back := wait(t, backs)
	l.reads(v.BackDir(), map[string]string{"state": "2"})
	before := l.store.Stats().Requests
	front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	await(t, back, true)
	n := l.store.Stats().Requests - before
	t.Logf("%d requests", n)
	if n > most {
		t.Errorf("%d requests, want %d at most", n, most)
	}
}
