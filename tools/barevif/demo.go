package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/tools/appliance"
	"barevif/tools/cli"
	"barevif/xenbus/toolstack"

	"github.com/spf13/cobra"
)

func demoCommand(p *cli.Program) *cobra.Command {
	d := demo{Program: p, size: 256 << 20}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Set up everything in one process, fetch pages through it, and show it",
		Long: `demo makes an emulated Xen with two domains, gives one of them a network card (a vif)
and lets the kernel's TCP/IP fetch web pages through it:

  net/http -> gVisor's TCP/IP -> frontend -> rings and granted pages -> backend
           -> TAP -> the kernel's TCP/IP -> an HTTP client

It needs no Xen and no root: the TAP and the kernel's TCP/IP live in a user and
network namespace of their own. Where /dev/net/tun may not be opened a veth pair and
a packet socket take the TAP's place; where namespaces are refused as well, the far
end is a second gVisor stack. --network asks for one of them.`,
		Example: `  barevif demo
  barevif demo --size 2GiB
  barevif demo --network userspace -v`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd.Context()) },
	}
	cmd.Flags().Var(&d.size, "size", "`bytes` of the file to fetch, with KiB, MiB, GiB or TiB")
	d.where.register(cmd)
	d.inspect.register(cmd)
	cmd.Flags().StringVar(&d.network, "network", "auto", "far `end` of the card: auto, tap, veth or userspace")
	cli.FixedValues(cmd, "network", "auto", "tap", "veth", "userspace")
	return cmd
}

type demo struct {
	*cli.Program
	size    byteSize
	network string
	where   counterFlag
	inspect inspectFlag
}

// The two ends of the demonstration's network and its domains.
var (
	demoNear = netip.MustParseAddr("10.9.0.2") // the appliance
	demoFar  = netip.MustParsePrefix("10.9.0.1/24")
)

const (
	demoFront hypercall.DomID = 1
	demoBack  hypercall.DomID = 2

	// setupPatience bounds the setup, which should take milliseconds.
	setupPatience = 20 * time.Second
)

// say prints a line under a label.
func (d *demo) say(label, format string, args ...any) {
	d.Say("%-10s %s", label, fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context) (err error) {
	began := time.Now()
	s := &stage{demo: d, vif: toolstack.Vif{Front: demoFront, Back: demoBack, MAC: [6]byte{0x00, 0x16, 0x3e, 0x00, 0x01, 0x00}}}
	if s.store, err = d.where.store(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.cleanUp()) }()
	var endInspect func()
	if s.inspector, endInspect, err = d.inspect.listen(d.Log()); err != nil {
		return err
	}
	s.later(func() error { endInspect(); return nil })
	setup, cancel := context.WithTimeoutCause(ctx, setupPatience, errSetup)
	defer cancel()
	if err := s.build(setup); err != nil {
		return err
	}
	if err := s.connect(setup); err != nil {
		return err
	}
	if err := s.traffic(ctx); err != nil {
		return err
	}
	d.say("close", "the appliance leaves; the toolstack takes the vif away:")
	closing, cancel := context.WithTimeoutCause(ctx, setupPatience, errSetup)
	defer cancel()
	if err := s.takeDown(closing); err != nil {
		return err
	}
	d.say("", "nothing is left: no page granted or mapped, no event channel open")
	d.say("done", "in %.1f s", time.Since(began).Seconds())
	return nil
}

// A stage is everything the demonstration sets up.
type stage struct {
	*demo
	vif         toolstack.Vif
	far         *far
	handshake   *handshake
	machine     *machine
	front, back *pvnet.Device
	app         *app
	stopServing func() error // of the backend
	store       telemetry.Store
	inspector   pvnet.Inspector

	undo []func() error // the functions that cleanUp calls, last first
}

// later makes cleanUp call f.
func (s *stage) later(f func() error) { s.undo = append(s.undo, f) }

// cleanUp takes down what is still up.
func (s *stage) cleanUp() (err error) {
	for _, f := range slices.Backward(s.undo) {
		err = errors.Join(err, f())
	}
	s.undo = nil
	return err
}

// build makes the network and the machine, and adds a vif to the machine.
func (s *stage) build(ctx context.Context) (err error) {
	if s.far, err = s.openFar(ctx); err != nil {
		return err
	}
	s.later(func() error { s.far.close(); return nil })
	s.say("network", "%s", s.far.describe)

	s.handshake = watchHandshake(s.vif, func(line string) { s.say("", "%s", line) })
	s.later(func() error { s.handshake.end(); return nil })
	if s.machine, err = startMachine(ctx, machineConfig{tap: s.handshake.tap}); err != nil {
		return fmt.Errorf("start the emulated Xen: %w", err)
	}
	s.later(func() error { s.machine.shutdown(); return nil })
	s.say("machine", "an emulated Xen in this process: domain 0 (toolstack, xenstore), domain %d (the appliance),", demoFront)
	s.say("", "domain %d (the driver domain)", demoBack)
	s.say("vif", "the toolstack gives domain %d vif 0, MAC %s, with its backend in domain %d", demoFront, net.HardwareAddr(s.vif.MAC[:]), demoBack)
	s.say("handshake", "all that is written to xenstore for the vif, as it is written:")
	return s.machine.add(ctx, s.vif)
}

// connect starts both ends and waits until they are connected.
func (s *stage) connect(ctx context.Context) error {
	frontDom, err := s.machine.NewDomain(demoFront)
	if err != nil {
		return err
	}
	backDom, err := s.machine.NewDomain(demoBack)
	if err != nil {
		return err
	}
	cfg := pvnet.Config{StaticGrants: true, Offload: true, Counters: s.store, Inspector: s.inspector, Logger: s.Log()}
	backs := s.serve(backDom, cfg)
	cfg.LendRx = true // the stack copies
	if s.front, err = pvnet.Connect(ctx, frontDom, "0", cfg); err != nil {
		return err
	}
	s.later(func() error { s.front.Disconnect(); return nil })
	select {
	case s.back = <-backs:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := awaitUp(ctx, s.back); err != nil {
		return err
	}
	s.handshake.flush()
	s.say("memory", "frontend: %s", s.front.Budget())
	s.say("", "backend:  %s; never more", s.back.Budget())
	s.say("counters", "%s", shown(s.front))

	addr := netip.PrefixFrom(demoNear, demoFar.Bits())
	if s.app, err = startAppliance(s.front, applianceConfig{addr: addr, own: uint16(demoFront)}); err != nil {
		return err
	}
	s.later(s.app.close)
	s.say("appliance", "net/http on gVisor's TCP/IP on the frontend: http://%s/", demoNear)
	return nil
}

// serve runs the backend until stopServing, and sends its device on the channel.
func (s *stage) serve(dom hypercall.Domain, cfg pvnet.Config) <-chan *pvnet.Device {
	ctx, stop := context.WithCancel(context.Background())
	backs, done := make(chan *pvnet.Device, 1), make(chan error, 1)
	go func() {
		done <- pvnet.Serve(ctx, dom, pvnet.ServeConfig{Hotplug: true, Config: cfg}, func(dev *pvnet.Device) {
			backs <- dev
			if err := s.far.join(ctx, dev); err != nil && ctx.Err() == nil {
				cfg.Logger.Error("the vif lost its network", "err", err)
			}
			dev.Disconnect()
		})
	}()
	s.stopServing = sync.OnceValue(func() error {
		stop()
		if err := <-done; !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	})
	s.later(s.stopServing)
	return backs
}

// traffic sends some through the vif.
func (s *stage) traffic(ctx context.Context) error {
	if err := s.pingAll(ctx, s.far); err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{DialContext: s.far.dial, DisableCompression: true}}
	defer client.CloseIdleConnections()
	if err := s.fetchPage(ctx, client); err != nil {
		return err
	}
	if err := s.fetchFile(ctx, client); err != nil {
		return err
	}
	client.CloseIdleConnections()
	return s.counters(ctx, s.front, s.back, s.far)
}

// takeDown ends everything in order and checks that nothing is left.
func (s *stage) takeDown(ctx context.Context) error {
	if err := s.app.close(); err != nil {
		return err
	}
	s.front.Disconnect()
	if err := toolstack.Remove(ctx, s.machine.tools, s.vif); err != nil {
		return fmt.Errorf("remove the vif: %w", err)
	}
	s.handshake.flush()
	if err := s.stopServing(); err != nil {
		return err
	}
	s.machine.tools.Close()
	if err := s.machine.CheckClean(); err != nil {
		return fmt.Errorf("something was left behind: %w", err)
	}
	return nil
}

// errSetup is the error of a setup that takes longer than setupPatience.
var errSetup = &cli.Advice{Err: errors.New("the machine did not get ready in time"), Next: "run it again with -vv and see what is last"}

// awaitUp waits until the device is connected.
func awaitUp(ctx context.Context, dev *pvnet.Device) error {
	for ev := range dev.Links(ctx) {
		if ev.Up {
			return nil
		}
	}
	return cmp.Or(context.Cause(ctx), pvnet.ErrDisconnected)
}

// pings is how many echo requests are sent.
const pings = 3

func (d *demo) pingAll(ctx context.Context, far *far) error {
	if far.ping == nil {
		d.say("ping", "not tried: %s", far.noPing)
		return nil
	}
	var best, sum time.Duration
	for i := range pings {
		one, cancel := context.WithTimeoutCause(ctx, 5*time.Second, errors.New("within 5 s"))
		t, err := far.ping(one, demoNear, uint16(i+1))
		cancel()
		if err != nil {
			return fmt.Errorf("ping %s: %w", demoNear, err)
		}
		if best == 0 || t < best {
			best = t
		}
		sum += t
	}
	d.say("ping", "%d of %d answered, %.3f ms the fastest, %.3f ms on average", pings, pings, ms(best), ms(sum/pings))
	return nil
}

func ms(t time.Duration) float64 { return float64(t.Microseconds()) / 1000 }

// get requests path from the appliance.
func (d *demo) get(ctx context.Context, c *http.Client, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+demoNear.String()+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("GET %s: %s", req.URL, resp.Status)
	}
	return resp, nil
}

func (d *demo) fetchPage(ctx context.Context, c *http.Client) error {
	began := time.Now()
	resp, err := d.get(ctx, c, "/")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if !strings.Contains(string(body), "<h1>") {
		return fmt.Errorf("GET http://%s/: not the appliance's page: %q", demoNear, body[:min(len(body), 80)])
	}
	_, title, _ := strings.Cut(string(body), "<h1>")
	title, _, _ = strings.Cut(title, "</h1>")
	d.say("page", "GET http://%s/: %s, %d bytes in %.1f ms, %q", demoNear, resp.Status, len(body), ms(time.Since(began)), title)
	return nil
}

func (d *demo) fetchFile(ctx context.Context, c *http.Client) error {
	size := int64(d.size)
	path := "/bytes/" + strconv.FormatInt(size, 10)
	d.say("file", "GET http://%s%s: %s of pseudo-random bytes", demoNear, path, cli.BinarySize(uint64(size)))
	began := time.Now()
	resp, err := d.get(ctx, c, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	hash := sha256.New()
	bar := newProgress(d.Program, size)
	n, err := io.Copy(io.MultiWriter(hash, bar), resp.Body)
	took := time.Since(began)
	bar.finish()
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("fetch %s: %d of %d bytes came: %w", path, n, size, err)
	}
	got := hex.EncodeToString(hash.Sum(nil))
	want, err := appliance.Sum(ctx, size)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("fetch %s: the bytes are not those that were sent: SHA-256 %s, want %s", path, got, want)
	}
	rate := float64(size) / took.Seconds()
	d.say("", "%.2f s, %s/s, %.2f Gbit/s", took.Seconds(), cli.BinarySize(uint64(rate)), rate*8/1e9)
	d.say("", "SHA-256 %s, as it should be", got)
	return nil
}

// counters prints the counters of both ends, once no frame is in flight.
func (d *demo) counters(ctx context.Context, front, back *pvnet.Device, far *far) error {
	var f [2]flow
	for end := time.Now().Add(5 * time.Second); ; {
		f = flows(front.Stats(), back.Stats())
		if f[0].balanced() && f[1].balanced() {
			break
		}
		if time.Now().After(end) {
			d.say("counters", "")
			d.Say("%s", sprintFlows("", f))
			return errors.New("the counters of the two ends disagree: sent is not received + dropped")
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	d.say("counters", "sent = received + dropped, in both directions:")
	d.Say("%s", sprintFlows(strings.Repeat(" ", 11), f))
	if far.joint != nil {
		js := far.joint.Stats()
		d.say("", "backend to the network: %s frames, %s dropped; from it: %s, %s dropped",
			cli.Grouped(js.ToLink), cli.Grouped(js.Unsent), cli.Grouped(js.FromLink), cli.Grouped(js.Dropped()))
	}
	return nil
}

// A byteSize is a flag: a number of bytes with an optional unit.
type byteSize int64

func (s *byteSize) String() string { return strings.ReplaceAll(cli.BinarySize(uint64(*s)), " ", "") }
func (s *byteSize) Type() string   { return "bytes" }

func (s *byteSize) Set(v string) error {
	number, shift := v, 0
	for unit, n := range map[string]int{"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40} {
		if rest, ok := strings.CutSuffix(v, unit); ok {
			number, shift = rest, n
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 || n > appliance.MaxBlob>>shift {
		return fmt.Errorf("a number of bytes up to %s, like 64MiB", cli.BinarySize(appliance.MaxBlob))
	}
	*s = byteSize(n << shift)
	return nil
}
