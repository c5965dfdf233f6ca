package telemetry

import (
	"fmt"
	"hash/fnv"
	"strconv"
)

// Dir is the direction of a block. It has the same sense at both ends: RX counts the
// frames this end gives to its local user, TX the frames its user gave it. So a backend's
// RX is the frontend's transmit ring.
type Dir uint8

const (
	RX Dir = iota
	TX
)

func (d Dir) String() string {
	if d == TX {
		return "tx"
	}
	return "rx"
}

// Kind is the meaning of a field's words.
type Kind uint8

const (
	KindCounter   Kind = iota // grows, and wraps at 2^64
	KindGauge                 // the latest value
	KindHistogram             // a word per bucket, then the sum of the values
)

func (k Kind) String() string {
	switch k {
	case KindCounter:
		return "counter"
	case KindGauge:
		return "gauge"
	default:
		return "histogram"
	}
}

// A Counter is a field that only grows. Its value is the index of its word in the block.
type Counter uint8

const (
	_ Counter = iota // word 0 is the generation marker gen_done

	Packets
	Bytes
	errorsSum  // sum of the reasons from DropTooLong on; written by Drop only
	droppedSum // sum of the other reasons; written by Drop only
	Multicast
	Broadcast

	Slots
	ChainedPackets
	ExtraInfos
	GSOPackets
	GSOCsumFixup
	CsumPartial
	CsumVerified
	CopiedBytes
	LentPackets
	HashedPackets
	AllocFailed
	RingFull

	Polls
	PollsFull
	Parks
	Events
	EventsSpurious
	NotifiesSent
	NotifiesSpared
	RescuedWakeups
	Stalls
	Violations
	CarrierOff

	GrantOps
	GrantBatches
	GrantErrors
	PagesQuarantined
	Undelivered

	MirrorHealed // written by Refresh only

	CreditWaits
	CreditWaited
	Filtered

	endCounters
)

// A Reason says why a frame was lost. Every reason is a counter of its own and is also
// added to dropped (the frame was correct) or to errors. There is no reason for a lack of
// pages or link, or for a moment's lack of slots: such a frame is not lost but waits, at
// the sender or in the ring; alloc_failed, ring_full and stalls count that.
type Reason uint8

const (
	DropDisconnected = Reason(endCounters) + iota
	DropGuestStalled

	// Reasons from here on count as errors.

	DropTooLong
	DropTooShort
	DropBadChain
	DropBadGref
	DropBadOffset
	DropBadExtra
	DropBadGSO
	DropBadCsum
	DropBadID
	DropBackendError

	endReasons

	firstError = DropTooLong
)

// String returns the name of the reason's counter, without direction: "drop_bad_gso".
func (r Reason) String() string {
	if r < DropDisconnected || r >= endReasons {
		return "Reason(" + strconv.Itoa(int(r)) + ")"
	}
	return texts[r].name
}

// sum returns the counter that includes r.
func (r Reason) sum() Counter {
	if r < firstError {
		return droppedSum
	}
	return errorsSum
}

// A Gauge is a field that holds the latest value.
type Gauge uint8

const (
	RingSize = Gauge(endReasons) + iota
	RingUsed
	RingUsedMax
	BuffersFree
	RateLimit // of queue 0 only

	endGauges
)

// A Hist is a histogram with buckets that double in width.
type Hist uint8

const (
	FrameSize     Hist = iota // bytes
	BatchSize                 // frames a poll or Send moved
	RingOccupancy             // slots in use, observed once per poll

	// RequestLatency is the time in nanoseconds from a request to its response, for at
	// most one request a second. A sending frontend measures from the publish of the
	// request until it sees the response. It counts a time only if at least half of it is
	// known to be the peer's, so a sender that rarely looks gives none. A backend
	// measures in both directions, from taking the requests of a batch to the publish of
	// their responses. A receiving frontend has none: a posted page is answered when a
	// frame comes, so the time would only show how idle the link is.
	RequestLatency

	endHists
)

// BlockWords is the number of 64-bit words in a block: 1024 bytes, so that blocks
// of different writers never share a cache line or an adjacent-line prefetch.
const BlockWords = 128

const (
	wordDone  = 0              // gen_done: first word
	wordStart = BlockWords - 1 // gen_start: last word
	wordHists = uint8(endGauges)
)

// shape places a histogram in the block. The buckets begin at word; their bounds are
// 2^shift, 2^(shift+1) and so on. Then follow a bucket without a bound, and the sum.
type shape struct{ word, shift, last, sum uint8 }

var shapes = [endHists]shape{
	FrameSize:      {word: wordHists, shift: 6, last: 11, sum: wordHists + 12},       // 64 to 65536
	BatchSize:      {word: wordHists + 13, shift: 0, last: 9, sum: wordHists + 23},   // 1 to 256
	RingOccupancy:  {word: wordHists + 24, shift: 0, last: 9, sum: wordHists + 34},   // 1 to 256
	RequestLatency: {word: wordHists + 35, shift: 10, last: 13, sum: wordHists + 49}, // 1 us to 4 ms
}

// A Field describes one field of a block. The table of all fields is the single source of
// the layout, the text formats, the BTF of a BPF map and the documentation page.
type Field struct {
	Name   string // without direction: "packets" is rx_packets and tx_packets
	Unit   string // "frames", "bytes", "nanoseconds", ...
	Help   string // one line, no trailing full stop
	Kind   Kind
	SumIn  string   // for a reason: the name of the sum that includes it
	Word   int      // index of its first word in the block
	Bounds []uint64 // for a histogram: inclusive upper bounds of all buckets but the last
}

// Words returns how many words of the block the field takes.
func (f Field) Words() int {
	if f.Kind == KindHistogram {
		return len(f.Bounds) + 2
	}
	return 1
}

// FullName returns the name in direction d: "rx_packets".
func (f Field) FullName(d Dir) string { return d.String() + "_" + f.Name }

// Metric returns the name of the field's OpenMetrics family in direction d:
// "barevif_rx_packets". The name of a histogram ends in its unit.
func (f Field) Metric(d Dir) string {
	m := "barevif_" + f.FullName(d)
	if f.Kind == KindHistogram {
		m += "_" + f.Unit
	}
	return m
}

// LE returns the bound of bucket i as OpenMetrics writes it: "64.0", "4.194304e+06",
// "+Inf".
func (f Field) LE(i int) string {
	if i >= len(f.Bounds) {
		return "+Inf"
	}
	if f.Bounds[i] >= 1e6 {
		return strconv.FormatFloat(float64(f.Bounds[i]), 'e', -1, 64)
	}
	return strconv.FormatUint(f.Bounds[i], 10) + ".0"
}

// Bucket returns the name of bucket i of a histogram, or of its sum: "le_64", "inf",
// "sum".
func (f Field) Bucket(i int) string {
	switch {
	case i < len(f.Bounds):
		return "le_" + strconv.FormatUint(f.Bounds[i], 10)
	case i == len(f.Bounds):
		return "inf"
	default:
		return "sum"
	}
}

type text struct{ name, unit, help string }

var texts = [wordHists]text{
	Packets:        {"packets", "frames", "frames received without an error, or taken to be sent"},
	Bytes:          {"bytes", "bytes", "bytes of those frames, Ethernet header included, without FCS"},
	errorsSum:      {"errors", "frames", "frames lost because something was wrong; the sum of its reasons"},
	droppedSum:     {"dropped", "frames", "frames lost with which nothing was wrong; the sum of its reasons"},
	Multicast:      {"multicast", "frames", "frames to a group address other than broadcast"},
	Broadcast:      {"broadcast", "frames", "frames to ff:ff:ff:ff:ff:ff"},
	Slots:          {"slots", "slots", "ring slots used"},
	ChainedPackets: {"chained_packets", "frames", "frames of more than one slot"},
	ExtraInfos:     {"extra_infos", "slots", "extra-info slots"},
	GSOPackets:     {"gso_packets", "frames", "frames longer than the MTU, to be segmented"},
	GSOCsumFixup:   {"gso_checksum_fixup", "frames", "GSO frames whose checksum had to be completed first"},
	CsumPartial:    {"csum_partial", "frames", "frames whose checksum is left to the receiver"},
	CsumVerified:   {"csum_verified", "frames", "frames the peer says it has verified"},
	CopiedBytes:    {"copied_bytes", "bytes", "bytes copied by this end"},
	LentPackets:    {"lent_packets", "frames", "frames passed in shared pages, without a copy"},
	HashedPackets:  {"hashed_packets", "frames", "frames that came, or were sent by a backend, with a hash of their flow"},
	AllocFailed:    {"alloc_failed", "failures", "times no page was free; a frame need not be lost by it"},
	RingFull:       {"ring_full", "failures", "times the ring had no room"},
	Polls:          {"polls", "polls", "looks at the ring"},
	PollsFull:      {"polls_full", "polls", "looks that filled the batch they were given; more may have waited"},
	Parks:          {"parks", "parks", "times the owner slept"},
	Events:         {"events", "events", "event channel signals that ended a wait; one for both directions counts once"},
	EventsSpurious: {"events_spurious", "events", "signals after which there was nothing to do"},
	NotifiesSent:   {"notifies_sent", "notifies", "signals sent to the peer"},
	NotifiesSpared: {"notifies_spared", "notifies", "publishes after which the peer asked for no signal"},
	RescuedWakeups: {"rescued_wakeups", "wakeups", "times the watchdog found work nobody signalled; 0 unless the peer floods us with events"},
	Stalls:         {"stalls", "stalls", "times a sender needed more slots than were free and the peer gave none for a second"},
	Violations:     {"violations", "violations", "things no correct peer could have done"},
	CarrierOff:     {"carrier_off", "times", "times a frontend took nothing for the stall time, and its backend turned the carrier off"},
	GrantOps:       {"grant_ops", "operations", "grant copy operations"},
	GrantBatches:   {"grant_batches", "batches", "batches of grant copies, one hypercall or less each"},
	GrantErrors:    {"grant_errors", "operations", "grant copy operations that failed"},

	PagesQuarantined: {"pages_quarantined", "pages", "pages the peer would not give back, never used again"},
	Undelivered:      {"undelivered", "frames", "frames lost between the vif and what it is joined to; in no sum"},
	CreditWaits:      {"credit_waits", "waits", "times the next frame had to wait for credit under the vif's rate limit"},
	CreditWaited:     {"credit_waited", "nanoseconds", "how long frames waited for credit; added when the wait is over"},
	Filtered:         {"filtered", "frames", "not sent, to multicast groups that the frontend has not joined; in no sum"},
	MirrorHealed:     {"mirror_healed", "words", "words of the mirror found changed by somebody else and written again"},

	DropDisconnected: {"drop_disconnected", "frames", "in flight when the connection ended"},
	DropGuestStalled: {"drop_guest_stalled", "frames", "waited for the drain time for a frontend that took none"},
	DropTooLong:      {"drop_too_long", "frames", "longer than allowed"},
	DropTooShort:     {"drop_too_short", "frames", "shorter than an Ethernet header"},
	DropBadChain:     {"drop_bad_chain", "frames", "too many slots, or a chain without an end"},
	DropBadGref:      {"drop_bad_gref", "frames", "the grant copy or map failed"},
	DropBadOffset:    {"drop_bad_offset", "frames", "offset and size leave the page"},
	DropBadExtra:     {"drop_bad_extra", "frames", "unknown or malformed extra info"},
	DropBadGSO:       {"drop_bad_gso", "frames", "impossible segmentation parameters"},
	DropBadCsum:      {"drop_bad_csum", "frames", "checksum state that does not fit the frame"},
	DropBadID:        {"drop_bad_id", "frames", "answered with an id that was not outstanding; the connection ends"},
	DropBackendError: {"drop_backend_error", "frames", "the backend answered with an error status"},

	RingSize:    {"ring_size", "slots", "slots in the ring"},
	RingUsed:    {"ring_used", "slots", "slots in use at the last poll"},
	RingUsedMax: {"ring_used_max", "slots", "most slots ever in use"},
	BuffersFree: {"buffers_free", "pages", "free pages at the last poll"},
	RateLimit:   {"rate_limit", "bytes", "bytes per second that the peer may send; 0: no limit. It holds for the vif, and is shown at queue 0"},
}

var histTexts = [endHists]text{
	FrameSize:      {"frame_size", "bytes", "frames by size"},
	BatchSize:      {"batch_size", "frames", "polls and sends by the frames they moved"},
	RingOccupancy:  {"ring_occupancy", "slots", "polls by the slots in use"},
	RequestLatency: {"request_latency", "nanoseconds", "time to a response, sampled: of the peer to a frontend, of a backend to a batch"},
}

// LayoutVersion is increased when a change of Fields changes the meaning of a word.
const LayoutVersion = 5

// Layout returns a hash of the meaning of every word of a block. A process that reads
// another's words compares it first.
func Layout() uint64 {
	h := fnv.New64a()
	for _, f := range Fields() {
		fmt.Fprintln(h, f.Word, f.Name, f.Kind, f.Bounds)
	}
	return h.Sum64()
}

// Fields returns the table, in the order of the words of a block. The slice is the
// caller's.
func Fields() []Field {
	out := make([]Field, 0, int(wordHists)+int(endHists))
	for w := 1; w < int(wordHists); w++ {
		f := Field{Name: texts[w].name, Unit: texts[w].unit, Help: texts[w].help, Word: w}
		switch {
		case w >= int(endReasons):
			f.Kind = KindGauge
		case w >= int(firstError):
			f.SumIn = texts[errorsSum].name
		case w >= int(endCounters):
			f.SumIn = texts[droppedSum].name
		}
		out = append(out, f)
	}
	for h, s := range shapes {
		f := Field{Name: histTexts[h].name, Unit: histTexts[h].unit, Help: histTexts[h].help,
			Kind: KindHistogram, Word: int(s.word)}
		for i := range s.last {
			f.Bounds = append(f.Bounds, 1<<(s.shift+i))
		}
		out = append(out, f)
	}
	return out
}
