package link

import (
	"cmp"
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
	toLink, toLinkGSO                        atomic.Uint64
	fromLink, fromLinkGSO, segments          atomic.Uint64
	unsent, unread, oversize, uncut, refused atomic.Uint64
	unfed                                    atomic.Uint64

	told   [kinds]atomic.Bool // by kind: the line was logged
	single atomic.Bool        // so was that frames are moved one by one
}

// JointStats counts frames.
type JointStats struct {
	ToLink      uint64 // written to a link
	ToLinkGSO   uint64 // of ToLink, those the kernel is to cut
	FromLink    uint64 // sent through the vif
	FromLinkGSO uint64 // of FromLink, those the vif or its other end cuts
	Segments    uint64 // of FromLink, what frames the kernel left whole were cut into here

	Unsent   uint64 // to a link, dropped: it was down or out of buffers, or refused the frame; or its headers contradict it
	Unread   uint64 // from a link, lost: the kernel could not hand it over
	Oversize uint64 // from a link, dropped: beyond the vif's MTU
	Uncut    uint64 // from a link, dropped: cannot be cut or completed here, or is not what its header says
	Refused  uint64 // from a link, dropped: the vif or its other end does not take one of that size
	Unfed    uint64 // from a link, dropped: read, and not yet sent, when Run ended
}

// Dropped is how many frames from links did not reach the vif.
func (s *JointStats) Dropped() uint64 { return s.Unread + s.Oversize + s.Uncut + s.Refused }

// Stats may be called at any time.
func (j *Joint) Stats() JointStats {
	return JointStats{
		ToLink: j.toLink.Load(), ToLinkGSO: j.toLinkGSO.Load(),
		FromLink: j.fromLink.Load(), FromLinkGSO: j.fromLinkGSO.Load(), Segments: j.segments.Load(),
		Unsent: j.unsent.Load(), Unread: j.unread.Load(), Oversize: j.oversize.Load(),
		Uncut: j.uncut.Load(), Refused: j.refused.Load(),
		Unfed: j.unfed.Load(),
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
// Frames go to a TAP, and come from it, up to 128 in one system call where the kernel has
// an io_uring for us, which takes two descriptors more for each link. Before Linux 6.4 a
// burst that ends early takes three. Where it cannot be done, which a line of level
// debug says, each frame takes a system call.
//
// A frame longer than the vif's MTU and a tagged header, or one that would be cut
// into such, is dropped, unless the MTU of the link was raised while they are joined:
// then frames up to that pass, as far as the vif's other end takes them. While the vif
// is down the links' frames wait in the kernel, which drops what it cannot hold.
//
// Dropped frames are counted here and in the device's counters, by reason. Sizes that
// do not fit are logged too, once of each kind, to the device's Logger.
//
// An error of a link that is about one frame loses that frame only.
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
		wg.Go(func() { cancel(j.toLinkFrom(dev, rx, links[i%len(links)])) })
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

	// mtuNow is the MTU the interface has now. It is 0 where that cannot be asked
	// for, if no frame beyond it is read: then a frame shows it.
	mtuNow() int

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

// batch is how many frames are moved between two notifications at most: half a ring, so
// that the other end has the rest of it to go on with. On a paravirtual Linux a system call
// or a notification is dear: with 32 small frames were an eighth to a third fewer.
const batch = 128

// fewEmpty is how many empty frames a feeder holds whose link has no more to read at once.
const fewEmpty = 32

// vifPieces is how many pieces a frame of a vif has at most.
const vifPieces = 19

// toLinkFrom writes what rx receives to l.
func (j *Joint) toLinkFrom(dev *pvnet.Device, rx *pvnet.RX, l Link) error {
	var frames [batch]pvnet.Frame
	s := j.newSink(dev, l)
	defer s.close()
	down := false
	lost := uint64(0) // and not yet counted
	defer func() {
		if lost > 0 {
			_ = rx.CountUndelivered(lost) // of a vif that has ended nothing is counted
		}
	}()
	for {
		n, err := rx.Receive(frames[:])
		if err != nil {
			return err
		}
		var end error
		sent, long := uint64(0), uint64(0)
		for i, err := range s.write(frames[:n]) {
			switch {
			case err == nil:
				sent++
				if frames[i].GSO().Size != 0 {
					long++
				}
				down = false
			case err == ErrDown && !down:
				// The kernel tells whoever asks first, and once: have the
				// reader ask too.
				down = true
				_ = l.SetReadDeadline(past)
			case err == ErrSize:
				j.tellUntaken(dev, l, frames[i].Len())
			case final(err) && end == nil:
				end = err
			}
		}
		if unsent := uint64(n) - sent; unsent > 0 {
			j.unsent.Add(unsent)
			lost += unsent
		}
		if end == nil && lost > 0 && rx.CountUndelivered(lost) == nil {
			lost = 0
		}
		j.wrote(sent, long)
		if err := rx.Release(frames[:n]); end != nil || err != nil {
			return cmp.Or(end, err)
		}
	}
}

func (j *Joint) wrote(sent, long uint64) {
	j.toLink.Add(sent)
	if long > 0 {
		j.toLinkGSO.Add(long)
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

	raised int // the link's MTU, once it is larger than when the link was opened; else 0
	errs   int // reads that failed since the last frame, or the last pause
	odd    int // of those since the last frame, the ones with an error no link is known to have
	lost   [endLosses]uint64

	whole []byte // behind what a frame has room for; or all of a long one
	bufs  [vifPieces + 1][]byte
	cut   packet.Cutter

	burst burstReader // nil: frames are read one by one
	want  int         // as many as are likely to be there
	in    [batch]arrival
}

func (j *Joint) fromLinkTo(ctx context.Context, l Link, dev *pvnet.Device, tx *pvnet.TX) error {
	f := &feeder{j: j, dev: dev, tx: tx, l: l, want: 1}
	most := MaxRead
	if f.quick, _ = l.(quick); f.quick != nil {
		most = f.quick.most()
	}
	f.whole = make([]byte, most) // no page of it is there before it is read into
	if b, ok := l.(bursts); ok {
		var err error
		if f.burst, err = b.readBursts(); err != nil {
			f.burst = nil
			j.tellSingle(dev, l, err)
		}
	}
	defer f.close()
	defer f.count()
	defer f.release(0)
	for {
		err := f.fill()
		if flushErr := f.flush(); flushErr != nil {
			err = flushErr
		}
		f.count()
		pause := time.Duration(0)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			_ = l.SetReadDeadline(time.Time{})
			if ctx.Err() != nil {
				return err
			}
		case err == ErrDown:
			pause = downPause
		case err == errFailing:
			pause = failPause
		default:
			return err
		}
		if pause > 0 {
			select {
			case <-ctx.Done():
				return err
			case <-time.After(pause):
			}
		}
	}
}

// downPause is how long a link that is down is left alone. Only a packet socket
// has to be asked.
const downPause = 100 * time.Millisecond

// failPause is how long a link is left alone after failLimit reads in a row lost a
// frame. Without it a kernel out of memory, or a neighbour that sends such frames, could
// take all of a CPU.
const (
	failPause = time.Millisecond
	failLimit = 64
)

// errFailing has fromLinkTo pause for failPause.
var errFailing = errors.New("link: reads fail")

// final reports whether a link that answers err has no more frames to come.
func final(err error) bool {
	return err == ErrGone || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded)
}

// failed counts the frame that a failed read lost, or returns the error if it is about
// the link. An unknown error is taken to be about a frame, but is final after failLimit
// of them without a frame in between.
func (f *feeder) failed(err error) error {
	switch {
	case err == errNone || err == ErrDown || err == ErrTooManyPieces || final(err):
		return err
	case err == ErrTruncated || err == ErrSize:
		f.drop(tooLong, &f.j.oversize)
	case err == ErrOffload:
		f.drop(badGSO, &f.j.uncut)
	default:
		f.drop(undelivered, &f.j.unread)
		if err == ErrNoBuffers {
			break
		}
		if f.odd++; f.odd > failLimit {
			return err
		}
	}
	if f.errs++; f.errs > failLimit {
		f.errs = 0
		return errFailing
	}
	return nil
}

// release gives back the frames from i on, and counts those that were to be sent.
func (f *feeder) release(i int) {
	f.j.unfed.Add(uint64(max(f.ready-i, 0)))
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
			n, err := f.tx.AllocWait(f.frames[:max(f.want, fewEmpty)], f.size)
			if err != nil {
				return err
			}
			f.ready, f.n = 0, n
		}
		more := f.quick != nil
		var err error
		if k := min(f.want, f.n-f.ready); f.burst != nil && k >= f.burst.least() {
			more, err = f.readBurst(k, wait)
		} else {
			err = f.read(wait)
		}
		if err == errNone || err == nil && !more {
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
	if err != nil {
		return f.failed(err)
	}
	f.errs, f.odd = 0, 0
	f.want = max(f.want, min(f.ready+2, batch)) // as many as there were, and one that sees that there are no more
	switch {
	case n < MinFrame:
		f.drop(tooShort, &f.j.uncut)
		return nil
	case off.GSO != GSONone:
		f.want = 1
		frame.CopyTo(f.whole[:min(n, f.size)])
		return f.long(f.whole[:n], off)
	case n > f.size:
		frame.CopyTo(f.whole[:f.size])
		return f.large(f.whole[:n], off)
	}
	frame.Truncate(n)
	f.finish(off, n, bufs)
	return nil
}

// finish counts frames[ready], of n bytes in bufs, as ready. It drops the frame if its
// checksum can neither be left to the vif nor completed.
func (f *feeder) finish(off Offload, n int, bufs [][]byte) {
	if !leave(&f.frames[f.ready], off) && off.Complete(n, bufs) != nil {
		f.drop(badSum, &f.j.uncut)
		f.discard()
		return
	}
	f.ready++
}

// large takes a frame of more than f.size bytes.
func (f *feeder) large(whole []byte, off Offload) error {
	if !f.fits(whole, len(whole), true) {
		f.drop(tooLong, &f.j.oversize)
		return nil
	}
	if err := f.enlarge(len(whole)); err == pvnet.ErrNoBuffers {
		f.refuse(len(whole))
		return nil
	} else if err != nil {
		return err
	}
	frame := &f.frames[f.ready]
	frame.CopyFrom(whole)
	f.finish(off, len(whole), pieces(frame, f.bufs[:0]))
	return nil
}

// discard gives back frames[ready], which was cut to what was read. The order of those
// behind it stays.
func (f *feeder) discard() {
	_ = f.frames[f.ready].Release()
	f.n = f.ready + copy(f.frames[f.ready:], f.frames[f.ready+1:f.n])
}

// long takes a frame that is still to be cut, if possible as it is.
func (f *feeder) long(whole []byte, off Offload) error {
	h, ok := packet.Parse(whole, len(whole))
	switch {
	case !ok, off.GSO == GSOUDP, off.ECN, off.Checksum != ChecksumPartial, h.L4 != int(off.SumStart): // in a tunnel, or so
		return f.segment(whole, off, 0)
	case len(whole) > pvnet.MaxFrame: // several of a vif's longest
		return f.segment(whole, off, pvnet.MaxFrame-h.L5)
	}
	if n := h.L5 + min(int(off.GSOSize), h.End-h.L5); n > f.size && !f.fits(whole, n, false) {
		f.drop(tooLong, &f.j.oversize)
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
		f.discard()
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
		f.drop(badGSO, &f.j.uncut)
		return nil
	}
	size := f.cut.HeaderLen() + min(int(off.GSOSize), len(whole))
	if size > f.size && !f.fits(whole, size, false) {
		f.drop(tooLong, &f.j.oversize)
		return nil
	}
	if size <= f.size {
		return f.cutAll(whole, off, f.size)
	}
	// None of the empty frames has room for a segment, and the next frame is read into
	// those of f.size again.
	err := f.flush()
	f.release(0)
	if err == nil {
		err = f.cutAll(whole, off, size)
	}
	if err == nil {
		err = f.flush()
	}
	f.release(0)
	return err
}

// cutAll makes the frames, those that are not cut again of size bytes.
func (f *feeder) cutAll(whole []byte, off Offload, size int) error {
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
				f.n, err = f.tx.AllocWait(f.frames[:], size)
			}
			if err == pvnet.ErrNoBuffers && size > f.size {
				f.refuse(size)
				return nil
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
			f.drop(badGSO, &f.j.uncut)
			f.ready--
			f.discard()
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
			f.refuse(f.frames[done].Len())
		case err == pvnet.ErrOffload:
			f.drop(badSum, &f.j.uncut)
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
