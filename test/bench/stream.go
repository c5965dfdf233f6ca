package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/netstack"
	"barevif/tools/cli"

	"github.com/spf13/cobra"
)

// streamPort is the default port, that of iperf3.
const streamPort = 5201

// streamBuffer is the size of each write and read, in bytes.
const streamBuffer = 128 << 10

// sendStream writes to c for window, and waits until the receiver has everything before it
// closes c: a stack of our own ends with the process.
func (b *piece) sendStream(ctx context.Context, window time.Duration, c net.Conn) (r result, err error) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	b.begun("sending")
	buf := make([]byte, streamBuffer)
	w := startWatch(window)
	for more := true; more; {
		n, err := c.Write(buf)
		r.Bytes += uint64(n)
		if err != nil {
			return r, errors.Join(err, context.Cause(ctx))
		}
		if more, err = w.running(ctx); err != nil {
			return r, err
		}
	}
	r.Seconds = w.stop()
	if err := c.SetDeadline(time.Now().Add(10*window + firstFrame)); err != nil {
		return r, err
	}
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		if err := half.CloseWrite(); err != nil {
			return r, err
		}
		_, err = io.Copy(io.Discard, c)
	}
	return r, err
}

// recvStream reads the first stream of l to its end, so that bytes in flight when the
// sender's time is over count at both ends. It closes l.
func (b *piece) recvStream(ctx context.Context, window time.Duration, l net.Listener) (r result, err error) {
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	late := time.AfterFunc(firstFrame, func() { l.Close() })
	b.begun("receiving")
	c, err := l.Accept()
	late.Stop()
	if err != nil {
		return r, fmt.Errorf("wait for the stream: %w", errors.Join(err, context.Cause(ctx)))
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	began := time.Now()
	if err := c.SetDeadline(began.Add(10*window + firstFrame)); err != nil {
		return r, err
	}
	buf := make([]byte, streamBuffer)
	for err != io.EOF {
		var n int
		n, err = c.Read(buf)
		r.Bytes += uint64(n)
		if err != nil && err != io.EOF {
			return r, errors.Join(err, context.Cause(ctx))
		}
	}
	r.Seconds = time.Since(began).Seconds()
	if r.Bytes == 0 {
		return r, errNothing
	}
	return r, nil
}

// A streamPiece is a TCP stream through a gVisor stack on a card of ours.
type streamPiece struct {
	piece
	card     card
	from, to string
	port     uint16
}

func streamSendCommand(p *cli.Program) *cobra.Command {
	return streamCommand(p, "stream-send", "Send a stream through a card of ours, with TCP/IP of its own", func(s *streamPiece, cmd *cobra.Command) {
		cmd.Flags().StringVar(&s.to, "to", "10.9.0.1", "`address` to connect to")
	}, func(s *streamPiece, ctx context.Context, window time.Duration, st *netstack.Stack) (result, error) {
		c, err := st.DialContext(ctx, "tcp", net.JoinHostPort(s.to, strconv.Itoa(int(s.port))))
		if err != nil {
			return result{}, err
		}
		return s.sendStream(ctx, window, c)
	})
}

func streamRecvCommand(p *cli.Program) *cobra.Command {
	return streamCommand(p, "stream-recv", "Receive one stream from a card of ours, with TCP/IP of its own, to its end",
		func(*streamPiece, *cobra.Command) {},
		func(s *streamPiece, ctx context.Context, window time.Duration, st *netstack.Stack) (result, error) {
			l, err := st.Listen("tcp", ":"+strconv.Itoa(int(s.port)))
			if err != nil {
				return result{}, err
			}
			return s.recvStream(ctx, window, l)
		})
}

// streamCommand makes a stream command; run moves the traffic.
func streamCommand(p *cli.Program, use, short string, flags func(*streamPiece, *cobra.Command), run func(*streamPiece, context.Context, time.Duration, *netstack.Stack) (result, error)) *cobra.Command {
	s := &streamPiece{piece: piece{Program: p}}
	cmd := &cobra.Command{
		Use: use, Short: short, Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			window, err := s.window()
			if err != nil {
				return err
			}
			own, err := netip.ParsePrefix(s.from)
			if err != nil {
				return cli.BadValue("from", s.from, "an address and a network, such as 10.9.0.2/24")
			}
			s.card.offload = true
			return s.card.run(cmd.Context(), func(ctx context.Context, dev *pvnet.Device) error {
				st, err := netstack.New(dev, netstack.Config{Addr: own})
				if err != nil {
					return err
				}
				defer st.Close()
				before := dev.Stats()
				r, err := run(s, ctx, window, st)
				if err != nil {
					return err
				}
				return s.print(withEvents(r, before, dev.Stats()))
			})
		},
	}
	s.registerRun(cmd, "stream", "ours")
	s.card.register(cmd, p)
	cmd.Flags().StringVar(&s.from, "from", "10.9.0.2/24", "our `address` and its network")
	cmd.Flags().Uint16Var(&s.port, "port", streamPort, "`port`")
	flags(s, cmd)
	return cmd
}
