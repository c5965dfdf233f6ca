package pvnet

import (
	"context"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet/netif"
	"barevif/xenbus"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore"
	"barevif/xenbus/xenstore/server/labtest"
)

// All vifs of a Serve share one count of mappings, as they share the memory regions of its process.
// A frontend that takes what it can leaves each other one its own, and gives everything back when
// it goes.
func TestAllVifsOfAServeShareTheCountOfMappings(t *testing.T) {
	l := labtest.New(t, emu.Config{})
	driver := l.Domain(2)
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Limit)
	defer cancel()
	client, err := xenstore.Dial(ctx, driver.Store, xenstore.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	s := &server{client: client, domain: driver, cfg: ServeConfig{Type: "vif", Config: Config{StaticGrants: true}.resolve()}}
	var backs []*back
	for front := range hypercall.DomID(2) {
		front += 3
		l.Domain(front)
		v := l.Add(toolstack.Vif{Front: front, Back: 2})
		id := xenbus.BackendID{Front: v.Front, ID: "0"}
		xd, err := xenbus.OpenBackend(ctx, client, "vif", id.Front, id.ID)
		if err != nil {
			t.Fatal(err)
		}
		defer xd.Close(ctx)
		b := s.newBack(ctx, id, xd)
		defer b.d.finishWith(ErrDisconnected)
		backs = append(backs, b)
	}
	if backs[0].mappings != backs[1].mappings {
		t.Fatal("each vif of a Serve has a count of its own")
	}
	all := backs[0].mappings
	const more = maxRuns - 2*ownRuns // what is left for all when one takes what it can
	all.Add(mostRuns - more)
	defer all.Add(more - mostRuns)

	single := func(s *staticPair, i int) netif.CtrlStatus {
		r := s.list(t, 0, s.client.refs(0)[i])
		r.Type = netif.CtrlAddGrefMapping
		st, _ := s.ask(r)
		return st
	}
	var pairs []*staticPair
	for _, b := range backs {
		p := staticAmong(t, join(t, emu.Config{Mapped: true}, plain, Config{}), b.mappings)
		r := p.list(t, 0, p.client.refs(0)...)
		r.Type = netif.CtrlDelGrefMapping
		p.ask(r)
		pairs = append(pairs, p)
	}
	greedy, other := pairs[0], pairs[1]
	taken := 0
	for i := range 200 {
		if single(greedy, i) != netif.CtrlSuccess {
			t.Fatalf("page %d is refused", i)
		}
		taken = max(taken, len(greedy.server.queues[0].mapped()))
	}
	if taken <= ownRuns {
		t.Fatalf("the greedy frontend has %d mappings at most", taken)
	}
	all.Add(maxRuns) // whoever else there is: none is left
	for i := range 200 {
		if single(other, i) != netif.CtrlSuccess {
			t.Fatalf("page %d of the other frontend is refused, which has %d mappings", i, len(other.server.queues[0].mapped()))
		}
	}
	all.Add(-maxRuns)
	held := int64(len(greedy.server.queues[0].mapped()))
	before := all.Load()
	greedy.disconnect()
	if n := before - all.Load(); n != held {
		t.Errorf("a frontend that had %d mappings has given %d back", held, n)
	}
	other.disconnect()
}
