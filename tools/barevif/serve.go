package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"

	"barevif/pvnet"
	"barevif/tools/appliance"
	"barevif/tools/cli"
	"barevif/tools/domain"

	"github.com/spf13/cobra"
)

func serveCommand(p *cli.Program) *cobra.Command {
	s := serve{front: front{Program: p, offload: true}}
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Be a guest: own a vif and serve web pages through it",
		Long: `serve is an appliance: it connects to a vif of its domain, runs a TCP/IP stack on it
(gVisor's, in this process) and serves HTTP, until a signal ends it:

  /                 a page that says what served it, or the files of --root
  /bytes/N          N pseudo-random bytes, the same every time
  /bytes/N.sha256   their SHA-256
  /sum              the SHA-256 of what is sent there: curl -T FILE
  /metrics          the card's counters as OpenMetrics text

With --check it answers datagrams, too: go run ./test/check finds out whether what
the card carries arrives as it was sent.

The machine's own network has no part in it. When the backend goes, or the toolstack
takes the vif away, serve says so, waits, and connects again when one comes back. A
signal takes the card down in good order: the backend sees it close.

On a real Xen (--xen) the kernel's xen-netfront must not own the vif; --take takes
it away from it.`,
		Example: `  barevif serve --addr 10.9.0.2/24
  barevif serve --addr 10.9.0.2/24 --gateway 10.9.0.1 --root ./public
  barevif serve --xen --take --vif 1 --addr 192.0.2.7/24 --gateway 192.0.2.1`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	s.register(cmd)
	cmd.Flags().StringVar(&s.addr, "addr", "10.9.0.2/24", "`address` of the appliance: IP/BITS")
	cmd.Flags().StringVar(&s.gateway, "gateway", "", "`address` of the router to other networks")
	cmd.Flags().Uint16Var(&s.port, "port", 80, "TCP `port` to serve HTTP on")
	cmd.Flags().StringVar(&s.root, "root", "", "serve the files of this `directory`")
	cmd.Flags().Uint16Var(&s.check, "check", 0, fmt.Sprintf("UDP `port` to answer \"go run ./test/check\" at, which asks at %d; 0: none", appliance.DatagramPort))
	cmd.Flags().IntVar(&s.queues, "queues", 1, "`queues` to ask for")
	return cmd
}

type serve struct {
	front
	addr, gateway, root string
	port, check         uint16
}

func (s *serve) run(ctx context.Context) error {
	cfg, err := s.config()
	if err != nil {
		return err
	}
	return s.own(ctx, func(dom *domain.Domain, dev *pvnet.Device) (*use, error) {
		cfg.own = uint16(dom.ID())
		app, err := startAppliance(dev, cfg)
		if err != nil {
			return nil, err
		}
		return &use{says: fmt.Sprintf("serving http://%s/", app.addr), failed: app.failed, close: app.close}, nil
	})
}

// config parses the flags that cobra does not check.
func (s *serve) config() (cfg applianceConfig, err error) {
	if cfg.addr, err = netip.ParsePrefix(s.addr); err != nil || cfg.addr.Addr().Is4In6() || cfg.addr.Addr().IsMulticast() || cfg.addr.Addr().IsUnspecified() {
		return cfg, cli.BadValue("addr", s.addr, "an address with a prefix, like 10.9.0.2/24")
	}
	if s.gateway != "" {
		if cfg.gateway, err = netip.ParseAddr(s.gateway); err != nil || !cfg.addr.Contains(cfg.gateway) || cfg.gateway == cfg.addr.Addr() {
			return cfg, cli.BadValue("gateway", s.gateway, "another address of the network "+cfg.addr.Masked().String())
		}
	}
	if s.port == 0 {
		return cfg, cli.BadValue("port", "0", "a port from 1 to 65535")
	}
	if s.queues < 1 || s.queues > 64 {
		return cfg, cli.BadValue("queues", strconv.Itoa(s.queues), "a number from 1 to 64")
	}
	cfg.port, cfg.check = s.port, s.check
	if s.root != "" {
		dir, err := os.OpenRoot(s.root)
		if err != nil {
			return cfg, &cli.Advice{Err: fmt.Errorf("--root: %w", err), Next: "name a directory this user can read", Usage: errors.Is(err, fs.ErrNotExist)}
		}
		cfg.root = dir
	}
	return cfg, nil
}
