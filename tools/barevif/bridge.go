package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/bridge"
	"barevif/pvnet/forward"
	"barevif/pvnet/handover"
	"barevif/pvnet/inspect"
	"barevif/pvnet/netif"
	"barevif/tools/cli"
	"barevif/tools/domain"

	"github.com/spf13/cobra"
)

func bridgeCommand(p *cli.Program) *cobra.Command {
	b := bridged{
		backend: backend{Program: p, name: "bridge"}, takeovers: takeovers{command: "bridge", pause: "send the other bridge SIGUSR1"},
		ports: make(map[*bridge.Port]portInfo), promised: make(map[string][]pvnet.MAC),
	}
	cmd := &cobra.Command{
		Use:   "bridge",
		Short: "Be the driver domain: serve vifs, and switch them without the kernel's network",
		Long: `bridge serves every vif whose backend is this domain, until a signal ends it, and is an
Ethernet bridge between them: frames go from guest to guest in this process, and this
machine's kernel sees none of them. It learns where stations are, as any bridge does.

The bridge reaches the world through uplinks, if it has any:

  --uplink tap:NAME  a TAP of that name: this machine's kernel is a station of the
                     bridge. It needs CAP_NET_ADMIN. --addr gives it an address; its
                     MTU is 1500, and the bridge follows when it is changed.
  --uplink vif:ID    a vif of this domain, of which it is the frontend: the bridge is a
                     part of the network behind that vif's backend.

An uplink that is gone, or not there yet, is tried again; the vifs go on meanwhile.

Each guest sends from the mac of its vif alone, and no other can send from it or take its
frames. --no-guard lifts that, for all vifs or some: for a guest that has bridges or
virtual machines of its own. --isolated vifs reach no other isolated vif: tenants, which
share an uplink or a router and not their frames. Uplinks are neither guarded nor isolated.
What a guest does not take is dropped, and no other guest waits for it.

What the toolstack wrote about a vif, as xl's vif= has it:

  bridge      is --name, or not there: a vif for another bridge is refused. The default
              of --name is what libxl writes where it was told nothing
  mac         the guard of the vif; one that is guarded and has none is refused
  rate, mtu   are honoured as by back
  script      none, vif-bridge or vif-barevif. bridge runs no scripts and has no
              interface for one: a vif with another is refused, and so is one in domain 0
              whose script libxl runs, which is any but vif-barevif
  vlan        refused
  vifname, ip, gatewaydev: a line in the log, nothing more

A refused vif does not connect: hotplug-status is "error", and hotplug-error and the log
say why. It connects when the key was corrected.

"barevif bridge status" shows the ports and the stations of a bridge that runs. "barevif
stat", "ring" and "dump" show its vifs as they show those of back.

An upgrade is not noticed by guests: bridge --take-over takes the vifs over from the bridge
that serves them now, one after another and each within milliseconds, and that one ends
with status 0. SIGUSR2 makes a running bridge start itself again in this way: with the file
that is at its program's path now, and the same arguments. Guards, isolation and what else
flags say are those of the new one; with another --vif, give both the same --handover. A vif that it would refuse stays with the old one until
that ends; and so does one that it cannot take, of which the old one says why.
While vifs move, frames between one that has moved and one that has not are dropped, as are
those that wait in the old bridge. Stations that have no guard are learnt again: until they
send, frames for them go to all ports without one.
Uplinks end with the old bridge and begin again with the new one, which takes a second or
two: a TAP is made again, with its MAC and --addr, and without what others gave it.

SIGUSR1 ends it without closing the vifs: the next bridge goes on where this one stopped,
and the guests see a pause. Several bridges of a domain have a --name and a --vif each.`,
		Example: `  barevif bridge
  barevif bridge --uplink tap:lan0 --addr 10.9.0.1/24
  barevif bridge --xen --uplink vif:0 --isolated
  barevif bridge --xen --uplink vif:0 --isolated --take-over
  barevif bridge --xen --name dmz --vif '5.*' --vif 7.1 --no-guard=7.1
  barevif bridge status --json | jq '.[].stations'`,
		Args: b.arguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return b.run(cmd.Context()) },
	}
	b.register(cmd)
	f := cmd.Flags()
	f.StringVar(&b.bridge, "name", defaultBridge, "the bridge's `name`, which a vif's bridge= has to be")
	f.StringArrayVar(&b.uplinkFlags, "uplink", nil, "a way out of the bridge: `tap:NAME` or vif:ID; repeatable")
	f.StringArrayVar(&b.addrs, "addr", nil, "`address` of this machine on an uplink's TAP: IP/BITS, of several uplinks NAME=IP/BITS; repeatable")
	f.StringArrayVar(&b.isolated, "isolated", nil, "isolate vifs from each other: all, or with --isolated=`vif` one, DOM.ID or a pattern such as '3.*'; repeatable")
	f.StringArrayVar(&b.unguarded, "no-guard", nil, "let guests send from any address: all, or with --no-guard=`vif` one, DOM.ID or a pattern such as '3.*'; repeatable")
	for _, name := range []string{"isolated", "no-guard"} {
		f.Lookup(name).NoOptDefVal = allVifs
	}
	f.IntVar(&b.stations, "stations", 4096, "`stations` to learn at most, 1 to 1048576; beyond, frames for a station go to all ports")
	f.IntVar(&b.perPort, "stations-per-vif", 256, "`stations` to learn of one port at most")
	f.IntVar(&b.most, "ports", 256, "`ports` at most, uplinks among them: 2 to 1024")
	f.DurationVar(&b.age, "age", 5*time.Minute, "`time` after which a station that sends nothing is forgotten")
	b.takeovers.register(cmd, "take the vifs over from the bridge that serves them now, which then ends")
	f.BoolVar(&b.take, "take", false, "with --xen: unbind the vif of an uplink from the kernel's driver first")
	completes(cmd, completeNothing, "name", "addr", "isolated", "no-guard", "stations", "stations-per-vif", "ports", "age")
	cli.Completes(cmd, "uplink", b.completeUplinks)
	cmd.AddCommand(bridgeStatusCommand(p))
	return cmd
}

// allVifs is the value of --isolated and --no-guard where they have none.
const allVifs = "all"

// A bridged is the command bridge.
type bridged struct {
	backend
	takeovers           takeovers
	bridge              string // its name
	uplinkFlags, addrs  []string
	isolated, unguarded []string
	stations, perPort   int
	most                int
	age                 time.Duration
	take                bool

	sw      *bridge.Bridge
	network interfaces
	began   time.Time
	own     *domain.Domain

	mu       sync.Mutex
	ports    map[*bridge.Port]portInfo // guarded by mu
	promised map[string][]pvnet.MAC    // guarded by mu: by vif, the guards of those that are being taken over
}

// A portInfo is what a bridged knows of a port beside what the port does.
type portInfo struct {
	name     string // "1.0", "tap:lan0", "vif:0"
	guard    []pvnet.MAC
	isolated bool
}

// arguments refuses arguments. The likely one is the vif of a flag that takes it behind "=" only.
func (b *bridged) arguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 && isVifPattern(args[0]) {
		return &cli.Advice{
			Err:  fmt.Errorf("%q: %q takes flags alone", args[0], cmd.CommandPath()),
			Next: fmt.Sprintf("write a vif behind an equals sign: --isolated=%s, --no-guard=%s", args[0], args[0]), Usage: true,
		}
	}
	return cli.Arguments(0)(cmd, args)
}

// checkBridge checks the flags that are of bridge alone, and returns its uplinks.
func (b *bridged) checkBridge() ([]uplink, error) {
	if !isInterfaceName(b.bridge) {
		return nil, cli.BadValue("name", b.bridge, "a name of 1 to 15 printable characters, as a bridge's in vif=['bridge=...']")
	}
	for flag, patterns := range map[string][]string{"isolated": b.isolated, "no-guard": b.unguarded} {
		for _, p := range patterns {
			if p != allVifs && !isVifPattern(p) {
				return nil, cli.BadValue(flag, p, "all, or a vif DOM.ID such as 1.0, or a pattern of such, as '3.*'")
			}
		}
	}
	for _, n := range []struct {
		flag              string
		value, least, top int
	}{{"stations", b.stations, 1, 1 << 20}, {"stations-per-vif", b.perPort, 1, 1 << 20}, {"ports", b.most, 2, 1024}} {
		if n.value < n.least || n.value > n.top {
			return nil, cli.BadValue(n.flag, fmt.Sprint(n.value), fmt.Sprintf("a number from %d to %d", n.least, n.top))
		}
	}
	if b.age < time.Second || b.age > maxTimeout {
		return nil, cli.BadValue("age", b.age.String(), "a time from 1s to 24h")
	}
	if b.take && !b.domain.Xen {
		return nil, &cli.Advice{Err: errors.New("--take is for a real Xen"), Next: "give --xen too", Usage: true}
	}
	return b.parseUplinks()
}

func (b *bridged) run(ctx context.Context) error {
	queues, counters, err := b.check()
	if err != nil {
		return err
	}
	uplinks, err := b.checkBridge()
	if err != nil {
		return err
	}
	b.slog, b.began = b.Log(), time.Now()
	b.domain.Beside = b.takeovers.takeOver
	if b.own, err = b.domain.Open(ctx); err != nil {
		return err
	}
	defer b.own.End()
	inspector, endInspect, err := b.inspect.listen(b.slog)
	if err != nil {
		return err
	}
	defer endInspect()

	file := fmt.Sprintf("bridge-%d-%s%s.handover", b.own.ID(), strings.ReplaceAll(b.typ, "/", "_"), b.selection())
	if err := b.takeovers.begin(b.Say, b.slog, &b.domain, file, handover.Identity{Domain: b.own.ID(), Type: b.typ}); err != nil {
		return err
	}
	takeOver, err := b.takeovers.dial(ctx, false)
	if err != nil {
		return err
	}
	defer b.takeovers.close()

	cfg := bridge.Config{Stations: b.stations, PerPort: min(b.perPort, b.stations), Ports: b.most, Age: b.age}
	if cfg.Pool, err = newPool(b.own); err != nil {
		return err
	}
	if cfg.Pool != nil {
		defer cfg.Pool.Close()
	}
	if b.sw, err = bridge.New(cfg); err != nil {
		return err
	}
	defer b.sw.Close()
	if s, ok := inspector.(*inspect.Server); ok {
		defer s.Show(bridgeState, func() any { return b.page() })()
	}

	ctx, cancel := context.WithCancelCause(ctx)
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel(nil)
	for _, u := range uplinks {
		if u.tap != "" {
			following.Go(b.network.follow(ctx, b.slog))
			break
		}
	}
	serve := b.serveConfig(queues, counters, inspector)
	endUplinks, err := b.startUplinks(ctx, uplinks, serve.Config)
	following.Go(endUplinks)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	following.Go(func() {
		for {
			select {
			case s := <-signals:
				if s == syscall.SIGUSR1 {
					cancel(pvnet.ErrHandover)
					return
				}
				b.takeovers.startSuccessor(b.slog)
			case <-ctx.Done():
				return
			}
		}
	})
	go b.takeovers.run(ctx, func() { cancel(pvnet.ErrHandover) })
	if takeOver != nil {
		b.selectTaken(&serve, takeOver)
	}
	b.Say("domain %d serves vifs of type %s on bridge %s; a signal ends it", b.own.ID(), b.typ, b.bridge)
	return b.serveVifs(ctx, cancel, b.own, serve, b.serve)
}

// newPool makes a pool that receives for all vifs of the domain, with a goroutine for each two
// processors: the others are for those who send what vifs have no room for at once. It returns nil
// for a domain that cannot wait for many events at once.
func newPool(dom *domain.Domain) (*forward.Pool, error) {
	p, err := forward.NewPool(dom.Domain, max(1, min(runtime.GOMAXPROCS(0)/2, 16)))
	if errors.Is(err, pvnet.ErrUnimplemented) {
		return nil, nil
	}
	return p, err
}

// serve makes a vif a port of the bridge, until the vif is removed or ctx ends. An error of this
// vif does not affect the others.
func (b *bridged) serve(ctx context.Context, dev *pvnet.Device) {
	vif := fmt.Sprintf("%d.%s", dev.Peer(), dev.ID())
	for _, f := range dev.TakenFiles() { // of a back, whose TAP ends here
		f.Close()
	}
	defer b.forgetPromise(vif)
	var port *bridge.Port
	var info portInfo
	ok, joined := b.offer(ctx, dev, vif, func(ctx context.Context) (notes []*keyError, _ bool, err error) {
		port, info, notes, err = b.tryAdd(ctx, dev, vif)
		return notes, false, err
	})
	if !ok {
		dev.Disconnect()
		if joined {
			<-port.Done()
		}
		return
	}
	hide := b.shown(port, info)
	b.forgetPromise(vif)
	var held atomic.Bool
	defer b.takeovers.add(&handover.Vif{
		Device: dev, Resume: func() { held.Store(false) },
		Hold: func(context.Context) ([]*os.File, error) { held.Store(true); return nil, nil },
	})()
	b.Say("vif %s: on bridge %s%s, MTU %d; counters: %s", vif, b.bridge, info, dev.MTU(), mirrored(dev))
	go b.endWith(port, vif)
	b.follow(dev, vif, func(pvnet.LinkEvent) {}, func() { b.recheck(ctx, dev, vif, info) })
	<-port.Done()
	hide()
	dev.Disconnect()
	end := "gone"
	if held.Load() {
		end = "handed over"
	}
	b.Say("vif %s: %s; %s", vif, end, portTally("frontend", port.Stats()))
}

// endWith ends the device of a port with the port.
func (b *bridged) endWith(port *bridge.Port, name string) {
	<-port.Done()
	if err := port.Err(); !errors.Is(err, pvnet.ErrDisconnected) && !errors.Is(err, bridge.ErrClosed) {
		b.slog.Error("a port has ended, and its vif is closed", "bridge", b.bridge, "port", name, "err", err)
	}
	port.Device().Disconnect()
}

// String says how a port is set apart from the others, as the end of a line.
func (i portInfo) String() (s string) {
	if len(i.guard) > 0 {
		s = ", from " + macs(i.guard) + " alone"
	}
	if i.isolated {
		s += ", isolated"
	}
	return s
}

func macs(list []pvnet.MAC) string {
	var out []string
	for _, m := range list {
		out = append(out, m.String())
	}
	return strings.Join(out, " ")
}

// tryAdd makes a vif a port. The error is a [*keyError] for a key of the toolstack that is in the way.
func (b *bridged) tryAdd(ctx context.Context, dev *pvnet.Device, vif string) (*bridge.Port, portInfo, []*keyError, error) {
	ts, err := dev.Toolstack(ctx)
	if err != nil {
		return nil, portInfo{}, nil, err
	}
	info, notes, err := b.plan(vif, ts)
	if err != nil {
		return nil, info, nil, err
	}
	if err := b.leavesRoom(vif, info.guard); err != nil {
		return nil, info, nil, err
	}
	port, err := b.sw.Add(dev, bridge.PortConfig{Guard: info.guard, Isolated: info.isolated})
	switch {
	case errors.Is(err, bridge.ErrGuarded):
		err = guardedTwice(info.guard, strings.TrimPrefix(err.Error(), bridge.ErrGuarded.Error()+": "))
	case errors.Is(err, bridge.ErrPorts):
		err = b.full()
	}
	return port, info, notes, err
}

// guardedTwice is the error for a vif with the address of another one, by.
func guardedTwice(guard []pvnet.MAC, by string) error {
	return &keyError{netif.KeyMAC, macs(guard), "another vif of this bridge has it: " + by, "give each vif an address of its own"}
}

// full is the error for one vif more than there may be.
func (b *bridged) full() error {
	return &cli.Advice{Err: fmt.Errorf("bridge %s has %d ports, which is all that --ports allows", b.bridge, b.most), Next: "start it with a larger --ports"}
}

// plan decides how a vif becomes a port, by the toolstack's keys and by the flags. The error is a
// [*keyError] for a key that must not be left aside; notes are those that are.
func (b *bridged) plan(vif string, ts pvnet.Toolstack) (info portInfo, notes []*keyError, err error) {
	info = portInfo{name: vif, isolated: b.among(b.isolated, vif)}
	var p plan
	if err := p.refuse(ts, "bridge", "put the vif on a bridge for that VLAN's vifs alone", "this bridge does not reach it"); err != nil {
		return info, nil, err
	}
	kind, ours := kindOf(ts.Script)
	switch {
	case kind != bridgeScript:
		return info, nil, &keyError{netif.KeyScript, ts.Script, "bridge runs no scripts, and a vif of it has no interface", "name vif-barevif, or none"}
	case b.dom0 && ts.Script != "" && !ours && !ts.Done:
		return info, nil, &keyError{netif.KeyScript, ts.Script, "the toolstack runs it in this domain, and a vif of bridge has no interface for it", "name vif-barevif"}
	case ts.Bridge != "" && ts.Bridge != b.bridge:
		return info, nil, &keyError{netif.KeyBridge, ts.Bridge, "this is the bridge " + b.bridge,
			fmt.Sprintf("correct the key, or serve the vif by a bridge of that name: barevif bridge --name %s --vif %s", ts.Bridge, vif)}
	}
	if !b.among(b.unguarded, vif) {
		if ts.MAC == (pvnet.MAC{}) || ts.MAC[0]&1 != 0 {
			return info, nil, &keyError{netif.KeyMAC, "", "there is no usable one, to which the guest is held", "give the vif one, mac=..., or let its guest send from any: --no-guard=" + vif}
		}
		info.guard = []pvnet.MAC{ts.MAC}
	}
	if ts.Name != "" {
		p.note(netif.KeyVifName, ts.Name, "a vif of bridge has no interface", "")
	}
	if len(ts.IPs) > 0 {
		p.note(netif.KeyIP, join(ts.IPs), "the guest is not held to these addresses", "vifrouter holds its guests to theirs")
	}
	if ts.Gateway != "" {
		p.note(netif.KeyGatewayDev, ts.Gateway, "nothing is routed", "vifrouter routes")
	}
	return info, p.notes, nil
}

// among reports whether a vif is among those of a flag.
func (b *bridged) among(patterns []string, vif string) bool {
	return slices.Contains(patterns, allVifs) || isAmong(patterns, vif)
}

// recheck reads the toolstack's keys again when the vif connects. One that was written after the
// vif was joined is named, since it has no effect before the vif is given anew.
func (b *bridged) recheck(ctx context.Context, dev *pvnet.Device, vif string, was portInfo) {
	ts, err := dev.Toolstack(ctx)
	if err != nil {
		return // being removed
	}
	ts.Done = true // by ourselves
	now, _, err := b.plan(vif, ts)
	switch {
	case err != nil:
		b.slog.Warn("a key of the toolstack was changed, and is not honoured", "vif", vif, "err", err)
	case !slices.Equal(now.guard, was.guard):
		b.changed(vif, netif.KeyMAC+"="+macs(now.guard))
	}
}

// shown makes a port one of those that status shows, until hide.
func (b *bridged) shown(p *bridge.Port, info portInfo) (hide func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ports[p] = info
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.ports, p)
	}
}

// portTally describes the traffic of a port, one clause per direction.
func portTally(peer string, s bridge.PortStats) string {
	dropped := s.Local + s.Isolated + s.Spoofed + s.Invalid + s.Reserved + s.Alone
	return fmt.Sprintf("%s frames from the %s, %s not passed on%s; %s to the %s, %s lost%s",
		cli.Grouped(s.Received), peer, cli.Grouped(dropped), notPassedOn(s), cli.Grouped(s.Out.Sent), peer, cli.Grouped(s.Out.Lost()), notSent(s.Out))
}

// notPassedOn says why frames of a port went nowhere.
func notPassedOn(s bridge.PortStats) string {
	return reasons(reason{s.Spoofed, "from another's address"}, reason{s.Isolated, "for an isolated vif"}, reason{s.Local, "for a station behind the port itself"},
		reason{s.Alone, "with no port to go to"}, reason{s.Reserved, "for a reserved group"}, reason{s.Invalid, "from no station's address"})
}

// notSent says why frames for a port were lost.
func notSent(s forward.Stats) string {
	return reasons(reason{s.Full, "not taken in time"}, reason{s.Down, "while it was down"}, reason{s.Oversize, "longer than its MTU"},
		reason{s.Refused, "malformed or too long for it"}, reason{s.Ended, "as it ended"})
}

// addresses returns the addresses of --addr, by the name of the TAP.
func (b *bridged) addresses(taps []string) (map[string]netip.Prefix, error) {
	if len(b.addrs) > 0 && len(taps) == 0 {
		return nil, &cli.Advice{Err: fmt.Errorf("--addr %q: no uplink is a TAP", b.addrs[0]), Next: "give one: --uplink tap:lan0", Usage: true}
	}
	values, err := (&vifValues{flag: "addr", given: b.addrs, what: "TAP", add: "--uplink tap:"}).of(taps, func(string) bool { return true })
	if err != nil {
		return nil, err
	}
	addrs := make(map[string]netip.Prefix)
	for tap, s := range values {
		p, err := parseAddr(s, s, "10.9.0.1/24")
		if err != nil {
			return nil, err
		}
		addrs[tap] = p
	}
	return addrs, nil
}

// isInterfaceName reports whether a name can be that of an interface, which is what the toolstack's
// key bridge can be.
func isInterfaceName(name string) bool {
	return len(name) > 0 && len(name) < 16 && name != "." && name != ".." &&
		!strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == ':' || r == '%' })
}

// orNone returns s, or "-" for none, as a cell of a table.
func orNone(s string) string { return cmp.Or(s, "-") }
