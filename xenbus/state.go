package xenbus

import (
	"fmt"

	"barevif/xenbus/xenstore"
)

// A State is how far one end of a device has come (enum xenbus_state of
// xen/include/public/io/xenbus.h). Both ends publish theirs under "state".
type State uint8

const (
	Unknown       State = 0 // also a value that is no state
	Initialising  State = 1
	InitWait      State = 2 // backend: features published, waiting for the frontend
	Initialised   State = 3
	Connected     State = 4
	Closing       State = 5
	Closed        State = 6
	Reconfiguring State = 7
	Reconfigured  State = 8 // counts as connected: Linux netback stays in it
)

var stateNames = [...]string{
	"Unknown", "Initialising", "InitWait", "Initialised", "Connected", "Closing",
	"Closed", "Reconfiguring", "Reconfigured",
}

func (s State) String() string {
	if int(s) >= len(stateNames) {
		return fmt.Sprintf("State(%d)", uint8(s))
	}
	return stateNames[s]
}

// up says whether an end in this state moves frames.
func (s State) up() bool { return s == Connected || s == Reconfiguring || s == Reconfigured }

// parseState reads what a peer wrote; garbage is Unknown.
func parseState(s string) State {
	n, err := xenstore.ParseUint(s, uint64(Reconfigured))
	if err != nil {
		return Unknown
	}
	return State(n)
}

// value is a State as it is written.
func (s State) value() string { return fmt.Sprint(uint8(s)) }

// A Role says which end of a device we are.
type Role uint8

const (
	Frontend Role = iota // uses the device, shares its memory
	Backend              // serves it
)

func (r Role) String() string {
	if r == Backend {
		return "backend"
	}
	return "frontend"
}

// An Action is what an end has to do before it writes its next state. Doing one
// again must be harmless.
type Action uint8

const (
	// Wait: nothing, until something changes. Frames do not move.
	Wait Action = iota
	// Prepare (backend): publish the features. Nothing is attached.
	Prepare
	// Connect: read what the other end published and set up the rings. A frontend
	// publishes its own keys here too. From now on Facts.Attached is set.
	Connect
	// Run: the link is up, frames move. Every other Action means it is down.
	Run
	// Drain: stop moving frames. The rings stay: the other end may still use them.
	Drain
	// Release: give up all that is shared. From now on Facts.Attached is 0.
	Release
	// Finish: nothing is shared and there is nothing left to do.
	Finish
)

var actionNames = [...]string{"Wait", "Prepare", "Connect", "Run", "Drain", "Release", "Finish"}

func (a Action) String() string {
	if int(a) >= len(actionNames) {
		return fmt.Sprintf("Action(%d)", uint8(a))
	}
	return actionNames[a]
}

// A Step is what one end does next: Do, and after that write State.
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

// A Change is what xenstore says of a device.
type Change struct {
	Own, Peer State

	// Overwritten is what is found in the node of our state, quoted, when another
	// domain or an operator has written over it; else "". Own is then the state we
	// wrote, and SetState(Own) puts it right. xenstore does not say who wrote.
	Overwritten string

	// Generation counts the other ends this device has had, from 1: it grows when
	// our directory was made anew or names another backend. What was attached to
	// an earlier one is of no use.
	Generation uint32

	// Online is false once the toolstack takes the device away. A frontend sees it
	// when the backend is Closed, and takes it for true when it may not.
	Online bool

	// Hotplug (backend): hotplug-status is "connected", so Connected may be said.
	Hotplug bool

	// SawClosing: the peer was Closing since we last wrote Initialising or
	// Connected. Linux netback writes Connected over it when a connect failed.
	SawClosing bool

	// PeerWrites counts the writes of the peer's state that were noticed, also of what
	// it was already. Some happen between two looks: a peer that is Connected both
	// times, and wrote, may be in another connection than it was.
	PeerWrites uint64

	// Vanished: the peer's state is not there, or not for us to read, as after a
	// hot-unplug.
	Vanished bool

	// Gone: our own directory is not there.
	Gone bool

	// Lost: another process has claimed our directory. Nothing may be written.
	Lost bool
}

// Facts are all that [Next] decides by.
type Facts struct {
	Change

	// Attached is the Generation whose rings are set up, 0 if there are none.
	Attached uint32

	// Leaving: we want to end, not to connect again.
	Leaving bool

	// Adopt (backend): if a backend before us died connected, attach to the
	// frontend's live rings. Linux netfront survives this and no other restart.
	// Requests the dead backend had answered out of order are lost.
	Adopt bool
}

func (f *Facts) attached() bool { return f.Attached != 0 }
