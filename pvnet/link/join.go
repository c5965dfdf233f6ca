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
// returns the cause), the device is disconnected (nil, also if it was before), or one of the two fails:
// [ErrGone], net.ErrClosed if the link was closed, or the [*pvnet.PeerError] that
// ended the device. It blocks.
//
// Join becomes the owner of the device's halves, for good, and of the link's
// deadlines until it returns. It closes neither. To count the frames it drops, use a
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

	logged [sizeKinds]atomic.Bool // by kind of size: logOnce has logged it
	single atomic.Bool            // logNoBursts has logged

	unsteered bool // followSteering, which alone uses it, has logged

	holds holds
}

// JointStats counts frames.
type JointStats struct {
	ToLink      uint64 // written to a link
	ToLinkGSO   uint64 // of ToLink, frames that the kernel has to cut
	FromLink    uint64 // given to the vif, which counts those that it drops for a stopped frontend
	FromLinkGSO uint64 // of FromLink, frames that the vif or its other end cuts
	Segments    uint64 // of FromLink, segments that the Joint cut from longer frames

	Unsent   uint64 // to a link, dropped: the link was down, out of buffers or refused the frame, or the frame contradicts its headers
	Unread   uint64 // from a link, lost: the kernel could not pass it on
	Oversize uint64 // from a link, dropped: beyond the vif's MTU
	Uncut    uint64 // from a link, dropped: the Joint cannot cut or complete it, or it contradicts its headers
	Refused  uint64 // from a link, dropped: the vif or its other end takes no frame of that size
	Unfed    uint64 // from a link, dropped: read, but not yet sent, when Run ended
}

// Dropped returns how many frames from links did not reach the vif while Run ran. It leaves
// out Unfed.
func (s *JointStats) Dropped() uint64 { return s.Unread + s.Oversize + s.Uncut + s.Refused }

// Stats returns the counters. It may be called at any time, from any goroutine.
func (j *Joint) Stats() JointStats {
	return JointStats{
		ToLink: j.toLink.Load(), ToLinkGSO: j.toLinkGSO.Load(),
		FromLink: j.fromLink.Load(), FromLinkGSO: j.fromLinkGSO.Load(), Segments: j.segments.Load(),
		Unsent: j.unsent.Load(), Unread: j.unread.Load(), Oversize: j.oversize.Load(),
		Uncut: j.uncut.Load(), Refused: j.refused.Load(),
		Unfed: j.unfed.Load(),
	}
}

// Run is [Join] with a link per queue, such as [OpenTAPQueues] returns. Link i feeds
// queue i; frames of a queue without a link of its own go to one of the other links. A single
// link, such as a packet socket, feeds all queues of the vif: each frame takes the one that
// [pvnet.Device.QueueFor] names, as the frontend asks, and else by its flow. While
// the vif has fewer queues than links, the kernel sends nothing to the links of the others.
// The links of a TAP are its queues in the order in which they were opened.
//
// The frontend of a vif with several queues may ask that the queue of a frame be chosen by
// its hash ([pvnet.Device.Steerings]). Then Run gives the TAP an eBPF program by which the
// kernel does so. It needs CAP_BPF in the first user namespace, and Linux 5.8. Without, and
// while the frontend asks for no hash, the kernel chooses as it likes; the first is logged
// once. Of a vif with more queues than links, a queue beyond the last link is fed by link
// number queue modulo links.
//
// Until it returns, Run lets the kernel behind a TAP leave TCP segmentation, and TCP and
// UDP checksums, to the vif. The vif does the part that its other end does not take. With
// pvnet.Config.Offload the vif leaves the same work to the kernel. A packet socket may read
// frames with other work left; Run does that in software.
//
// Where the process may use io_uring, up to 128 frames of a TAP move in one system call,
// which takes two more descriptors per link. Before Linux 6.4 a burst of reads that ends
// early takes two calls. Where io_uring cannot be used, each frame takes a system call,
// and Run logs that at level debug.
//
// Run drops a frame longer than the vif's MTU and a tagged header, and a frame whose
// segments would be longer. But if the MTU of the link is raised while they are joined,
// frames up to that MTU pass, as far as the vif's other end takes them. While the vif is
// down the links' frames wait in the kernel, which drops those it has no room for.
//
// A vif whose frontend takes no frames does not hold up others. At most 128 frames, of
// 256 pages, wait for it, and the device drops them as [pvnet.ServeConfig].DrainTimeout
// says; later ones wait in the kernel's queue. When the device turns the carrier off, Run
// turns off that of a TAP too: the kernel then drops its frames itself, and a bridge takes
// the interface for unplugged. It is on again with the device's, and when Run returns. On a
// packet socket, whose interface belongs to others, it stays as it is. Needs Linux 5.0.
//
// Dropped frames are counted in the Joint and in the device's counters, by reason. Sizes
// that do not fit are also logged to the device's Logger, once per kind.
//
// An error of a link that concerns one frame loses that frame only.
func (j *Joint) Run(ctx context.Context, dev *pvnet.Device, links ...Link) error {
	if len(links) == 0 || len(links) > dev.Queues() {
		return fmt.Errorf("link: %d links for the %d queues of vif %s", len(links), dev.Queues(), dev.ID())
	}
	feeds := len(links)
	if feeds == 1 {
		feeds = dev.Queues()
	}
	rxs, txs, err := own(dev, feeds)
	if pvnet.Orderly(err) {
		return nil
	}
	if err != nil {
		return err
	}
	holding := j.holds.begin() // first, so that whoever sees an effect of Run can Hold
	defer j.holds.end()
	for _, l := range links {
		setOffloads(l, true)
	}
	following, enough := context.WithCancel(ctx)
	var followers sync.WaitGroup
	followers.Go(func() { j.followCarrier(following, dev, links) })
	if len(links) > 1 {
		followers.Go(func() { j.followQueues(following, dev, links) })
		followers.Go(func() { j.followSteering(following, dev, links) })
	}
	for {
		err = j.move(ctx, dev, links, rxs, txs, holding)
		if err != errHeld {
			break
		}
		if err = j.holds.rest(ctx, dev); err != nil {
			break
		}
	}
	enough()
	followers.Wait()
	j.holds.unlessHeld(func() {
		for _, l := range links {
			setOffloads(l, false)
		}
	})
	if pvnet.Orderly(err) {
		return nil
	}
	return err
}

// move forwards frames until ctx ends, something fails, or holding gives a token: then it
// returns errHeld once every frame that was read or received has been passed on.
func (j *Joint) move(ctx context.Context, dev *pvnet.Device, links []Link, rxs []*pvnet.RX, txs []*pvnet.TX, holding <-chan struct{}) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	held := make(chan struct{}) // closed with the wait for the frames in flight
	empty := make([]atomic.Bool, len(links))
	go func() {
		defer close(held)
		select {
		case <-holding:
			j.quiesce(ctx, links, rxs, txs, empty)
		case <-ctx.Done():
		}
	}()
	moved := func(err error) { // a goroutine below has ended
		if !j.holds.stopping.Load() || !errors.Is(err, os.ErrDeadlineExceeded) {
			cancel(err)
		}
	}
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
		feeds := txs[i : i+1]
		if len(links) == 1 {
			feeds = txs
		}
		wg.Go(func() { moved(j.fromLinkTo(ctx, l, dev, feeds, &empty[i])) })
	}
	for i, rx := range rxs {
		wg.Go(func() { moved(j.toLinkFrom(dev, rx, links[i%len(links)])) })
	}
	wg.Wait()
	if !stop() {
		<-stopped
	}
	err := context.Cause(ctx)
	cancel(errHeld)
	<-held
	j.holds.stopping.Store(false)
	for _, l := range links {
		setDeadlines(l, time.Time{})
	}
	if err != nil {
		return err
	}
	for i := range rxs {
		rxs[i].SetDeadline(time.Time{})
	}
	for i := range txs {
		txs[i].SetDeadline(time.Time{})
	}
	return errHeld
}

// followCarrier turns the carrier of the links off while the vif's frontend takes no frames
// ([pvnet.Device.Stalled]), until ctx or the device ends. While the links are held their carrier
// stays as it is: another process may have them already. One that takes a TAP over whose
// carrier is off turns it on.
func (j *Joint) followCarrier(ctx context.Context, dev *pvnet.Device, links []Link) {
	off, known := false, false
	set := func(stalled, up bool) {
		if stalled == off && (known || !up) { // once the link is up: another process may have left it off
			return
		}
		off, known = stalled, known || up
		for _, l := range links {
			q, ok := l.(native)
			if !ok {
				continue
			}
			if err := q.setCarrier(!off); err != nil {
				dev.Logger().Debug("the carrier of the interface stays as it is", "vif", dev.ID(), "peer", dev.Peer(),
					"interface", l.Name(), "error", err)
			}
		}
	}
	defer j.holds.unlessHeld(func() { set(false, false) })
	for ev := range dev.Links(ctx) {
		if !j.holds.unheld(ctx, dev, func() { set(ev.Stalled, ev.Up) }) {
			break
		}
	}
}

// own owns the receive halves of all queues of dev, and the transmit halves of the first
// n.
func own(dev *pvnet.Device, n int) (rxs []*pvnet.RX, txs []*pvnet.TX, err error) {
	for i := range dev.Queues() {
		rx, err := dev.OwnRX(i)
		if err != nil {
			return nil, nil, fmt.Errorf("link: receive queue %d: %w", i, err)
		}
		rxs = append(rxs, rx)
	}
	for i := range n {
		tx, err := dev.OwnTX(i)
		if err != nil {
			return nil, nil, fmt.Errorf("link: transmit queue %d: %w", i, err)
		}
		txs = append(txs, tx)
	}
	return rxs, txs, nil
}

// errNone is the error of a read without waiting if there is no frame.
var errNone = errors.New("link: no frame")

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// native has the methods that the links of this package have beyond [Link].
type native interface {
	read(bufs [][]byte, wait bool) (n int, off Offload, err error)
	setWriteDeadline(t time.Time) error

	// setOffloads lets the kernel leave the work that a vif can take over, or none.
	setOffloads(on bool) error

	// setCarrier tells the interface whether frames reach the vif's other end. While they do
	// not, its kernel sends none.
	setCarrier(on bool) error

	// attach makes the kernel send frames to this queue of a TAP with several, or no more.
	attach(on bool) error

	// attached reports whether the kernel sends frames to this queue of a TAP.
	attached() bool

	// steer makes the kernel spread the frames of a TAP over its queues as s says; nil: as the
	// kernel likes.
	steer(s *pvnet.Steering) error

	// mtuNow returns the interface's current MTU. It returns 0 if the process cannot
	// read the MTU; the link then reads no frame beyond it, so that the size of a frame
	// gives a lower bound.
	mtuNow() int

	// maxRead returns the size of the longest frame that the link reads.
	maxRead() int
}

// setDeadlines ignores errors: they come only from a closed link, where nobody waits.
func setDeadlines(l Link, t time.Time) {
	_ = l.SetReadDeadline(t)
	if q, ok := l.(native); ok {
		_ = q.setWriteDeadline(t)
	}
}

// setOffloads ignores errors: a kernel that does not accept the setting does the work
// itself, and each frame says which work is left.
func setOffloads(l Link, on bool) {
	if q, ok := l.(native); ok {
		_ = q.setOffloads(on)
	}
}

// batch is how many frames are moved between two notifications at most: half a ring, so
// that the other end can work on the other half. System calls and notifications are
// expensive on a paravirtual Linux: a batch of 32 moved an eighth to a third fewer small
// frames.
const batch = 128

// fewEmpty is how many empty frames a feeder allocates if it expects fewer frames than
// that at once.
const fewEmpty = 32

// vifPieces is how many pieces a frame of a vif has at most.
const vifPieces = 19

// toLinkFrom writes what rx receives to l.
func (j *Joint) toLinkFrom(dev *pvnet.Device, rx *pvnet.RX, l Link) error {
	var frames [batch]pvnet.Frame
	s := j.newSink(dev, l)
	defer s.close()
	lost := uint64(0) // frames lost but not yet counted by the device
	defer func() {
		if lost > 0 {
			_ = rx.CountUndelivered(lost) // a device that has ended counts nothing
		}
	}()
	for {
		n, err := rx.Receive(frames[:])
		if err != nil {
			return err
		}
		sent, gso, end := s.deliver(frames[:n])
		if unsent := uint64(n) - sent; unsent > 0 {
			j.unsent.Add(unsent)
			lost += unsent
		}
		if end == nil && lost > 0 && rx.CountUndelivered(lost) == nil {
			lost = 0
		}
		j.toLink.Add(sent)
		if gso > 0 {
			j.toLinkGSO.Add(gso)
		}
		if err := rx.Release(frames[:n]); end != nil || err != nil {
			return cmp.Or(end, err)
		}
	}
}

// pieces appends the pieces of f to bufs.
func pieces(f *pvnet.Frame, bufs [][]byte) [][]byte {
	for p := range f.Pieces() {
		bufs = append(bufs, p)
	}
	return bufs
}

// A feeder moves frames from a link to a vif.
type feeder struct {
	j      *Joint
	dev    *pvnet.Device
	tx     *pvnet.TX // makes the frames, and sends those that spread does not
	spread spread
	l      Link
	native native       // nil if l only reads one frame at a time
	empty  *atomic.Bool // the feeder has read nothing, and waits for empty frames

	// frames[:ready] are filled and wait to be sent; frames[ready:n] are empty, each of
	// size bytes.
	frames   [batch]pvnet.Frame
	ready, n int
	size     int

	raised int // the link's MTU, in bytes, if it is larger than when the link was opened, else 0
	errs   int // reads that failed since the last frame, or the last pause
	odd    int // reads since the last frame that failed with an unknown error
	lost   [losses]uint64

	whole []byte // holds the bytes of a read beyond f.size at their offset, or all of a long frame
	bufs  [vifPieces + 1][]byte
	cut   packet.Cutter

	ending func() bool // reports whether Run is about to end, or to be held

	burst burstReader // nil: frames are read one by one
	want  int         // how many frames the next burst asks for
	in    [batch]arrival
}

// fromLinkTo moves frames from l to the queues of txs, until ctx ends or something fails.
// empty says meanwhile whether it has read nothing, and waits for empty frames.
func (j *Joint) fromLinkTo(ctx context.Context, l Link, dev *pvnet.Device, txs []*pvnet.TX, empty *atomic.Bool) error {
	tx := txs[0]
	f := &feeder{j: j, dev: dev, tx: tx, spread: spread{txs: txs}, l: l, empty: empty, want: 1, size: frameSize(dev)}
	f.ending = func() bool { return ctx.Err() != nil || j.holds.stopping.Load() }
	defer f.release(0)
	// A queue that the vif never has costs no buffers and no io_uring.
	var err error
	if err = f.refill(fewEmpty); err != nil {
		return err
	}
	most := MaxRead
	if f.native, _ = l.(native); f.native != nil {
		most = f.native.maxRead()
	}
	f.whole = make([]byte, most) // takes memory only for the pages that are used
	if b, ok := l.(bursts); ok {
		if f.burst, err = b.readBursts(); err != nil {
			f.burst = nil
			j.logNoBursts(dev, l, err)
		}
	}
	defer f.close()
	defer f.count()
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
			if f.ending() {
				return err
			}
		case err == ErrDown:
			pause = downPause
		case err == errFailing:
			pause = failPause
		default:
			return err
		}
		if pause == 0 {
			continue
		}
		if f.ending() { // a link that is down may not look at its deadline
			return os.ErrDeadlineExceeded
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// downPause is the time between two reads of a link that is down. Only a packet socket
// needs it; a TAP waits.
const downPause = 100 * time.Millisecond

// failPause is the pause after failLimit reads in a row that lost a frame. Without it, a
// kernel out of memory or a neighbour that sends frames the kernel cannot pass on could
// keep a CPU busy.
const (
	failPause = time.Millisecond
	failLimit = 64
)

// errFailing makes fromLinkTo pause for failPause.
var errFailing = errors.New("link: reads fail")

// final reports whether a link that returned err moves no more frames.
func final(err error) bool {
	return err == ErrGone || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded)
}

// failed counts the frame that a failed read lost, or returns err if it concerns the link.
// An unknown error counts as the loss of a frame, but is returned after more than failLimit
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

// release gives back the frames from i on, and counts the filled ones as Unfed.
func (f *feeder) release(i int) {
	f.j.unfed.Add(uint64(max(f.ready-i, 0)))
	for k := i; k < f.n; k++ {
		_ = f.frames[k].Release() // fails for a frame that was sent, which is no longer ours
	}
	f.n = i
	f.ready = min(f.ready, i)
}

// frameSize is the size in bytes of the empty frames of a feeder.
func frameSize(dev *pvnet.Device) int { return min(dev.MTU()+18, pvnet.MaxFrame) }

// refill waits for up to n empty frames. No frame waits to be sent.
func (f *feeder) refill(n int) (err error) {
	f.empty.Store(true)
	defer f.empty.Store(false)
	if f.j.holds.stopping.Load() { // quiesce may have looked before
		return os.ErrDeadlineExceeded
	}
	f.ready = 0
	f.n, err = f.tx.AllocWait(f.frames[:n], f.size)
	return err
}

// fill waits for a frame of the link, and reads the frames that follow without a wait.
func (f *feeder) fill() error {
	if size := frameSize(f.dev); size != f.size {
		f.release(0)
		f.size = size
	}
	for wait := true; ; wait = false {
		if f.ready == f.n {
			if !wait {
				return nil
			}
			if err := f.refill(max(f.want, fewEmpty)); err != nil {
				return err
			}
		}
		more := f.native != nil
		var err error
		if k := min(f.want, f.n-f.ready); f.burst != nil && k >= f.burst.minBurst() {
			more, err = f.readBurst(k, wait)
		} else {
			err = f.read(wait)
		}
		if err == errNone || err == nil && !more {
			return nil
		}
		if err != nil || f.ready > 0 && f.frames[f.ready-1].GSO().Size != 0 {
			return err // send a long frame at once, so that it holds no pages that the next one needs
		}
	}
}

// read reads one frame of the link into frames[ready], and makes it ready unless it drops
// it.
func (f *feeder) read(wait bool) error {
	frame := &f.frames[f.ready]
	bufs := append(pieces(frame, f.bufs[:0]), f.whole[f.size:])
	var n int
	var off Offload
	var err error
	if f.native != nil {
		n, off, err = f.native.read(bufs, wait)
	} else {
		n, off, err = f.l.ReadFrame(bufs)
	}
	if err != nil {
		return f.failed(err)
	}
	f.errs, f.odd = 0, 0
	f.want = max(f.want, min(f.ready+2, batch)) // one more than there were, to see that there are no further frames
	switch {
	case n < pvnet.MinFrame:
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

// finish makes frames[ready] ready; it has n bytes, in bufs. finish drops the frame if its
// checksum can neither be left to the vif nor completed.
func (f *feeder) finish(off Offload, n int, bufs [][]byte) {
	if !setOffload(&f.frames[f.ready], off) && off.Complete(n, bufs) != nil {
		f.drop(badSum, &f.j.uncut)
		f.discard()
		return
	}
	f.ready++
}

// large makes a frame of more than f.size bytes ready, or drops it.
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

// discard releases frames[ready], which no longer has f.size bytes. The frames behind it
// keep their order.
func (f *feeder) discard() {
	_ = f.frames[f.ready].Release()
	f.n = f.ready + copy(f.frames[f.ready:], f.frames[f.ready+1:f.n])
}

// long takes a frame that has yet to be cut. It leaves the cutting to the vif if it can.
func (f *feeder) long(whole []byte, off Offload) error {
	h, ok := packet.Parse(whole, len(whole))
	switch {
	case !ok, off.GSO == GSOUDP, off.ECN, off.Checksum != ChecksumPartial, h.L4 != int(off.SumStart): // for example in a tunnel
		return f.segment(whole, off, 0)
	case len(whole) > pvnet.MaxFrame: // cut into frames that the vif cuts again
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
	if !setOffload(frame, off) {
		f.discard()
		return f.segment(whole, off, 0)
	}
	f.ready++
	return nil
}

// enlarge replaces frames[ready] by a frame of size bytes. It may send the frames before
// it. ErrNoBuffers: the vif can never supply a frame of that size.
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

// segment cuts a frame into segments, or, if most is not 0, into frames of up to most
// bytes of payload that the vif cuts again.
func (f *feeder) segment(whole []byte, off Offload, most int) error {
	if !off.startCut(&f.cut, whole, most) {
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
	// The empty frames are too small for a segment: replace them by frames of size bytes.
	// The next read needs frames of f.size bytes again, so release these at the end.
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

// cutAll cuts and makes the pieces ready. A piece that is not cut again goes into a frame of
// size bytes.
func (f *feeder) cutAll(whole []byte, off Offload, size int) error {
	src, room := [1][]byte{whole}, [2][]byte{}
	for f.cut.Left() > 0 {
		var err error
		if f.cut.Again() {
			if err = f.enlarge(f.cut.Len()); err == pvnet.ErrNoBuffers {
				done := f.cut.Done()
				off.startCut(&f.cut, whole, 0)
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
		if g, _ := off.vifGSO(); frame.SetGSO(g) != nil {
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
	f.sort(!long)
	for done < f.ready {
		n, err := f.send(done)
		f.j.fromLink.Add(uint64(n))
		done += n
		switch {
		case err == nil && long && done == f.ready:
			f.j.fromLinkGSO.Add(1)
			continue
		case err == nil:
			continue
		case err == pvnet.ErrNoBuffers && f.n > f.ready:
			f.release(f.ready)
			continue
		case err == pvnet.ErrFrameSize, err == pvnet.ErrNoBuffers && long: // ErrNoBuffers: the vif cannot supply pages even for one segment
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

// keep removes the first done frames, which the vif has taken over or which were released.
func (f *feeder) keep(done int) {
	f.n = copy(f.frames[:], f.frames[done:f.n])
	f.ready -= done
}
