package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/tools/cli"

	"github.com/spf13/cobra"
)

// maxBatch is more than a ring has room for.
const maxBatch = 256

func sendCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "send", "Send frames through a card of ours", "send", "ours", (*piece).send, func(b *piece, cmd *cobra.Command) {
		b.card.register(cmd, p)
		b.frame.register(cmd)
		cmd.Flags().IntVar(&b.batch, "batch", 32, "`frames` to send at a time")
	})
}

func (b *piece) send(ctx context.Context, window time.Duration) (result, error) {
	if err := b.frame.parse(); err != nil {
		return result{}, err
	}
	if b.batch < 1 || b.batch > maxBatch {
		return result{}, cli.BadValue("batch", fmt.Sprint(b.batch), fmt.Sprintf("a number from 1 to %d", maxBatch))
	}
	return b.card.measure(ctx, func(ctx context.Context, dev *pvnet.Device) (result, error) {
		b.begun("sending")
		return sendFrames(ctx, dev, &b.frame, b.batch, window)
	})
}

// sendFrames sends for window and copies each frame into its page. Of the frames it counts,
// up to a ring full may not have reached the peer.
func sendFrames(ctx context.Context, dev *pvnet.Device, f *udpFrame, batch int, window time.Duration) (result, error) {
	tx, err := dev.OwnTX(0)
	if err != nil {
		return result{}, err
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
		return result{}, context.Cause(ctx)
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return result{}, err
	}
	if seq == 0 {
		return result{}, errNothing
	}
	r := result{Seconds: w.stop(), Frames: seq, Bytes: seq * uint64(len(data))}
	return withEvents(r, before, dev.Stats()), nil
}

// withEvents adds to r how often each end notified the other, and the grant operations.
func withEvents(r result, before, after telemetry.Stats) result {
	count := func(st telemetry.Stats, c telemetry.Counter) uint64 { return st.RX.Get(c) + st.TX.Get(c) }
	r.Notified = count(after, telemetry.NotifiesSent) - count(before, telemetry.NotifiesSent)
	r.GrantOps = count(after, telemetry.GrantOps) - count(before, telemetry.GrantOps)
	r.Woken = count(after, telemetry.Events) - count(before, telemetry.Events)
	return r
}

func recvCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "recv", "Receive frames from a card of ours", "receive", "ours", (*piece).recv,
		func(b *piece, cmd *cobra.Command) { b.card.register(cmd, p) })
}

func (b *piece) recv(ctx context.Context, window time.Duration) (result, error) {
	return b.card.measure(ctx, func(ctx context.Context, dev *pvnet.Device) (result, error) {
		return b.recvFrames(ctx, dev, window)
	})
}

// recvFrames counts the frames of a window that begins with the first frame.
func (b *piece) recvFrames(ctx context.Context, dev *pvnet.Device, window time.Duration) (r result, err error) {
	rx, err := dev.OwnRX(0)
	if err != nil {
		return r, err
	}
	defer context.AfterFunc(ctx, func() { rx.SetDeadline(time.Unix(1, 0)) })()
	frames := make([]pvnet.Frame, 64)
	b.begun("receiving")
	rx.SetDeadline(time.Now().Add(b.card.wait))
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
