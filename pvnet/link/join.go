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
	"barevif/pvnet/packet"
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
	toLink, toLinkGSO                atomic.Uint64
	fromLink, fromLinkGSO, segments  atomic.Uint64
	unsent, oversize, uncut, refused atomic.Uint64
}

// JointStats counts frames.
type JointStats struct {
	ToLink      uint64 // written to a link
	ToLinkGSO   uint64 // of ToLink, those the kernel is to cut
	FromLink    uint64 // sent through the vif
	FromLinkGSO uint64 // of FromLink, those the vif or its other end cuts
	Segments    uint64 // of FromLink, what frames the kernel left whole were cut into here

	Unsent   uint64 // dropped: a link was down, out of buffers, or did not take one of that size
	Oversize uint64 // dropped: beyond the vif's MTU
	Uncut    uint64 // dropped: cannot be cut or completed here, or is not what its header says
	Refused  uint64 // dropped: the vif's other end does not take one of that size
}

// Stats may be called at any time.
func (j *Joint) Stats() JointStats {
	return JointStats{
		ToLink: j.toLink.Load(), ToLinkGSO: j.toLinkGSO.Load(),
		FromLink: j.fromLink.Load(), FromLinkGSO: j.fromLinkGSO.Load(), Segments: j.segments.Load(),
		Unsent: j.unsent.Load(), Oversize: j.oversize.Load(),
		Uncut: j.uncut.Load(), Refused: j.refused.Load(),
	}
}

// Run is [Join] with a link per queue, such as [OpenTAPQueues] gives. Link i feeds
// queue i; a queue without a link of its own is written to one of the others.
//
// Run has the kernel behind a TAP leave TCP to be segmented, and TCP and UDP
// checksums, until it returns: they are passed on to the vif, which does what its
// other end does not take. With pvnet.Config.Offload the vif leaves the same to the
// kernel. What else a packet socket leaves is done here, in software.
//
// A frame longer than the vif's MTU and a tagged header, or one that would be cut
// into such, is dropped. While the vif is down the links' frames wait in the kernel,
// which drops what it cannot hold.
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

	for _, l := range links {
		setOffloads(l, true)
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
		setOffloads(l, false)
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

	// setOffloads has the kernel leave work that the vif can be left, or none.
	setOffloads(on bool) error

	// most is how long a frame that is read can be.
	most() int
}

// setDeadlines cannot fail but on a closed link, where nobody waits.
func setDeadlines(l Link, t time.Time) {
	_ = l.SetReadDeadline(t)
	if q, ok := l.(quick); ok {
		_ = q.setWriteDeadline(t)
	}
}

// setOffloads ignores an error: a kernel that leaves no work does it itself, and the
// frames say what was left.
func setOffloads(l Link, on bool) {
	if q, ok := l.(quick); ok {
		_ = q.setOffloads(on)
	}
}

// batch is how many frames are moved between two notifications at most.
const batch = 32

// vifPieces is how many pieces a frame of a vif has at most.
const vifPieces = 19

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
		sent, long := uint64(0), uint64(0)
		for i := range frames[:n] {
			off, ok := leftOf(&frames[i])
			if !ok {
				j.uncut.Add(1)
				continue
			}
			_, err = l.WriteFrame(off, pieces(&frames[i], bufs[:0]))
			switch {
			case err == nil:
				sent++
				if off.GSO != GSONone {
					long++
				}
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
		if long > 0 {
			j.toLinkGSO.Add(long)
		}
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

	whole []byte // behind what a frame has room for; or all of a long one
	bufs  [vifPieces + 1][]byte
	cut   packet.Cutter
}

func (j *Joint) fromLinkTo(ctx context.Context, l Link, dev *pvnet.Device, tx *pvnet.TX) error {
	f := &feeder{j: j, dev: dev, tx: tx, l: l}
	most := MaxRead
	if f.quick, _ = l.(quick); f.quick != nil {
		most = f.quick.most()
	}
	f.whole = make([]byte, most) // no page of it is there before it is read into
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
		if err != nil || f.ready > 0 && f.frames[f.ready-1].GSO().Size != 0 {
			return err // a long one is sent at once, and holds no pages the next one needs
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
	case n < MinFrame:
		f.j.uncut.Add(1)
		return nil
	case off.GSO != GSONone:
		frame.CopyTo(f.whole[:min(n, f.size)])
		return f.long(f.whole[:n], off)
	case n > f.size:
		f.j.oversize.Add(1)
		return nil
	}
	frame.Truncate(n)
	if !leave(frame, off) && off.Complete(n, bufs) != nil {
		f.j.uncut.Add(1)
		f.drop()
		return nil
	}
	f.ready++
	return nil
}

// drop gives back frames[ready], which was cut to what was read.
func (f *feeder) drop() {
	_ = f.frames[f.ready].Release()
	f.n--
	f.frames[f.ready] = f.frames[f.n]
}

// long takes a frame that is still to be cut, if possible as it is.
func (f *feeder) long(whole []byte, off Offload) error {
	h, ok := packet.Parse(whole, len(whole))
	switch {
	case !ok, off.GSO == GSOUDP, off.ECN, off.Checksum != ChecksumPartial, h.L4 != int(off.SumStart): // in a tunnel, or so
		return f.segment(whole, off, 0)
	case len(whole) > pvnet.MaxFrame: // several of a vif's longest
		return f.segment(whole, off, pvnet.MaxFrame-h.L5)
	case h.L5+min(int(off.GSOSize), h.End-h.L5) > f.size:
		f.j.oversize.Add(1)
		return nil
	}
	if err := f.enlarge(len(whole)); err == pvnet.ErrNoBuffers {
		return f.segment(whole, off, 0)
	} else if err != nil {
		return err
	}
	frame := &f.frames[f.ready]
	frame.CopyFrom(whole)
	if !leave(frame, off) {
		f.drop()
		return f.segment(whole, off, 0)
	}
	f.ready++
	return nil
}

// enlarge makes frames[ready] another one, of size bytes. It may send those before
// it. ErrNoBuffers: the vif has no such frame, whatever is sent.
func (f *feeder) enlarge(size int) error {
	at := f.frames[f.ready : f.ready+1]
	_ = at[0].Release()
	if f.tx.AllocSize(at, size) == 1 {
		f.n = max(f.n, f.ready+1)
		return nil
	}
	if err := f.flush(); err != nil {
		return err
	}
	f.release(0)
	n, err := f.tx.AllocWait(f.frames[:1], size)
	f.n = n
	return err
}

// segment cuts a frame into such as the vif takes, or into such as it cuts again, with as
// many bytes of payload as most says.
func (f *feeder) segment(whole []byte, off Offload, most int) error {
	if !off.begin(&f.cut, whole, most) {
		f.j.uncut.Add(1)
		return nil
	}
	if f.cut.HeaderLen()+min(int(off.GSOSize), len(whole)) > f.size {
		f.j.oversize.Add(1)
		return nil
	}
	src, room := [1][]byte{whole}, [2][]byte{}
	for f.cut.Left() > 0 {
		var err error
		if f.cut.Again() {
			if err = f.enlarge(f.cut.Len()); err == pvnet.ErrNoBuffers {
				done := f.cut.Done()
				off.begin(&f.cut, whole, 0)
				f.cut.Skip(done)
				continue
			}
		} else if f.ready == f.n {
			if err = f.flush(); err == nil {
				f.n, err = f.tx.AllocWait(f.frames[:], f.size)
			}
		}
		if err != nil {
			return err
		}
		again := f.cut.Again()
		head, parts := f.cut.Next(src[:], room[:1])
		parts[0] = head
		frame := &f.frames[f.ready]
		frame.Truncate(frame.CopyFrom(parts...))
		f.ready++
		if !again {
			f.j.segments.Add(1)
			continue
		}
		if g, _ := off.vif(); frame.SetGSO(g) != nil {
			f.j.uncut.Add(1)
			f.ready--
			f.drop()
		}
		if err := f.flush(); err != nil {
			return err
		}
	}
	return nil
}

// flush sends the frames that are ready and keeps the empty ones.
func (f *feeder) flush() error {
	long := f.ready > 0 && f.frames[f.ready-1].GSO().Size != 0
	done := 0
	for done < f.ready {
		n, err := f.tx.SendWait(f.frames[done:f.ready])
		f.j.fromLink.Add(uint64(n))
		done += n
		switch {
		case err == nil && long:
			f.j.fromLinkGSO.Add(1)
			continue
		case err == nil:
			continue
		case err == pvnet.ErrNoBuffers && f.n > f.ready:
			f.release(f.ready)
			continue
		case err == pvnet.ErrFrameSize, err == pvnet.ErrNoBuffers && long: // nor are there ever pages for one piece
			f.j.refused.Add(1)
		case err == pvnet.ErrOffload:
			f.j.uncut.Add(1)
		default:
			f.keep(done)
			return err
		}
		_ = f.frames[done].Release()
		done++
	}
	f.keep(done)
	return nil
}

// keep drops the first done frames, which are no longer ours.
func (f *feeder) keep(done int) {
	f.n = copy(f.frames[:], f.frames[done:f.n])
	f.ready -= done
}
