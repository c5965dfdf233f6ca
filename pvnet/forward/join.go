package forward

import (
	"context"
	"fmt"
	"runtime"
	"sync"

	"barevif/pvnet"
)

// Receive owns the receiving halves of all queues of dev, for good, and calls fn with the
// frames that arrive, at most [Batch] of one queue at a time, until ctx ends (it returns the
// cause), the device is disconnected (nil, also if it was before) or a [*pvnet.PeerError] has ended it, or fn returns
// an error, which it returns. It blocks.
//
// fn takes over all frames; the slice is lent until it returns. It runs concurrently for
// different queues, and in order within one. It returns how many of the frames it did not pass
// on, which Receive has the device count as undelivered. After a full batch Receive lets others
// run, so that many receivers in few threads take turns batch by batch.
//
// While all pages that a queue receives into are held by fn, or by those it gave frames to,
// the frames that arrive wait in the ring. Whoever releases one of them wakes the receiver.
func Receive(ctx context.Context, dev *pvnet.Device, fn func(queue int, frames []pvnet.Frame) (lost int, err error)) error {
	rxs, err := ownAll(dev)
	if err != nil {
		return unlessOrderly(err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() {
		for _, rx := range rxs {
			rx.SetDeadline(past)
		}
	})
	defer stop()
	var wg sync.WaitGroup
	for i, rx := range rxs {
		wg.Go(func() {
			cancel(receiveQueue(ctx, rx, func(frames []pvnet.Frame) (int, error) { return fn(i, frames) }))
		})
	}
	wg.Wait()
	return unlessOrderly(context.Cause(ctx))
}

// ownAll owns the receiving halves of all queues of dev.
func ownAll(dev *pvnet.Device) (rxs []*pvnet.RX, err error) {
	rxs = make([]*pvnet.RX, dev.Queues())
	for i := range rxs {
		if rxs[i], err = dev.OwnRX(i); err != nil {
			return nil, fmt.Errorf("forward: receive queue %d of vif %s: %w", i, dev.ID(), err)
		}
	}
	return rxs, nil
}

// unlessOrderly returns err, or nil for the orderly end of a device.
func unlessOrderly(err error) error {
	if pvnet.Orderly(err) {
		return nil
	}
	return err
}

// receiveQueue gives fn what rx receives until ctx ends, or rx or fn return an error.
func receiveQueue(ctx context.Context, rx *pvnet.RX, fn func([]pvnet.Frame) (int, error)) error {
	var frames [Batch]pvnet.Frame
	undelivered := uint64(0) // frames lost that the device has not counted yet
	defer func() {
		if undelivered > 0 {
			rx.CountUndelivered(undelivered) // a device that has ended counts nothing
		}
	}()
	for ctx.Err() == nil {
		n, err := rx.Receive(frames[:])
		if err == pvnet.ErrNoBuffers {
			if err = rx.AwaitBuffers(); err == nil {
				continue
			}
		}
		if err != nil {
			return err
		}
		lost, err := fn(frames[:n])
		undelivered += uint64(lost)
		if undelivered > 0 && rx.CountUndelivered(undelivered) == nil {
			undelivered = 0
		}
		if err != nil {
			return err
		}
		if n == len(frames) {
			runtime.Gosched()
		}
	}
	return context.Cause(ctx)
}

// Join moves frames between two vifs of this process, both ways, over all their queues, until
// ctx ends (it returns the cause), one of the devices is disconnected (nil, also if it was
// before), or a [*pvnet.PeerError] has ended one. It blocks.
//
// A vif that takes frames more slowly than the other's end sends them makes that wait
// ([Wait]): the frames stay in its ring. So nothing is lost but what does not fit the MTU,
// what contradicts its headers, and what a frontend that has stopped does not take
// ([pvnet.ServeConfig].DrainTimeout). While the link of one is down, the frames of the other
// wait too.
//
// Join becomes the owner of both devices, for good. It disconnects neither. For counters, make
// the two [Sender]s and call [Receive].
func Join(ctx context.Context, a, b *pvnet.Device) error {
	if a == b {
		return fmt.Errorf("forward: vif %s cannot be joined to itself", a.ID())
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	toA, err := NewSender(a, Config{Full: Wait})
	if err != nil {
		return unlessOrderly(err)
	}
	defer toA.Close()
	toB, err := NewSender(b, Config{Full: Wait})
	if err != nil {
		return unlessOrderly(err)
	}
	defer toB.Close()
	fromA, err := toB.Input(NewSource(0))
	if err != nil {
		return unlessOrderly(err)
	}
	fromB, err := toA.Input(NewSource(0))
	if err != nil {
		return unlessOrderly(err)
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { // ends the calls of Send that wait
		defer close(closed)
		fromA.Close()
		fromB.Close()
	})
	var wg sync.WaitGroup
	move := func(from *pvnet.Device, to *Input) {
		err := Receive(ctx, from, func(_ int, frames []pvnet.Frame) (int, error) { return to.Send(frames) })
		if err == nil {
			err = pvnet.ErrDisconnected
		}
		cancel(err)
	}
	wg.Go(func() { move(a, fromA) })
	wg.Go(func() { move(b, fromB) })
	wg.Wait()
	if !stop() {
		<-closed
	}
	return unlessOrderly(context.Cause(ctx))
}
