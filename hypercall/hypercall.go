package hypercall

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"barevif/arena/shm"
)

// A DomID names a domain of this host. Xen reuses domids: a DomID is an address, not an
// identity.
type DomID uint16

// DomSelf is DOMID_SELF of xen/include/public/xen.h: the domain that makes the call.
const DomSelf DomID = 0x7FF0

// A GrantRef names a page that one domain lets another access. Xen reserves refs 0 to 7,
// so the zero GrantRef is never one of ours.
type GrantRef uint32

// A PortID names one end of an event channel within its domain. Ports are small integers
// that Xen reuses; 0 is never valid.
type PortID uint32

// Access says what the peer may do with a page we granted, or we with a page we mapped.
type Access uint8

const (
	ReadOnly Access = iota
	ReadWrite
)

func (a Access) String() string {
	if a == ReadWrite {
		return "read-write"
	}
	return "read-only"
}

// A Domain is the domain this program runs in. Any goroutine may call its methods. All of
// them but Copy are for set-up: they may take milliseconds.
//
// A domain that is suspended and then resumed, from a file or on another host, is a new
// domain of Xen, in which the program continues. All ports are closed then and all grants
// ended. The program learns it from xenstore, where the toolstack has made the domain's
// directory anew. A Waiter, Port, Share or Mapping of before is dead: Notify does nothing,
// Wait returns only for Wake, Close and the deadline, and Close, End and Release give back
// what is left. No call for it reaches another's port or page that has the same number now.
type Domain interface {
	// ID returns the domain's number. It changes when the domain is resumed.
	ID() DomID

	// Memory returns zeroed pages that no other domain can access. They may only be
	// reserved: [Mapping.Populate] makes the kernel back them with memory before their
	// first use.
	Memory(pages int) (*Mapping, error)

	// Share returns zeroed pages with one grant per page, all for the same peer with the
	// same access. The error is [ErrNoGrants] if the system has no grants left.
	Share(peer DomID, pages int, access Access) (*Share, error)

	// Map maps pages that the peer granted, in order, as one run of memory: all or none.
	// A ref that does not permit it gives a [*GrantError].
	Map(peer DomID, refs []GrantRef, access Access) (*Mapping, error)

	// Copy runs ops in order and sets the Status of each; a failed op does not stop the
	// others. With an error no Status means anything: the caller takes every op for failed,
	// although some may have run. Copy makes at most one system call per 256 ops and does
	// not allocate.
	Copy(ops []CopyOp) error

	// Waiter makes a Waiter, on which event channels are then opened.
	Waiter() (Waiter, error)

	// Store opens a connection to xenstore, with this domain as the client. The error
	// ErrClosed is final: the domain has ended.
	Store(ctx context.Context) (io.ReadWriteCloser, error)
}

// A ThreadDomain is a Domain that also has Waiters for goroutines that are locked to
// their threads (runtime.LockOSThread).
type ThreadDomain interface {
	Domain

	// ThreadWaiter is Waiter, but its Wait blocks the calling thread in the kernel.
	// Otherwise parking and waking a locked goroutine takes several thread switches. A
	// goroutine that is not locked occupies a thread while it waits.
	ThreadWaiter() (Waiter, error)
}

// A GroupDomain is a Domain in which one goroutine can wait for many Waiters at once.
type GroupDomain interface {
	Domain

	// Group makes an empty Group. onThread is for a goroutine that is locked to its
	// thread, as in [ThreadDomain].
	Group(onThread bool) (Group, error)
}

// A Group is where one goroutine at a time waits for the events of many Waiters. Waiters
// without events cost nothing, or a bit each that is looked at 64 at a time. Only that goroutine calls
// Wait, Poll and Rearm; any goroutine may call the other methods at any time.
type Group interface {
	// Add makes Wait return tag when a port of w has fired, also if it fired before. A tag
	// is from 0 to [MaxTag] and belongs to one Waiter of the Group. Until Remove nobody
	// may call w's own Wait, and its Wake does not end the Group's Wait. A Waiter is in
	// one Group at a time; closing the Waiter removes it.
	//
	// Errors: ErrGrouped, ErrClosed, and those of the operating system.
	Add(w Waiter, tag int) error

	// Remove takes w out of the Group if it is in it. A Wait that is running may still
	// return its tag. Ports that fired stay masked until w's own Wait, or Rearm in another
	// Group.
	Remove(w Waiter)

	// Wait parks until a Waiter has an event, Wake is called, or the deadline passes (the
	// zero Time: never). It fills tags with the tags of the Waiters that have events, each
	// once, and returns their number: 0 after a Wake. If tags is too short, the next call
	// returns the rest.
	//
	// The ports that fired stay masked, and Wait does not return their Waiter's tag
	// again, until Rearm.
	//
	// Errors: ErrDeadlineExceeded, ErrClosed.
	Wait(tags []int, deadline time.Time) (n int, err error)

	// Poll is a Wait that does not block: n is 0 if no Waiter has an event.
	Poll(tags []int) (n int, err error)

	// Rearm unmasks the ports of w that fired; events that came meanwhile count. worked
	// says whether the events brought any work; without work the unmasking is delayed as in
	// [Waiter].Wait. Rearm does nothing if no port fired or w is not in the Group.
	Rearm(w Waiter, worked bool) error

	// Wake makes the current Wait, or else the next, return.
	Wake()

	// Close removes every Waiter and ends Wait with ErrClosed. It is idempotent.
	Close() error
}

// MaxTag is the largest tag of a Waiter in a Group.
const MaxTag = 1<<16 - 1

// A Waiter is where one goroutine at a time waits for the event channels opened on it.
// Any goroutine may call Wake at any time.
//
// An event only says that there may be work. Several events may merge into one, and one
// may remain from a port that has been closed.
type Waiter interface {
	// Unbound opens a port to which peer may bind (EVTCHNOP_alloc_unbound).
	Unbound(peer DomID) (Port, error)

	// Bind opens a port that is connected to the peer's (EVTCHNOP_bind_interdomain). It
	// fires at once, so the first Wait returns.
	Bind(peer DomID, remote PortID) (Port, error)

	// Wait blocks until an event comes, Wake is called, or the deadline passes (the zero
	// Time: never). Events and Wakes from before the call count.
	//
	// A port that fired stays masked until the next Wait. worked says whether the last
	// wake-up brought any work. If not, the events were spurious. After each spurious event
	// from the fifth in a row on, the port stays masked for 1 ms, then 2, doubling up to
	// 1 s, or until some wake-up brings work, so that a peer's event storm costs the peer.
	// Other ports, Wake and the deadline are never delayed.
	//
	// The error is ErrDeadlineExceeded or ErrClosed.
	Wait(deadline time.Time, worked bool) error

	// Wake makes the current Wait, or else the next one, return nil.
	Wake()

	// Close closes the open ports and ends Wait. It is idempotent.
	Close() error
}

// A Nudger is a Waiter whose Wait is woken by Go's scheduler. While goroutines keep all processors busy, the scheduler
// looks for events only every ten milliseconds.
type Nudger interface {
	Waiter

	// Nudge makes the current Wait look for events now. It is no event and no Wake: without an event Wait goes
	// on. Any goroutine may call it; after Close it does nothing.
	Nudge()
}

// A Port is our end of an event channel. Its methods may be called from any
// goroutine.
type Port interface {
	// ID returns the number with which the peer binds to the port.
	ID() PortID

	// Notify fires the other end (EVTCHNOP_send). A peer that is gone is no error:
	// xenstore tells whether it lives.
	Notify() error

	// Close closes the port. It is idempotent, and the peer does not notice it.
	Close() error
}

// A JoinedPort is a Port that knows whether another port is bound to it
// (EVTCHNOP_status). Linux's evtchn device does not tell.
type JoinedPort interface {
	Port

	// Joined reports whether a port is bound to this one.
	Joined() bool
}

// A Mapping is memory that this domain may use until Release: private pages, or pages of
// another domain.
type Mapping struct {
	shm.Memory
	release  func() error
	populate func([]byte) // nil: there is nothing to do
}

// NewMapping is for implementations of [Domain]. release runs at most once.
func NewMapping(m shm.Memory, release func() error) *Mapping {
	return &Mapping{Memory: m, release: release}
}

// NewReserved is NewMapping for private memory that is only reserved. populate makes the
// kernel back part of it with memory before its first use.
func NewReserved(m shm.Memory, populate func([]byte), release func() error) *Mapping {
	return &Mapping{Memory: m, release: release, populate: populate}
}

// Populate makes the kernel back n pages from page first on with memory, so that their
// first use causes no page faults. No goroutine may use them meanwhile. It is a hint.
func (m *Mapping) Populate(first, n int) {
	if m.populate != nil {
		m.populate(m.Slice(first, n).Bytes())
	}
}

// Release gives the memory back; it must not be used afterwards. Release is idempotent,
// but not safe for concurrent use.
func (m *Mapping) Release() error {
	m.Memory = shm.Memory{}
	return runOnce(&m.release)
}

// A Share is memory of ours that Peer may access through Refs, one per page.
type Share struct {
	shm.Memory
	Peer   DomID
	Access Access
	Refs   []GrantRef
	end    func() error
	owned  any
}

// NewShare is for implementations of [Domain]. end runs at most once.
func NewShare(m shm.Memory, peer DomID, access Access, refs []GrantRef, end func() error) *Share {
	return &Share{Memory: m, Peer: peer, Access: access, Refs: slices.Clip(refs), end: end}
}

// SetOwned keeps what an implementation of [HandoverDomain] knows of the Share.
func (s *Share) SetOwned(owned any) { s.owned = owned }

// Owned returns what SetOwned was given; nil after End.
func (s *Share) Owned() any { return s.owned }

// End ends the grants and frees the pages. It does not free a page that the peer still
// has mapped: it sets the page aside, possibly for ever, and returns [ErrInUse]. End is
// idempotent, but not safe for concurrent use.
func (s *Share) End() error {
	s.Memory, s.owned = shm.Memory{}, nil
	return runOnce(&s.end)
}

// runOnce calls *f unless it has been called.
func runOnce(f *func() error) error {
	run := *f
	*f = nil
	if run == nil {
		return nil
	}
	return run()
}

// An Area is one end of a copy: our own memory in Local, or, if Local is nil, the page
// that Dom granted as Ref, from byte Offset on.
type Area struct {
	Local  []byte
	Ref    GrantRef
	Dom    DomID
	Offset uint16
}

// A CopyOp copies Len bytes from Src to Dst. At least one of them is a grant. A grant's
// bytes do not leave its page, and Local has at least Len bytes.
type CopyOp struct {
	Src, Dst Area
	Len      uint32
	Status   Status // set by Copy
}

// Status is the result of one grant operation: 0, or one of the negative GNTST_ codes of
// xen/include/public/grant_table.h.
type Status int16

const (
	OK             Status = 0
	GeneralError   Status = -1
	BadDomain      Status = -2
	BadGntref      Status = -3
	BadHandle      Status = -4
	BadVirtAddr    Status = -5
	BadDevAddr     Status = -6
	NoDeviceSpace  Status = -7
	PermissionDeny Status = -8
	BadPage        Status = -9
	BadCopyArg     Status = -10
	AddressTooBig  Status = -11
	TryAgain       Status = -12
	NoSpace        Status = -13
)

var statusNames = [...]string{
	"okay", "general error", "bad domain", "bad grant reference", "bad handle",
	"bad virtual address", "bad device address", "no device space",
	"permission denied", "bad page", "copy crosses a page", "address too big",
	"try again", "out of space",
}

func (s Status) String() string {
	if s > 0 || int(-s) >= len(statusNames) {
		return fmt.Sprintf("grant status %d", int16(s))
	}
	return statusNames[-s]
}

// A GrantError is a grant that did not permit an operation.
type GrantError struct {
	Op     string // "map" or "copy"
	Dom    DomID  // the domain that granted, or was said to have granted
	Ref    GrantRef
	Status Status
}

func (e *GrantError) Error() string {
	return fmt.Sprintf("%s grant %d of domain %d: %v", e.Op, e.Ref, e.Dom, e.Status)
}

var (
	// ErrNoGrants is returned when the system's limit of granted pages is reached.
	ErrNoGrants = errors.New("no grants left")

	// ErrInUse is returned by Share.End while the peer still maps a page.
	ErrInUse = errors.New("the peer still uses a granted page")

	// ErrNoPort is returned by Bind when this domain may not bind to such a port.
	ErrNoPort = errors.New("no such event channel for this domain")

	// ErrNoPorts is returned when the domain has no event channel left.
	ErrNoPorts = errors.New("no event channels left")

	// ErrGrouped is returned by Group.Add for a Waiter that is in a Group already, or a tag
	// that another Waiter of the Group has.
	ErrGrouped = errors.New("the waiter, or its tag, is in a group already")

	// ErrNoDomain is returned when the peer does not exist.
	ErrNoDomain = errors.New("no such domain")
)
