package telemetry

import "time"

// Role is the end of the vif a device is.
type Role uint8

const (
	Frontend Role = iota
	Backend
)

func (r Role) String() string {
	if r == Backend {
		return "back"
	}
	return "front"
}

// Info names a device to a [Store].
type Info struct {
	Role   Role
	Own    uint16 // our domain's number
	Peer   uint16 // the other end's domain
	Handle uint32 // of the vif, as in xenstore
	Queues int    // queues to make room for
}

// State is enum xenbus_state of xen/include/public/io/xenbus.h.
type State uint8

// Feature is a bit of what was negotiated with the peer.
type Feature uint32

const (
	FeatureCsum Feature = 1 << iota // partial IPv4 checksums pass
	FeatureCsum6
	FeatureGSO4
	FeatureGSO6
	FeatureScatter
	FeatureRxCopy
	FeatureMulticastControl
	FeatureControlRing
	FeatureStaticGrants
	FeatureSplitEvents
	FeatureLendRx
	FeatureTrusted
)

// Status is what a store shows of a device beside its counters.
type Status struct {
	State    State
	Up       bool
	MAC      [6]byte
	MTU      uint32 // bytes
	Queues   uint32 // in use
	Epoch    uint64 // number of the connection, from 1
	Features Feature
}

// EventKind says what an [Event] reports.
type EventKind uint8

const (
	EventState     EventKind = iota + 1 // A: old state, B: new state
	EventViolation                      // A: slot or index, B: what was found there
	EventStall                          // A: slots outstanding, B: nanoseconds without progress
	EventRescued                        // A: slots found waiting
	EventTamper                         // A: words healed
	EventReset                          // A: resets so far
	EventReconnect                      // A: epoch
)

var eventNames = [...]string{"none", "state", "violation", "stall", "rescued_wakeup", "tamper", "reset", "reconnect"}

func (k EventKind) String() string {
	if int(k) < len(eventNames) {
		return eventNames[k]
	}
	return "unknown"
}

// NoQueue is the Queue of an event of the whole device.
const NoQueue = -1

// An Event is one entry of the recorder: something rare worth remembering.
type Event struct {
	Seq   uint64 // from 1, without gaps
	Time  time.Time
	Kind  EventKind
	Queue int // or NoQueue
	A, B  uint64
}

// Reset is the baseline [Set.Reset] set.
type Reset struct {
	Count              uint64
	Time               time.Time
	RxPackets, RxBytes uint64
	TxPackets, TxBytes uint64
}

// A Store makes a place outside the process's heap where counters are mirrored.
type Store interface {
	// Open makes the mirror of one device. The error is for a device that must
	// not run, such as one another process owns; a store that can do less than
	// it would like gives a lesser Mirror that says why.
	Open(Info) (Mirror, error)
}

// A Mirror is the place of one device's counters. Words is called once a block;
// the methods from Update on may be called from any goroutine.
type Mirror interface {
	// Words gives the [BlockWords] words of one block, which belong to the Set
	// until Close, and the totals they are to continue from: nil for none.
	Words(queue int, d Dir) (words, base []uint64)

	// Kind is what the mirror is, "bpf" for instance, and Reason why it is not
	// a better one: empty for the best there is.
	Kind() string
	Reason() string

	// Update shows status and reset, and that the device is alive: it is called
	// on every change and once a second.
	Update(Status, Reset)

	// Record keeps e beside the counters.
	Record(e Event)

	// Close takes the mirror away. Nobody writes its words any more.
	Close() error
}
