package forward

import (
	"slices"
	"sync"
	"sync/atomic"

	"barevif/pvnet"
)

// An Input is one receiver's way into a [Sender]: a queue of frames for each queue of the vif.
// Its methods may be called from any goroutine. All frames of one receiver should take one
// Input, whatever number of queues that has, since each Input gets the same share of the vif.
type Input struct {
	s      *Sender
	src    *Source
	lanes  []*lane // by queue of the vif
	closed atomic.Bool
	counts counts
}

// vlanHeader is what a frame of the MTU's size has beside its payload: an Ethernet header with
// one tag.
const vlanHeader = 18

// Send takes over all frames and sends those that the vif has room for now; others wait in the
// Input's queue. The slice is the caller's again when Send returns, but its order and its
// values have changed. Frames may have other holders ([pvnet.Frame.Retain]).
//
// lost is how many frames it dropped before they were in a queue: counted in [Stats] as Full,
// Down, Oversize or Ended. The receiver should tell its device ([pvnet.RX.CountUndelivered]).
// Those that are dropped later are counted in the vif's counters in that way.
//
// With [Wait] it waits for room, until the Input, the Sender or the vif ends. err says why the
// Sender has ended: [ErrClosed], or what the vif returned. All later frames are lost too. It
// does not allocate, but for the Input's queue when the first frame has to wait.
func (in *Input) Send(frames []pvnet.Frame) (lost int, err error) {
	for len(frames) > 0 {
		k := min(len(frames), Batch)
		n, e := in.sendBatch(frames[:k])
		lost += n
		if e != nil {
			err = e
		}
		frames = frames[k:]
	}
	return lost, err
}

func (in *Input) sendBatch(frames []pvnet.Frame) (lost int, err error) {
	frames, lost = in.dropLong(frames)
	if len(frames) == 0 {
		return lost, nil
	}
	if in.s.dev.Active() < 2 {
		n, err := in.lanes[0].send(frames)
		return lost + n, err
	}
	var at [Batch]int
	same := true
	for i := range frames {
		at[i] = in.queueOf(&frames[i])
		same = same && at[i] == at[0]
	}
	if same {
		n, err := in.lanes[at[0]].send(frames)
		return lost + n, err
	}
	room := rooms.Get().(*[Batch]pvnet.Frame)
	defer rooms.Put(room)
	for left := len(frames); left > 0; {
		q, n := -1, 0
		for i := range frames {
			if q < 0 {
				q = at[i]
			}
			if q >= 0 && at[i] == q {
				room[n] = frames[i]
				n++
				at[i] = -1
			}
		}
		left -= n
		k, e := in.lanes[q].send(room[:n])
		lost += k
		if e != nil {
			err = e
		}
	}
	clear(room[:])
	return lost, err
}

// rooms has arrays for the frames of one queue.
var rooms = sync.Pool{New: func() any { return new([Batch]pvnet.Frame) }}

// queueOf returns the queue for a frame. One that is stale, which the vif refuses, takes the
// first.
func (in *Input) queueOf(f *pvnet.Frame) int {
	if !f.Valid() {
		return 0
	}
	return min(in.s.dev.QueueOf(f), len(in.lanes)-1)
}

// dropLong drops the frames that are too long for the vif, and returns the others.
func (in *Input) dropLong(frames []pvnet.Frame) (fit []pvnet.Frame, lost int) {
	most := in.s.dev.MTU() + vlanHeader
	for i := range frames {
		f := &frames[i]
		if f.Len() <= most || fits(f, most) {
			if lost > 0 {
				frames[i-lost] = *f
			}
			continue
		}
		f.Release() // a stale one is released already
		lost++
	}
	if lost > 0 {
		in.count(oversize, lost)
	}
	return frames[:len(frames)-lost], lost
}

// fits reports whether the segments of a long frame have at most so many bytes. What cannot be
// cut is left to the vif to refuse.
func fits(f *pvnet.Frame, most int) bool {
	g := f.GSO()
	if g.Size == 0 || !f.Valid() {
		return false
	}
	h, ok := f.Headers()
	return ok && h.L5+min(int(g.Size), h.End-h.L5) <= most
}

// count counts n frames.
func (in *Input) count(what kind, n int) {
	if n != 0 {
		in.counts[what].Add(int64(n))
		in.s.counts[what].Add(int64(n))
	}
}

// drop drops frames that are in no queue.
func (in *Input) drop(frames []pvnet.Frame, why kind) {
	for i := range frames {
		frames[i].Release() // it may be stale by a mistake of the one who gave it
	}
	in.count(why, len(frames))
}

// Stats returns the counts of the Input.
func (in *Input) Stats() Stats { return in.counts.stats() }

// Close drops the frames that wait in the Input and ends its calls of Send. At most [Batch]
// frames for each queue of the vif may still be sent. It is idempotent and returns nil.
func (in *Input) Close() error {
	if in.closed.Swap(true) {
		return nil
	}
	for _, l := range in.lanes {
		l.close() // which also wakes those that wait for room
	}
	s := in.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.inputs, in); i >= 0 {
		s.inputs = slices.Delete(s.inputs, i, i+1)
	}
	return nil
}
