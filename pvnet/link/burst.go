package link

import (
	"errors"

	"barevif/pvnet"
)

// bursts is what a link can do that moves several frames in one system call. An error
// says why it cannot, here.
type bursts interface {
	readBursts() (burstReader, error)
	writeBursts() (burstWriter, error)
}

// A burstReader reads up to batch frames at once. It belongs to one goroutine.
type burstReader interface {
	// add has the next read fill bufs with a frame, as [Link].ReadFrame does. bufs is
	// vifPieces+1 long at most.
	add(bufs [][]byte)

	// read reads frames into what was added, as long as there are any. The readings, one
	// for each, are in the order of the frames.
	// With wait it waits for one; without, errNone says that there is none. Other errors
	// are those of ReadFrame. The readings are good until add.
	read(wait bool) ([]reading, error)

	// room is memory for what of frame i has no room elsewhere, MaxFrame bytes, until
	// close.
	room(i int) []byte

	// least is how many frames are worth a call of read; fewer are read one by one.
	least() int

	// broken says why it is of no use any more. What it has read before is good.
	broken() error

	close()
}

// A reading is what ReadFrame returns. The error is errNone where no frame was read.
type reading struct {
	slot int // the frame, by when it was added; they may come in another order
	n    int
	off  Offload
	err  error
}

// A burstWriter writes up to batch frames at once. It belongs to one goroutine.
type burstWriter interface {
	// add has the next write write a frame, as [Link].WriteFrame does, unless it returns
	// an error of that. bufs is vifPieces long at most.
	add(off Offload, bufs [][]byte) error

	// write writes what was added, in that order, and returns WriteFrame's error for
	// each, or errWait. The errors are good until add.
	write() []error

	// broken says why it is of no use any more.
	broken() error

	close()
}

// errWait is the error of a frame that was not written and has to wait for room.
var errWait = errors.New("link: no room for the frame")

// tellSingle says once that frames of a link are moved one by one.
func (j *Joint) tellSingle(dev *pvnet.Device, l Link, why error) {
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
	burst burstWriter // nil: one by one

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
		j.tellSingle(dev, l, err)
	}
	return s
}

func (s *sink) close() {
	if s.burst != nil {
		s.burst.close()
		s.burst = nil
	}
}

// write writes frames in order and returns the error of each. Behind one that is final
// frames may not have been tried, and have none.
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
		off, ok := leftOf(&frames[i])
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
		s.j.tellSingle(s.dev, s.l, why)
	}
	return s.errs[:len(frames)]
}

// one writes a frame. One whose headers contradict it is as good as refused.
func (s *sink) one(f *pvnet.Frame) error {
	off, ok := leftOf(f)
	if !ok {
		return ErrOffload
	}
	_, err := s.l.WriteFrame(off, pieces(f, s.bufs[:0]))
	return err
}

// An arrival is a frame that a burst has read. Beyond the feeder's size it lies in whole.
type arrival struct {
	n     int
	off   Offload
	whole []byte
}

// readBurst reads up to k frames of the link at once. full says that there were as many.
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
				err = e // that of the last frame, as they would be read one by one
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
	case long: // such a frame is worth a call of its own, and one place in the cache
		f.want = 1
	case filled < k:
		f.want = max(filled+1, 2) // the last one sees that there are no more
	case k == f.want:
		f.want = min(2*k, batch)
	}
	if e := f.take(in); e != nil {
		err = e
	}
	if why := f.burst.broken(); why != nil {
		f.close()
		f.j.tellSingle(f.dev, f.l, why)
	}
	return filled == k, err
}

// arrange brings the frames into the order of the readings.
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

// take makes what arrived ready. The frames are frames[ready:], in their order.
func (f *feeder) take(in []arrival) error {
	moved := false // what is left of them lies in whole
	for i := range in {
		a := &in[i]
		if (a.off.GSO != GSONone || a.n > f.size) && !moved {
			// It takes other frames, for which those behind it may have to make room.
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
	case a.n < MinFrame:
		f.drop(tooShort, &f.j.uncut)
		if !moved {
			f.discard()
		}
		return nil
	case a.off.GSO != GSONone:
		if err := f.long(whole, a.off); err != nil {
			return err
		}
		return f.flush() // as fill has it done behind a long one
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

// close gives the burst back: from here on frames are read one by one.
func (f *feeder) close() {
	if f.burst != nil {
		f.burst.close()
		f.burst = nil
	}
}
