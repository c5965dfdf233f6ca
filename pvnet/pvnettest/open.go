package pvnettest

import (
	"cmp"
	"context"

	"barevif/pvnet"
	"barevif/xenbus/xenstore/server/labtest"
)

// Open is [New] for examples, which have no testing.TB: it makes a vif between two domains of a
// new machine and connects its ends. end disconnects both and ends the machine. ctx bounds the
// connecting.
func Open(ctx context.Context, front, back pvnet.Config) (f, b *pvnet.Device, end func(), err error) {
	w, err := labtest.NewWorld(ctx, 1)
	if err != nil {
		return nil, nil, nil, err
	}
	serving, stop := context.WithCancel(context.Background())
	backs, served := make(chan *pvnet.Device, 1), make(chan error, 1)
	go func() {
		served <- pvnet.Serve(serving, w.Driver, pvnet.ServeConfig{Config: back, Hotplug: true}, func(d *pvnet.Device) { backs <- d })
	}()
	end = func() {
		if f != nil {
			f.Disconnect()
		}
		stop()
		<-served
		w.Close()
	}
	if f, err = pvnet.Connect(ctx, w.Guests[0], "0", front); err == nil {
		select {
		case b = <-backs:
			for ev := range b.Links(ctx) { // the frontend's end is up first
				if ev.Up {
					return f, b, end, nil
				}
			}
			err = cmp.Or(context.Cause(ctx), pvnet.ErrDisconnected)
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	end()
	return nil, nil, nil, err
}
