// Command vifrouter is a router and firewall between vifs: guests on one side, whose backend it
// is, and an uplink on the other, whose frontend it is. It moves frames in this process, without
// a kernel's network. See its --help.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"barevif/pvnet"
	"barevif/tools/cli"
	"barevif/tools/domain"
	"barevif/tools/internal/looking"
	"barevif/tools/internal/systemd"
	"barevif/tools/vifrouter/config"

	"github.com/spf13/cobra"
)

func main() {
	signal.Ignore(syscall.SIGPIPE) // a closed output pipe must not keep us from cleaning up
	// SIGHUP is a reload here, and so not among those that end the command.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(cli.Run(ctx, rootCommand, os.Args[1:], os.Stdout, os.Stderr))
}

const about = `vifrouter is what a firewall guest runs on Xen, between other guests and the world:

  guests     their vifs have their backend in this domain; each is a link of its own
  uplink     a vif of this domain, whose backend is another router, dom0, a driver domain
  router     IPv4 and IPv6, NAT, a filter that knows flows, DHCP, router advertisements,
             a name server, counters; one process, and no network of the kernel

Guests come and go with "xl network-attach", and so may the uplink. Each guest is held to
its MAC and its addresses. What may begin is in a small file; answers pass.`

func rootCommand(p *cli.Program) *cobra.Command {
	root := &cobra.Command{
		Use:   "vifrouter",
		Short: "A router and firewall between vifs",
		Long:  about,
		Example: `  vifrouter example > router.conf
  vifrouter check router.conf
  vifrouter run --xen router.conf
  vifrouter status`,
	}
	root.AddCommand(runCommand(p), statusCommand(p), checkCommand(p), exampleCommand(p))
	return root
}

func exampleCommand(p *cli.Program) *cobra.Command {
	return &cobra.Command{
		Use:   "example",
		Short: "Print a complete configuration, with every statement",
		Long:  "example prints a configuration that has every statement there is, each explained by a comment.",
		Args:  cli.Arguments(0),
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprint(p.Stdout, config.Example)
			return err
		},
	}
}

func checkCommand(p *cli.Program) *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "Say what is wrong in a configuration",
		Long: `check reads a configuration and prints a line for each that is wrong: where it is, what is
wrong, and what to write instead. It exits with 1 if there is any.`,
		Example: `  vifrouter check router.conf`,
		Args:    cli.OneArgument("FILE", `"vifrouter example" prints one`),
		RunE: func(_ *cobra.Command, args []string) error {
			cfg, err := load(args[0])
			if err != nil {
				return err
			}
			p.Say("%s: %s; nothing is wrong", args[0], counts(cfg))
			return nil
		},
	}
}

// load reads a configuration; its errors have advice.
func load(name string) (*config.Config, error) {
	cfg, err := config.Load(name)
	if wrong, ok := errors.AsType[config.Errors](err); ok {
		return nil, &cli.Advice{Err: wrong, Next: `"vifrouter example" prints a configuration with every statement`}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &cli.Advice{Err: err, Next: `"vifrouter example" prints one to begin with`, Usage: true}
	}
	if err != nil {
		return nil, &cli.Advice{Err: err, Next: "name a file that this user can read", Refused: errors.Is(err, fs.ErrPermission)}
	}
	return cfg, nil
}

type run struct {
	*cli.Program
	domain domain.Flags
	take   bool
	lines  []string
	file   string
	store  string // a directory of xenstore; "": none
	look   looking.Flag
}

func runCommand(p *cli.Program) *cobra.Command {
	r := run{Program: p}
	cmd := &cobra.Command{
		Use:   "run [FILE]",
		Short: "Route between the vifs of this domain, as FILE says",
		Long: `run connects to the uplink, serves every vif whose backend is this domain, and routes
between them until a signal ends it.

SIGHUP makes it read FILE again. The new configuration counts between two frames: flows that
it still allows go on and lose nothing, others end with their next packet. If a line of it is
wrong, or it changes what takes a new start (the uplink's vif, flows, metrics), the log says
so and the old one stays. "vifrouter status" shows what became of it, and what the router
has and does.

A vif that no line of the file admits does not connect: hotplug-error in xenstore says why. It
does after a reload that admits it. A guest has one IPv4 address: that of its guest line, the
one that the toolstack has for it (ip= in a domain's configuration) if it is in the network, or
one of the pool, by DHCP. It may have the address set by hand, too, with the router as a gateway.
Packets from another source, and of guests whose MAC the toolstack wrote from another MAC, are
dropped and counted. In IPv6 a guest has a /64 of its own.

With --store data/vifrouter dom0 hands this domain a configuration in xenstore, also while it
runs: as the value of data/vifrouter/config, or in pieces below it, config/1, config/2 and so
on. It counts in place of FILE. data/vifrouter/result has the answer, "taken: …" or
"refused: …" with what is wrong. If the key is removed, what is in use stays. Without FILE the
router waits for its first one.

On a real Xen (--xen) the kernel's xen-netfront must not own the uplink; --take takes it away.
The guests' vifs name this domain: vif = [ 'backend=router,mac=…' ]; libxl must not run its
script in this domain. As the only program of a guest, which "barevif image" makes, it has its
file in the image: see DEPLOYING.md.`,
		Example: `  vifrouter run --xen router.conf
  vifrouter run --xen --store data/vifrouter router.conf
  vifrouter run --emu host.sock --dom 1 router.conf
  kill -HUP $(pidof vifrouter)`,
		Args: cli.Arguments(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				r.file = args[0]
			}
			return r.run(cmd.Context())
		},
	}
	r.domain.Register(cmd, 1)
	r.look.Register(cmd, `where "vifrouter status", "barevif ring" and "barevif dump" of this user and root find this process`)
	cmd.Flags().BoolVar(&r.take, "take", false, "with --xen: unbind the uplink from the kernel's driver first")
	cmd.Flags().StringArrayVar(&r.lines, "line", nil, "a `line` of the configuration, instead of FILE; repeatable")
	cmd.Flags().StringVar(&r.store, "store", "", "take the configuration from this `directory` of the domain's xenstore, such as data/vifrouter, whenever dom0 writes it there")
	return cmd
}

// configuration reads the file, or the lines. Without either it returns nil.
func (r *run) configuration() (*config.Config, error) {
	if r.file != "" {
		return load(r.file)
	}
	if len(r.lines) == 0 {
		return nil, nil
	}
	cfg, err := config.Parse("--line", []byte(strings.Join(r.lines, "\n")))
	if err != nil {
		return nil, &cli.Advice{Err: err, Next: `"vifrouter example" prints a configuration with every statement`, Usage: true}
	}
	return cfg, nil
}

func (r *run) run(ctx context.Context) error {
	switch {
	case r.file == "" && len(r.lines) == 0 && r.store == "":
		return &cli.Advice{Err: errors.New("FILE is missing"), Next: `"vifrouter example" prints one; or give its lines with --line`, Usage: true}
	case r.file != "" && len(r.lines) > 0:
		return &cli.Advice{Err: errors.New("both FILE and --line are given"), Next: "leave out one of them", Usage: true}
	case r.take && !r.domain.Xen:
		return &cli.Advice{Err: errors.New("--take is for a real Xen"), Next: "give --xen too", Usage: true}
	case r.store != "":
		if err := checkStore(r.store); err != nil {
			return err
		}
	}
	own, err := r.configuration()
	if err != nil {
		return err
	}
	dom, err := r.domain.Open(ctx)
	if err != nil {
		return err
	}
	defer dom.End()
	return r.route(ctx, dom, own)
}

// route routes in dom, which has just been opened, until ctx or the domain ends. own is what the command
// line says, or nil.
func (r *run) route(ctx context.Context, dom *domain.Domain, own *config.Config) (err error) {
	var h *handed
	if r.store != "" {
		if h, err = openHanded(ctx, dom.Domain, r.store, r.Log()); err != nil {
			return err
		}
		defer h.close()
	}
	cfg, source, err := r.begin(ctx, dom, h, own)
	if err != nil || cfg == nil {
		return err
	}
	handedOver := h != nil && source == h.source()
	defer func() {
		if handedOver && err != nil {
			h.answer(ctx, cfg, err)
		}
	}()
	if r.domain.Xen {
		if err := r.domain.Free(cfg.Uplink.Vif, r.take); err != nil {
			return err
		}
	}
	hups := make(chan os.Signal, 1)
	signal.Notify(hups, syscall.SIGHUP)
	defer signal.Stop(hups)
	device := pvnet.Config{Queues: pvnet.AutoQueues, StaticGrants: true, Offload: true, Logger: r.Log()}
	inspector, endInspect, err := r.look.Listen(r.Log())
	if err != nil {
		return err
	}
	defer endInspect()
	if inspector != nil {
		device.Inspector = inspector
	}
	d, err := newDaemon(dom.Domain, cfg, device, r.Say, r.Log())
	if err != nil {
		return err
	}
	d.file = source
	if inspector != nil {
		defer inspector.Show(stateName, d.state)()
	}
	endMetrics, err := d.serveMetrics(cfg.Metrics)
	if err != nil {
		d.close()
		return cli.ListenRefused(err, cfg.Metrics.Addr.String(), "line")
	}
	defer endMetrics()
	r.Say("domain %d routes between %d networks and vif %s; SIGHUP reads the configuration again, another signal ends it", dom.ID(), len(cfg.Networks), cfg.Uplink.Vif)
	if handedOver {
		h.answer(ctx, cfg, nil)
	}
	defer context.AfterFunc(ctx, func() { systemd.Notify("STOPPING=1") })()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan error, 1)
	go func() { done <- d.run(ctx) }()
	systemd.Notify("READY=1")
	go r.reloads(ctx, d, hups, h) // says RELOADING, which READY would end
	select {
	case err := <-done:
		return err
	case <-dom.Gone:
		cancel(domain.ErrHostGone)
		return dom.Lost(r.Say, done)
	}
}

// reloads reads the configuration again for each SIGHUP, and whenever dom0 hands one, until ctx ends.
func (r *run) reloads(ctx context.Context, d *daemon, hups <-chan os.Signal, h *handed) {
	changed := h.changed()
	for {
		asked := true // by a signal, which has an effect even if nothing was handed
		select {
		case <-ctx.Done():
			return
		case <-hups:
		case _, ok := <-changed:
			if !ok && ctx.Err() != nil {
				return
			}
			if !ok {
				r.Log().Error("what dom0 hands this domain is not looked at any more", "err", h.watch.Err())
				changed = nil
				continue
			}
			asked = false
		}
		cfg, source, err := r.again(ctx, h, asked)
		if ctx.Err() != nil {
			return
		}
		if cfg == nil && err == nil {
			if asked {
				r.Log().Warn("there is no configuration to read again: no FILE was given, and dom0 has none in xenstore", "key", h.key(keyConfig))
			}
			continue
		}
		systemd.Reloading()
		if err == nil {
			err = d.reload(cfg)
		}
		d.triedReload(source, err)
		if h != nil && source == h.source() {
			h.answer(ctx, cfg, err)
		}
		systemd.Notify("READY=1")
		if err != nil {
			r.logRefused("the new configuration is not used, and the old one stays", err)
			continue
		}
		r.Say("the configuration was read again: %s", counts(cfg))
	}
}

// again returns the configuration to use now, and its source: the one that was handed, or if there is
// none and a signal asked, that of the command line. nil: there is none, or it has its answer already.
func (r *run) again(ctx context.Context, h *handed, asked bool) (*config.Config, string, error) {
	if h != nil {
		cfg, err := h.read(ctx)
		if h.done && !asked {
			return nil, "", nil
		}
		if cfg != nil || err != nil {
			return cfg, h.source(), err
		}
	}
	if !asked {
		return nil, "", nil
	}
	cfg, err := r.configuration()
	return cfg, r.file, err
}
