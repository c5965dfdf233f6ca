package pvnet_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"reflect"
	"testing"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus/toolstack"
)

// Every call after Disconnect returns ErrDisconnected, no matter who owns the halves and
// what else is wrong with the call.
func TestEveryCallAfterDisconnectSaysSo(t *testing.T) {
	type call struct {
		name string
		do   func() error
	}
	// Calls that return no error.
	silent := map[string]bool{
		"ID": true, "MAC": true, "MTU": true, "Queues": true, "Active": true, "Peer": true, "Trusted": true, "Carrier": true, "Stalled": true, "Features": true, "TakenFiles": true,
		"PeerTakes": true, "Budget": true, "Touched": true, "Stats": true, "ResetStats": true, "Counters": true, "Links": true,
		"Disconnect": true, "Close": true, "Done": true, "Logger": true, "Rings": true, "Kick": true, "Offer": true, "Refuse": true, "SetPatience": true, "Join": true, "Parked": true, "QueueFor": true, "QueueOf": true, "Steerings": true, "GuestAddressChanges": true,
		"Tell": true, "SentPages": true, // of the tests
		"TX.Alloc": true, "TX.AllocSize": true, "TX.SetDeadline": true, "TX.Nudge": true, "RX.SetDeadline": true,
		"RX.Release": true, // releases frames, which is still allowed
	}
	for _, owned := range []bool{false, true} {
		for _, deadline := range []time.Time{{}, time.Unix(1, 0), time.Now().Add(time.Hour)} {
			l := newLab(t)
			fdom, bdom := l.domain(1), l.domain(2)
			l.add(toolstack.Vif{Front: 1, Back: 2})
			backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
			front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
			if err != nil {
				t.Fatal(err)
			}
			back := wait(t, backs)
			for _, d := range []*pvnet.Device{front, back} {
				var tx *pvnet.TX
				var rx *pvnet.RX
				if owned {
					tx, _ = d.OwnTX(0)
					rx, _ = d.OwnRX(0)
					tx.SetDeadline(deadline)
					rx.SetDeadline(deadline)
				}
				d.SetDeadline(deadline)
				if d == front {
					d.Disconnect()
				} else {
					stop()
				}
				two := func(n int, err error) error {
					if n != 0 {
						t.Errorf("%d frames or bytes", n)
					}
					return err
				}
				var frames [2]pvnet.Frame
				long := make([]byte, pvnet.MaxFrame+1)
				calls := []call{
					{"Write", func() error { return two(d.Write(frame(60, 0))) }},
					{"Write", func() error { return two(d.Write(nil)) }},
					{"Write", func() error { return two(d.Write(long)) }},
					{"Writev", func() error { return two(d.Writev(frame(60, 0), long[:9])) }},
					{"Writev", func() error { return two(d.Writev()) }},
					{"Listen", func() error { return d.Listen(context.Background(), func(pvnet.Frame) {}) }},
					{"WriteBatch", func() error { return two(d.WriteBatch([][]byte{make([]byte, 60)})) }},
					{"WriteBatch", func() error { return two(d.WriteBatch(nil)) }},
					{"ListenBatch", func() error { return d.ListenBatch(context.Background(), func([]pvnet.Frame) {}) }},
					{"Announce", func() error { return d.Announce(context.Background(), netip.MustParseAddr("10.0.0.1")) }},
					{"Tap", func() error { _, err := d.Tap(pvnet.TapConfig{}); return err }},
					{"OwnTX", func() error { _, err := d.OwnTX(0); return err }},
					{"OwnTX", func() error { _, err := d.OwnTX(9); return err }},
					{"OwnRX", func() error { _, err := d.OwnRX(0); return err }},
					{"OwnRX", func() error { _, err := d.OwnRX(-1); return err }},
					{"SetHash", func() error { return d.SetHash(context.Background(), nil) }},
					{"SetMulticast", func() error { return d.SetMulticast(context.Background(), nil) }},
					{"HandOver", func() error { return d.HandOver(func([]byte, []*os.File) error { return nil }, nil) }},
					{"PrepareHandOver", func() error { return d.PrepareHandOver(ctx(t)) }},
					{"SetCarrier", func() error { return d.SetCarrier(false) }},
					{"SetMTU", func() error { return d.SetMTU(1) }},
					{"SetDeadline", func() error { return d.SetDeadline(deadline) }},
					{"SetReadDeadline", func() error { return d.SetReadDeadline(deadline) }},
					{"Toolstack", func() error { _, err := d.Toolstack(ctx(t)); return err }},
					{"GuestAddresses", func() error { _, err := d.GuestAddresses(ctx(t)); return err }},
					{"SetWriteDeadline", func() error { return d.SetWriteDeadline(deadline) }},
				}
				if owned {
					calls = append(calls, []call{
						{"TX.AllocWait", func() error { return two(tx.AllocWait(frames[:], 60)) }},
						{"TX.AllocWait", func() error { return two(tx.AllocWait(nil, 60)) }},
						{"TX.AllocWait", func() error { return two(tx.AllocWait(frames[:], -1)) }},
						{"TX.Send", func() error { return two(tx.Send(frames[:])) }},
						{"TX.Send", func() error { return two(tx.Send(nil)) }},
						{"TX.SendWait", func() error { return two(tx.SendWait(frames[:])) }},
						{"TX.SendWait", func() error { return two(tx.SendWait(nil)) }},
						{"TX.CountDropped", func() error { return tx.CountDropped(telemetry.DropTooLong, 1) }},
						{"TX.CountUndelivered", func() error { return tx.CountUndelivered(1) }},
						{"RX.CountUndelivered", func() error { return rx.CountUndelivered(1) }},
						{"RX.Receive", func() error { return two(rx.Receive(frames[:])) }},
						{"RX.Receive", func() error { return two(rx.Receive(nil)) }},
						{"RX.ReceiveInto", func() error { return two(rx.ReceiveInto(frames[:])) }},
						{"RX.ReceiveInto", func() error { return two(rx.ReceiveInto(nil)) }},
						{"RX.Poll", func() error { return two(rx.Poll(frames[:])) }},
						{"RX.Poll", func() error { return two(rx.Poll(nil)) }},
						{"RX.PollInto", func() error { return two(rx.PollInto(frames[:])) }},
						{"RX.PollInto", func() error { return two(rx.PollInto(nil)) }},
						{"RX.AwaitBuffers", func() error { return rx.AwaitBuffers() }},
					}...)
				}
				tried := make(map[string]bool)
				for _, c := range calls {
					tried[c.name] = true
					if err := c.do(); !errors.Is(err, pvnet.ErrDisconnected) || !errors.Is(err, net.ErrClosed) {
						t.Errorf("%s, owned %v, deadline %v: %v", c.name, owned, deadline.Unix(), err)
					}
				}
				all := []any{d}
				if owned {
					all = append(all, tx, rx)
				}
				for i, v := range all {
					typ := reflect.TypeOf(v)
					for m := range typ.Methods() {
						name := []string{"", "TX.", "RX."}[i] + m.Name
						if !tried[name] && !silent[name] {
							t.Errorf("%s is not tried", name)
						}
					}
				}
			}
		}
	}
}

// A loop that calls Listen again whenever it returns must not spin.
func TestListenThatRanEndsWithNilAndTheNextSaysWhy(t *testing.T) {
	for _, role := range []string{"frontend", "backend"} {
		l := newLab(t)
		fdom, bdom := l.domain(1), l.domain(2)
		l.add(toolstack.Vif{Front: 1, Back: 2})
		backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
		front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
		if err != nil {
			t.Fatal(err)
		}
		back := wait(t, backs)
		await(t, back, true)
		d, peer, end := front, back, front.Disconnect
		if role == "backend" {
			d, peer, end = back, front, stop
		}
		heard := make(chan int, 1)
		ended := make(chan []error, 1)
		go func() {
			var errs []error
			for range 2 {
				errs = append(errs, d.Listen(context.Background(), func(f pvnet.Frame) { heard <- f.Len() }))
			}
			ended <- errs
		}()
		if _, err := peer.Write(frame(60, 0)); err != nil {
			t.Fatal(err)
		}
		wait(t, heard) // the first Listen runs
		end()
		if errs := wait(t, ended); errs[0] != nil || !errors.Is(errs[1], pvnet.ErrDisconnected) {
			t.Errorf("%s: Listen ended with %v", role, errs)
		}
		front.Disconnect()
	}
}
