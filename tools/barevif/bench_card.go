package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime/pprof"
	"slices"
	"time"

	"barevif/hypercall/xendev"
	"barevif/pvnet"
	"barevif/pvnet/packet"
	"barevif/telemetry"
	"barevif/tools/cli"
	"barevif/tools/domain"

	"github.com/spf13/cobra"
)

// benchCard is a card of ours for a bench command.
type benchCard struct {
	domain                  domain.Flags
	vif, doorbell, waitMode string
	take, back, offload     bool
	profile                 string
	wait                    time.Duration
	mode                    pvnet.WaitMode
	log                     func() pvnet.Config
}

func (c *benchCard) register(cmd *cobra.Command, p *cli.Program) {
	c.domain.Register(cmd, 1)
	c.flags(cmd, p)
	cmd.Flags().BoolVar(&c.back, "back", false, "be the backend: of the first vif that comes; on an emulated host also give --dom 2")
}

func (c *benchCard) flags(cmd *cobra.Command, p *cli.Program) {
	cmd.Flags().StringVar(&c.vif, "vif", "0", "`id` of the vif")
	cmd.Flags().BoolVar(&c.take, "take", false, "with --xen: unbind the vif from the kernel's driver first")
	cmd.Flags().StringVar(&c.doorbell, "doorbell", "ioctl", "with --xen: `way` to fire an event channel: ioctl or hypercall")
	cmd.Flags().StringVar(&c.waitMode, "wait-mode", "park", "what a `call` does that has to wait: park, adaptive or busy")
	cmd.Flags().StringVar(&c.profile, "profile", "", "write a CPU profile of the measurement to this `file`")
	cmd.Flags().DurationVar(&c.wait, "wait", 30*time.Second, "give up if the other end does not connect within this `time`")
	c.log = func() pvnet.Config { return pvnet.Config{LendRx: true, Logger: p.Log()} }
}

func (c *benchCard) parse() (err error) {
	if c.mode, err = benchWait(c.waitMode); err != nil {
		return err
	}
	switch c.doorbell {
	case "ioctl":
		c.domain.Doorbell = xendev.DoorbellIoctl
	case "hypercall":
		c.domain.Doorbell = xendev.DoorbellHypercall
	default:
		return cli.BadValue("doorbell", c.doorbell, "ioctl or hypercall")
	}
	if !c.domain.Xen && (c.take || c.domain.Doorbell != xendev.DoorbellIoctl) {
		return &cli.Advice{Err: errors.New("--take and --doorbell are for a real Xen"), Next: "give --xen too", Usage: true}
	}
	return nil
}

// run calls fn with the connected card, and ends the card after it.
func (c *benchCard) run(ctx context.Context, fn func(context.Context, *pvnet.Device) error) error {
	if err := c.parse(); err != nil {
		return err
	}
	dom, err := c.domain.Open(ctx)
	if err != nil {
		return err
	}
	defer dom.End()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	dom.Watch(ctx, cancel)
	cfg := c.log()
	cfg.Wait, cfg.Offload = c.mode, c.offload
	if c.back {
		return c.serve(ctx, dom, cfg, fn)
	}
	if c.domain.Xen {
		if err := c.domain.Free(c.vif, c.take); err != nil {
			return err
		}
	}
	wait, stop := context.WithTimeoutCause(ctx, c.wait, fmt.Errorf("waited %v", c.wait))
	dev, err := pvnet.Connect(wait, dom.Domain, c.vif, cfg)
	stop()
	if err != nil {
		return err
	}
	defer dev.Disconnect()
	return c.measured(ctx, dev, fn)
}

// serve is run for a backend.
func (c *benchCard) serve(ctx context.Context, dom *domain.Domain, cfg pvnet.Config, fn func(context.Context, *pvnet.Device) error) error {
	cfg.LendRx = false
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(c.wait, func() { cancel(fmt.Errorf("no frontend connected within %v", c.wait)) })
	first := make(chan struct{}, 1)
	first <- struct{}{}
	measured := errors.New("measured")
	var failed error
	err := pvnet.Serve(ctx, dom.Domain, pvnet.ServeConfig{Config: cfg, Hotplug: true}, func(dev *pvnet.Device) {
		select {
		case <-first:
		default: // another vif
			<-ctx.Done()
			return
		}
		for ev := range dev.Links(ctx) {
			if ev.Up {
				timer.Stop()
				failed = c.measured(ctx, dev, fn)
				break
			}
		}
		cancel(measured)
	})
	if errors.Is(err, measured) {
		return failed
	}
	return err
}

func (c *benchCard) measured(ctx context.Context, dev *pvnet.Device, fn func(context.Context, *pvnet.Device) error) error {
	if c.profile == "" {
		return fn(ctx, dev)
	}
	f, err := os.Create(c.profile)
	if err != nil {
		return fmt.Errorf("--profile: %w", err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		f.Close()
		return err
	}
	err = fn(ctx, dev)
	pprof.StopCPUProfile()
	return errors.Join(err, f.Close())
}

// maxBatch is more than a ring has room for.
const maxBatch = 256

type benchSend struct {
	benchRun
	card  benchCard
	frame udpFrame
	batch int
}

func benchSendCommand(p *cli.Program) *cobra.Command {
	s := &benchSend{benchRun: benchRun{Program: p}}
	cmd := &cobra.Command{
		Use:   "send",
		Short: "Send frames through a card of ours",
		Args:  cli.Arguments(0),
		RunE:  func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	s.registerRun(cmd, "send", "ours")
	s.card.register(cmd, p)
	s.frame.register(cmd)
	cmd.Flags().IntVar(&s.batch, "batch", 32, "`frames` to send at a time")
	return cmd
}

func (s *benchSend) run(ctx context.Context) error {
	window, err := s.window()
	if err != nil {
		return err
	}
	if err := s.frame.parse(); err != nil {
		return err
	}
	if s.batch < 1 || s.batch > maxBatch {
		return cli.BadValue("batch", fmt.Sprint(s.batch), fmt.Sprintf("a number from 1 to %d", maxBatch))
	}
	return s.card.run(ctx, func(ctx context.Context, dev *pvnet.Device) error {
		s.begun("sending")
		r, err := sendFrames(ctx, dev, &s.frame, s.batch, window)
		if err != nil {
			return err
		}
		return s.print(r)
	})
}

// sendFrames sends for window and copies each frame into its page. Of the frames it counts,
// up to a ring full may not have reached the peer.
func sendFrames(ctx context.Context, dev *pvnet.Device, f *udpFrame, batch int, window time.Duration) (benchResult, error) {
	tx, err := dev.OwnTX(0)
	if err != nil {
		return benchResult{}, err
	}
	mac := dev.MAC()
	data := f.bytes(mac[:])
	frames := make([]pvnet.Frame, batch)
	before := dev.Stats()
	w := startWatch(window)
	tx.SetDeadline(w.began.Add(window)) // so that a peer that left cannot block us for ever
	defer context.AfterFunc(ctx, func() { tx.SetDeadline(time.Unix(1, 0)) })()
	var seq uint64
	for more := true; more && err == nil; {
		var n, sent int
		if n, err = tx.AllocWait(frames, len(data)); err != nil {
			break
		}
		for i := range n {
			b := frames[i].Bytes()
			copy(b, data)
			binary.BigEndian.PutUint64(b[headersLen:], seq+uint64(i))
		}
		sent, err = tx.SendWait(frames[:n])
		seq += uint64(sent)
		for i := sent; i < n; i++ {
			err = errors.Join(err, frames[i].Release())
		}
		if err == nil {
			more, err = w.running(ctx)
		}
	}
	if ctx.Err() != nil {
		return benchResult{}, context.Cause(ctx)
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return benchResult{}, err
	}
	if seq == 0 {
		return benchResult{}, errNothing
	}
	r := benchResult{Seconds: w.stop(), Frames: seq, Bytes: seq * uint64(len(data))}
	return withEvents(r, before, dev.Stats()), nil
}

// withEvents adds to r how often each end notified the other.
func withEvents(r benchResult, before, after telemetry.Stats) benchResult {
	count := func(st telemetry.Stats, c telemetry.Counter) uint64 { return st.RX.Get(c) + st.TX.Get(c) }
	r.Notified = count(after, telemetry.NotifiesSent) - count(before, telemetry.NotifiesSent)
	r.Woken = count(after, telemetry.Events) - count(before, telemetry.Events)
	return r
}

type benchRecv struct {
	benchRun
	card benchCard
}

func benchRecvCommand(p *cli.Program) *cobra.Command {
	s := &benchRecv{benchRun: benchRun{Program: p}}
	cmd := &cobra.Command{
		Use:   "recv",
		Short: "Receive frames from a card of ours",
		Args:  cli.Arguments(0),
		RunE:  func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	s.registerRun(cmd, "receive", "ours")
	s.card.register(cmd, p)
	return cmd
}

func (s *benchRecv) run(ctx context.Context) error {
	window, err := s.window()
	if err != nil {
		return err
	}
	return s.card.run(ctx, func(ctx context.Context, dev *pvnet.Device) error {
		r, err := s.recvFrames(ctx, dev, window)
		if err != nil {
			return err
		}
		return s.print(r)
	})
}

// recvFrames counts the frames of a window that begins with the first frame.
func (s *benchRecv) recvFrames(ctx context.Context, dev *pvnet.Device, window time.Duration) (r benchResult, err error) {
	rx, err := dev.OwnRX(0)
	if err != nil {
		return r, err
	}
	defer context.AfterFunc(ctx, func() { rx.SetDeadline(time.Unix(1, 0)) })()
	frames := make([]pvnet.Frame, 64)
	s.begun("receiving")
	rx.SetDeadline(time.Now().Add(s.card.wait))
	n, err := rx.Receive(frames)
	if err == nil {
		err = rx.Release(frames[:n])
	}
	if err != nil {
		return r, fmt.Errorf("wait for the first frame: %w", err)
	}
	before := dev.Stats()
	w := startWatch(window)
	rx.SetDeadline(w.began.Add(window))
	for more := true; more; {
		n, err := rx.Receive(frames)
		if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() == nil {
			break
		}
		if err != nil {
			return r, errors.Join(err, context.Cause(ctx))
		}
		for i := range n {
			r.Bytes += uint64(frames[i].Len())
		}
		r.Frames += uint64(n)
		if err := rx.Release(frames[:n]); err != nil {
			return r, err
		}
		if more, err = w.running(ctx); err != nil {
			return r, err
		}
	}
	r.Seconds = w.stop()
	if r.Frames == 0 {
		return r, errNothing
	}
	return withEvents(r, before, dev.Stats()), nil
}

type benchPing struct {
	benchRun
	card     benchCard
	from, to string
	count    int
}

func benchPingCommand(p *cli.Program) *cobra.Command {
	s := &benchPing{benchRun: benchRun{Program: p}}
	cmd := &cobra.Command{
		Use:   "ping",
		Short: "Measure round trips through a card of ours to a kernel that answers",
		Args:  cli.Arguments(0),
		RunE:  func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context()) },
	}
	s.registerRun(cmd, "round trip", "ours")
	s.card.register(cmd, p)
	cmd.Flags().StringVar(&s.from, "from", "10.9.0.2", "our `address`, IPv4")
	cmd.Flags().StringVar(&s.to, "to", "10.9.0.1", "`address` that answers, IPv4, on the same network")
	cmd.Flags().IntVar(&s.count, "count", 500, "`echoes` to ask for, within --secs")
	return cmd
}

func (s *benchPing) run(ctx context.Context) error {
	window, err := s.window()
	if err != nil {
		return err
	}
	from, err := netip.ParseAddr(s.from)
	if err != nil || !from.Is4() {
		return cli.BadValue("from", s.from, "an IPv4 address")
	}
	to, err := netip.ParseAddr(s.to)
	if err != nil || !to.Is4() {
		return cli.BadValue("to", s.to, "an IPv4 address")
	}
	if s.count < 1 {
		return cli.BadValue("count", fmt.Sprint(s.count), "a number from 1 on")
	}
	return s.card.run(ctx, func(ctx context.Context, dev *pvnet.Device) error {
		e, err := newEcho(dev, from.As4(), to.As4())
		if err != nil {
			return err
		}
		defer context.AfterFunc(ctx, func() {
			e.rx.SetDeadline(time.Unix(1, 0))
			e.tx.SetDeadline(time.Unix(1, 0))
		})()
		if err := e.resolve(time.Now().Add(s.card.wait)); err != nil {
			return fmt.Errorf("ask for the address of %s: %w", s.to, errors.Join(err, context.Cause(ctx)))
		}
		s.begun("pinging")
		r, err := roundTrips(ctx, s.count, window, e.ping)
		if err != nil {
			return err
		}
		return s.print(r)
	})
}

// echoTimeout is the time after which an echo counts as lost.
const echoTimeout = time.Second

// roundTrips calls ping until it has count round trips, or the window is over.
func roundTrips(ctx context.Context, count int, window time.Duration, ping func(seq uint16) (time.Duration, error)) (r benchResult, err error) {
	var times []time.Duration
	began := time.Now()
	for i := 0; i < count && time.Since(began) < window; i++ {
		d, err := ping(uint16(i))
		switch {
		case ctx.Err() != nil:
			return r, context.Cause(ctx)
		case errors.Is(err, os.ErrDeadlineExceeded):
			r.Lost++
		case err != nil:
			return r, err
		default:
			times = append(times, d)
		}
	}
	if len(times) == 0 {
		return r, errNothing
	}
	slices.Sort(times)
	micro := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
	r.Frames, r.Seconds = uint64(len(times)), time.Since(began).Seconds()
	r.Median, r.P99 = micro(times[len(times)/2]), micro(times[len(times)*99/100])
	return r, nil
}

// An echo pings the kernel at the other end of a card.
type echo struct {
	tx       *pvnet.TX
	rx       *pvnet.RX
	own, far [6]byte // MAC addresses
	from, to [4]byte
	frames   [16]pvnet.Frame
}

func newEcho(dev *pvnet.Device, from, to [4]byte) (e *echo, err error) {
	e = &echo{own: dev.MAC(), from: from, to: to}
	if e.tx, err = dev.OwnTX(0); err != nil {
		return nil, err
	}
	e.rx, err = dev.OwnRX(0)
	return e, err
}

func (e *echo) send(b []byte) error {
	n, err := e.tx.AllocWait(e.frames[:1], len(b))
	if err != nil {
		return err
	}
	e.frames[0].CopyFrom(b)
	_, err = e.tx.SendWait(e.frames[:n])
	return err
}

// await receives until match accepts a frame or the deadline passes. It answers ARP
// requests for our address, and drops all other frames.
func (e *echo) await(deadline time.Time, match func([]byte) bool) (found bool, err error) {
	e.rx.SetDeadline(deadline)
	for !found && err == nil {
		var n int
		if n, err = e.rx.Receive(e.frames[:]); err != nil {
			return false, err
		}
		var ask []byte
		for i := range n {
			b := e.frames[i].Bytes()
			if match(b) {
				found = true
			} else if len(b) >= 42 && b[12] == 8 && b[13] == 6 && b[21] == 1 && [4]byte(b[38:42]) == e.from {
				ask = slices.Clone(b[6:12])
			}
		}
		if err = e.rx.Release(e.frames[:n]); err == nil && ask != nil {
			err = e.send(e.arp(2, [6]byte(ask), [6]byte(ask)))
		}
	}
	return found, err
}

// arp returns an ARP message (RFC 826). Op 1 asks for the MAC of to, op 2 says that from is
// at own.
func (e *echo) arp(op byte, dst, target [6]byte) []byte {
	b := make([]byte, 60)
	copy(b, dst[:])
	copy(b[6:], e.own[:])
	copy(b[12:], []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, op})
	copy(b[22:], e.own[:])
	copy(b[28:], e.from[:])
	copy(b[32:], target[:])
	copy(b[38:], e.to[:])
	return b
}

// resolve finds the far end's MAC address. It repeats the request until the deadline, because
// the far end may come up late.
func (e *echo) resolve(until time.Time) error {
	for {
		err := e.send(e.arp(1, [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, [6]byte{}))
		if err != nil {
			return err
		}
		deadline := time.Now().Add(echoTimeout / 4)
		found, err := e.await(deadline, func(b []byte) bool {
			if len(b) < 42 || b[12] != 8 || b[13] != 6 || b[21] != 2 || [4]byte(b[28:32]) != e.to {
				return false
			}
			e.far = [6]byte(b[22:28])
			return true
		})
		if found || !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(until) {
			return err
		}
	}
}

func (e *echo) ping(seq uint16) (time.Duration, error) {
	const size = 98 // the frame size of ping's default of 56 bytes
	b := make([]byte, size)
	copy(b, e.far[:])
	copy(b[6:], e.own[:])
	b[12] = 8
	ip, icmp := b[14:34], b[34:]
	ip[0], ip[8], ip[9] = 0x45, 64, 1
	binary.BigEndian.PutUint16(ip[2:], size-14)
	copy(ip[12:], e.from[:])
	copy(ip[16:], e.to[:])
	binary.BigEndian.PutUint16(ip[10:], packet.Checksum(ip))
	icmp[0] = echoRequest
	binary.BigEndian.PutUint16(icmp[6:], seq)
	for i := echoHeader; i < len(icmp); i++ {
		icmp[i] = byte(i)
	}
	binary.BigEndian.PutUint16(icmp[2:], packet.Checksum(icmp))
	began := time.Now()
	if err := e.send(b); err != nil {
		return 0, err
	}
	_, err := e.await(began.Add(echoTimeout), func(got []byte) bool {
		return len(got) >= size && got[12] == 8 && got[13] == 0 && got[23] == 1 &&
			got[34] == echoReply && string(got[38:size]) == string(b[38:])
	})
	return time.Since(began), err
}
