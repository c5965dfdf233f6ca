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

func streamSendCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "stream-send", "Send a stream through a card of ours, with TCP/IP of its own", "stream", "ours", (*piece).streamSend,
		func(b *piece, cmd *cobra.Command) {
			b.streamFlags(cmd)
			cmd.Flags().StringVar(&b.frame.to, "to", "10.9.0.1", "`address` to connect to")
		})
}

func streamRecvCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "stream-recv", "Receive one stream from a card of ours, with TCP/IP of its own, to its end", "stream", "ours", (*piece).streamRecv,
		(*piece).streamFlags)
}

func (b *piece) streamFlags(cmd *cobra.Command) {
	b.card.register(cmd, b.Program)
	cmd.Flags().StringVar(&b.frame.from, "from", "10.9.0.2/24", "our `address` and its network")
	b.portFlag(cmd)
}

func (b *piece) streamSend(ctx context.Context, window time.Duration) (result, error) {
	return b.onStack(ctx, func(ctx context.Context, st *netstack.Stack) (result, error) {
		c, err := st.DialContext(ctx, "tcp", net.JoinHostPort(b.frame.to, strconv.Itoa(int(b.port))))
		if err != nil {
			return result{}, err
		}
		return b.sendStream(ctx, window, c)
	})
}

func (b *piece) streamRecv(ctx context.Context, window time.Duration) (result, error) {
	return b.onStack(ctx, func(ctx context.Context, st *netstack.Stack) (result, error) {
		l, err := st.Listen("tcp", ":"+strconv.Itoa(int(b.port)))
		if err != nil {
			return result{}, err
		}
		return b.recvStream(ctx, window, l)
	})
}

// onStack calls run with a gVisor stack on a card of ours.
func (b *piece) onStack(ctx context.Context, run func(context.Context, *netstack.Stack) (result, error)) (result, error) {
	own, err := netip.ParsePrefix(b.frame.from)
	if err != nil {
		return result{}, cli.BadValue("from", b.frame.from, "an address and a network, such as 10.9.0.2/24")
	}
	b.card.offload = true
	return b.card.measure(ctx, func(ctx context.Context, dev *pvnet.Device) (result, error) {
		st, err := netstack.New(dev, netstack.Config{Addr: own})
		if err != nil {
			return result{}, err
		}
		defer st.Close()
		before := dev.Stats()
		r, err := run(ctx, st)
		return withEvents(r, before, dev.Stats()), err
	})
}
