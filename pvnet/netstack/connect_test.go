package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"

	"barevif/pvnet"
	"barevif/pvnet/pvnettest"
	"barevif/xenbus/toolstack"
	"barevif/xenbus/xenstore/server/labtest"
)

func TestAutoTakesWhatTheToolstackHas(t *testing.T) {
	prefix := netip.MustParsePrefix
	for ip, want := range map[string]Config{
		"192.0.2.7/24":                       {Addr: prefix("192.0.2.7/24")},
		"192.0.2.7/24 fd00::7/64":            {Addr: prefix("192.0.2.7/24"), Addrs: []netip.Prefix{prefix("fd00::7/64")}},
		"192.0.2.7/24 192.0.2.7/25":          {Addr: prefix("192.0.2.7/24")},
		"192.0.2.7 255.255.255.0 192.0.2.1":  {Addr: prefix("192.0.2.7/24"), Gateways: []netip.Addr{netip.MustParseAddr("192.0.2.1")}},
		"":                                   {DHCP: true, RA: true},
		"192.0.2.7":                          {},
		"192.0.2.7/24 and something foolish": {},
	} {
		w := pvnettest.New(t, toolstack.Vif{MAC: frontMAC, IP: ip}, pvnet.Config{}, pvnet.Config{})
		cfg, err := Auto(within(t), w.Front)
		if bad := want.Addr == (netip.Prefix{}) && !want.DHCP; bad != (err != nil) {
			t.Errorf("%q: %v", ip, err)
		}
		if err == nil && (cfg.Addr != want.Addr || !slices.Equal(cfg.Addrs, want.Addrs) || !slices.Equal(cfg.Gateways, want.Gateways) || cfg.DHCP != want.DHCP || cfg.RA != want.RA) {
			t.Errorf("%q: %+v", ip, cfg)
		}
		if err != nil || cfg.DHCP {
			continue
		}
		newStack(t, w.Front, cfg)
	}
}

// A Connect that fails, for the vif or for its Config, leaves no goroutine of a stack.
func TestAFailedConnectLeavesNoStack(t *testing.T) {
	w, err := labtest.NewWorld(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	before := runtime.NumGoroutine()
	for range 3 {
		if _, err := Connect(within(t), w.Guests[0], "7", Config{}); err == nil {
			t.Fatal("there is no vif 7")
		}
	}
	eventually(t, "all goroutines have ended", func() bool { return runtime.NumGoroutine() <= before })
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- pvnet.Serve(ctx, w.Driver, pvnet.ServeConfig{Hotplug: true}, func(*pvnet.Device) {})
	}()
	if _, err := Connect(within(t), w.Guests[0], "0", Config{Addr: netip.MustParsePrefix("10.9.0.2/24"), MTU: 1}); err == nil || !strings.Contains(err.Error(), "MTU") {
		t.Fatal(err)
	}
	stop()
	<-served
	eventually(t, "all goroutines have ended", func() bool { return runtime.NumGoroutine() <= before })
}

// Connect is a vif and a stack in one call, and Close ends both. Without an address it gives the
// vif back.
func TestConnectOwnsItsVif(t *testing.T) {
	w, err := labtest.NewWorld(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	serving, stop := context.WithCancel(t.Context())
	served, backs := make(chan error, 1), make(chan *pvnet.Device, 4)
	go func() {
		served <- pvnet.Serve(serving, w.Driver, pvnet.ServeConfig{Hotplug: true}, func(d *pvnet.Device) { backs <- d })
	}()
	defer func() {
		stop()
		<-served
	}()
	none, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	go func() {
		<-backs
		cancel(enough)
	}()
	if _, err := Connect(none, w.Guests[0], "0", Config{}); !errors.Is(err, enough) {
		t.Fatalf("nobody gives an address: %v", err)
	} else if text := err.Error(); !strings.Contains(text, "enough") {
		t.Error(text)
	}
	for range 2 { // the vif is free again
		s, err := Connect(within(t), w.Guests[0], "0", Config{Addr: frontIP})
		if err != nil {
			t.Fatal(err)
		}
		dev := s.card.dev
		if s.Addr() != frontIP.Addr() {
			t.Error(s.Addr())
		}
		s.Close()
		select {
		case <-dev.Done():
		default:
			t.Error("the vif is still connected")
		}
		if _, err := s.Ready(within(t)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("ready after Close: %v", err)
		}
	}
	if _, err := Connect(within(t), w.Guests[0], "0", Config{Addr: frontIP, MTU: 9}); err == nil {
		t.Error("a Config that cannot be was taken")
	}
	s, err := Connect(within(t), w.Guests[0], "0", Config{Addr: frontIP})
	if err != nil {
		t.Fatalf("after a refused Config: %v", err)
	}
	s.Close()
}
