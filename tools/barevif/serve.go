package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"time"

	"barevif/hypercall/xendev"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/xenbus"

	"github.com/spf13/cobra"
)

func serveCommand(p *program) *cobra.Command {
	s := serve{program: p}
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Be a guest: own a vif and serve web pages through it",
		Long: `serve is an appliance: it connects to a vif of its domain, runs a TCP/IP stack on it
(gVisor's, in this process) and serves HTTP, until a signal ends it:

  /                 a page that says what served it, or the files of --root
  /bytes/N          N pseudo-random bytes, the same every time
  /bytes/N.sha256   their SHA-256
  /metrics          the card's counters as OpenMetrics text

The machine's own network has no part in it. When the backend goes, or the toolstack
takes the vif away, serve says so, waits, and connects again when one comes back. A
signal takes the card down in good order: the backend sees it close.

On a real Xen (--xen) the kernel's xen-netfront must not own the vif; --take takes
it away from it.`,
		Example: `  barevif serve --addr 10.9.0.2/24
  barevif serve --addr 10.9.0.2/24 --gateway 10.9.0.1 --root ./public
  barevif serve --xen --take --vif 1 --addr 192.0.2.7/24 --gateway 192.0.2.1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	s.domain.register(cmd, 1)
	s.counters.register(cmd)
	cmd.Flags().StringVar(&s.vif, "vif", "0", "`id` of the vif")
	cmd.Flags().StringVar(&s.addr, "addr", "10.9.0.2/24", "`address` of the appliance: IP/BITS")
	cmd.Flags().StringVar(&s.gateway, "gateway", "", "`address` of the router to other networks")
	cmd.Flags().Uint16Var(&s.port, "port", 80, "TCP `port` to serve HTTP on")
	cmd.Flags().StringVar(&s.root, "root", "", "serve the files of this `directory`")
	cmd.Flags().DurationVar(&s.wait, "wait", 30*time.Second, "give up if no backend connects within this `time`; 0: wait for ever")
	cmd.Flags().IntVar(&s.queues, "queues", 1, "`queues` to ask for")
	cmd.Flags().BoolVar(&s.take, "take", false, "with --xen: unbind the vif from the kernel's driver first")
	return cmd
}

type serve struct {
	*program
	domain                   domainFlags
	counters                 counterFlag
	vif, addr, gateway, root string
	port                     uint16
	wait                     time.Duration
	queues                   int
	take                     bool
}

func (s *serve) run(ctx context.Context) error {
	cfg, err := s.config()
	if err != nil {
		return err
	}
	counters, err := s.counters.store()
	if err != nil {
		return err
	}
	dom, err := s.domain.open(ctx)
	if err != nil {
		return err
	}
	defer dom.close()
	if s.domain.xen {
		if err := s.free(); err != nil {
			return err
		}
	}
	signals := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	dom.watch(ctx, cancel)

	fmt.Fprintf(s.stdout, "domain %d: vif %s waits for its backend\n", dom.ID(), s.vif)
	dev, err := s.connect(ctx, dom, counters)
	if err != nil {
		return err
	}
	cfg.own = uint16(dom.ID())
	app, err := startAppliance(dev, cfg)
	if err != nil {
		dev.Disconnect()
		return err
	}
	fmt.Fprintf(s.stdout, "vif %s: MAC %v, MTU %d, backend in domain %d, %s\ncounters: %s\nserving http://%s/; a signal ends it\n",
		s.vif, dev.MAC(), dev.MTU(), dev.Peer(), dev.Budget(), mirrored(dev), app.addr)
	go func() {
		select {
		case err := <-app.failed:
			cancel(err)
		case <-ctx.Done():
		}
	}()
	last := s.follow(ctx, dev)
	switch cause := context.Cause(ctx); {
	case ctx.Err() == nil:
		err = fmt.Errorf("vif %s has ended: %s", s.vif, last.Reason)
	case errors.Is(cause, errHostGone):
		return errHostGone // with it all there was to close in good order
	case signals.Err() == nil:
		err = cause
	}
	dev.Disconnect()
	return errors.Join(err, app.close())
}

// follow tells when the backend goes and comes back, until ctx or the device ends.
func (s *serve) follow(ctx context.Context, dev *pvnet.Device) (last pvnet.LinkEvent) {
	last.Up = true
	for ev := range dev.Links(ctx) {
		switch {
		case ev.Up && !last.Up:
			fmt.Fprintf(s.stdout, "vif %s: connected again, backend in domain %d\n", s.vif, dev.Peer())
		case !ev.Up && last.Up:
			fmt.Fprintf(s.stdout, "vif %s: down: %s\n", s.vif, ev.Reason)
		}
		last = ev
	}
	return last
}

// config reads the flags that are not for cobra to check.
func (s *serve) config() (cfg applianceConfig, err error) {
	if cfg.addr, err = netip.ParsePrefix(s.addr); err != nil || cfg.addr.Addr().Is4In6() || cfg.addr.Addr().IsMulticast() || cfg.addr.Addr().IsUnspecified() {
		return cfg, badValue("addr", s.addr, "an address with a prefix, like 10.9.0.2/24")
	}
	if s.gateway != "" {
		if cfg.gateway, err = netip.ParseAddr(s.gateway); err != nil || !cfg.addr.Contains(cfg.gateway) || cfg.gateway == cfg.addr.Addr() {
			return cfg, badValue("gateway", s.gateway, "another address of the network "+cfg.addr.Masked().String())
		}
	}
	if s.port == 0 {
		return cfg, badValue("port", "0", "a port from 1 to 65535")
	}
	if s.queues < 1 || s.queues > 64 {
		return cfg, badValue("queues", strconv.Itoa(s.queues), "a number from 1 to 64")
	}
	if s.wait < 0 {
		return cfg, badValue("wait", s.wait.String(), "a time to wait")
	}
	if s.take && !s.domain.xen {
		return cfg, &advice{err: errors.New("--take is for a real Xen"), next: "give --xen too", usage: true}
	}
	cfg.port = s.port
	if s.root != "" {
		dir, err := os.OpenRoot(s.root)
		if err != nil {
			return cfg, &advice{err: fmt.Errorf("--root: %w", err), next: "name a directory this user can read", usage: errors.Is(err, fs.ErrNotExist)}
		}
		cfg.root = dir
	}
	return cfg, nil
}

// free sees to it that the kernel does not own the vif too.
func (s *serve) free() error {
	if s.take {
		if err := xendev.Take(xendev.Config{}, s.vif); err != nil {
			return fmt.Errorf("take vif %s from the kernel: %w", s.vif, err)
		}
	}
	if err := xendev.CheckFree(xendev.Config{}, s.vif); err != nil {
		return &advice{err: err, next: "--take does that (as root)", refused: true}
	}
	return nil
}

// connect waits for the backend.
func (s *serve) connect(ctx context.Context, dom *domain, counters telemetry.Store) (*pvnet.Device, error) {
	if s.wait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.wait, fmt.Errorf("waited %v", s.wait))
		defer cancel()
	}
	dev, err := pvnet.Connect(ctx, dom.Domain, s.vif, pvnet.Config{Queues: s.queues, LendRx: true, Counters: counters, Logger: s.log()})
	if err == nil {
		return dev, nil
	}
	if cause := context.Cause(ctx); errors.Is(cause, context.Canceled) || errors.Is(cause, errHostGone) {
		return nil, cause
	}
	if none, ok := errors.AsType[*xenbus.NoDeviceError](err); ok {
		next := "the host gives this domain none: see its --vif"
		if len(none.Have) > 0 {
			next = "choose one of those with --vif"
		}
		return nil, &advice{err: err, next: next}
	}
	if _, ok := errors.AsType[*xenbus.WaitError](err); ok {
		return nil, &advice{err: err, next: `is the backend running? "barevif back", or the kernel's in its domain`}
	}
	return nil, err
}
