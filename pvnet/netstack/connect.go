package netstack

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"barevif/hypercall"
	"barevif/pvnet"
)

// Connect is a vif with TCP/IP in one call: it connects to vif id of the domain, as
// [pvnet.Connect] does, makes a stack on it and waits until the stack has an address. The zero
// Config means what [Auto] finds. [Stack.Close] disconnects the vif, too.
//
// The vif has as many queues as the machine and the backend give, and moves long frames. Who
// wants it otherwise calls [pvnet.Connect] and [New].
func Connect(ctx context.Context, domain hypercall.Domain, id string, cfg Config) (*Stack, error) {
	bare := sync.OnceValues(newCardless)
	go bare() // while xenstore and the backend answer
	taken := false
	defer func() {
		if s, err := bare(); err == nil && !taken {
			s.network.net.Destroy()
		}
	}()
	dev, err := pvnet.Connect(ctx, domain, id, pvnet.Config{
		Queues: pvnet.AutoQueues, LendRx: true, Offload: true, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	s, err := connected(ctx, dev, cfg, func() (*cardless, error) {
		taken = true
		return bare()
	})
	if err != nil {
		dev.Disconnect()
		return nil, err
	}
	return s, nil
}

// connected makes a Stack that owns dev, and waits until the Stack has an address. bare returns gVisor's stack, which
// gets the card of dev.
func connected(ctx context.Context, dev *pvnet.Device, cfg Config, bare func() (*cardless, error)) (*Stack, error) {
	if has4, has6 := cfg.families(); !has4 && !has6 {
		found, err := Auto(ctx, dev)
		if err != nil {
			return nil, err
		}
		found.MTU, found.DNS, found.Hostname, found.Logger = cfg.MTU, cfg.DNS, cfg.Hostname, cfg.Logger
		cfg = found
	}
	s, err := newOn(dev, cfg, bare)
	if err != nil {
		return nil, err
	}
	s.owned = dev
	if _, err := s.Ready(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Auto returns the Config of a guest that was told nothing: the addresses that the toolstack
// has for it ([pvnet.Device.GuestAddresses]), or else DHCP and router advertisements.
//
// A program that wants to follow them as they change sets Config.Later, and calls
// [Stack.SetAddresses] with what [pvnet.Device.GuestAddressChanges] yields.
//
// The error is that of GuestAddresses, or says that one of the toolstack's addresses has no
// network.
func Auto(ctx context.Context, dev *pvnet.Device) (cfg Config, err error) {
	g, err := dev.GuestAddresses(ctx)
	if err != nil {
		return cfg, err
	}
	if len(g.Addrs) == 0 {
		return Config{DHCP: true, RA: true}, nil
	}
	seen := map[netip.Addr]bool{}
	addrs := slices.DeleteFunc(g.Addrs, func(p netip.Prefix) bool {
		again := seen[p.Addr()]
		seen[p.Addr()] = true
		return again
	})
	for _, p := range addrs {
		if p.IsSingleIP() {
			return cfg, fmt.Errorf("netstack: the toolstack's address %v does not say its network: write %v/24, or its number of bits", p.Addr(), p.Addr())
		}
	}
	cfg.Addr, cfg.Addrs = addrs[0], addrs[1:]
	if g.Gateway.IsValid() {
		cfg.Gateways = append(cfg.Gateways, g.Gateway)
	}
	return cfg, nil
}
