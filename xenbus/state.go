package xenbus

import (
	"fmt"
	"strconv"

	"barevif/telemetry"
	"barevif/xenbus/xenstore"
)

// A State is how far one end of a device has come. Each end publishes its own under
// "state".
type State = telemetry.State

const (
	Unknown       State = 0 // also stands for a value that is no state
	Initialising  State = 1
	InitWait      State = 2 // backend: features published, waiting for the frontend
	Initialised   State = 3
	Connected     State = 4
	Closing       State = 5
	Closed        State = 6
	Reconfiguring State = 7
	Reconfigured  State = 8 // counts as connected: Linux netback stays in it
)

// isUp reports whether an end in state s moves frames.
func isUp(s State) bool { return s == Connected || s == Reconfiguring || s == Reconfigured }

// parseState parses a state node; a value that is no state gives Unknown.
func parseState(s string) State {
	n, err := xenstore.ParseUint(s, uint64(Reconfigured))
	if err != nil {
		return Unknown
	}
	return State(n)
}

// formatState returns s as it is written to the node.
func formatState(s State) string { return strconv.Itoa(int(s)) }

// A Role is the end of a device that a process plays.
type Role = telemetry.Role

const (
	Frontend = telemetry.Frontend
	Backend  = telemetry.Backend
)

// An Action is what an end does before it writes its next state. Doing an Action twice
// must be harmless.
type Action uint8

const (
	// Wait: do nothing until a fact changes. Frames do not move.
	Wait Action = iota
	// Prepare (backend): publish the features. Nothing is attached.
	Prepare
	// Connect: read the other end's keys and set up the rings. A frontend also publishes its
	// own keys, before its next state or together with it. Afterwards Facts.Attached is set.
	Connect
	// Run: the link is up and frames move. In every other Action the link is down.
	Run
	// Drain: stop moving frames. The rings stay, because the other end may still use
	// them.
	Drain
	// Release: give up everything shared. Afterwards Facts.Attached is 0.
	Release
	// Finish: nothing is shared and the device is at its end.
	Finish
)

var actionNames = [...]string{"Wait", "Prepare", "Connect", "Run", "Drain", "Release", "Finish"}

func (a Action) String() string {
	if int(a) >= len(actionNames) {
		return fmt.Sprintf("Action(%d)", uint8(a))
	}
	return actionNames[a]
}

// A Step is the next step of one end: it does Do and then writes State.
type Step struct {
	Do    Action
	State State // Unknown: write nothing
}

func (s Step) String() string {
	if s.State == Unknown {
		return s.Do.String()
	}
	return fmt.Sprintf("%v, then %v", s.Do, s.State)
}

// A Change is the state of a device as last read from xenstore.
type Change struct {
	Own, Peer State

	// Overwritten is the quoted value of our state node when another domain or an
	// operator wrote over it; else "". Own is then the state we wrote, and SetState(Own)
	// repairs the node. xenstore does not say who wrote.
	Overwritten string

	// Generation counts the peers of this device, from 1. It grows when our directory is
	// made again or names another backend. Rings attached in an earlier generation are
	// useless.
	Generation uint32

	// Online becomes false when the toolstack takes the device away. A frontend reads it
	// only from a backend that is Closed, and assumes true if it may not read it.
	Online bool

	// Hotplug (backend): hotplug-status is "connected", so we may write Connected.
	Hotplug bool

	// SawClosing: the peer was Closing at some time since we last wrote Initialising or
	// Connected. Linux netback replaces Closing by Connected after a failed connect.
	SawClosing bool

	// PeerWrites counts the writes of the peer's state that we noticed, also those that
	// did not change the value. A peer that we read as Connected twice, with a write in
	// between, may have started another connection.
	PeerWrites uint64

	// Settings counts what we noticed of writes to the keys of [Device.Follow]: the values
	// may have changed since it was smaller.
	Settings uint64

	// Vanished: the peer's state node does not exist or is not readable for us, as after
	// a hot-unplug.
	Vanished bool

	// Gone: our own directory does not exist.
	Gone bool

	// Lost: another process has claimed our directory. We must not write to it.
	Lost bool
}

// Facts are the input of [Next].
type Facts struct {
	Change

	// Attached is the Generation in which the rings were set up, 0 if there are none.
	Attached uint32

	// Leaving: the caller wants to end the device, not to connect again.
	Leaving bool

	// Adopt (backend): if an earlier backend process died connected, attach to the
	// frontend's live rings. Linux netfront survives this and no other restart. Requests
	// that the dead backend had answered out of order are lost.
	Adopt bool
}

func (f *Facts) attached() bool { return f.Attached != 0 }
