package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/tools/cli"
	"barevif/tools/domain"

	"github.com/spf13/cobra"
)

// A backend is a command that serves vifs of its domain.
type backend struct {
	*cli.Program
	name         string // of the command
	domain       domain.Flags
	counters     counterFlag
	inspect      inspectFlag
	typ          string
	vifs         []string
	queues       string
	remove       bool
	drain, stall time.Duration
	dom0         bool // we are the domain in which libxl runs scripts
	news         linkNews
	slog         *slog.Logger
}

func (b *backend) register(cmd *cobra.Command) {
	b.domain.Register(cmd, 2)
	b.counters.register(cmd)
	b.inspect.register(cmd)
	cmd.Flags().StringVar(&b.typ, "type", "vif", "backend `type` to serve; one of its own keeps the kernel's netback away")
	cmd.Flags().StringArrayVar(&b.vifs, "vif", nil, "serve this `vif` alone, and leave others to other processes: DOM.ID, or a pattern such as '3.*'; repeatable; default: all")
	cmd.Flags().StringVar(&b.queues, "queues", autoQueues, queuesUsage("to offer per vif"))
	cmd.Flags().BoolVar(&b.remove, "remove", false, "remove a vif's directory once it was taken away, where no xl devd does")
	cmd.Flags().DurationVar(&b.drain, "drain", 10*time.Second, "`time` that frames wait for a guest that takes none; negative: for ever")
	cmd.Flags().DurationVar(&b.stall, "stall", 60*time.Second, "`time` without a frame taken after which the carrier goes off; negative: never")
	cli.FixedValues(cmd, "queues", autoQueues)
	completes(cmd, completeNothing, "type", "vif", "drain", "stall")
}

// maxTimeout is the longest --drain and --stall.
const maxTimeout = 24 * time.Hour

// check checks the flags that cobra does not check.
func (b *backend) check() (queues int, counters telemetry.Store, err error) {
	if queues, err = deviceQueues(b.queues); err != nil {
		return 0, nil, err
	}
	if t := b.drain; t >= 0 && t < time.Millisecond || t > maxTimeout {
		return 0, nil, cli.BadValue("drain", t.String(), "a time from 1ms to 24h, or negative")
	}
	if t := b.stall; t >= 0 && t < time.Second || t > maxTimeout {
		return 0, nil, cli.BadValue("stall", t.String(), "a time from 1s to 24h, or negative")
	}
	for _, pattern := range b.vifs {
		if !isVifPattern(pattern) {
			return 0, nil, cli.BadValue("vif", pattern, "a vif DOM.ID such as 1.0, or a pattern of such, as '3.*'")
		}
	}
	if !isDeviceType(b.typ) {
		return 0, nil, cli.BadValue("type", b.typ, deviceType)
	}
	counters, err = b.counters.store()
	return queues, counters, err
}

// deviceType is what isDeviceType reports true for.
const deviceType = "a backend type of small letters, digits, - and _"

func isDeviceType(s string) bool {
	return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789_-") == ""
}

// isVifPattern reports whether a pattern can match a vif, like "1.0".
func isVifPattern(pattern string) bool {
	dom, id, two := strings.Cut(pattern, ".")
	_, err := path.Match(pattern, "")
	return err == nil && two && dom != "" && id != "" && strings.Trim(pattern, "0123456789.*?[]-^\\") == ""
}

// isAmong reports whether a vif, like "1.0", matches one of the patterns.
func isAmong(patterns []string, vif string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		ok, _ := path.Match(pattern, vif) // isVifPattern was asked
		return ok
	})
}

// selection stands for the vifs of --vif in the name of a file; "": all vifs. Processes that serve
// other vifs than each other do not take each other's over.
func (b *backend) selection() string {
	if len(b.vifs) == 0 {
		return ""
	}
	patterns := slices.Clone(b.vifs)
	slices.Sort(patterns)
	return fmt.Sprintf("-%x", sha256.Sum256([]byte(strings.Join(slices.Compact(patterns), " "))))[:9]
}

// serveConfig returns what the flags say of all vifs.
func (b *backend) serveConfig(queues int, counters telemetry.Store, inspector pvnet.Inspector) pvnet.ServeConfig {
	cfg := pvnet.ServeConfig{
		Config: pvnet.Config{Queues: queues, StaticGrants: true, Offload: true, Counters: counters, Inspector: inspector, Logger: b.slog},
		Type:   b.typ,
		Hold:   true,
		Remove: b.remove,

		DrainTimeout: b.drain,
		StallTimeout: b.stall,
	}
	if len(b.vifs) > 0 {
		cfg.Select = func(front hypercall.DomID, id string) bool { return isAmong(b.vifs, fmt.Sprintf("%d.%s", front, id)) }
	}
	return cfg
}

// hostPatience is how long after its xenstore an emulated host may end, so that its end is known to be
// the reason.
const hostPatience = 2 * time.Second

// serveVifs serves the vifs of the domain until ctx ends, or the host does, and cancels ctx then. A
// signal is no error.
func (b *backend) serveVifs(ctx context.Context, cancel context.CancelCauseFunc, dom *domain.Domain, cfg pvnet.ServeConfig, accept func(context.Context, *pvnet.Device)) error {
	defer cancel(nil)
	b.dom0 = dom.ID() == 0
	done := make(chan error, 1)
	go func() { done <- pvnet.Serve(ctx, dom, cfg, func(dev *pvnet.Device) { accept(ctx, dev) }) }()
	select {
	case err := <-done:
		if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, pvnet.ErrHandover) {
			return nil // a signal
		}
		done <- err
		if dom.Gone == nil { // no emulated host
			return err
		}
		select { // a host that ends closes its xenstore first
		case <-dom.Gone:
		case <-time.After(hostPatience):
			return err
		}
	case <-dom.Gone:
	}
	// The xenstore is gone, so the vifs cannot be closed there. But they must end: the pins of their
	// counters would outlive this process.
	cancel(domain.ErrHostGone)
	return dom.Lost(b.Say, done)
}

// offer calls join until it has joined the vif to its network, and offers the vif to its frontend
// then. While it cannot be joined, the toolstack, the frontend and the log are told why. notes are
// keys that are left aside; byScript says that the toolstack's script goes on. It reports false
// once the device or ctx has ended; joined says then whether join has succeeded all the same.
func (b *backend) offer(ctx context.Context, dev *pvnet.Device, vif string, join func(context.Context) (notes []*keyError, byScript bool, err error)) (ok, joined bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-dev.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	for said := ""; ; {
		notes, byScript, err := join(ctx)
		if ctx.Err() != nil || errors.Is(err, pvnet.ErrDisconnected) {
			return false, err == nil
		}
		if err == nil {
			for _, n := range notes {
				b.slog.Warn("a key of the toolstack is not honoured", append([]any{"vif", vif}, n.attrs()...)...)
			}
			dev.Offer(!byScript)
			return true, true
		}
		if err.Error() != said {
			said = err.Error()
			b.refused(vif, err)
			dev.Refuse(err)
		}
		news, stop := b.news.of(missing(err))
		await(ctx, news, lookAgain)
		stop()
	}
}

// refused logs why a vif has no network.
func (b *backend) refused(vif string, err error) {
	args := []any{"vif", vif}
	if e, ok := errors.AsType[*keyError](err); ok {
		args = append(args, e.attrs()...)
	} else {
		args = append(args, "err", err)
		if a, ok := errors.AsType[*cli.Advice](err); ok {
			args = append(args, "next", a.Next)
		}
	}
	b.slog.Error("a vif has no network and does not connect", args...)
}

// follow prints the changes of the vif's link state until the device has ended. It calls up for each
// event while the link is up, and connected when it comes up, before that is printed.
func (b *backend) follow(dev *pvnet.Device, vif string, up func(pvnet.LinkEvent), connected func()) {
	was, stalled, mtu := false, false, 0
	for ev := range dev.Links(context.Background()) {
		if ev.Up {
			up(ev)
		}
		switch {
		case ev.Up && ev.Stalled && !stalled:
			b.Say("vif %s: takes no frames, carrier off", vif)
		case ev.Up && was && stalled && !ev.Stalled:
			b.Say("vif %s: takes frames again, carrier on", vif)
		case ev.Up && was && ev.MTU != mtu:
			b.Say("vif %s: its MTU is now %d", vif, ev.MTU)
		case ev.Up:
			connected()
			b.Say("vif %s: connected to domain %d, MTU %d, %s, %s", vif, dev.Peer(), ev.MTU, queuesOf(dev), dev.Budget())
		case was:
			b.Say("vif %s: down: %s", vif, ev.Reason)
		}
		was, stalled, mtu = ev.Up, ev.Stalled, ev.MTU
	}
}

// changed logs that a key was changed in a way that has no effect before the vif is given anew.
func (b *backend) changed(vif, key string) {
	b.slog.Warn("a key of the toolstack was changed after the vif was joined", "vif", vif, "key", key,
		"next", "xl network-detach and xl network-attach, or start "+b.name+" again")
}
