package telemetry

import (
	"fmt"
	"time"
)

// A Role is the end of a vif that a device is.
type Role uint8

const (
	Frontend Role = iota // owns the vif, grants its memory to the backend
	Backend              // serves the vif
)

func (r Role) String() string { return r.Short() + "end" }

// Short returns the role as in names of mirrors: "front" or "back".
func (r Role) Short() string {
	if r == Backend {
		return "back"
	}
	return "front"
}

// Info names a device to a [Store].
type Info struct {
	Role   Role
	Own    uint16 // our domain id
	Peer   uint16 // the other end's domain id
	Handle uint32 // of the vif, as in xenstore
	Queues int    // number of queues to mirror; set by Set.Open
}

// Name returns the name of the device's mirrors: "front-3-0-0" is domain 3's end of its
// vif 0 with domain 0.
func (i Info) Name() string {
	return fmt.Sprintf("%s-%d-%d-%d", i.Role.Short(), i.Own, i.Peer, i.Handle)
}

// A State is how far one end of a device has come (enum xenbus_state of
// xen/include/public/io/xenbus.h). Package xenbus has constants for the states.
type State uint8

// StateNames are the names of the states, from 0.
var StateNames = [...]string{
	"Unknown", "Initialising", "InitWait", "Initialised", "Connected", "Closing",
	"Closed", "Reconfiguring", "Reconfigured",
}

func (s State) String() string {
	if int(s) >= len(StateNames) {
		return fmt.Sprintf("State(%d)", uint8(s))
	}
	return StateNames[s]
}

// Symbol returns the header's name of the state, such as "XenbusStateConnected", or
// "unknown" for a value that is no state.
func (s State) Symbol() string {
	if int(s) >= len(StateNames) {
		return "unknown"
	}
	return "XenbusState" + StateNames[s]
}

// Feature is a set of features negotiated with the peer, one per bit.
type Feature uint32

const (
	FeatureCsum Feature = 1 << iota // frames with partial IPv4 checksums pass
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
	FeatureHash // the backend hashes frames for the frontend
)

// FeatureNames are the names of the bits, from the lowest.
var FeatureNames = [...]string{
	"csum", "csum6", "gso4", "gso6", "scatter", "rx_copy", "multicast_control", "control_ring",
	"static_grants", "split_events", "lend_rx", "trusted", "hash",
}

// Status is the state of a device that a store shows beside its counters.
type Status struct {
	State    State
	Up       bool
	MAC      [6]byte
	MTU      uint32 // bytes
	Queues   uint32 // in use
	Epoch    uint64 // number of the connection, counted from 1
	Features Feature
}

// EventKind says what an [Event] reports.
type EventKind uint8

const (
	EventState      EventKind = iota + 1 // A: old state, B: new state
	EventViolation                       // A: slot or index, B: the value found there
	EventStall                           // A: slots that the sender is short of, B: nanoseconds without progress
	EventRescued                         // A: slots found waiting
	EventTamper                          // A: words healed
	EventReset                           // A: resets so far
	EventReconnect                       // A: epoch
	EventStallOver                       // A: slots that the sender is still short of, B: nanoseconds the stall lasted
	EventCarrierOff                      // B: nanoseconds without progress
	EventCarrierOn                       // B: nanoseconds that the carrier was off
)

// EventNames are the names of the kinds, from 0, which stands for no event.
var EventNames = [...]string{
	"none", "state", "violation", "stall", "rescued_wakeup", "tamper", "reset", "reconnect", "stall_over",
	"carrier_off", "carrier_on",
}

func (k EventKind) String() string { return nameOf(EventNames[:], int(k)) }

func nameOf(names []string, i int) string {
	if i < len(names) {
		return names[i]
	}
	return "unknown"
}

// NoQueue is the Queue of an event that concerns the whole device.
const NoQueue = -1

// An Event is an entry of the event log: something rare.
type Event struct {
	Seq   uint64 // from 1, without gaps
	Time  time.Time
	Kind  EventKind
	Queue int // or NoQueue
	A, B  uint64
}

// Reset is the baseline that [Set.Reset] set.
type Reset struct {
	Count              uint64
	Time               time.Time
	RxPackets, RxBytes uint64
	TxPackets, TxBytes uint64
}

// A Store provides memory outside the process's heap in which counters are mirrored.
type Store interface {
	// Open makes the mirror of one device. A store that cannot make its best kind of
	// Mirror makes a lesser one, whose Reason says why. The error says why it could make
	// none.
	Open(Info) (Mirror, error)
}

// A Mirror holds the counters of one device. The [Set] it is attached to calls its
// methods, one at a time.
type Mirror interface {
	// Words returns the [BlockWords] words of one block, which the Set writes until
	// Close, and the totals from which they continue: nil for none.
	Words(queue int, d Dir) (words, base []uint64)

	// Kind returns the kind of mirror, such as "memfd", and Reason why it is not a better
	// one: empty for the best kind.
	Kind() string
	Reason() string

	// Update shows status and reset, and that the device is alive. The Set calls it on
	// every change and once a second.
	Update(Status, Reset)

	// Record stores e beside the counters.
	Record(e Event)

	// Close removes the mirror. The Set no longer writes its words.
	Close() error
}
