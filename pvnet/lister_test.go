package pvnet

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall/emu"
	"barevif/telemetry"
	"barevif/xenbus/xenstore/server/labtest"
)

// SetMulticast waits for the backend of the connection that it asked. If that connection is
// over before SetMulticast has looked, and the next backend has no filter, or has refused a
// group meanwhile, it does not wait for ever.
func TestSetMulticastDoesNotWaitForAnEarlierBackend(t *testing.T) {
	for _, tt := range []struct {
		name string
		next func(*joins) // what the lifecycle goroutine does with the next connection
		want error
	}{
		{"a backend without a filter", func(j *joins) {
			j.offered.Store(false)
			j.dynamic.Store(false)
			j.filter.Store(false)
			j.asked.Store(false)
		}, ErrUnimplemented},
		{"a backend that refused a group", func(j *joins) {
			j.filter.Store(false)
			j.asked.Store(false)
		}, ErrLinkDown}, // ask again
	} {
		t.Run(tt.name, func(t *testing.T) {
			virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
				j := &p.front.joins
				j.offered.Store(true)
				j.dynamic.Store(true)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				done := make(chan error, 1)
				go func() { done <- p.front.askFilter(ctx, true) }()
				synctest.Wait() // it looks again in a moment
				tt.next(j)
				synctest.Wait()
				pauseFor(ctx, 10*joinPause)
				select {
				case err := <-done:
					if !errors.Is(err, tt.want) {
						t.Error(err)
					}
				default:
					t.Error("it waits")
				}
			})
		})
	}
}

// While one SetMulticast waits for the link, another one ends with its context all the same, and
// has changed nothing.
func TestSetMulticastKeepsItsContextWhileAnotherWaits(t *testing.T) {
	d := newDevice("0", telemetry.Frontend, nil, Config{Queues: 1})
	first, endFirst := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	ended := make(chan error, 1)
	go func() { ended <- d.SetMulticast(first, []MAC{{1, 0, 0x5e, 0, 0, 1}}) }()
	for end := time.Now().Add(labtest.Limit); len(d.joins.wanted()) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the first call does not begin")
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	second := make(chan error, 1)
	go func() { second <- d.SetMulticast(ctx, nil) }()
	cancel(enough)
	select {
	case err := <-second:
		if !errors.Is(err, enough) {
			t.Errorf("the second call: %v", err)
		}
	case <-time.After(labtest.Limit):
		t.Error("the second call goes on after the end of its context")
	}
	if d.joins.wanted() == nil {
		t.Error("the second call has replaced the list")
	}
	endFirst(enough)
	select {
	case err := <-ended:
		if !errors.Is(err, enough) {
			t.Errorf("the first call: %v", err)
		}
	case <-time.After(labtest.Limit):
		t.Error("the first call goes on after the end of its context")
	}
}

// A group that the backend refused when the connection was made is no error of a later list
// without it.
func TestAnEarlierRefusalConcernsNoOtherGroup(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	_, rx := own(t, p.back)
	e := p.front.tx[0].eng.(*frontTX)
	one, other := MAC{1, 0, 0x5e, 0, 0, 1}, MAC{1, 0, 0x5e, 0, 0, 2}
	for i := range byte(maxGroups) {
		p.back.groups.add(MAC{1, 1, 1, 1, 1, i})
	}
	p.front.joins.want, _ = []MAC{one}, p.front.joins.filter.Swap(true)
	e.listFirst(p.front)
	if _, err := rx.Poll(make([]Frame, 1)); err != nil {
		t.Fatal(err)
	}
	p.back.groups.clear(true)
	for {
		done, refused, err := e.tell([]MAC{other})
		if err != nil || refused != (MAC{}) {
			t.Fatalf("%v is refused; %v", refused, err)
		}
		if done {
			break
		}
		if _, err := rx.Poll(make([]Frame, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if !p.back.groups.has(other) || p.back.groups.has(one) {
		t.Error("the list is not the one that was told")
	}
}
