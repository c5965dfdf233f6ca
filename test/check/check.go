// Command check finds out whether datagrams arrive as they were sent. See its --help.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"barevif/tools/appliance"
	"barevif/tools/cli"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
)

func main() { cli.Main(command) }

func command(p *cli.Program) *cobra.Command {
	c := check{Program: p}
	cmd := &cobra.Command{
		Use:   "check ADDRESS",
		Short: "Find out whether datagrams of every size arrive as they were sent",
		Long: `check sends UDP datagrams of every size through this machine's own network, each with a
number and bytes that follow from it. The other end compares each with what it
should be and answers with one of the same size, which check compares too.

The other end is "barevif serve --check", or this command with --answer, which
answers until a signal ends it. Datagrams go one small batch at a time, so that
few are lost where they have no rival; how many may be is for --lost to say. One
that is wrong, or comes twice, is a failure.

Where nothing answers it says so after a second, with what the kernel knows about
the address, and gives up after --silence.`,
		Example: `  barevif serve --check 7007
  check 10.9.0.2

  other$ check --answer
  check --sizes 1-8972:61,8972 --lost 0 10.9.0.1`,
		Args: cli.Arguments(1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.run(cmd.Context(), args) },
	}
	cmd.Flags().BoolVar(&c.answer, "answer", false, "be the other end")
	cmd.Flags().Uint16Var(&c.port, "port", appliance.DatagramPort, "UDP `port` to ask or to answer at")
	cmd.Flags().StringVar(&c.sizes, "sizes", "1-1472", "`sizes` in bytes: SIZE, FROM-TO or FROM-TO:STEP, and more of them after commas")
	cmd.Flags().Float64Var(&c.lost, "lost", 1, "`percent` that may be lost")
	cmd.Flags().DurationVar(&c.patience, "patience", 2*time.Second, "`time` after which what has not come is lost")
	cmd.Flags().DurationVar(&c.silence, "silence", 5*time.Second, "`time` after which to give up if nothing was answered yet")
	cli.Exclusive(cmd, "answer", "silence")
	cli.Exclusive(cmd, "answer", "sizes")
	cli.Exclusive(cmd, "answer", "lost")
	cli.Exclusive(cmd, "answer", "patience")
	return cmd
}

type check struct {
	*cli.Program
	answer   bool
	port     uint16
	sizes    string
	lost     float64
	patience time.Duration
	silence  time.Duration
}

func (c *check) run(ctx context.Context, args []string) error {
	if c.port == 0 {
		return cli.BadValue("port", "0", "a port from 1 to 65535")
	}
	port := strconv.Itoa(int(c.port))
	if c.answer {
		host := ""
		if len(args) > 0 {
			host = args[0]
		}
		return c.answers(ctx, net.JoinHostPort(host, port))
	}
	if len(args) == 0 {
		return &cli.Advice{Err: errors.New("whom to ask?"), Next: `give an address, or --answer to be the other end`, Usage: true}
	}
	sizes, err := parseSizes(c.sizes)
	if err != nil {
		return err
	}
	if !(c.lost >= 0 && c.lost <= 100) {
		return cli.BadValue("lost", fmt.Sprint(c.lost), "a percentage")
	}
	if c.patience <= 0 {
		return cli.BadValue("patience", c.patience.String(), "a time to wait")
	}
	if c.silence <= 0 {
		return cli.BadValue("silence", c.silence.String(), "a time to wait")
	}
	return c.ask(ctx, net.JoinHostPort(args[0], port), sizes)
}

func (c *check) answers(ctx context.Context, addr string) error {
	pc, err := net.ListenPacket("udp", addr)
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return cli.UnknownHost(dns)
	}
	if err != nil {
		return cli.ListenRefused(err, addr, "port")
	}
	defer context.AfterFunc(ctx, func() { pc.Close() })()
	c.Say("answering at %s; a signal ends it", pc.LocalAddr())
	if err := appliance.Answer(pc); ctx.Err() == nil {
		return err
	}
	return nil
}

func (c *check) ask(ctx context.Context, addr string, sizes []int) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "udp", addr)
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return cli.UnknownHost(dns)
	}
	if err != nil {
		return c.unreachable(err, addr)
	}
	defer conn.Close()
	began := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	heard := c.hear(ctx, conn, cancel)
	t, err := appliance.Ask(ctx, heard, sizes, c.patience)
	heard.stop()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return c.unreachable(err, addr)
	}
	fmt.Fprintf(c.Stdout, "%d datagrams, %s each way in %s: %d lost, %d wrong\n",
		t.Asked, cli.BinarySize(uint64(t.Bytes)), time.Since(began).Round(time.Millisecond), t.Lost(), t.Wrong)
	switch {
	case t.What != nil:
		return t.What
	case float64(t.Lost()) > c.lost/100*float64(t.Asked):
		return fmt.Errorf("%d of %d datagrams are lost", t.Lost(), t.Asked)
	}
	return nil
}

// A hearing is a socket that notes the first answer.
type hearing struct {
	net.Conn
	ctx      context.Context
	answered chan struct{} // closed with the first answer
	once     sync.Once
	waiting  sync.WaitGroup
}

// hear watches conn. If there is no answer, it says so after a second, and calls giveUp
// after c.silence. The caller calls stop.
func (c *check) hear(ctx context.Context, conn net.Conn, giveUp context.CancelCauseFunc) *hearing {
	h := &hearing{Conn: conn, ctx: ctx, answered: make(chan struct{})}
	h.waiting.Go(func() {
		// One timer, so that the word comes first however late this goroutine runs.
		word := min(time.Second, c.silence)
		rest := c.silence - word
		timer := time.NewTimer(word)
		defer timer.Stop()
		for {
			select {
			case <-timer.C:
				if rest > 0 {
					c.Note("check: no answer yet: %s; giving up after %v", neighbour(conn.RemoteAddr()), c.silence)
					timer.Reset(rest)
					rest = 0
					continue
				}
				giveUp(&silentError{fmt.Sprintf("nothing was answered within %v: %s", c.silence, neighbour(conn.RemoteAddr()))})
				conn.SetDeadline(time.Unix(1, 0)) // a write can wait, too
				return
			case <-h.answered:
				return
			case <-ctx.Done():
				conn.SetDeadline(time.Unix(1, 0)) // a write can wait, too
				return
			}
		}
	})
	return h
}

// stop ends the watching.
func (h *hearing) stop() {
	h.heard()
	h.waiting.Wait()
}

func (h *hearing) heard() { h.once.Do(func() { close(h.answered) }) }

func (h *hearing) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	if err == nil {
		h.heard()
	}
	return n, err
}

// SetReadDeadline leaves the deadline in the past once the context has ended, so that no
// further read waits.
func (h *hearing) SetReadDeadline(t time.Time) error {
	err := h.Conn.SetReadDeadline(t)
	if err == nil && h.ctx.Err() != nil {
		err = h.Conn.SetReadDeadline(time.Unix(1, 0))
	}
	return err
}

// A silentError says that there was no answer at all.
type silentError struct{ text string }

func (e *silentError) Error() string { return e.text }

// unreachable adds advice to the error of another end that does not answer.
func (c *check) unreachable(err error, addr string) error {
	const answers = `"barevif serve --check", or "check --answer"`
	if _, ok := errors.AsType[*silentError](err); ok {
		return &cli.Advice{Err: err, Next: "is that its address, and does it answer there? " + answers + "; --silence waits longer"}
	}
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, syscall.ECONNREFUSED):
		return &cli.Advice{Err: fmt.Errorf("nothing answers at port %d of %s", c.port, strings.TrimSuffix(addr, ":"+strconv.Itoa(int(c.port)))),
			Next: "does it run there, at this --port? " + answers}
	case errors.Is(err, syscall.EHOSTUNREACH):
		why := cli.Bare(err).Error()
		if udp, err := net.ResolveUDPAddr("udp", addr); err == nil {
			why = neighbour(udp)
		}
		return &cli.Advice{Err: fmt.Errorf("%s cannot be reached: %s", addr, why), Next: "is that its address, and does it answer there? " + answers}
	case errors.Is(err, syscall.ENETUNREACH):
		return &cli.Advice{Err: fmt.Errorf("there is no way to %s: %w", addr, cli.Bare(err)), Next: `"ip route get ADDRESS" says which way it would take`}
	case errors.Is(err, syscall.EMSGSIZE):
		return &cli.Advice{Err: fmt.Errorf("a datagram is too long for the way to %s", addr), Next: "choose smaller --sizes"}
	}
	return &cli.Advice{Err: fmt.Errorf("ask %s: %w", addr, cli.Bare(err)), Next: "-v may say more, and so may ping"}
}

// neighbour describes what the kernel knows of the next hop to an address.
func neighbour(addr net.Addr) string {
	const unknown = "the kernel knows a way to it, and nothing comes back"
	udp, ok := addr.(*net.UDPAddr)
	if !ok {
		return unknown
	}
	routes, err := netlink.RouteGet(udp.IP)
	if err != nil || len(routes) == 0 {
		return unknown
	}
	hop, way := udp.IP, routes[0]
	if way.Gw != nil {
		hop = way.Gw
	}
	card, err := net.InterfaceByIndex(way.LinkIndex)
	if err != nil || card.Flags&net.FlagLoopback != 0 {
		return unknown
	}
	known, err := netlink.NeighList(way.LinkIndex, 0)
	if err != nil {
		return unknown
	}
	for _, n := range known {
		if n.IP.Equal(hop) && n.State&(netlink.NUD_INCOMPLETE|netlink.NUD_FAILED|netlink.NUD_PROBE) == 0 {
			return fmt.Sprintf("%s is a station on %s, and does not answer", hop, card.Name)
		}
	}
	return fmt.Sprintf("no station on %s says that it is %s (ARP, or neighbour discovery)", card.Name, hop)
}

// maxAsked bounds how many datagrams one command sends.
const maxAsked = 10_000_000

// parseSizes reads --sizes.
func parseSizes(s string) (sizes []int, err error) {
	const want = "SIZE, FROM-TO or FROM-TO:STEP from 1 to 65507, and more of them after commas"
	for part := range strings.SplitSeq(s, ",") {
		span, step, stepped := strings.Cut(part, ":")
		from, to, two := strings.Cut(span, "-")
		if !two {
			to = from
		}
		if !stepped {
			step = "1"
		}
		var n [3]int
		for i, text := range [...]string{from, to, step} {
			v, err := strconv.ParseUint(text, 10, 16)
			if err != nil || v == 0 || v > appliance.MaxDatagram {
				return nil, cli.BadValue("sizes", s, want)
			}
			n[i] = int(v)
		}
		if n[0] > n[1] || stepped && !two || len(sizes) > maxAsked {
			return nil, cli.BadValue("sizes", s, want)
		}
		for size := n[0]; size <= n[1]; size += n[2] {
			sizes = append(sizes, size)
		}
	}
	return sizes, nil
}
