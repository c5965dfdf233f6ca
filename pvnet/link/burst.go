package link

import (
	"errors"

	"barevif/pvnet"
)

// bursts is a link that can move several frames in one system call. An error says why it
// cannot do so on this system.
type bursts interface {
	readBursts() (burstReader, error)
	writeBursts() (burstWriter, error)
}

// A burstReader reads up to batch frames at once. It belongs to one goroutine.
type burstReader interface {
	// add makes the next read fill bufs with a frame, as [Link].ReadFrame does. bufs has
	// at most vifPieces+1 elements.
	add(bufs [][]byte)

	// read reads the frames that are there into the added buffers. It returns a reading
	// for each add, in the order in which the link received the frames. If wait is true
	// it waits for a first frame, otherwise it returns errNone if there is none. Other
	// errors are those of ReadFrame. The readings are valid until the next add.
	read(wait bool) ([]reading, error)

	// room returns MaxFrame bytes of memory, for the part of the frame of add i that does
	// not fit elsewhere. It is valid until close.
	room(i int) []byte

	// minBurst returns from how many frames on a call of read is cheaper than single reads.
	minBurst() int

	// broken returns why the reader can no longer be used, or nil. The readings so far
	// are valid.
	broken() error

	close()
}

// A reading is the result of one ReadFrame in a burst. The error is errNone if there was no
// frame.
type reading struct {
	slot int // number of the add whose buffers hold the frame; readings may be in another order
	n    int
	off  Offload
	err  error
}

// A burstWriter writes up to batch frames at once. It belongs to one goroutine.
type burstWriter interface {
	// add makes the next write send a frame, as [Link].WriteFrame does, or returns an
	// error of WriteFrame. bufs has at most vifPieces elements.
	add(off Offload, bufs [][]byte) error

	// write sends the added frames in order and returns for each the error of WriteFrame,
	// or errWait. The errors are valid until the next add.
	write() []error

	// broken returns why the writer can no longer be used, or nil.
	broken() error

	close()
}

// errWait is the error of a frame that was not written because the link had no room.
var errWait = errors.New("link: no room for the frame")

// logNoBursts logs once that each frame of a link takes a system call.
func (j *Joint) logNoBursts(dev *pvnet.Device, l Link, why error) {
	if !j.single.Swap(true) {
		dev.Logger().Debug("each frame of the interface takes a system call", "vif", dev.ID(), "peer", dev.Peer(),
			"interface", l.Name(), "error", why)
	}
}

// A sink writes frames of a vif to a link.
type sink struct {
	j     *Joint
	dev   *pvnet.Device
	l     Link
	burst burstWriter // nil: each frame takes a call of WriteFrame
	down  bool        // the link said so, and has taken no frame since

	bufs [vifPieces][]byte
	errs [batch]error
}

func (j *Joint) newSink(dev *pvnet.Device, l Link) *sink {
	s := &sink{j: j, dev: dev, l: l}
	b, ok := l.(bursts)
	if !ok {
		return s
	}
	var err error
	if s.burst, err = b.writeBursts(); err != nil {
		s.burst = nil
		j.logNoBursts(dev, l, err)
	}
	return s
}

func (s *sink) close() {
	if s.burst != nil {
		s.burst.close()
		s.burst = nil
	}
}

// deliver writes frames. It returns how many the link took and how many of these were GSO
// frames, and the error after which it takes no more.
func (s *sink) deliver(frames []pvnet.Frame) (sent, gso uint64, end error) {
	for i, err := range s.write(frames) {
		switch {
		case err == nil:
			sent++
			if frames[i].GSO().Size != 0 {
				gso++
			}
			s.down = false
		case err == ErrDown && !s.down:
			// The kernel reports this once, to the first that asks. Wake the
			// reader so that it learns of it, too.
			s.down = true
			_ = s.l.SetReadDeadline(past)
		case err == ErrSize:
			s.j.logBeyondLink(s.dev, s.l, frames[i].Len())
		case final(err) && end == nil:
			end = err
		}
	}
	return sent, gso, end
}

// write writes frames in order and returns the error of each. It may stop at a final error;
// the errors then end with it.
func (s *sink) write(frames []pvnet.Frame) []error {
	if s.burst == nil || len(frames) == 1 {
		for i := range frames {
			if s.errs[i] = s.one(&frames[i]); final(s.errs[i]) {
				return s.errs[:i+1]
			}
		}
		return s.errs[:len(frames)]
	}
	for i := range frames {
		off, ok := offloadOf(&frames[i])
		if !ok {
			s.errs[i] = ErrOffload
			continue
		}
		s.errs[i] = s.burst.add(off, pieces(&frames[i], s.bufs[:0]))
	}
	errs := s.burst.write()
	for i := range frames {
		if s.errs[i] != nil {
			continue
		}
		s.errs[i], errs = errs[0], errs[1:]
		if s.errs[i] == errWait {
			s.errs[i] = s.one(&frames[i])
		}
	}
	if why := s.burst.broken(); why != nil {
		s.close()
		s.j.logNoBursts(s.dev, s.l, why)
	}
	return s.errs[:len(frames)]
}

// one writes one frame. A frame whose headers contradict its offload gets ErrOffload.
func (s *sink) one(f *pvnet.Frame) error {
	off, ok := offloadOf(f)
	if !ok {
		return ErrOffload
	}
	_, err := s.l.WriteFrame(off, pieces(f, s.bufs[:0]))
	return err
}

// An arrival is a frame of a burst. Its first bytes, up to the feeder's size, are in a frame
// of the vif; the rest is in whole at the same offset.
type arrival struct {
	n     int
	off   Offload
	whole []byte
}

// readBurst reads up to k frames of the link at once. full means that there were k.
func (f *feeder) readBurst(k int, wait bool) (full bool, err error) {
	for i := range k {
		f.burst.add(append(pieces(&f.frames[f.ready+i], f.bufs[:0]), f.burst.room(i)[f.size:]))
	}
	got, err := f.burst.read(wait)
	if err != nil {
		err = f.failed(err)
	}
	f.arrange(got)
	in, filled, long := f.in[:0], 0, false
	for i := range got {
		r := &got[i]
		if r.err == errNone {
			continue
		}
		filled++
		if r.err != nil {
			if e := f.failed(r.err); e != nil {
				err = e // the last error wins, as with single reads
			}
			continue
		}
		f.errs, f.odd = 0, 0
		long = long || r.off.GSO != GSONone
		to := f.ready + len(in)
		f.frames[to], f.frames[f.ready+i] = f.frames[f.ready+i], f.frames[to]
		in = append(in, arrival{r.n, r.off, f.burst.room(r.slot)})
	}
	switch {
	case long: // a long frame is worth a call of its own, with one buffer that stays in the cache
		f.want = 1
	case filled < k:
		f.want = max(filled+1, 2) // one more, to see that there are no further frames
	case k == f.want:
		f.want = min(2*k, batch)
	}
	if e := f.take(in); e != nil {
		err = e
	}
	if why := f.burst.broken(); why != nil {
		f.close()
		f.j.logNoBursts(f.dev, f.l, why)
	}
	return filled == k, err
}

// arrange puts frames[ready:] into the order of the readings.
func (f *feeder) arrange(got []reading) {
	for i := range got {
		if got[i].slot != i {
			var was [batch]pvnet.Frame
			frames := f.frames[f.ready : f.ready+len(got)]
			copy(was[:], frames)
			for i := range got {
				frames[i] = was[got[i].slot]
			}
			return
		}
	}
}

// take makes the arrived frames ready. They are in frames[ready:], in order.
func (f *feeder) take(in []arrival) error {
	moved := false // the remaining arrivals are complete in whole
	for i := range in {
		a := &in[i]
		if (a.off.GSO != GSONone || a.n > f.size) && !moved {
			// A long or large frame needs other frames of the vif. To get them, the
			// feeder may have to release the frames behind it, so copy them first.
			moved = true
			for k := range in[i:] {
				b := &in[i+k]
				f.frames[f.ready+k].CopyTo(b.whole[:min(b.n, f.size)])
			}
		}
		if err := f.takeOne(a, moved); err != nil {
			f.j.unfed.Add(uint64(len(in) - i - 1))
			return err
		}
	}
	return nil
}

func (f *feeder) takeOne(a *arrival, moved bool) error {
	whole := a.whole[:a.n]
	switch {
	case a.n < pvnet.MinFrame:
		f.drop(tooShort, &f.j.uncut)
		if !moved {
			f.discard()
		}
		return nil
	case a.off.GSO != GSONone:
		if err := f.long(whole, a.off); err != nil {
			return err
		}
		return f.flush() // as fill does behind a long frame
	case a.n > f.size:
		return f.large(whole, a.off)
	case moved:
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
		f.frames[f.ready].CopyFrom(whole)
	}
	frame := &f.frames[f.ready]
	frame.Truncate(a.n)
	f.finish(a.off, a.n, pieces(frame, f.bufs[:0]))
	return nil
}

// close closes the burst reader, if any. From then on each frame takes a read.
func (f *feeder) close() {
	if f.burst != nil {
		f.burst.close()
		f.burst = nil
	}
}
