package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/netstack"
	"barevif/telemetry"
	"barevif/telemetry/openmetrics"
	"barevif/tools/appliance"
	"barevif/tools/cli"
)

// applianceConfig configures an appliance: what it serves, and at which address.
type applianceConfig struct {
	addr    netip.Prefix
	gateway netip.Addr                       // zero: none
	addrs   []netip.Prefix                   // further addresses
	dynamic bool                             // the addresses come from DHCP and routers; then there is no addr
	later   bool                             // other addresses may be set
	say     func(format string, args ...any) // says which addresses come and go; nil: nobody asks
	log     *slog.Logger
	port    uint16   // 0: 80
	check   uint16   // UDP port for test/check; 0: none
	root    *os.Root // the files to serve, lent until close; nil: the status page
	own     uint16   // the domain's number
}

// An app is a net/http server on gVisor's TCP/IP on a vif.
type app struct {
	failed chan error // gets the error if the app ends by itself

	stack   *netstack.Stack
	server  *http.Server
	serving sync.WaitGroup
	once    sync.Once
}

func startAppliance(dev *pvnet.Device, cfg applianceConfig) (*app, error) {
	if cfg.port == 0 {
		cfg.port = 80
	}
	s, err := netstack.New(dev, netstack.Config{Addr: cfg.addr, Gateway: cfg.gateway, Addrs: cfg.addrs, DHCP: cfg.dynamic, RA: cfg.dynamic, Later: cfg.later, Logger: cfg.log})
	if err != nil {
		return nil, fmt.Errorf("TCP/IP on the vif: %w", err)
	}
	l, err := s.Listen("tcp", ":"+strconv.Itoa(int(cfg.port)))
	if err != nil {
		s.Close()
		return nil, err
	}
	a := &app{failed: make(chan error, 1), stack: s}
	if cfg.check != 0 {
		c, err := s.ListenPacket("udp", ":"+strconv.Itoa(int(cfg.check)))
		if err != nil {
			s.Close()
			return nil, err
		}
		a.serving.Go(func() {
			if err := appliance.Answer(c); !errors.Is(err, net.ErrClosed) {
				a.fail(fmt.Errorf("answer datagrams: %w", err))
			}
		})
	}
	began := time.Now()
	pages := appliance.Config{
		About: func() []appliance.Row { return aboutVif(dev, s, cfg.own, time.Since(began)) },
		Vifs: func() []openmetrics.Device {
			return []openmetrics.Device{{Name: vifName(dev, cfg.own), Stats: dev.Counters().Totals()}}
		},
	}
	if cfg.root != nil {
		pages.Files = cfg.root.FS()
	}
	a.server = &http.Server{Handler: appliance.New(pages), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	a.serving.Go(func() {
		if err := a.server.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			a.fail(fmt.Errorf("serve HTTP: %w", err))
		}
	})
	if cfg.dynamic && cfg.say != nil {
		a.serving.Go(func() { sayAddresses(s, cfg.port, cfg.say) })
	}
	return a, nil
}

// urlOf returns where the server is at an address.
func urlOf(addr netip.Addr, port uint16) string {
	host := addr.String()
	if port != 0 && port != 80 {
		host = net.JoinHostPort(host, strconv.Itoa(int(port)))
	} else if addr.Is6() {
		host = "[" + host + "]"
	}
	return "http://" + host + "/"
}

// sayAddresses says which addresses the stack gets and loses, until it ends.
func sayAddresses(s *netstack.Stack, port uint16, say func(format string, args ...any)) {
	var have []netstack.Address
	for now := range s.Changes(context.Background()) {
		for _, a := range have {
			if !slices.Contains(now.Addrs, a) {
				say("address %s, from %s, is over", a.Prefix, source(a.Origin))
			}
		}
		for _, a := range now.Addrs {
			if !slices.Contains(have, a) {
				say("address %s, from %s; serving %s", a.Prefix, source(a.Origin), urlOf(a.Addr(), port))
			}
		}
		have = now.Addrs
	}
}

// source says where an address comes from.
func source(o netstack.Origin) string {
	if o == netstack.Announced {
		return "a router"
	}
	return string(o)
}

// fail reports that the appliance ended by itself. Only the first report counts.
func (a *app) fail(err error) {
	select {
	case a.failed <- err:
	default:
	}
}

// close ends the server and every connection. It is idempotent; the device stays connected.
func (a *app) close() (err error) {
	a.once.Do(func() {
		err = a.server.Close()
		if errors.Is(err, net.ErrClosed) {
			err = nil // the device ended first, and the stack with it
		}
		a.stack.Close()
		a.serving.Wait()
	})
	return err
}

// aboutVif returns the table of the status page.
func aboutVif(dev *pvnet.Device, s *netstack.Stack, own uint16, up time.Duration) []appliance.Row {
	st := dev.Stats()
	var addrs []string
	for _, a := range s.Settings().Addrs {
		addrs = append(addrs, a.Prefix.String())
	}
	return []appliance.Row{
		{Name: "Vif", Value: fmt.Sprintf("%s of domain %d, backend in domain %d", dev.ID(), own, dev.Peer())},
		{Name: "MAC", Value: dev.MAC().String()},
		{Name: "Address", Value: strings.Join(addrs, ", ")},
		{Name: "MTU", Value: strconv.Itoa(dev.MTU())},
		{Name: "Memory", Value: dev.Budget().String()},
		{Name: "Frames received", Value: cli.Grouped(st.RX.Get(telemetry.Packets))},
		{Name: "Frames sent", Value: cli.Grouped(st.TX.Get(telemetry.Packets))},
		{Name: "Serving for", Value: up.Round(time.Second).String()},
	}
}

// vifName returns the name of the vif in metrics.
func vifName(dev *pvnet.Device, own uint16) string {
	info := telemetry.Info{Role: telemetry.Frontend, Own: own, Peer: uint16(dev.Peer())}
	if n, err := strconv.ParseUint(dev.ID(), 10, 32); err == nil {
		info.Handle = uint32(n)
	}
	return info.Name()
}
