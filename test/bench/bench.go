// Command bench compares a card owned by a program with the kernel's own. See its --help.
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/packet"
	"barevif/tools/cli"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const about = `bench compares a card owned by a program with the kernel's own, in pieces that run in
the domains of one machine. Each moves traffic for a while and prints one line of
JSON; "bench table" makes a table of such lines, with ratios.

  through a card of ours    send, recv, ping, stream-send, stream-recv
  through the kernel        pktgen, udp-send, udp-recv, packet-send, packet-recv,
                            tcp-send, tcp-recv, ping-socket
  watching                  count: what an interface's counters say
  at the end                table

What is compared must come from one boot of one machine, taken in turns: --way names
the line, --what the traffic, and lines of equal names are rounds of one row. A
sender is best judged by "count" at the other end's interface, not by its own line.

"bench --xen", without a piece, takes those a guest can run alone, in turns: it gives
the vif to the kernel's xen-netfront, sends by its packet generator, a UDP socket and
a packet socket, takes the vif back, sends by itself, and prints the table. There it
counts the frames the backend has taken. Nobody needs to listen to --to. It needs
root, and everything that uses the vif is cut off from it.`

func main() { cli.Main(command) }

func command(p *cli.Program) *cobra.Command {
	x := guestAlone{piece: piece{Program: p}}
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure a card against the kernel's own",
		Long:  about,
		Example: `  # "bench" is what "go build ./test/bench" makes

  # in a Xen guest with a vif 0 and the modules pktgen and xen-netfront
  bench --xen --from 10.7.0.2 --to 10.7.0.9

  # both ends ours, on an emulated host: each in a terminal
  barevif host
  bench recv --back --dom 2
  bench send --secs 8

  # by hand, the backend domain watching
  guest$ bench send --xen --secs 8
  dom0$  bench count --if vif1.0 --dir rx --way ours --what send >>lines
  dom0$  bench table <lines`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return x.run(cmd) },
	}
	x.register(cmd)
	for _, add := range []func(*cli.Program) *cobra.Command{
		sendCommand, recvCommand, pingCommand, streamSendCommand, streamRecvCommand,
		pktgenCommand, udpSendCommand, udpRecvCommand,
		packetSendCommand, packetRecvCommand, tcpSendCommand, tcpRecvCommand,
		pingSocketCommand, countCommand, tableCommand,
	} {
		cmd.AddCommand(add(p))
	}
	return cmd
}

// A result is the JSON line of one measurement: What was done, and the Way to do it.
type result struct {
	What    string  `json:"what"`
	Way     string  `json:"way"`
	Seconds float64 `json:"seconds"`
	Frames  uint64  `json:"frames,omitempty"`
	Bytes   uint64  `json:"bytes,omitempty"`

	// Round trips, in microseconds.
	Median float64 `json:"median_us,omitempty"`
	P99    float64 `json:"p99_us,omitempty"`
	Lost   int     `json:"lost,omitempty"`

	// Cards of ours: events sent to the other end and received from it.
	Notified uint64 `json:"notified,omitempty"`
	Woken    uint64 `json:"woken,omitempty"`

	// Backends of ours: grant copies.
	GrantOps uint64 `json:"grant_ops,omitempty"`
}

// A piece is what one command of bench measures. Each uses some of the fields, which are its
// flags.
type piece struct {
	*cli.Program
	what, way string // names in the result line
	secs      float64

	card                card
	frame               udpFrame
	iface, dir          string
	port                uint16
	count, clone, batch int
}

// newCommand makes the command of a piece; run moves the traffic.
func newCommand(p *cli.Program, use, short, what, way string, run func(*piece, context.Context, time.Duration) (result, error), flags func(*piece, *cobra.Command)) *cobra.Command {
	b := &piece{Program: p}
	cmd := &cobra.Command{
		Use: use, Short: short, Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			window, err := b.window()
			if err != nil {
				return err
			}
			r, err := run(b, cmd.Context(), window)
			if err != nil {
				return err
			}
			r.What, r.Way = b.what, b.way
			return json.NewEncoder(b.Stdout).Encode(r)
		},
	}
	cmd.Flags().StringVar(&b.what, "what", what, "`name` of the traffic, in the line printed")
	cmd.Flags().StringVar(&b.way, "way", way, "`name` of how it is moved, in the line printed")
	cmd.Flags().Float64Var(&b.secs, "secs", 5, "`seconds` to measure")
	flags(b, cmd)
	return cmd
}

// window returns how long to measure, from --secs.
func (b *piece) window() (time.Duration, error) {
	if !(b.secs > 0 && b.secs <= 86400) {
		return 0, cli.BadValue("secs", fmt.Sprint(b.secs), "a number of seconds")
	}
	return time.Duration(b.secs * float64(time.Second)), nil
}

// begun tells the script that runs the command that it sends, or is ready to receive.
func (b *piece) begun(what string) { b.Note("bench: %s", what) }

// udpFrame is the frame that the bench commands send: IPv4 and UDP to the discard port,
// with valid checksums.
type udpFrame struct {
	size         int
	from, to     string
	dstMAC       string
	fromIP, toIP netip.Addr
	dst          net.HardwareAddr
}

// xenBackendMAC is the address that Xen's hotplug scripts and netback give to the
// backend's interface.
const xenBackendMAC = "fe:ff:ff:ff:ff:ff"

func (f *udpFrame) register(cmd *cobra.Command) {
	cmd.Flags().IntVar(&f.size, "size", 106, "`bytes` of a frame, Ethernet header included")
	cmd.Flags().StringVar(&f.from, "from", "10.9.0.2", "source `address`, IPv4")
	cmd.Flags().StringVar(&f.to, "to", "10.9.0.9", "destination `address`, IPv4: nobody's, so that the other end's kernel drops it early")
	cmd.Flags().StringVar(&f.dstMAC, "dst-mac", xenBackendMAC, "destination `MAC` address")
}

const (
	ipHeaders   = 14 + 20       // Ethernet, IPv4
	headersLen  = ipHeaders + 8 // and UDP
	discardPort = 9
)

func (f *udpFrame) parse() (err error) {
	if f.fromIP, err = parseIPv4("from", f.from); err != nil {
		return err
	}
	if f.toIP, err = parseIPv4("to", f.to); err != nil {
		return err
	}
	if f.dst, err = net.ParseMAC(f.dstMAC); err != nil || len(f.dst) != 6 {
		return cli.BadValue("dst-mac", f.dstMAC, "an Ethernet address")
	}
	if f.size < headersLen+16 || f.size > 1514 {
		return cli.BadValue("size", fmt.Sprint(f.size), fmt.Sprintf("from %d to 1514 bytes", headersLen+16))
	}
	return nil
}

// parseIPv4 reads the value of a flag.
func parseIPv4(flag, value string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(value)
	if err != nil || !addr.Is4() {
		return addr, cli.BadValue(flag, value, "an IPv4 address")
	}
	return addr, nil
}

// payload returns the size of the UDP payload, in bytes.
func (f *udpFrame) payload() int { return f.size - headersLen }

// bytes returns the frame with the source MAC src. It has no UDP checksum, which UDP over
// IPv4 allows, because the payload may change.
func (f *udpFrame) bytes(src []byte) []byte {
	b := ipFrame(f.dst, src, f.fromIP.As4(), f.toIP.As4(), unix.IPPROTO_UDP, f.size-ipHeaders)
	udp := b[ipHeaders:]
	binary.BigEndian.PutUint16(udp, discardPort)
	binary.BigEndian.PutUint16(udp[2:], discardPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	for i := range b[headersLen:] {
		b[headersLen+i] = byte(i)
	}
	return b
}

// ipFrame returns a frame with the headers of Ethernet and IPv4, and room for size bytes.
func ipFrame(dst, src []byte, from, to [4]byte, protocol byte, size int) []byte {
	b := make([]byte, ipHeaders+size)
	copy(b, dst)
	copy(b[6:], src)
	binary.BigEndian.PutUint16(b[12:], 0x0800)
	ip := b[14:ipHeaders]
	ip[0], ip[8], ip[9] = 0x45, 64, protocol
	binary.BigEndian.PutUint16(ip[2:], uint16(len(b)-14))
	copy(ip[12:], from[:])
	copy(ip[16:], to[:])
	binary.BigEndian.PutUint16(ip[10:], packet.Checksum(ip))
	return b
}

// stopwatch tells a loop when its time is over, without a clock reading per iteration.
type stopwatch struct {
	began time.Time
	over  chan struct{}
	timer *time.Timer
}

func startWatch(d time.Duration) *stopwatch {
	w := &stopwatch{began: time.Now(), over: make(chan struct{})}
	w.timer = time.AfterFunc(d, func() { close(w.over) })
	return w
}

func (w *stopwatch) stop() float64 {
	w.timer.Stop()
	return time.Since(w.began).Seconds()
}

// running reports whether there is time left. The error is the cause if ctx has ended.
func (w *stopwatch) running(ctx context.Context) (bool, error) {
	select {
	case <-w.over:
		return false, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	default:
		return true, nil
	}
}

// parseWaitMode reads --wait.
func parseWaitMode(s string) (pvnet.WaitMode, error) {
	switch s {
	case "park":
		return pvnet.Park, nil
	case "adaptive":
		return pvnet.Adaptive, nil
	case "busy":
		return pvnet.Busy, nil
	}
	return 0, cli.BadValue("wait-mode", s, "park, adaptive or busy")
}

// errNothing is the error of a measurement without any traffic.
var errNothing = errors.New("nothing was moved")

// dialRefused adds advice to the error of a connection to addr. other is the command that
// must run at the other end.
func dialRefused(err error, addr, other string) error {
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return cli.UnknownHost(dns)
	}
	return &cli.Advice{Err: fmt.Errorf("connect to %s: %w", addr, cli.Bare(err)), Next: fmt.Sprintf("is that its address, and does %q run there?", other)}
}
