package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"

	"barevif/tools/internal/appliance"

	"github.com/spf13/cobra"
)

// checkPort is where datagrams are asked for unless something else is said.
const checkPort = 7007

func checkCommand(p *program) *cobra.Command {
	c := check{program: p}
	cmd := &cobra.Command{
		Use:   "check ADDRESS",
		Short: "Find out whether datagrams of every size arrive as they were sent",
		Long: `check sends UDP datagrams of every size through this machine's own network, each with a
number and bytes that follow from it. The other end compares each with what it
should be and answers with one of the same size, which check compares too.

The other end is "barevif serve --check", or this command with --answer, which
answers until a signal ends it. Datagrams go one small batch at a time, so that
few are lost where they have no rival; how many may be is for --lost to say. One
that is wrong, or comes twice, is a failure.`,
		Example: `  barevif serve --check 7007
  barevif check 10.9.0.2

  other$ barevif check --answer
  barevif check --sizes 1-8972:61,8972 --lost 0 10.9.0.1`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.run(cmd.Context(), args) },
	}
	cmd.Flags().BoolVar(&c.answer, "answer", false, "be the other end")
	cmd.Flags().Uint16Var(&c.port, "port", checkPort, "UDP `port` to ask or to answer at")
	cmd.Flags().StringVar(&c.sizes, "sizes", "1-1472", "`sizes` in bytes: SIZE, FROM-TO or FROM-TO:STEP, and more of them after commas")
	cmd.Flags().Float64Var(&c.lost, "lost", 1, "`percent` that may be lost")
	cmd.Flags().DurationVar(&c.patience, "patience", 2*time.Second, "`time` after which what has not come is lost")
	cmd.MarkFlagsMutuallyExclusive("answer", "sizes")
	cmd.MarkFlagsMutuallyExclusive("answer", "lost")
	cmd.MarkFlagsMutuallyExclusive("answer", "patience")
	return cmd
}

type check struct {
	*program
	answer   bool
	port     uint16
	sizes    string
	lost     float64
	patience time.Duration
}

func (c *check) run(ctx context.Context, args []string) error {
	if c.port == 0 {
		return badValue("port", "0", "a port from 1 to 65535")
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
		return &advice{err: errors.New("whom to ask?"), next: `give an address, or --answer to be the other end`, usage: true}
	}
	sizes, err := parseSizes(c.sizes)
	if err != nil {
		return err
	}
	if !(c.lost >= 0 && c.lost <= 100) {
		return badValue("lost", fmt.Sprint(c.lost), "a percentage")
	}
	if c.patience <= 0 {
		return badValue("patience", c.patience.String(), "a time to wait")
	}
	return c.ask(ctx, net.JoinHostPort(args[0], port), sizes)
}

func (c *check) answers(ctx context.Context, addr string) error {
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { pc.Close() })()
	fmt.Fprintf(c.stdout, "answering at %s; a signal ends it\n", pc.LocalAddr())
	if err := appliance.Answer(pc); ctx.Err() == nil {
		return err
	}
	return nil
}

func (c *check) ask(ctx context.Context, addr string, sizes []int) error {
	conn, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	began := time.Now()
	t, err := appliance.Ask(ctx, conn, sizes, c.patience)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return &advice{err: err, next: `does it run there? "barevif serve --check", or "barevif check --answer"`}
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "%d datagrams, %s each way in %s: %d lost, %d wrong\n",
		t.Asked, binarySize(uint64(t.Bytes)), time.Since(began).Round(time.Millisecond), t.Lost(), t.Wrong)
	switch {
	case t.What != nil:
		return t.What
	case float64(t.Lost()) > c.lost/100*float64(t.Asked):
		return fmt.Errorf("%d of %d datagrams are lost", t.Lost(), t.Asked)
	}
	return nil
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
				return nil, badValue("sizes", s, want)
			}
			n[i] = int(v)
		}
		if n[0] > n[1] || stepped && !two || len(sizes) > maxAsked {
			return nil, badValue("sizes", s, want)
		}
		for size := n[0]; size <= n[1]; size += n[2] {
			sizes = append(sizes, size)
		}
	}
	return sizes, nil
}
