package telemetry

import "fmt"

// Stats are the counters of a device: the sums over its queues, and those of each queue.
type Stats struct {
	RX, TX Values
	Queues []Queue
}

// String prints both directions, as [Values.String] does.
func (s Stats) String() string { return fmt.Sprintf("rx: %v; tx: %v", s.RX, s.TX) }

// Queue is the counters of one queue.
type Queue struct{ RX, TX Values }

// Sum makes the Stats of queues and takes the slice over.
func Sum(queues []Queue) Stats {
	st := Stats{Queues: queues}
	for i := range queues {
		st.RX.add(&queues[i].RX)
		st.TX.add(&queues[i].TX)
	}
	return st
}

// Unaccounted returns how many frames of one direction of a vif neither end accounts for:
// sent, but neither received nor lost. It is 0 at rest, and negative if frames were
// counted twice.
//
// Each frame is counted once. The receiving end counts it as received or, by reason, as
// lost. The sender counts a frame that had no answer when the connection ended:
// [DropDisconnected]. Other frames that a sender counts as lost the receiver counts too:
// one end told the other.
func Unaccounted(sent, received *Values) int64 {
	return int64(sent.Get(Packets) - sent.Lost(DropDisconnected) - received.Get(Packets) - received.Dropped() - received.Errors())
}

// Values are the words of one block, or the sum of several.
type Values struct{ words [BlockWords]uint64 }

// ValuesOf makes Values of a block's words, as read from a mirror.
func ValuesOf(words *[BlockWords]uint64) Values { return Values{*words} }

// additive are the ranges of words that are summed over queues and start from the
// baseline: all but the markers and the gauges.
var additive = [...][2]int{{1, int(endReasons)}, {int(endGauges), wordStart}}

// add adds o to v. For ring_used_max it takes the maximum; other gauges are summed.
func (v *Values) add(o *Values) {
	for w := 1; w < wordStart; w++ {
		if w == int(RingUsedMax) {
			v.words[w] = max(v.words[w], o.words[w])
		} else {
			v.words[w] += o.words[w]
		}
	}
}

// Packets returns the number of frames that were moved.
func (v Values) Packets() uint64 { return v.words[Packets] }

// Bytes returns the number of bytes in the moved frames, Ethernet headers included.
func (v Values) Bytes() uint64 { return v.words[Bytes] }

// String prints packets, bytes and, unless they are 0, dropped frames and errors.
func (v Values) String() string {
	s := fmt.Sprintf("%d packets, %d bytes", v.Packets(), v.Bytes())
	if n := v.Dropped(); n > 0 {
		s += fmt.Sprintf(", %d dropped", n)
	}
	if n := v.Errors(); n > 0 {
		s += fmt.Sprintf(", %d errors", n)
	}
	return s
}

// Get returns the value of c.
func (v Values) Get(c Counter) uint64 { return v.words[c] }

// Errors returns the number of frames lost because something was wrong with them.
func (v Values) Errors() uint64 { return v.words[errorsSum] }

// Dropped returns the number of correct frames that were lost.
func (v Values) Dropped() uint64 { return v.words[droppedSum] }

// Lost returns the number of frames lost for reason r.
func (v Values) Lost(r Reason) uint64 { return v.words[r] }

// Gauge returns the value of g.
func (v Values) Gauge(g Gauge) uint64 { return v.words[g] }

// Field returns the value of f, which must not be a histogram.
func (v Values) Field(f Field) uint64 { return v.words[f.Word] }

// Histogram returns the counts of f's buckets, not cumulated, and the sum of the observed
// values. The slice is the caller's.
func (v Values) Histogram(f Field) (buckets []uint64, sum uint64) {
	n := len(f.Bounds) + 1
	return append([]uint64(nil), v.words[f.Word:f.Word+n]...), v.words[f.Word+n]
}
