package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/pprof"
	"time"

	"barevif/hypercall/xendev"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/tools/cli"
	"barevif/tools/domain"

	"github.com/spf13/cobra"
)

// card is a card of ours for a bench command.
type card struct {
	domain                  domain.Flags
	vif, doorbell, waitMode string
	take, back, offload     bool
	static                  bool
	profile                 string
	wait                    time.Duration
	mode                    pvnet.WaitMode
	log                     func() pvnet.Config
}

func (c *card) register(cmd *cobra.Command, p *cli.Program) {
	c.domain.Register(cmd, 1)
	cmd.Flags().BoolVar(&c.back, "back", false, "be the backend: of the first vif that comes; on an emulated host also give --dom 2")
	cmd.Flags().StringVar(&c.vif, "vif", "0", "`id` of the vif")
	cmd.Flags().BoolVar(&c.take, "take", false, "with --xen: unbind the vif from the kernel's driver first")
	cmd.Flags().StringVar(&c.doorbell, "doorbell", "ioctl", "with --xen: `way` to fire an event channel: ioctl or hypercall")
	cmd.Flags().StringVar(&c.waitMode, "wait-mode", "park", "what a `call` does that has to wait: park, adaptive or busy")
	cmd.Flags().BoolVar(&c.static, "static-grants", false, "let the backend keep the frontend's pages mapped, if both ends say so; it then lends them")
	cmd.Flags().StringVar(&c.profile, "profile", "", "write a CPU profile of the measurement to this `file`")
	cmd.Flags().DurationVar(&c.wait, "wait", 30*time.Second, "give up if the other end does not connect within this `time`")
	c.log = func() pvnet.Config { return pvnet.Config{LendRx: true, Logger: p.Log()} }
}

func (c *card) parse() (err error) {
	if c.mode, err = parseWaitMode(c.waitMode); err != nil {
		return err
	}
	switch c.doorbell {
	case "ioctl":
		c.domain.Doorbell = xendev.DoorbellIoctl
	case "hypercall":
		c.domain.Doorbell = xendev.DoorbellHypercall
	default:
		return cli.BadValue("doorbell", c.doorbell, "ioctl or hypercall")
	}
	if !c.domain.Xen && (c.take || c.domain.Doorbell != xendev.DoorbellIoctl) {
		return &cli.Advice{Err: errors.New("--take and --doorbell are for a real Xen"), Next: "give --xen too", Usage: true}
	}
	return nil
}

// run calls fn with the connected card, and ends the card after it.
func (c *card) run(ctx context.Context, fn func(context.Context, *pvnet.Device) error) error {
	if err := c.parse(); err != nil {
		return err
	}
	dom, err := c.domain.Open(ctx)
	if err != nil {
		return err
	}
	defer dom.End()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	dom.Watch(ctx, cancel)
	cfg := c.log()
	cfg.Wait, cfg.Offload, cfg.StaticGrants = c.mode, c.offload, c.static
	if c.back {
		return c.serve(ctx, dom, cfg, fn)
	}
	if c.domain.Xen {
		if err := c.domain.Free(c.vif, c.take); err != nil {
			return err
		}
	}
	wait, stop := context.WithTimeoutCause(ctx, c.wait, fmt.Errorf("waited %v", c.wait))
	dev, err := pvnet.Connect(wait, dom.Domain, c.vif, cfg)
	stop()
	if err != nil {
		return err
	}
	defer dev.Disconnect()
	return c.measured(ctx, dev, fn)
}

// awaitStatic waits until the backend has mapped the frontend's pages, which is soon after
// the link is up.
func (c *card) awaitStatic(ctx context.Context, dev *pvnet.Device) error {
	late := time.After(c.wait)
	for dev.Features()&telemetry.FeatureStaticGrants == 0 {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-late:
			return &cli.Advice{Err: fmt.Errorf("no static grants within %v", c.wait), Next: "give --static-grants to both ends; Linux's drivers have none"}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// measure is run for a measurement, whose result it returns.
func (c *card) measure(ctx context.Context, fn func(context.Context, *pvnet.Device) (result, error)) (r result, err error) {
	err = c.run(ctx, func(ctx context.Context, dev *pvnet.Device) error {
		var err error
		r, err = fn(ctx, dev)
		return err
	})
	return r, err
}

// serve is run for a backend.
func (c *card) serve(ctx context.Context, dom *domain.Domain, cfg pvnet.Config, fn func(context.Context, *pvnet.Device) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(c.wait, func() { cancel(fmt.Errorf("no frontend connected within %v", c.wait)) })
	first := make(chan struct{}, 1)
	first <- struct{}{}
	measured := errors.New("measured")
	var failed error
	err := pvnet.Serve(ctx, dom.Domain, pvnet.ServeConfig{Config: cfg, Hotplug: true}, func(dev *pvnet.Device) {
		select {
		case <-first:
		default: // another vif
			<-ctx.Done()
			return
		}
		for ev := range dev.Links(ctx) {
			if ev.Up {
				timer.Stop()
				failed = c.measured(ctx, dev, fn)
				break
			}
		}
		cancel(measured)
	})
	if errors.Is(err, measured) {
		return failed
	}
	return err
}

func (c *card) measured(ctx context.Context, dev *pvnet.Device, fn func(context.Context, *pvnet.Device) error) error {
	if c.static {
		if err := c.awaitStatic(ctx, dev); err != nil {
			return err
		}
	}
	if c.profile == "" {
		return fn(ctx, dev)
	}
	f, err := os.Create(c.profile)
	if err != nil {
		return fmt.Errorf("--profile: %w", err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		f.Close()
		return err
	}
	err = fn(ctx, dev)
	pprof.StopCPUProfile()
	return errors.Join(err, f.Close())
}
