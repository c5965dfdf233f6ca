package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet"
)

// Join forwards frames between a vif and a link, both ways, until ctx ends (it
// returns the cause), the device is disconnected (nil), or one of the two fails:
// [ErrGone], net.ErrClosed if the link was closed, or the [*pvnet.PeerError] that
// ended the device. It blocks.
//
// Join becomes the owner of the device's halves, for good, and of the link's
// deadlines until it returns. It closes neither. To see what it drops, use a
// [Joint].
func Join(ctx context.Context, dev *pvnet.Device, l Link) error {
	return new(Joint).Run(ctx, dev, l)
}

// A Joint is a vif joined to links. The zero Joint is ready to Run, once.
type Joint struct {
	toLink, fromLink, segments       atomic.Uint64
	unsent, oversize, uncut, refused atomic.Uint64
}

// JointStats counts frames.
type JointStats struct {
	ToLink   uint64 // written to a link
	FromLink uint64 // sent through the vif, segments counted one by one
	Segments uint64 // of FromLink, those cut here from a frame the kernel left whole

	Unsent   uint64 // dropped: a link was down, out of buffers, or did not take one of that size
	Oversize uint64 // dropped: beyond the vif's MTU
	Uncut    uint64 // dropped: of a kind that cannot be cut or completed here
	Refused  uint64 // dropped: the vif's other end does not take one of that size
}

// Stats may be called at any time.
func (j *Joint) Stats() JointStats {
	return JointStats{
		ToLink: j.toLink.Load(), FromLink: j.fromLink.Load(), Segments: j.segments.Load(),
		Unsent: j.unsent.Load(), Oversize: j.oversize.Load(),
		Uncut: j.uncut.Load(), Refused: j.refused.Load(),
	}
}

// Run is [Join] with a link per queue, such as [OpenTAPQueues] gives. Link i feeds
// queue i; a queue without a link of its own is written to one of the others.
//
// A frame longer than the vif's MTU and a tagged header is dropped, unless it is
// one the kernel left to be segmented: that is done here, in software. While the
// vif is down the links' frames wait in the kernel, which drops what it cannot
// hold.
func (j *Joint) Run(ctx context.Context, dev *pvnet.Device, links ...Link) error {
	if len(links) == 0 || len(links) > dev.Queues() {
		return fmt.Errorf("link: %d links for the %d queues of vif %s", len(links), dev.Queues(), dev.ID())
	}
	var txs []*pvnet.TX
	var rxs []*pvnet.RX
	for i := range dev.Queues() {
		rx, err := dev.OwnRX(i)
		if err != nil {
			return fmt.Errorf("link: receive queue %d: %w", i, err)
		}
		rxs = append(rxs, rx)
	}
	for i := range links {
		tx, err := dev.OwnTX(i)
		if err != nil {
			return fmt.Errorf("link: transmit queue %d: %w", i, err)
		}
		txs = append(txs, tx)
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		for _, l := range links {
			setDeadlines(l, past)
		}
		for _, rx := range rxs {
			rx.SetDeadline(past)
		}
		for _, tx := range txs {
			tx.SetDeadline(past)
		}
	})
	var wg sync.WaitGroup
	for i, l := range links {
		wg.Go(func() { cancel(j.fromLinkTo(ctx, l, dev, txs[i])) })
	}
	for i, rx := range rxs {
		wg.Go(func() { cancel(j.toLinkFrom(rx, links[i%len(links)])) })
	}
	wg.Wait()
	if !stop() {
		<-stopped
	}
	for _, l := range links {
		setDeadlines(l, time.Time{})
	}
	err := context.Cause(ctx)
	if _, broken := errors.AsType[*pvnet.PeerError](err); !broken && errors.Is(err, pvnet.ErrDisconnected) {
		return nil
	}
	return err
}

// errNone is what reading without waiting returns if there is nothing to read.
var errNone = errors.New("link: no frame")

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// quick is what the links of this package can do beyond [Link].
type quick interface {
	read(bufs [][]byte, wait bool) (n int, off Offload, err error)
	setWriteDeadline(t time.Time) error
}

// setDeadlines cannot fail but on a closed link, where nobody waits.
func setDeadlines(l Link, t time.Time) {
	_ = l.SetReadDeadline(t)
	if q, ok := l.(quick); ok {
		_ = q.setWriteDeadline(t)
	}
}

// batch is how many frames are moved between two notifications at most.
const batch = 32

// vifPieces is how many pieces a frame of a vif has at most.
const vifPieces = 18

// toLinkFrom writes what rx receives to l.
func (j *Joint) toLinkFrom(rx *pvnet.RX, l Link) error {
	var frames [batch]pvnet.Frame
	var bufs [vifPieces][]byte
	down := false
	for {
		n, err := rx.Receive(frames[:])
		if err != nil {
			return err
		}
		sent := uint64(0)
		for i := range frames[:n] {
			_, err = l.WriteFrame(Offload{}, pieces(&frames[i], bufs[:0]))
			switch {
			case err == nil:
				sent++
				down = false
				continue
			case err == ErrDown && !down:
				// The kernel tells whoever asks first, and once: have the
				// reader ask too.
				down = true
				_ = l.SetReadDeadline(past)
			case err == ErrGone || err == net.ErrClosed || errors.Is(err, os.ErrDeadlineExceeded):
				_ = rx.Release(frames[:n])
				return err
			}
			j.unsent.Add(1)
		}
		j.toLink.Add(sent)
		if err := rx.Release(frames[:n]); err != nil {
			return err
		}
	}
}

// pieces gathers the pieces of f in bufs.
func pieces(f *pvnet.Frame, bufs [][]byte) [][]byte {
	for p := range f.Pieces() {
		bufs = append(bufs, p)
	}
	return bufs
}

// A feeder moves frames from a link to a vif.
type feeder struct {
	j     *Joint
	dev   *pvnet.Device
	tx    *pvnet.TX
	l     Link
	quick quick // nil if l only reads one frame at a time

	// frames[:ready] are to be sent, frames[ready:n] empty, each of size bytes.
	frames   [batch]pvnet.Frame
	ready, n int
	size     int

	whole [MaxFrame]byte // behind what a frame has room for; or a frame to be cut
	bufs  [vifPieces + 1][]byte
	cut   segmenter
}

func (j *Joint) fromLinkTo(ctx context.Context, l Link, dev *pvnet.Device, tx *pvnet.TX) error {
	f := &feeder{j: j, dev: dev, tx: tx, l: l}
	f.quick, _ = l.(quick)
	defer f.release(0)
	for {
		err := f.fill()
		if flushErr := f.flush(); flushErr != nil {
			err = flushErr
		}
		switch {
		case err == nil, err == ErrNoBuffers:
		case errors.Is(err, os.ErrDeadlineExceeded):
			_ = l.SetReadDeadline(time.Time{})
			if ctx.Err() != nil {
				return err
			}
		case err == ErrDown:
			select {
			case <-ctx.Done():
				return err
			case <-time.After(downPause):
			}
		default:
			return err
		}
	}
}

// downPause is how long a link that is down is left alone. Only a packet socket
// has to be asked.
const downPause = 100 * time.Millisecond

// release gives back the frames from i on.
func (f *feeder) release(i int) {
	for k := i; k < f.n; k++ {
		_ = f.frames[k].Release() // it is stale if it was sent: nothing to give back
	}
	f.n = i
	f.ready = min(f.ready, i)
}

// fill waits for a frame of the link, and takes those that are there behind it.
func (f *feeder) fill() error {
	if size := f.dev.MTU() + 18; size != f.size {
		f.release(0)
		f.size = min(size, pvnet.MaxFrame)
	}
	for wait := true; ; wait = false {
		if f.ready == f.n {
			if !wait {
				return nil
			}
			n, err := f.tx.AllocWait(f.frames[:], f.size)
			if err != nil {
				return err
			}
			f.ready, f.n = 0, n
		}
		err := f.read(wait)
		if err == errNone || err == nil && f.quick == nil {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// read reads one frame of the link into frames[ready], and counts it as ready if
// it is to be sent.
func (f *feeder) read(wait bool) error {
	frame := &f.frames[f.ready]
	bufs := append(pieces(frame, f.bufs[:0]), f.whole[f.size:])
	var n int
	var off Offload
	var err error
	if f.quick != nil {
		n, off, err = f.quick.read(bufs, wait)
	} else {
		n, off, err = f.l.ReadFrame(bufs)
	}
	switch {
	case err == ErrTruncated:
		f.j.oversize.Add(1)
		return nil
	case err != nil:
		return err
	case off.GSO != GSONone:
		frame.CopyTo(f.whole[:min(n, f.size)])
		return f.segment(f.whole[:n], off)
	case n > f.size:
		f.j.oversize.Add(1)
		return nil
	case off.Complete(n, bufs) != nil || n < MinFrame:
		f.j.uncut.Add(1)
		return nil
	}
	frame.Truncate(n)
	f.ready++
	return nil
}

// segment cuts a frame into such as the vif takes.
func (f *feeder) segment(whole []byte, off Offload) error {
	if !f.cut.init(whole, off) {
		f.j.uncut.Add(1)
		return nil
	}
	if f.cut.size+f.cut.step > f.size {
		f.j.oversize.Add(1)
		return nil
	}
	for {
		head, payload, more := f.cut.next()
		if !more {
			return nil
		}
		if f.ready == f.n {
			if err := f.flush(); err != nil {
				return err
			}
			n, err := f.tx.AllocWait(f.frames[:], f.size)
			if err != nil {
				return err
			}
			f.n = n
		}
		frame := &f.frames[f.ready]
		frame.Truncate(frame.CopyFrom(head, payload))
		f.ready++
		f.j.segments.Add(1)
	}
}

// flush sends the frames that are ready and keeps the empty ones.
func (f *feeder) flush() error {
	sent, done := 0, 0
	for done < f.ready {
		n, err := f.tx.SendWait(f.frames[done:f.ready])
		sent, done = sent+n, done+n
		if err == pvnet.ErrFrameSize {
			_ = f.frames[done].Release()
			done++
			f.j.refused.Add(1)
			continue
		}
		if err != nil {
			f.j.fromLink.Add(uint64(sent))
			f.keep(done)
			return err
		}
	}
	f.j.fromLink.Add(uint64(sent))
	f.keep(done)
	return nil
}

// keep drops the first done frames, which are no longer ours.
func (f *feeder) keep(done int) {
	f.n = copy(f.frames[:], f.frames[done:f.n])
	f.ready -= done
}
