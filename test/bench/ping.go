package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"barevif/pvnet"
	"barevif/tools/cli"
	"barevif/tools/ping"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func pingCommand(p *cli.Program) *cobra.Command {
	return newCommand(p, "ping", "Measure round trips through a card of ours to a kernel that answers", "round trip", "ours", (*piece).ping,
		func(b *piece, cmd *cobra.Command) {
			b.card.register(cmd, p)
			cmd.Flags().StringVar(&b.frame.from, "from", "10.9.0.2", "our `address`, IPv4")
			b.echoFlags(cmd, "`address` that answers, IPv4, on the same network")
		})
}

func (b *piece) echoFlags(cmd *cobra.Command, to string) {
	cmd.Flags().StringVar(&b.frame.to, "to", "10.9.0.1", to)
	cmd.Flags().IntVar(&b.count, "count", 500, "`echoes` to ask for, within --secs")
}

// echoes checks the flags of echoFlags, and returns who answers.
func (b *piece) echoes() (to netip.Addr, err error) {
	if to, err = parseIPv4("to", b.frame.to); err == nil && b.count < 1 {
		err = cli.BadValue("count", fmt.Sprint(b.count), "a number from 1 on")
	}
	return to, err
}

func (b *piece) ping(ctx context.Context, window time.Duration) (r result, err error) {
	from, err := parseIPv4("from", b.frame.from)
	if err != nil {
		return r, err
	}
	to, err := b.echoes()
	if err != nil {
		return r, err
	}
	return b.card.measure(ctx, func(ctx context.Context, dev *pvnet.Device) (result, error) {
		e, err := newEcho(dev, from.As4(), to.As4())
		if err != nil {
			return result{}, err
		}
		defer context.AfterFunc(ctx, func() {
			e.rx.SetDeadline(time.Unix(1, 0))
			e.tx.SetDeadline(time.Unix(1, 0))
		})()
		if err := e.resolve(time.Now().Add(b.card.wait)); err != nil {
			return result{}, fmt.Errorf("ask for the address of %s: %w", to, errors.Join(err, context.Cause(ctx)))
		}
		b.begun("pinging")
		return roundTrips(ctx, b.count, window, e.ping)
	})
}

// echoTimeout is the time after which an echo counts as lost.
const echoTimeout = time.Second

// roundTrips calls ping until it has count round trips, or the window is over.
func roundTrips(ctx context.Context, count int, window time.Duration, ping func(seq uint16) (time.Duration, error)) (r result, err error) {
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

// ping asks with a frame of 98 bytes, that of ping's default payload.
func (e *echo) ping(seq uint16) (time.Duration, error) {
	ask, err := ping.Request(seq)
	if err != nil {
		return 0, err
	}
	b := ipFrame(e.far[:], e.own[:], e.from, e.to, unix.IPPROTO_ICMP, len(ask))
	copy(b[ipHeaders:], ask)
	began := time.Now()
	if err := e.send(b); err != nil {
		return 0, err
	}
	_, err = e.await(began.Add(echoTimeout), func(got []byte) bool {
		return len(got) >= len(b) && got[12] == 8 && got[13] == 0 && got[23] == unix.IPPROTO_ICMP &&
			ping.IsReply(got[ipHeaders:len(b)], seq)
	})
	return time.Since(began), err
}
