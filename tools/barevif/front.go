package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/tools/cli"
	"barevif/tools/domain"
	"barevif/xenbus"
	"barevif/xenbus/xenstore"

	"github.com/spf13/cobra"
)

// A front is a command that owns a vif of its domain.
type front struct {
	*cli.Program
	domain   domain.Flags
	counters counterFlag
	vif      string
	wait     time.Duration
	queues   int
	take     bool
	offload  bool // the user of the vif takes long frames and partial checksums
}

func (f *front) register(cmd *cobra.Command) {
	f.domain.Register(cmd, 1)
	f.counters.register(cmd)
	cmd.Flags().StringVar(&f.vif, "vif", "0", "`id` of the vif")
	cmd.Flags().DurationVar(&f.wait, "wait", 30*time.Second, "give up if no backend connects within this `time`; 0: wait for ever")
	cmd.Flags().BoolVar(&f.take, "take", false, "with --xen: unbind the vif from the kernel's driver first")
}

// A use is the user of a vif, such as a server or a TAP. It runs beside the device.
type use struct {
	says   string       // a message for the user of the command
	failed <-chan error // gets the error if the use ends by itself
	renew  func() error // called when the device has reconnected, maybe with another MAC or MTU; may be nil
	close  func() error // called after the device has ended
}

// own connects to the vif and uses it until a signal, or until the device, the use or the
// host ends by itself.
func (f *front) own(ctx context.Context, begin func(*domain.Domain, *pvnet.Device) (*use, error)) error {
	if f.wait < 0 {
		return cli.BadValue("wait", f.wait.String(), "a time to wait")
	}
	if f.take && !f.domain.Xen {
		return &cli.Advice{Err: errors.New("--take is for a real Xen"), Next: "give --xen too", Usage: true}
	}
	counters, err := f.counters.store()
	if err != nil {
		return err
	}
	dom, err := f.domain.Open(ctx)
	if err != nil {
		return err
	}
	defer dom.End()
	if f.domain.Xen {
		if err := f.domain.Free(f.vif, f.take); err != nil {
			return err
		}
	}
	signals := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	dom.Watch(ctx, cancel)

	fmt.Fprintf(f.Stdout, "domain %d: vif %s waits for its backend\n", dom.ID(), f.vif)
	dev, err := f.connect(ctx, dom, counters)
	if err != nil {
		return err
	}
	u, err := begin(dom, dev)
	if err != nil {
		dev.Disconnect()
		return err
	}
	fmt.Fprintf(f.Stdout, "vif %s: MAC %v, MTU %d, backend in domain %d, %s\ncounters: %s\n%s; a signal ends it\n",
		f.vif, dev.MAC(), dev.MTU(), dev.Peer(), dev.Budget(), mirrored(dev), u.says)
	go func() {
		select {
		case err := <-u.failed:
			cancel(err)
		case <-ctx.Done():
		}
	}()
	last := f.follow(ctx, dev, u)
	switch cause := context.Cause(ctx); {
	case ctx.Err() == nil:
		err = fmt.Errorf("vif %s has ended: %s", f.vif, last.Reason)
	case errors.Is(cause, domain.ErrHostGone):
		// End the device so that the pins of its counters do not outlive this process.
		ended := make(chan error, 1)
		go func() {
			dev.Disconnect()
			ended <- u.close()
		}()
		return dom.Lost(func(format string, args ...any) { fmt.Fprintf(f.Stdout, format+"\n", args...) }, ended)
	case signals.Err() == nil:
		err = cause
	}
	dev.Disconnect()
	return errors.Join(err, u.close())
}

// follow prints when the vif goes down and connects again, until ctx or the device ends.
// After each reconnection it renews the use.
func (f *front) follow(ctx context.Context, dev *pvnet.Device, u *use) (last pvnet.LinkEvent) {
	last.Up = true
	for ev := range dev.Links(ctx) {
		switch {
		case ev.Up && !last.Up:
			if u.renew != nil {
				if err := u.renew(); err != nil {
					f.Log().Error("a vif is another card, and what uses it does not follow", "vif", f.vif, "err", err)
				}
			}
			fmt.Fprintf(f.Stdout, "vif %s: connected again, backend in domain %d, MAC %v, MTU %d\n", f.vif, dev.Peer(), ev.MAC, ev.MTU)
		case !ev.Up && last.Up:
			fmt.Fprintf(f.Stdout, "vif %s: down: %s\n", f.vif, ev.Reason)
		}
		last = ev
	}
	return last
}

// connect waits for the backend.
func (f *front) connect(ctx context.Context, dom *domain.Domain, counters telemetry.Store) (*pvnet.Device, error) {
	if f.wait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, f.wait, fmt.Errorf("waited %v", f.wait))
		defer cancel()
	}
	dev, err := pvnet.Connect(ctx, dom.Domain, f.vif, pvnet.Config{
		Queues: f.queues, LendRx: true, Offload: f.offload, Counters: counters, Logger: f.Log(),
	})
	if err == nil {
		return dev, nil
	}
	if cause := context.Cause(ctx); errors.Is(cause, context.Canceled) || errors.Is(cause, domain.ErrHostGone) {
		return nil, cause
	}
	if none, ok := errors.AsType[*xenbus.NoDeviceError](err); ok {
		next := "the host gives this domain none: see its --vif"
		if len(none.Have) > 0 {
			next = "choose one of those with --vif"
		}
		return nil, &cli.Advice{Err: err, Next: next}
	}
	if errors.Is(err, xenstore.ErrQuota) {
		return nil, &cli.Advice{Err: err, Next: "this domain has used up its quota in xenstore: remove what it does not need there, or have dom0 raise the quota"}
	}
	// On a slow machine the time may be over before Connect has begun to wait.
	if _, ok := errors.AsType[*xenbus.WaitError](err); ok || ctx.Err() != nil {
		return nil, &cli.Advice{Err: err, Next: `is the backend running? "barevif back", or the kernel's in its domain; --wait gives it longer`}
	}
	return nil, err
}
