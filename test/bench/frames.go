package main

import (
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/tools/cli"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
)

// maxBatch is more than a ring has room for.
const maxBatch = 256

type sender struct {
	piece
	card  card
	frame udpFrame
	batch int
}

func sendCommand(p *cli.Program) *cobra.Command {
	s := &sender{piece: piece{Program: p}}
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

func (s *sender) run(ctx context.Context) error {
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

// withEvents adds to r how often each end notified the other.
func withEvents(r result, before, after telemetry.Stats) result {
	count := func(st telemetry.Stats, c telemetry.Counter) uint64 { return st.RX.Get(c) + st.TX.Get(c) }
	r.Notified = count(after, telemetry.NotifiesSent) - count(before, telemetry.NotifiesSent)
	r.Woken = count(after, telemetry.Events) - count(before, telemetry.Events)
	return r
}

type receiver struct {
	piece
	card card
}

func recvCommand(p *cli.Program) *cobra.Command {
	s := &receiver{piece: piece{Program: p}}
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

func (s *receiver) run(ctx context.Context) error {
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
func (s *receiver) recvFrames(ctx context.Context, dev *pvnet.Device, window time.Duration) (r result, err error) {
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
