package pvnet

import (
	"context"
	"errors"
	"runtime/debug"
	"sync"
)

// Listen calls fn with every frame that arrives, until Disconnect, when it returns nil, or
// until ctx ends, when it returns the cause of ctx. It blocks. fn runs concurrently for
// different queues, and in order within one. The frame is lent until fn returns, or for
// longer with [Frame.Retain]. Frames that arrive before Listen wait in the ring, and so do
// frames for which there is no buffer because fn retained them all.
//
// A second Listen, or one beside an owner of a receiving half, returns [ErrOwned]; one
// after Disconnect returns [ErrDisconnected]. It returns os.ErrDeadlineExceeded at the read
// deadline, and the [*PeerError] that ended the device.
func (d *Device) Listen(ctx context.Context, fn func(Frame)) error {
	return d.ListenBatch(ctx, func(frames []Frame) {
		for i := range frames {
			fn(frames[i])
		}
	})
}

// ListenBatch is Listen with up to 32 frames that arrived together in one call of fn. The
// slice and the frames are lent until fn returns.
func (d *Device) ListenBatch(ctx context.Context, fn func([]Frame)) error {
	if err := d.endError(); err != nil {
		return err
	}
	d.mu.Lock()
	taken := d.listening
	for _, rx := range d.rx {
		taken = taken || rx.owned.Load()
	}
	if !taken {
		d.listening = true
		for _, rx := range d.rx {
			rx.ending.Store(false)
		}
	}
	d.mu.Unlock()
	if taken {
		return ErrOwned
	}
	defer func() {
		d.mu.Lock()
		d.listening = false
		for _, rx := range d.rx {
			rx.ending.Store(false)
		}
		d.mu.Unlock()
	}()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		for _, rx := range d.rx {
			rx.interrupt()
		}
	})
	defer func() {
		if !stop() {
			<-stopped // else its interrupt could end the receive of a later Listen
		}
	}()
	var wg sync.WaitGroup
	errs := make([]error, len(d.rx))
	for i, rx := range d.rx {
		wg.Go(func() {
			errs[i] = rx.listen(fn)
			cancel(errs[i])
		})
	}
	wg.Wait()
	if err := d.violationError(); err != nil {
		return err
	}
	for _, err := range errs {
		if v, ok := errors.AsType[*PeerError](err); ok {
			return v // d.cause will be v too, but may not be set yet
		}
		if err != nil && err != errInterrupted && !errors.Is(err, ErrDisconnected) {
			return err
		}
	}
	if d.link.Load() == linkGone {
		return nil
	}
	return context.Cause(ctx)
}

// violationError returns the violation that ended the device, or nil.
func (d *Device) violationError() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := errors.AsType[*PeerError](d.cause); ok {
		return d.cause
	}
	return nil
}

func (rx *RX) listen(fn func([]Frame)) (err error) {
	debug.SetPanicOnFault(true)
	var frames [callBatch]Frame
	lent := 0 // of frames: how many fn has
	defer func() {
		if v := faultError(recover()); v != nil {
			releaseAll(frames[:lent])
			rx.abort()
			err = rx.dev.callError(v)
		}
	}()
	for {
		n, err := rx.Receive(frames[:])
		if err == ErrNoBuffers { // fn retains every buffer; new frames wait in the ring
			err = rx.AwaitBuffers()
			n = 0
		}
		if err != nil {
			return err
		}
		if n == 0 {
			continue
		}
		lent = n
		fn(frames[:n])
		lent = 0
		rx.Release(frames[:n])
		rx.flush()
	}
}

// abort ends a call that met a fault, if the fault came inside the gate: it gives back what the
// call had taken, and leaves the gate. No other caller may be using the half.
func (rx *RX) abort() {
	if rx.gate.occupied() {
		rx.eng.abort()
		rx.gate.leave()
	}
}
