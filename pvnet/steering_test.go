package pvnet_test

import (
	"context"
	"encoding/json"
	"iter"
	"slices"
	"strings"
	"testing"

	"barevif/pvnet"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"
	"barevif/xenbus/toolstack"
)

// queueBy returns the queue of a frame as the documentation of Steering says.
func queueBy(s *pvnet.Steering, frame []byte) int {
	hash, _, _ := s.Table.Frame(frame, len(frame), s.Types)
	return s.Queues[hash%uint32(len(s.Queues))]
}

// awaitSteering takes steerings until ok accepts one.
func awaitSteering(t testing.TB, next func() (*pvnet.Steering, bool), ok func(*pvnet.Steering) bool) *pvnet.Steering {
	t.Helper()
	for {
		s, more := next()
		if !more {
			t.Fatal("the steerings ended")
		}
		if ok(s) {
			return s
		}
	}
}

// A backend's device tells what its frontend asks for, and each change of it, and the table
// is the one that QueueFor uses.
func TestSteeringsFollowTheFrontend(t *testing.T) {
	v := newHashed(t, 4, pvnet.Config{}, pvnet.Config{})
	next, stop := iter.Pull(v.back.Steerings(ctx(t)))
	defer stop()
	if s, more := next(); s != nil || !more {
		t.Fatalf("%+v, %v before a hash", s, more)
	}
	agrees := func(s *pvnet.Steering) {
		t.Helper()
		for flow := range uint32(40) {
			for _, f := range [][]byte{ipv4(6, flow, 60), ipv4(17, flow, 60), arp} {
				if q := queueBy(s, f); q != v.back.QueueFor(f) {
					t.Fatalf("queue %d, but QueueFor says %d", q, v.back.QueueFor(f))
				}
			}
		}
	}
	for _, c := range []*pvnet.HashConfig{
		{Key: []byte("one"), Table: []int{3, 1}},
		{Key: []byte("two"), Types: []pvnet.HashType{pvnet.HashIPv4}, Table: []int{0, 1, 2, 2, 2}},
		{Key: []byte("three")},
	} {
		if err := v.front.SetHash(ctx(t), c); err != nil {
			t.Fatal(err)
		}
		s := awaitSteering(t, next, func(s *pvnet.Steering) bool {
			return s != nil && s.Table.Sum([]byte{1, 2, 3}) == toeplitz.NewTable(c.Key).Sum([]byte{1, 2, 3}) &&
				(c.Table == nil || slices.Equal(s.Queues, c.Table)) && (c.Types == nil) == (s.Types == netif.HashFlagsAll)
		})
		if c.Table == nil && len(s.Queues)%4 != 0 {
			t.Errorf("without a table the queues are %v", s.Queues)
		}
		agrees(s)
	}
	if err := v.front.SetHash(ctx(t), nil); err != nil {
		t.Fatal(err)
	}
	awaitSteering(t, next, func(s *pvnet.Steering) bool { return s == nil })
	// A reader that comes late gets the newest only.
	for _, table := range [][]int{{1}, {2}, {3}} {
		if err := v.front.SetHash(ctx(t), &pvnet.HashConfig{Table: table}); err != nil {
			t.Fatal(err)
		}
	}
	if s, _ := next(); s == nil || !slices.Equal(s.Queues, []int{3}) {
		t.Errorf("a reader that fell behind gets %+v", s)
	}
	v.back.Disconnect()
	for _, more := next(); more; _, more = next() {
	}
}

func TestSteeringsEndWithTheContext(t *testing.T) {
	v := newHashed(t, 1, pvnet.Config{}, pvnet.Config{})
	c, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := 0
	for s := range v.front.Steerings(c) { // a frontend's device has none
		if s != nil {
			t.Errorf("%+v", s)
		}
		n++
		cancel()
	}
	if n != 1 {
		t.Errorf("%d steerings", n)
	}
}

// The hash goes with the vif to the process that takes it over: the frontend, which does not
// notice, does not ask for it again.
func TestTheHashIsHandedOver(t *testing.T) {
	l := newLab(t)
	fdom, bdom := l.domain(1), l.domain(2)
	l.add(toolstack.Vif{Front: 1, Back: 2})
	cfg := pvnet.Config{Queues: 3}
	p := l.process(bdom, pvnet.ServeConfig{Config: cfg})
	hash := &pvnet.HashConfig{Key: []byte("a key"), Types: []pvnet.HashType{pvnet.HashIPv4}, Table: []int{2, 1, 1, 0, 2}}
	hashed := cfg
	hashed.Hash = hash
	front, err := pvnet.Connect(ctx(t), fdom, "0", hashed)
	if err != nil {
		t.Fatal(err)
	}
	defer front.Disconnect()
	old := wait(t, p.came)
	await(t, old, true)
	set := func(s *pvnet.Steering) bool { return s != nil && slices.Equal(s.Queues, hash.Table) }
	first, stop := iter.Pull(old.Steerings(ctx(t)))
	defer stop()
	awaitSteering(t, first, set)

	// What no frontend can have set is refused, and the vif stays with its hash.
	for _, change := range []func(map[string]any){
		func(h map[string]any) { h["Key"] = strings.Repeat("AAAA", 14) }, // 42 bytes
		func(h map[string]any) { h["Flags"] = 16 },
		func(h map[string]any) { h["Algorithm"] = 2 },
		func(h map[string]any) { h["Mapping"] = make([]uint32, 129) },
	} {
		refused := make(chan error, 1)
		q := l.process(bdom, pvnet.ServeConfig{Config: cfg, TakeOver: p.handsOver(func(in *pvnet.TakenVif) {
			var state map[string]any
			if err := json.Unmarshal(in.State, &state); err != nil {
				t.Error(err)
			}
			told := state["Told"].(map[string]any)
			change(told["Ctrl"].(map[string]any)["Hash"].(map[string]any))
			in.State, _ = json.Marshal(state)
			refuse := in.Refuse
			in.Refuse = func(why error) { refuse(why); refused <- why }
		})})
		if err := wait(t, refused); err == nil || !strings.Contains(err.Error(), "hash") {
			t.Errorf("refused with %v", err)
		}
		q.end(context.Canceled)
		await(t, old, true)
		if f := ipv4(17, 7, 60); old.QueueFor(f) != queueOf(hash, f) {
			t.Errorf("the old process chooses queue %d", old.QueueFor(f))
		}
	}

	next := l.process(bdom, pvnet.ServeConfig{Config: cfg, TakeOver: p.handsOver(nil)})
	d := wait(t, next.came)
	await(t, d, true)
	for flow := range uint32(30) {
		for _, f := range [][]byte{ipv4(6, flow, 60), arp} {
			if q := d.QueueFor(f); q != queueOf(hash, f) {
				t.Errorf("flow %d: queue %d, want %d", flow, q, queueOf(hash, f))
			}
		}
	}
	second, stop := iter.Pull(d.Steerings(ctx(t)))
	defer stop()
	awaitSteering(t, second, set)
	p.end(pvnet.ErrHandover)
	// The frontend changes it as before.
	if err := front.SetHash(ctx(t), &pvnet.HashConfig{Key: []byte("b"), Table: []int{1}}); err != nil {
		t.Fatal(err)
	}
	awaitSteering(t, second, func(s *pvnet.Steering) bool { return s != nil && slices.Equal(s.Queues, []int{1}) })
	front.Disconnect()
	next.end(context.Canceled)
}

// queueOf returns the queue of a frame as the frontend's configuration says.
func queueOf(c *pvnet.HashConfig, frame []byte) int {
	s := pvnet.Steering{Table: toeplitz.NewTable(c.Key), Queues: c.Table}
	for _, typ := range c.Types {
		s.Types |= typ.Flag()
	}
	return queueBy(&s, frame)
}
