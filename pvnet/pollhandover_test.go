//go:build linux

package pvnet_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/xenbus/toolstack"
)

// A receiver that sleeps in a Poller gets frames again after a hand-over that came to nothing: the
// other process refused the vif, or had gone. So does one that gets frames meanwhile.
func TestAPolledReceiverGoesOnAfterARefusedHandOver(t *testing.T) {
	for _, mode := range []pvnet.WaitMode{pvnet.Park, pvnet.Adaptive, pvnet.Busy} {
		for _, end := range []string{"backend", "frontend"} {
			t.Run([]string{"Park", "Adaptive", "Busy"}[mode]+" "+end, func(t *testing.T) {
				l := newLab(t)
				fdom, bdom := l.domain(1), l.domain(2)
				l.add(toolstack.Vif{Front: 1, Back: 2})
				backs, stop := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
				defer stop()
				front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{})
				if err != nil {
					t.Fatal(err)
				}
				defer front.Disconnect()
				back := wait(t, backs)
				await(t, back, true)
				dev, peer, dom := back, front, hypercall.Domain(bdom)
				if end == "frontend" {
					dev, peer, dom = front, back, fdom
				}
				p, err := pvnet.NewPoller(dom, pvnet.PollerConfig{Wait: mode})
				if err != nil {
					t.Fatal(err)
				}
				rx, err := dev.OwnRX(0)
				if err == nil {
					err = p.Add(rx, nil)
				}
				if err != nil {
					t.Fatal(err)
				}
				got, over := make(chan int, 1000), make(chan error, 1)
				go func() {
					over <- func() error {
						var frames [8]pvnet.Frame
						for {
							ready, err := p.Wait()
							if err != nil {
								return err
							}
							for _, r := range ready {
								if r.Err != nil {
									return r.Err
								}
								n, err := r.RX.Poll(frames[:])
								if err != nil && !errors.Is(err, pvnet.ErrLinkDown) {
									return err
								}
								for i := range n {
									got <- frames[i].Len()
								}
								if err := r.RX.Release(frames[:n]); err != nil {
									return err
								}
							}
						}
					}()
				}()
				next := 60
				exchange := func() {
					t.Helper()
					if _, err := peer.Write(make([]byte, next)); err != nil {
						t.Fatal(err)
					}
					if n := wait(t, got); n != next {
						t.Fatalf("a frame of %d bytes, not %d", n, next)
					}
					next++
				}
				refused := errors.New("the other process does not want it")
				for range 3 {
					exchange()
					waitAsleep(t, dev, mode)
					if err := dev.HandOver(func([]byte, []*os.File) error { return refused }, nil); !errors.Is(err, refused) {
						t.Fatal(err)
					}
					await(t, dev, true)
					exchange()
					waitAsleep(t, dev, mode)
					if err := dev.HandOver(func([]byte, []*os.File) error {
						if _, err := peer.Write(make([]byte, next)); err != nil {
							return err
						}
						return refused
					}, nil); !errors.Is(err, refused) {
						t.Fatal(err)
					}
					if n := wait(t, got); n != next { // it came while nobody looked
						t.Fatalf("a frame of %d bytes, not %d", n, next)
					}
					next++
				}
				if err := p.Close(); err != nil {
					t.Error(err)
				}
				wait(t, over)
			})
		}
	}
}

// waitAsleep waits until the receiver of a device sleeps, as it does where it does not spin for
// ever.
func waitAsleep(t *testing.T, dev *pvnet.Device, mode pvnet.WaitMode) {
	t.Helper()
	for end := time.Now().Add(time.Minute); mode != pvnet.Busy && dev.Parked(0) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the receiver does not sleep")
		}
	}
}
