//go:build linux

package processes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/handover"
)

// runFrontHandover is a frontend that echoes frames and hands its vif over; as
// "frontsuccessor" it takes the vif over first. Standard input is as for runHandover.
func runFrontHandover(ctx context.Context) error {
	dom, err := emu.JoinBeside(ctx, os.Getenv("BAREVIF_TEST_SOCKET"), 1)
	if err != nil {
		return err
	}
	defer dom.Destroy()
	ctx, cancel, step, _ := stepwise(ctx)
	defer cancel(nil)
	path, id := os.Getenv("BAREVIF_TEST_HANDOVER"), handover.Identity{Domain: 1, Frontend: true}
	finish := func() {}
	connect := func() (*pvnet.Device, error) { return pvnet.Connect(ctx, dom, "0", pvnet.Config{}) }
	if os.Getenv(childVar) == "frontsuccessor" {
		c, err := handover.Dial(ctx, path, id)
		if err != nil {
			return err
		}
		defer c.Close()
		step(stepDialled)
		connect = func() (*pvnet.Device, error) {
			return pvnet.TakeOver(ctx, dom, "0", pvnet.Config{}, func(ctx context.Context, back hypercall.DomID, id string) (*pvnet.TakenVif, error) {
				in, err := c.TakeOver(ctx, back, id)
				if in == nil {
					return nil, err
				}
				step(stepGiven)
				accept := in.Accept
				in.Accept = func() error {
					step(stepAttached)
					err := accept()
					step(stepAccepted)
					return err
				}
				return in, nil
			})
		}
		finish = func() {
			step(stepUp)
			c.Finish(ctx) // without the other process there is nothing to finish
			step(stepFinished)
		}
	}
	d, err := connect()
	if err != nil {
		fmt.Println("failed:", err)
		return nil
	}
	e := &echoer{}
	go func() {
		finish()
		os.Remove(path) // a process that was killed leaves it
		l, err := handover.Listen(path, id, nil)
		if err != nil {
			fmt.Println(err)
			return
		}
		e.offer(l)
		fmt.Println("ready")
		select {
		case <-l.Done():
			cancel(pvnet.ErrHandover)
		case <-ctx.Done():
		}
		l.Close()
	}()
	go func() {
		<-ctx.Done()
		if !errors.Is(context.Cause(ctx), pvnet.ErrHandover) {
			d.Disconnect()
		}
	}()
	e.serve(d)
	<-d.Done()
	if _, err := d.OwnTX(0); errors.Is(err, pvnet.ErrHandover) {
		<-ctx.Done() // the other process says when, and if it has ended the test does
	}
	return nil
}

// Either process of a frontend is killed at any step of a hand-over. As long as the new one has
// not accepted the vif, the old one goes on with it and no frame is lost; the death of the old
// one ends nothing that the new one has accepted; and whoever is started next connects.
// Nobody gets a frame twice, and nothing is left behind.
func TestEitherProcessOfAFrontendIsKilledDuringAHandover(t *testing.T) {
	for _, victim := range []string{"nobody", "the old one", "the new one"} {
		for at, step := range steps {
			if victim == "nobody" && at > 0 {
				continue
			}
			t.Run(victim+" at "+step, func(t *testing.T) {
				m := newServingMachine(t)
				env := "BAREVIF_TEST_HANDOVER=" + m.socket + ".handover"
				old := m.startChild("fronthand", env)
				old.expect("ready")
				x := startExchange(t, m.awaitDevice())
				x.await()
				successor := m.startChild("frontsuccessor", env)
				for i, s := range steps {
					successor.expect(s)
					if i == at && victim != "nobody" {
						break
					}
					successor.goOn()
				}
				survivor, lossless := successor, true
				switch victim {
				case "nobody":
					if err := old.wait(); err != nil {
						t.Errorf("the old process: %v", err)
					}
				case "the old one":
					lossless = at >= len(steps)-3
					if step == stepFinished {
						old.wait() // it has ended in order
					} else {
						old.kill()
					}
					for range steps[at:] {
						successor.goOn()
					}
					if !lossless { // the new one cannot know whether the old one goes on
						successor.wait()
						survivor = m.startChild("fronthand", env)
						survivor.expect("ready")
					}
				case "the new one":
					survivor, lossless = old, at < 3
					successor.kill()
					if !lossless {
						old.in.Close() // nobody else tells it
						old.wait()
						survivor = m.startChild("fronthand", env)
						survivor.expect("ready")
					}
				}
				x.await()
				lost, downs := x.end(lossless)
				t.Logf("%d frames lost, the backend's link went down %d times", lost, downs)
				if lossless && (lost > 0 || downs > 0) {
					t.Error("frames are lost, or the backend noticed")
				}
				survivor.stop()
			})
		}
	}
}
