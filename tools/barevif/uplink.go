package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/pvnet/bridge"
	"barevif/pvnet/forward"
	"barevif/pvnet/link"
	"barevif/tools/cli"
	"barevif/xenbus/toolstack"

	"github.com/spf13/cobra"
)

// An uplink is a way out of a bridge: a TAP of this machine, or a vif of this domain.
type uplink struct {
	tap  string       // its name; "": the uplink is a vif
	addr netip.Prefix // of the TAP; invalid: none
	vif  string       // its id
}

// String returns the uplink as --uplink has it.
func (u uplink) String() string {
	if u.tap != "" {
		return "tap:" + u.tap
	}
	return "vif:" + u.vif
}

// parseUplinks reads --uplink and --addr.
func (b *bridged) parseUplinks() (all []uplink, err error) {
	var taps []string
	for _, s := range b.uplinkFlags {
		kind, name, _ := strings.Cut(s, ":")
		var u uplink
		switch {
		case kind == "tap" && isInterfaceName(name):
			u.tap = name
			taps = append(taps, name)
		case kind == "vif" && isNumber(name):
			u.vif = name
		default:
			return nil, cli.BadValue("uplink", s, "tap:NAME, the name of a TAP of 1 to 15 characters, or vif:ID, the number of a vif of this domain")
		}
		if slices.Contains(all, u) {
			return nil, cli.BadValue("uplink", s, "given once only")
		}
		all = append(all, u)
	}
	addrs, err := b.addresses(taps)
	if err != nil {
		return nil, err
	}
	for i := range all {
		all[i].addr = addrs[all[i].tap]
	}
	return all, nil
}

// completeUplinks offers the kinds of uplinks, and the vifs of the domain.
func (b *bridged) completeUplinks(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completePatience)
	defer cancel()
	ids, _ := b.domain.Vifs(ctx) // there is no place for an error between two words of a command line
	names := []string{"tap:"}
	for _, id := range ids {
		names = append(names, "vif:"+id)
	}
	names, directive := offered(names, b.uplinkFlags...)
	return names, directive | cobra.ShellCompDirectiveNoSpace
}

// startUplink makes an uplink a port of the bridge, and keeps it one until ctx ends. wait waits for
// the end of that. cfg is that of the domain's vifs.
func (b *bridged) startUplink(ctx context.Context, u uplink, cfg pvnet.Config) (wait func(), err error) {
	if u.tap != "" {
		return b.startTAP(ctx, u, cfg)
	}
	if b.domain.Xen {
		if err := b.domain.Free(u.vif, b.take); err != nil {
			return nil, err
		}
	}
	var running sync.WaitGroup
	running.Go(func() { b.keepVif(ctx, u, cfg) })
	return running.Wait, nil
}

// retryUplink is how long a bridge waits before it looks for an uplink again.
const retryUplink = 2 * time.Second

// keepVif connects to the vif of an uplink, and again when it has ended, until ctx ends.
func (b *bridged) keepVif(ctx context.Context, u uplink, cfg pvnet.Config) {
	for said := ""; ctx.Err() == nil; await(ctx, nil, retryUplink) {
		dev, err := pvnet.Connect(ctx, b.own.Domain, u.vif, cfg)
		var port *bridge.Port
		if err == nil {
			if port, err = b.sw.Add(dev, bridge.PortConfig{}); err != nil {
				dev.Disconnect()
			}
		}
		if err != nil {
			if ctx.Err() == nil && err.Error() != said {
				said = err.Error()
				b.slog.Error("an uplink is not there, and is tried again", "uplink", u.String(), "err", err)
			}
			continue
		}
		said = ""
		hide := b.shown(port, portInfo{name: u.String()})
		b.Say("uplink %s: on bridge %s, MAC %v; counters: %s", u, b.bridge, dev.MAC(), mirrored(dev))
		stop := context.AfterFunc(ctx, func() { dev.Disconnect() })
		go b.endWith(port, u.String())
		b.followUplink(dev, u)
		<-port.Done()
		stop()
		hide()
		dev.Disconnect()
		b.Say("uplink %s: gone; %s", u, portTally("uplink", port.Stats()))
	}
}

// followUplink prints the changes of an uplink's link state until its device has ended.
func (b *bridged) followUplink(dev *pvnet.Device, u uplink) {
	was, mtu := false, 0
	for ev := range dev.Links(context.Background()) {
		switch {
		case ev.Up && !was:
			b.Say("uplink %s: connected, backend in domain %d, MTU %d, %s, %s", u, dev.Peer(), ev.MTU, queuesOf(dev), dev.Budget())
		case ev.Up && ev.MTU != mtu:
			b.Say("uplink %s: its MTU is now %d", u, ev.MTU)
		case !ev.Up && was:
			b.Say("uplink %s: down: %s", u, ev.Reason)
		}
		was, mtu = ev.Up, ev.MTU
	}
}

// A tapUplink is a TAP on the bridge. A port of a bridge is a vif. So the TAP is the guest of a vif
// whose both ends are in this process, on an emulated Xen that nobody else joins: what the kernel
// sends is copied once more than it would be on a bridge of the kernel's, and its long frames,
// checksums and queues pass as those of any guest.
type tapUplink struct {
	*bridged
	uplink
	cfg     pvnet.Config
	machine *machine
	guest   hypercall.Domain
	back    *pvnet.Device // the port's
	port    *bridge.Port
	pool    *forward.Pool

	front *pvnet.Device // of the guest, as long as the TAP is there
	tap   *tap
}

// The two domains of the machine of a TAP.
const (
	tapGuest  hypercall.DomID = 1
	tapDriver hypercall.DomID = 2
)

// startTAP opens the TAP of an uplink, and makes it a port.
func (b *bridged) startTAP(ctx context.Context, u uplink, cfg pvnet.Config) (wait func(), err error) {
	// Its vif is of another Xen, whose domains have the numbers of others: it shows itself to nobody
	// but as a port.
	cfg.Counters, cfg.Inspector, cfg.Logger = nil, nil, b.slog.With("uplink", u.String())
	t := &tapUplink{bridged: b, uplink: u, cfg: cfg}
	var undo []func()
	end := func() {
		for _, f := range slices.Backward(undo) {
			f()
		}
	}
	defer func() {
		if err != nil {
			end()
		}
	}()
	setup, cancel := context.WithTimeoutCause(ctx, setupPatience, errSetup)
	defer cancel()
	if t.machine, err = startMachine(setup, machineConfig{}); err != nil {
		return nil, fmt.Errorf("uplink %s: %w", u, err)
	}
	undo = append(undo, t.machine.shutdown)
	stop, err := t.serve(setup)
	if err != nil {
		return nil, fmt.Errorf("uplink %s: %w", u, err)
	}
	undo = append(undo, stop)
	if err := t.open(setup); err != nil {
		return nil, err
	}
	hide := b.shown(t.port, portInfo{name: u.String()})
	undo = append(undo, hide)
	b.Say("uplink %s: on bridge %s, the kernel has it as %s%s, MAC %v, MTU %d, %s", u, b.bridge, t.tap.Name(), addressed([]netip.Prefix{u.addr}), net.HardwareAddr(tapMAC(t.tap)), t.tap.MTU(), queuesOf(t.front))
	var running sync.WaitGroup
	running.Go(func() { t.keep(ctx) })
	return func() {
		running.Wait()
		end()
		b.Say("uplink %s: gone; %s", u, portTally("kernel", t.port.Stats()))
	}, nil
}

// serve makes the driver domain of the machine, with the port.
func (t *tapUplink) serve(ctx context.Context) (stop func(), err error) {
	if err := t.machine.add(ctx, toolstack.Vif{Front: tapGuest, Back: tapDriver, MAC: [6]byte{0x00, 0x16, 0x3e, 0, 0, 1}}); err != nil {
		return nil, err
	}
	if t.guest, err = t.machine.NewDomain(tapGuest); err != nil {
		return nil, err
	}
	driver, err := t.machine.NewDomain(tapDriver)
	if err != nil {
		return nil, err
	}
	if t.pool, err = forward.NewPool(driver, 1); err != nil && !errors.Is(err, pvnet.ErrUnimplemented) {
		return nil, err
	}
	serving, cancel := context.WithCancel(context.Background())
	backs, served := make(chan *pvnet.Device, 1), make(chan error, 1)
	go func() {
		// The kernel takes frames from its TAP as long as it runs: none waits for long.
		served <- pvnet.Serve(serving, driver, pvnet.ServeConfig{Config: t.cfg, Hotplug: true}, func(dev *pvnet.Device) { backs <- dev })
	}()
	stop = func() {
		cancel()
		<-served
		if t.port != nil {
			<-t.port.Done()
		}
		if t.pool != nil {
			t.pool.Close()
		}
		t.machine.tools.Close()
		if err := t.machine.CheckClean(); err != nil {
			t.slog.Error("the vif of a TAP has left something behind", "uplink", t.uplink.String(), "err", err)
		}
	}
	select {
	case t.back = <-backs:
		t.port, err = t.sw.Add(t.back, bridge.PortConfig{Pool: t.pool})
	case err = <-served:
		served <- err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		stop()
		return nil, err
	}
	return stop, nil
}

// open connects the guest's end of the vif, and opens the TAP.
func (t *tapUplink) open(ctx context.Context) (err error) {
	cfg := t.cfg
	cfg.LendRx = true // the kernel copies
	if t.front, err = pvnet.Connect(ctx, t.guest, "0", cfg); err != nil {
		return fmt.Errorf("uplink %s: %w", t.uplink, err)
	}
	defer func() {
		if err != nil {
			t.front.Disconnect()
		}
	}()
	_, missing := net.InterfaceByName(t.uplink.tap)
	if t.tap, err = openTAP(link.TAPConfig{Name: t.uplink.tap, MTU: t.front.MTU()}, t.front.Queues()); err != nil {
		return linkRefused(err)
	}
	if missing != nil { // one that was there before has the address that it should have
		err = t.setStableMAC()
	}
	if err == nil {
		err = addAddress(t.tap.Name(), t.addr)
	}
	if err != nil {
		t.tap.Close()
	}
	return err
}

// setStableMAC gives the TAP an address that it has again when the bridge is started again: guests
// know it.
func (t *tapUplink) setStableMAC() error {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil || len(id) == 0 {
		return nil // the kernel's own, which is another each time
	}
	sum := sha256.Sum256([]byte("barevif bridge\n" + string(id) + t.uplink.tap))
	mac := pvnet.MAC(sum[:6])
	mac[0] = mac[0]&^1 | 2 // of one station, and local
	return setMAC(t.tap.Name(), mac)
}

// tapMAC returns the address that the TAP has now.
func tapMAC(t *tap) []byte {
	if i, err := net.InterfaceByName(t.Name()); err == nil {
		return i.HardwareAddr
	}
	mac := t.MAC()
	return mac[:]
}

// keep joins the TAP to its vif, and a new one when it was removed, until ctx ends.
func (t *tapUplink) keep(ctx context.Context) {
	for {
		t.join(ctx)
		t.front.Disconnect()
		t.tap.Close()
		for said := ""; ; {
			await(ctx, nil, retryUplink)
			if ctx.Err() != nil {
				return
			}
			err := t.open(ctx)
			if err == nil {
				break
			}
			if err.Error() != said && ctx.Err() == nil {
				said = err.Error()
				t.slog.Error("the TAP of an uplink is gone, and is tried again", "uplink", t.uplink.String(), "err", err)
			}
		}
		t.Say("uplink %s: on bridge %s again", t.uplink, t.bridge)
	}
}

// join moves frames between the TAP and its vif until ctx ends or the TAP is removed.
func (t *tapUplink) join(ctx context.Context) {
	if i, err := net.InterfaceByName(t.tap.Name()); err == nil { // else it is gone already, as Run finds
		watch := t.network.watch(i.Index, t.tell)
		defer watch.end()
	}
	var j link.Joint
	if err := j.Run(ctx, t.front, queuesOfLink(t.tap)...); err != nil && ctx.Err() == nil {
		t.slog.Error("an uplink has lost its TAP, which is made again", "uplink", t.uplink.String(), "err", err)
	}
}

// tell makes the MTU of the TAP, which was changed, that of its vif: the bridge then passes frames of
// that size to and from it.
func (t *tapUplink) tell(s interfaceState) {
	if s.mtu == 0 || s.mtu == t.back.MTU() {
		return
	}
	if err := t.back.SetMTU(s.mtu); err != nil && !errors.Is(err, pvnet.ErrDisconnected) {
		t.slog.Error("an uplink keeps its MTU", "uplink", t.uplink.String(), "err", err)
		return
	}
	t.Say("uplink %s: its MTU is now %d", t.uplink, s.mtu)
}
