package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"barevif/hypercall/xendev"
	"barevif/pvnet"
	"barevif/tools/cli"
	"barevif/tools/domain"
	"barevif/tools/xenhost"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// guestAlone measures what one guest can measure alone: sending.
type guestAlone struct {
	piece
	xen    bool
	vif    string
	rounds int
}

func (x *guestAlone) register(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&x.xen, "xen", false, "measure what this Xen guest can measure alone")
	cmd.Flags().StringVar(&x.vif, "vif", "0", "with --xen: `id` of the vif")
	cmd.Flags().Float64Var(&x.secs, "secs", 5, "with --xen: `seconds` for each way and round")
	cmd.Flags().IntVar(&x.rounds, "rounds", 3, "with --xen: `times` to take all of them in turn")
	x.frame.register(cmd)
}

func (x *guestAlone) run(cmd *cobra.Command) (err error) {
	if !x.xen {
		return cmd.Help()
	}
	window, err := x.window()
	if err != nil {
		return err
	}
	if err := x.frame.parse(); err != nil {
		return err
	}
	if x.rounds < 1 || x.rounds > 1000 {
		return cli.BadValue("rounds", fmt.Sprint(x.rounds), "a number from 1 to 1000")
	}
	ctx := cmd.Context()
	vif, err := xenhost.Frontend(xendev.Config{}, x.vif)
	if err != nil {
		return err
	}
	// Give the vif back to the kernel's driver if that had it.
	defer func() {
		if vif.Driver != "" {
			err = errors.Join(err, xenhost.Release(xendev.Config{}, x.vif))
		}
	}()
	var all []result
	for range x.rounds {
		for _, part := range []func(context.Context, time.Duration) ([]result, error){x.kernel, x.ours} {
			results, err := part(ctx, window)
			if err != nil {
				return err
			}
			all = append(all, results...)
		}
	}
	return printTable(x.Stdout, all)
}

// kernel measures the kernel's netfront.
func (x *guestAlone) kernel(ctx context.Context, window time.Duration) (all []result, err error) {
	iface, err := x.bringUp(ctx)
	if err != nil {
		return nil, err
	}
	n := x.piece
	n.iface = iface
	for _, way := range []struct {
		name string
		run  func(context.Context, time.Duration) (result, error)
	}{{"kernel pktgen", n.pktgen}, {"Go UDP socket", n.udpSend}, {"Go packet socket", n.packetSend}} {
		before, err := readCounters(iface)
		if err != nil {
			return nil, err
		}
		r, err := way.run(ctx, window)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", way.name, err)
		}
		after, err := readCounters(iface)
		if err != nil {
			return nil, err
		}
		r = after.since(before, "tx", r.Seconds)
		r.What, r.Way = "send", way.name
		all = append(all, r)
	}
	return all, nil
}

// bringUp binds the vif to the kernel's driver, and gives its interface an address and a
// neighbour.
func (x *guestAlone) bringUp(ctx context.Context) (iface string, err error) {
	vif, err := xenhost.Frontend(xendev.Config{}, x.vif)
	if err != nil {
		return "", err
	}
	if vif.Driver == "" {
		if err := xenhost.Release(xendev.Config{}, x.vif); err != nil {
			return "", fmt.Errorf("give vif %s to the kernel: %w", x.vif, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, firstFrame)
	defer cancel()
	for {
		if vif, err = xenhost.Frontend(xendev.Config{}, x.vif); err != nil {
			return "", err
		}
		if vif.Interface != "" {
			break
		}
		if err := pause(ctx); err != nil {
			return "", fmt.Errorf("wait for the kernel's interface of vif %s: %w", x.vif, err)
		}
	}
	l, err := netlink.LinkByName(vif.Interface)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		return "", fmt.Errorf("bring up %s: %w", vif.Interface, err)
	}
	addr := &netlink.Addr{IPNet: netlink.NewIPNet(x.frame.fromIP.AsSlice())}
	addr.Mask[3] = 0
	if err := netlink.AddrReplace(l, addr); err != nil {
		return "", fmt.Errorf("give %s the address %s: %w", vif.Interface, x.frame.from, err)
	}
	if p := netip.PrefixFrom(x.frame.fromIP, 24); !p.Contains(x.frame.toIP) {
		return "", cli.BadValue("to", x.frame.to, "of the network "+p.Masked().String())
	}
	err = netlink.NeighSet(&netlink.Neigh{
		LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, Family: unix.AF_INET,
		IP: x.frame.toIP.AsSlice(), HardwareAddr: x.frame.dst,
	})
	if err != nil {
		return "", fmt.Errorf("tell %s its neighbour: %w", vif.Interface, err)
	}
	for {
		if l, err = netlink.LinkByName(vif.Interface); err != nil {
			return "", err
		}
		if l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0 {
			return vif.Interface, nil
		}
		if err := pause(ctx); err != nil {
			return "", fmt.Errorf("wait for the backend of vif %s: %w", x.vif, err)
		}
	}
}

func pause(ctx context.Context) error {
	select {
	case <-time.After(20 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ours measures a card of ours.
func (x *guestAlone) ours(ctx context.Context, window time.Duration) (all []result, err error) {
	for _, way := range []struct {
		name  string
		batch int
		wait  string
	}{{"ours, batch 32", 32, "park"}, {"ours, batch 32, busy", 32, "busy"}, {"ours, batch 1", 1, "park"}} {
		card := card{
			domain: domain.Flags{Xen: true}, vif: x.vif, take: true, doorbell: "ioctl", waitMode: way.wait, wait: firstFrame,
			log: func() pvnet.Config { return pvnet.Config{Logger: x.Program.Log()} },
		}
		err := card.run(ctx, func(ctx context.Context, dev *pvnet.Device) error {
			r, err := sendFrames(ctx, dev, &x.frame, way.batch, window)
			r.What, r.Way = "send", way.name
			all = append(all, r)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", way.name, err)
		}
	}
	return all, nil
}
