package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"barevif/tools/cli"
	"barevif/tools/ping"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func (b *piece) ifaceFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&b.iface, "if", "eth0", "network `interface`")
}

func (b *piece) portFlag(cmd *cobra.Command) {
	cmd.Flags().Uint16Var(&b.port, "port", streamPort, "`port`")
}

func pktgenCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "pktgen", "Send frames by the kernel's own generator (module pktgen; root)",
		"send", "kernel pktgen", (*piece).pktgen, func(b *piece, cmd *cobra.Command) {
			b.ifaceFlag(cmd)
			b.frame.register(cmd)
			cmd.Flags().IntVar(&b.clone, "clone", 0, "`times` to send each frame before making another")
		})
}

// pktgenDir has the control files of the kernel's packet generator:
// Documentation/networking/pktgen.rst.
const pktgenDir = "/proc/net/pktgen"

func (b *piece) pktgen(ctx context.Context, window time.Duration) (r result, err error) {
	if err := b.frame.parse(); err != nil {
		return r, err
	}
	tell := func(file string, lines ...string) error {
		for _, line := range lines {
			if err := os.WriteFile(filepath.Join(pktgenDir, file), []byte(line+"\n"), 0); err != nil {
				if errors.Is(err, os.ErrNotExist) && file == "pgctrl" {
					return &cli.Advice{Err: fmt.Errorf("there is no generator: %w", err), Next: "modprobe pktgen", Refused: true}
				}
				return fmt.Errorf("pktgen: %q: %w", line, err)
			}
		}
		return nil
	}
	if err := tell("pgctrl", "reset"); err != nil {
		return r, err
	}
	if err := tell("kpktgend_0", "add_device "+b.iface); err != nil {
		return r, err
	}
	defer func() {
		err = errors.Join(err, tell("kpktgend_0", "rem_device_all"))
	}()
	err = tell(b.iface, "count 0", "delay 0", fmt.Sprintf("clone_skb %d", b.clone), fmt.Sprintf("pkt_size %d", b.frame.size),
		"src_min "+b.frame.from, "src_max "+b.frame.from, "dst "+b.frame.to, "dst_mac "+b.frame.dstMAC,
		fmt.Sprintf("udp_src_min %d", discardPort), fmt.Sprintf("udp_src_max %d", discardPort),
		fmt.Sprintf("udp_dst_min %d", discardPort), fmt.Sprintf("udp_dst_max %d", discardPort))
	if err != nil {
		return r, err
	}
	before, err := readCounters(b.iface)
	if err != nil {
		return r, err
	}
	b.begun("sending")
	began := time.Now()
	ended := make(chan error, 1)
	start := func() { ended <- tell("pgctrl", "start") } // returns when the generator has stopped
	go start()
	over := time.After(window)
wait:
	for {
		select {
		case err = <-ended:
			if err != nil {
				return r, err
			}
			go start() // any signal to the thread that waits in the kernel stops it
		case <-over:
			break wait
		case <-ctx.Done():
			err = context.Cause(ctx)
			break wait
		}
	}
	// A start that a signal has interrupted may be repeated after a stop. So stop until the
	// start has returned.
	for stopped := false; !stopped; {
		err = errors.Join(err, tell("pgctrl", "stop"))
		select {
		case e := <-ended:
			err, stopped = errors.Join(err, e), true
		case <-time.After(100 * time.Millisecond):
		}
	}
	seconds := time.Since(began).Seconds()
	after, counted := readCounters(b.iface)
	r = after.since(before, "tx", seconds)
	return r, errors.Join(err, counted)
}

func udpSendCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "udp-send", "Send through a UDP socket of the kernel's", "send", "Go UDP socket", (*piece).udpSend,
		func(b *piece, cmd *cobra.Command) { b.frame.register(cmd) })
}

func (b *piece) udpSend(ctx context.Context, window time.Duration) (r result, err error) {
	if err := b.frame.parse(); err != nil {
		return r, err
	}
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.frame.toIP, discardPort)))
	if err != nil {
		return r, dialRefused(err, b.frame.to, "bench udp-recv")
	}
	defer c.Close()
	return b.sendLoop(ctx, window, make([]byte, b.frame.payload()), func(payload []byte) error {
		_, err := c.Write(payload)
		return err
	})
}

// sendLoop calls send for window. It does not count packets that a full queue refuses.
func (b *piece) sendLoop(ctx context.Context, window time.Duration, data []byte, send func([]byte) error) (r result, err error) {
	b.begun("sending")
	w := startWatch(window)
	for {
		more, err := w.running(ctx)
		if err != nil {
			return r, err
		}
		if !more {
			break
		}
		binary.BigEndian.PutUint64(data[len(data)-8:], r.Frames)
		switch err := send(data); {
		case err == nil:
			r.Frames++
		case !transient(err):
			return r, err
		}
	}
	r.Seconds, r.Bytes = w.stop(), r.Frames*uint64(b.frame.size)
	return r, nil
}

func udpRecvCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "udp-recv", "Receive from a UDP socket of the kernel's", "receive", "Go UDP socket", (*piece).udpRecv,
		func(b *piece, cmd *cobra.Command) {
			cmd.Flags().Uint16Var(&b.port, "port", discardPort, "`port`")
		})
}

func (b *piece) udpRecv(ctx context.Context, window time.Duration) (r result, err error) {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{Port: int(b.port)})
	if err != nil {
		return r, cli.ListenRefused(err, fmt.Sprintf("UDP port %d", b.port), "port")
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })()
	return b.recvLoop(ctx, window, c.SetReadDeadline, func(buf []byte) (int, error) {
		n, _, err := c.ReadFromUDPAddrPort(buf)
		return n, err
	})
}

// firstFrame is how long a receiver waits for its first frame.
const firstFrame = 30 * time.Second

// recvLoop counts the packets of receive in a window that begins with the first one.
func (b *piece) recvLoop(ctx context.Context, window time.Duration, deadline func(time.Time) error, receive func([]byte) (int, error)) (r result, err error) {
	b.begun("receiving")
	if err := deadline(time.Now().Add(firstFrame)); err != nil {
		return r, err
	}
	buf := make([]byte, 65536)
	if _, err := receive(buf); err != nil {
		return r, fmt.Errorf("wait for the first: %w", errors.Join(err, context.Cause(ctx)))
	}
	began := time.Now()
	if err := deadline(began.Add(window)); err != nil {
		return r, err
	}
	for {
		n, err := receive(buf)
		if ctx.Err() != nil {
			return r, context.Cause(ctx)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return r, err
		}
		r.Frames++
		r.Bytes += uint64(n)
	}
	r.Seconds = time.Since(began).Seconds()
	if r.Frames == 0 {
		return r, errNothing
	}
	return r, nil
}

// openPacket opens a packet socket bound to the interface: plain reads and writes,
// through Go's poller.
func (b *piece) openPacket() (*os.File, *net.Interface, error) {
	ifi, err := net.InterfaceByName(b.iface)
	if err != nil {
		return nil, nil, fmt.Errorf("interface %s: %w", b.iface, err)
	}
	const ipv4 = 0x0008 // ETH_P_IP in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, ipv4)
	if err != nil {
		return nil, nil, &cli.Advice{Err: fmt.Errorf("open a packet socket: %w", err), Next: "run as root", Refused: true}
	}
	f := os.NewFile(uintptr(fd), "packet socket")
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: ipv4, Ifindex: ifi.Index}); err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("bind a packet socket to %s: %w", b.iface, err)
	}
	return f, ifi, nil
}

// transient reports whether err means a full queue of the interface, or that nobody listened
// at the port of an earlier datagram.
func transient(err error) bool {
	return errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ECONNREFUSED)
}

func packetSendCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "packet-send", "Send through a packet socket of the kernel's (root)", "send", "Go packet socket", (*piece).packetSend,
		func(b *piece, cmd *cobra.Command) {
			b.ifaceFlag(cmd)
			b.frame.register(cmd)
		})
}

func (b *piece) packetSend(ctx context.Context, window time.Duration) (r result, err error) {
	if err := b.frame.parse(); err != nil {
		return r, err
	}
	c, ifi, err := b.openPacket()
	if err != nil {
		return r, err
	}
	defer c.Close()
	return b.sendLoop(ctx, window, b.frame.bytes(ifi.HardwareAddr), func(data []byte) error {
		_, err := c.Write(data)
		return err
	})
}

func packetRecvCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "packet-recv", "Receive from a packet socket of the kernel's (root)", "receive", "Go packet socket", (*piece).packetRecv,
		func(b *piece, cmd *cobra.Command) { b.ifaceFlag(cmd) })
}

func (b *piece) packetRecv(ctx context.Context, window time.Duration) (r result, err error) {
	c, _, err := b.openPacket()
	if err != nil {
		return r, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })()
	return b.recvLoop(ctx, window, c.SetReadDeadline, c.Read)
}

func tcpSendCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "tcp-send", "Send a stream through a TCP socket of the kernel's", "stream", "Go TCP socket", (*piece).tcpSend,
		func(b *piece, cmd *cobra.Command) {
			b.portFlag(cmd)
			cmd.Flags().StringVar(&b.frame.to, "to", "10.9.0.1", "`address` to connect to")
		})
}

func (b *piece) tcpSend(ctx context.Context, window time.Duration) (r result, err error) {
	var d net.Dialer
	addr := net.JoinHostPort(b.frame.to, strconv.Itoa(int(b.port)))
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil && ctx.Err() != nil {
		return r, context.Cause(ctx)
	}
	if err != nil {
		return r, dialRefused(err, addr, "bench tcp-recv")
	}
	return b.sendStream(ctx, window, c)
}

func tcpRecvCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "tcp-recv", "Receive one stream from a TCP socket of the kernel's, to its end", "stream", "Go TCP socket", (*piece).tcpRecv,
		func(b *piece, cmd *cobra.Command) { b.portFlag(cmd) })
}

func (b *piece) tcpRecv(ctx context.Context, window time.Duration) (result, error) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{Port: int(b.port)})
	if err != nil {
		return result{}, cli.ListenRefused(err, fmt.Sprintf("TCP port %d", b.port), "port")
	}
	return b.recvStream(ctx, window, l)
}

func pingSocketCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "ping-socket", "Measure round trips through a raw ICMP socket of the kernel's (root)", "round trip", "Go ICMP socket", (*piece).pingSocket,
		func(b *piece, cmd *cobra.Command) {
			b.echoFlags(cmd, "`address` that answers, IPv4")
		})
}

func (b *piece) pingSocket(ctx context.Context, window time.Duration) (r result, err error) {
	to, err := b.echoes()
	if err != nil {
		return r, err
	}
	c, err := net.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		return r, &cli.Advice{Err: err, Next: "run as root", Refused: true}
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	b.begun("pinging")
	return roundTrips(ctx, b.count, window, func(seq uint16) (time.Duration, error) {
		if err := c.SetReadDeadline(time.Now().Add(echoTimeout)); err != nil {
			return 0, err
		}
		return ping.Trip(c, to.AsSlice(), seq)
	})
}

func countCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "count", "Count what an interface of the kernel's sends or receives", "send", "all", (*piece).counts,
		func(b *piece, cmd *cobra.Command) {
			b.ifaceFlag(cmd)
			cmd.Flags().StringVar(&b.dir, "dir", "rx", "the interface's `direction`: rx or tx")
		})
}

func (b *piece) counts(ctx context.Context, window time.Duration) (r result, err error) {
	if b.dir != "rx" && b.dir != "tx" {
		return r, cli.BadValue("dir", b.dir, "rx or tx")
	}
	before, err := readCounters(b.iface)
	if err != nil {
		return r, err
	}
	began := time.Now()
	select {
	case <-time.After(window):
	case <-ctx.Done():
		return r, context.Cause(ctx)
	}
	after, err := readCounters(b.iface)
	return after.since(before, b.dir, time.Since(began).Seconds()), err
}

// ifaceCounters counts what an interface has received and sent.
type ifaceCounters struct{ rxFrames, rxBytes, txFrames, txBytes uint64 }

// readCounters reads all counters at once. Read from sysfs files they would be of different
// times.
func readCounters(iface string) (c ifaceCounters, err error) {
	l, err := netlink.LinkByName(iface)
	if err != nil {
		return c, fmt.Errorf("counters of %s: %w", iface, err)
	}
	st := l.Attrs().Statistics
	if st == nil {
		return c, fmt.Errorf("counters of %s: there are none", iface)
	}
	return ifaceCounters{st.RxPackets, st.RxBytes, st.TxPackets, st.TxBytes}, nil
}

func (c ifaceCounters) since(before ifaceCounters, dir string, seconds float64) result {
	r := result{Seconds: seconds, Frames: c.rxFrames - before.rxFrames, Bytes: c.rxBytes - before.rxBytes}
	if dir == "tx" {
		r.Frames, r.Bytes = c.txFrames-before.txFrames, c.txBytes-before.txBytes
	}
	return r
}
